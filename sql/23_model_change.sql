-- Changing the model of a collection. Its companion is a second collection on the same table, with the vectors of
-- the other model. It is filled and kept like any deferred collection, while searches use the first one. The switch
-- exchanges their names: one transaction, which searches see as any other. From then on the companion has the
-- previous vectors, still kept up to date, and the same switch leads back.

-- === Public functions ===

CREATE FUNCTION siamese.change_model(collection text, model text) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    main siamese.collections;
    companion text;
    companion_name text := collection || ' (next)';
    queued bigint;
BEGIN
    IF collection IS NULL OR model IS NULL THEN
        RAISE EXCEPTION '% is null', CASE WHEN collection IS NULL THEN 'collection' ELSE 'model' END
        USING ERRCODE = 'null_value_not_allowed';
    END IF;
    main := siamese._lock_builds(collection);
    IF main.companion_of IS NOT NULL THEN
        RAISE EXCEPTION 'collection "%" is a companion', collection
        USING ERRCODE = 'object_not_in_prerequisite_state',
            HINT = (SELECT format('Change the model of collection "%s".', c.name) FROM siamese.collections AS c
                WHERE c.collection_id = main.companion_of);
    END IF;
    SELECT c.name INTO companion FROM siamese.collections AS c WHERE c.companion_of = main.collection_id;
    IF FOUND THEN
        RAISE EXCEPTION 'collection "%" already has a companion', collection
        USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = format('Its name is "%s".', companion),
            HINT = 'Switch to it with switch_model, or drop it with drop_collection.';
    END IF;
    IF siamese._model_id(nullif(model, '')) = main.model_id THEN
        RAISE EXCEPTION 'collection "%" already has this model', collection
        USING ERRCODE = 'invalid_parameter_value';
    END IF;
    queued := siamese.create_collection(
        companion_name, main.relation, main.key_column, main.image_column, model, main.on_error,
        embed => 'deferred',
        max_bytes => coalesce(main.max_bytes, -1), max_pixels => coalesce(main.max_pixels, -1),
        group_column => coalesce(main.group_column, ''), dicom_window => coalesce(main.dicom_window, ''),
        frames => main.frames);
    UPDATE siamese.collections AS c SET companion_of = main.collection_id WHERE c.name = companion_name;
    RETURN queued;
END
$$;
COMMENT ON FUNCTION siamese.change_model(text, text)
IS 'create a companion of another model; returns rows queued';

CREATE FUNCTION siamese.switch_model(collection text, keep_old boolean DEFAULT true) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    main siamese.collections;
    companion siamese.collections;
    previous text := collection || ' (previous)';
    number integer;
BEGIN
    IF collection IS NULL OR keep_old IS NULL THEN
        RAISE EXCEPTION '% is null', CASE WHEN collection IS NULL THEN 'collection' ELSE 'keep_old' END
        USING ERRCODE = 'null_value_not_allowed';
    END IF;
    -- What was committed after an older snapshot would be missing afterwards.
    IF current_setting('transaction_isolation') NOT LIKE 'read %' THEN
        RAISE EXCEPTION 'switch_model cannot run in a % transaction',
            upper(current_setting('transaction_isolation'))
        USING ERRCODE = 'active_sql_transaction', HINT = 'Use READ COMMITTED.';
    END IF;
    -- In the order of the rules of 22_collection_objects.sql: builds, views, the table.
    main := siamese._lock_builds(collection);
    SELECT c.* INTO companion FROM siamese.collections AS c WHERE c.companion_of = main.collection_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'collection "%" has no companion', collection
        USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'Create one with change_model.';
    END IF;
    IF EXISTS (
        SELECT FROM siamese.collections AS c WHERE c.name = previous AND c.collection_id <> companion.collection_id
    ) THEN
        RAISE EXCEPTION 'collection "%" already exists', previous
        USING ERRCODE = 'duplicate_object', HINT = 'The previous vectors get its name: rename or drop it.';
    END IF;
    IF main.generation IS NOT NULL AND companion.generation IS NULL THEN
        RAISE EXCEPTION 'collection "%" has no index', companion.name
        USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = 'Searches would be slow after the switch.', HINT = 'Call build_index for it.';
    END IF;
    PERFORM siamese._check_few_wait(companion);
    FOR number IN
        SELECT n.number FROM unnest(ARRAY[main.collection_id, companion.collection_id]) AS n (number) ORDER BY 1
    LOOP
        IF siamese._vectors_view(number) IS NOT NULL THEN
            EXECUTE format(
                'ALTER VIEW %s RENAME TO %I', siamese._vectors_view(number), format('vectors_%s_switching', number));
        END IF;
    END LOOP;
    -- At once, since two that hold weaker locks already would wait for each other. All others wait from here on.
    -- What a worker had begun with is stored, or free again.
    IF NOT siamese._lock_table(main.collection_id, 'ACCESS EXCLUSIVE') THEN
        RAISE EXCEPTION 'table of collection "%" no longer exists', collection
        USING ERRCODE = 'undefined_object', HINT = 'Drop the collection with drop_collection.';
    END IF;
    PERFORM siamese._queue_uncovered(main, companion);
    PERFORM siamese._check_few_wait(companion);
    PERFORM siamese.embed_pending(companion.name);
    PERFORM siamese._check_covered(main, companion);
    IF main.embed = 'sync' THEN
        PERFORM siamese._set_embed(companion.collection_id, 'sync');
        PERFORM siamese._set_embed(main.collection_id, 'deferred');
    END IF;
    -- One name at a time, and views follow.
    UPDATE siamese.collections AS c SET
        name = companion.name || ' (switching)', companion_of = NULL, on_error = m.on_error,
        max_bytes = m.max_bytes, max_pixels = m.max_pixels, group_column = m.group_column
    FROM siamese.collections AS m
    WHERE c.collection_id = companion.collection_id AND m.collection_id = main.collection_id;
    UPDATE siamese.collections AS c SET name = previous, companion_of = companion.collection_id
    WHERE c.collection_id = main.collection_id;
    UPDATE siamese.collections AS c SET name = collection WHERE c.collection_id = companion.collection_id;
    IF NOT keep_old THEN
        PERFORM siamese.drop_collection(previous);
    END IF;
END
$$;
COMMENT ON FUNCTION siamese.switch_model(text, boolean) IS 'exchange a collection with its companion';

-- === Private functions ===

CREATE FUNCTION siamese._lock_builds(name text) RETURNS siamese.collections
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    main siamese.collections;
    numbers integer[];
    locked integer[];
    number integer;
BEGIN
    LOOP
        SELECT c.* INTO main FROM siamese.collections AS c WHERE c.name = _lock_builds.name;
        IF NOT FOUND THEN
            PERFORM siamese._unknown_collection(name);
        END IF;
        PERFORM siamese._check_owner(main.relation);
        numbers := ARRAY(
            SELECT c.collection_id FROM siamese.collections AS c
            WHERE main.collection_id IN (c.collection_id, c.companion_of) ORDER BY c.collection_id);
        -- It may have been changed while this waited.
        IF numbers = locked THEN
            RETURN main;
        END IF;
        FOREACH number IN ARRAY numbers LOOP
            PERFORM pg_advisory_xact_lock(hashtext('pg_siamese build'), number);
        END LOOP;
        locked := numbers;
    END LOOP;
END
$$;
COMMENT ON FUNCTION siamese._lock_builds(text) IS 'lock the builds of a collection and its companion';

CREATE FUNCTION siamese._queue_uncovered(main siamese.collections, companion siamese.collections) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    keys text[];
BEGIN
    -- Rows that a backfill mended, after changes without triggers: their image is another one, or they are new.
    EXECUTE format($sql$
        SELECT array_agg(DISTINCT m.key::text)
        FROM siamese.embedding_%1$s AS m INNER JOIN siamese.embedding_%2$s AS e ON e.key = m.key
        WHERE e.image_hash <> m.image_hash
        $sql$, main.collection_id, companion.collection_id)
    INTO keys;
    IF keys IS NOT NULL THEN
        PERFORM siamese._forget_vectors(companion.collection_id, keys);
    END IF;
    EXECUTE format($sql$
        SELECT array_agg(DISTINCT m.key::text) FROM siamese.embedding_%1$s AS m
        WHERE NOT EXISTS (SELECT FROM siamese.embedding_%2$s AS e WHERE e.key = m.key)
            AND NOT EXISTS (
                SELECT FROM siamese.queue_%2$s AS q CROSS JOIN unnest(q.keys) AS u (key) WHERE u.key = m.key)
        $sql$, main.collection_id, companion.collection_id)
    INTO keys;
    IF keys IS NOT NULL THEN
        PERFORM siamese._add_tickets(companion.collection_id, keys);
    END IF;
END
$$;
COMMENT ON FUNCTION siamese._queue_uncovered(siamese.collections, siamese.collections)
IS 'queue rows that a companion lacks';

CREATE FUNCTION siamese._check_few_wait(companion siamese.collections) RETURNS void
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    waiting bigint;
BEGIN
    EXECUTE format('SELECT sum(cardinality(q.keys)) FROM siamese.queue_%s AS q', companion.collection_id) INTO waiting;
    IF waiting > 500 THEN
        PERFORM siamese._refuse_switch(companion.name, waiting);
    END IF;
END
$$;
COMMENT ON FUNCTION siamese._check_few_wait(siamese.collections)
IS 'refuse a switch that would take long';

CREATE FUNCTION siamese._check_covered(main siamese.collections, companion siamese.collections) RETURNS void
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    missing bigint;
BEGIN
    -- A row that has failed in both has no vector to lose.
    EXECUTE format($sql$
        SELECT (SELECT coalesce(sum(cardinality(q.keys)), 0) FROM siamese.queue_%2$s AS q) + (
            SELECT count(*) FROM siamese.failures AS f
            WHERE f.collection_id = %2$s AND EXISTS (
                SELECT FROM siamese.embedding_%1$s AS m WHERE m.key = f.key::%3$s))
        $sql$, main.collection_id, companion.collection_id, main.key_type)
    INTO missing;
    IF missing > 0 THEN
        PERFORM siamese._refuse_switch(companion.name, missing);
    END IF;
END
$$;
COMMENT ON FUNCTION siamese._check_covered(siamese.collections, siamese.collections)
IS 'refuse a companion that lacks vectors';

CREATE FUNCTION siamese._refuse_switch(companion text, missing bigint) RETURNS void
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'collection "%" lacks the vectors of % rows', companion, missing
    USING ERRCODE = 'object_not_in_prerequisite_state',
        DETAIL = 'They are queued, or they have failed.',
        HINT = 'Let workers embed them, or call backfill for it. Failures are in siamese.embedding_failures.';
END
$$;
COMMENT ON FUNCTION siamese._refuse_switch(text, bigint) IS 'raise that a companion lacks vectors';

CREATE FUNCTION siamese._set_embed(collection_id integer, embed text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM siamese._drop_triggers(collection_id);
    UPDATE siamese.collections AS c SET embed = _set_embed.embed WHERE c.collection_id = _set_embed.collection_id;
    IF embed = 'deferred' THEN
        PERFORM siamese._create_queue(collection_id);
        PERFORM siamese._comment_on_tables(collection_id);
    ELSE
        EXECUTE format('DROP TABLE siamese.queue_%s', collection_id);
        EXECUTE format('DROP FUNCTION siamese._queue_insert_%s()', collection_id);
        DELETE FROM siamese.embedding_attempts AS a WHERE a.collection_id = _set_embed.collection_id;
    END IF;
    PERFORM siamese._create_triggers(collection_id);
END
$$;
COMMENT ON FUNCTION siamese._set_embed(integer, text) IS 'change when the images of a collection are embedded';
