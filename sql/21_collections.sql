-- Collections as administrators see them: create, alter, fill, renew and drop. The checks that these make are here,
-- too. What a collection consists of is in 22_collection_objects.sql.

-- === Public functions ===

CREATE FUNCTION siamese.create_collection(
    name text DEFAULT 'images',
    -- No table: the ready-made one. NULL is none of the defaults, since it is what to_regclass gives of a wrong name.
    relation regclass DEFAULT '-',
    key_column text DEFAULT '',
    image_column text DEFAULT 'image',
    model text DEFAULT '',
    on_error text DEFAULT 'reject',
    backfill boolean DEFAULT TRUE,
    embed text DEFAULT 'sync',
    max_bytes bigint DEFAULT -1,
    max_pixels bigint DEFAULT -1,
    group_column text DEFAULT '',
    dicom_window text DEFAULT '',
    frames text DEFAULT 'one'
) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
-- Types are compared by their names.
SET search_path = pg_catalog, pg_temp SET jit = off SET quote_all_identifiers = off
AS $$
DECLARE
    model_id integer;
    key_type text;
    collection_id integer;
    publication text;
    stray name;
    missing text;
BEGIN
    -- Rows that were committed after an older snapshot would get neither trigger nor backfill.
    IF current_setting('transaction_isolation') NOT LIKE 'read %' THEN
        RAISE EXCEPTION 'create_collection cannot run in a % transaction',
            upper(current_setting('transaction_isolation'))
        USING ERRCODE = 'active_sql_transaction', HINT = 'Use READ COMMITTED.';
    END IF;
    SELECT a.argument INTO missing FROM (VALUES
        ('name', name IS NULL), ('relation', relation IS NULL), ('key_column', key_column IS NULL),
        ('image_column', image_column IS NULL), ('model', model IS NULL), ('on_error', on_error IS NULL),
        ('backfill', backfill IS NULL), ('embed', embed IS NULL), ('max_bytes', max_bytes IS NULL),
        ('max_pixels', max_pixels IS NULL), ('group_column', group_column IS NULL),
        ('dicom_window', dicom_window IS NULL), ('frames', frames IS NULL)) AS a (argument, is_null)
    WHERE a.is_null LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION '% is null', missing
        USING ERRCODE = 'null_value_not_allowed', HINT = 'Leave the argument out for its default.';
    END IF;
    IF name = '' THEN
        RAISE EXCEPTION 'a collection must have a name' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    PERFORM siamese._check_settings(on_error, max_bytes, max_pixels);
    IF embed NOT IN ('sync', 'deferred') THEN
        RAISE EXCEPTION 'invalid value for "embed": "%"', embed
        USING ERRCODE = 'invalid_parameter_value', HINT = 'Use "sync" or "deferred".';
    END IF;
    IF dicom_window <> '' THEN
        PERFORM siamese._raise(siamese._check_window(dicom_window));
    END IF;
    IF frames NOT IN ('one', 'all') THEN
        RAISE EXCEPTION 'invalid value for "frames": "%"', frames
        USING ERRCODE = 'invalid_parameter_value', HINT = 'Use "one" or "all".';
    END IF;
    -- Two that create one by the same name come one after the other, even if both make siamese.images.
    PERFORM pg_advisory_xact_lock(hashtext('pg_siamese create'), hashtext(name));
    IF EXISTS (SELECT FROM siamese.collections AS c WHERE c.name = create_collection.name) THEN
        RAISE EXCEPTION 'collection "%" already exists', name
        USING ERRCODE = 'duplicate_object',
            HINT = CASE WHEN NOT EXISTS (
                SELECT FROM siamese.collections AS c INNER JOIN pg_class AS t ON t.oid = c.relation::oid
                WHERE c.name = create_collection.name)
                THEN 'Its table was dropped: drop it, too, with drop_collection.'
                ELSE 'Choose another name, or drop it with drop_collection.' END;
    END IF;
    PERFORM siamese._check_local();
    model_id := siamese._model_id(nullif(model, ''));
    IF relation::oid = 0 THEN
        relation := siamese._create_images_table();
    ELSE
        PERFORM siamese._check_owner(relation);
    END IF;
    PERFORM siamese._check_relation(relation, image_column);
    -- What triggers need. Now, so that the table stays what the checks find from here on.
    IF NOT siamese._lock_relation(relation, 'SHARE ROW EXCLUSIVE') THEN
        RAISE EXCEPTION 'table with OID % does not exist', relation::oid USING ERRCODE = 'undefined_table';
    END IF;
    PERFORM siamese._check_relation(relation, image_column);
    IF key_column = '' THEN
        SELECT a.attname INTO key_column
        FROM pg_index AS i INNER JOIN pg_attribute AS a ON i.indrelid = a.attrelid AND i.indkey[0] = a.attnum
        WHERE i.indrelid = relation AND i.indisprimary AND i.indnkeyatts = 1;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'table % has no primary key of one column', relation
            USING ERRCODE = 'invalid_table_definition', HINT = 'Name a unique column as key_column.';
        END IF;
    END IF;
    key_type := siamese._key_type(relation, key_column);
    PERFORM siamese._check_group_column(relation, group_column);
    -- Triggers that a copy of another collection's table has brought along.
    FOR stray IN
        SELECT t.name FROM siamese._triggers() AS t
        WHERE t.relation = create_collection.relation AND NOT EXISTS (
            SELECT FROM siamese.collections AS c
            WHERE c.collection_id = t.collection_id AND c.relation::oid = t.relation::oid)
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', stray, relation);
    END LOOP;
    SELECT p.pubname INTO publication FROM pg_publication AS p
    WHERE p.puballtables OR EXISTS (
        SELECT FROM pg_publication_namespace AS n
        WHERE n.pnpubid = p.oid AND n.pnnspid = 'siamese'::regnamespace)
    LIMIT 1;
    IF FOUND THEN
        RAISE WARNING 'publication "%" holds the tables of collection "%"', publication, name
        USING DETAIL = 'Subscribers that do not have these tables stop at the collection''s first row.',
            HINT = 'Publish the tables of images by name instead of all tables.';
    END IF;
    BEGIN
        INSERT INTO siamese.collections AS c
            (name, relation, key_column, key_type, image_column, model_id, on_error, embed, max_bytes, max_pixels,
            group_column, dicom_window, frames)
        VALUES (
            name, relation, key_column, key_type, image_column, model_id, on_error, embed,
            nullif(max_bytes, -1), nullif(max_pixels, -1), nullif(group_column, ''), nullif(dicom_window, ''), frames)
        RETURNING c.collection_id INTO collection_id;
    EXCEPTION WHEN foreign_key_violation THEN
        -- The model was dropped meanwhile: look again, and say so.
        model_id := siamese._model_id(nullif(model, ''));
        RAISE;
    END;
    PERFORM siamese._create_vector_tables(collection_id);
    IF NOT backfill THEN
        RETURN 0;
    END IF;
    IF embed = 'deferred' THEN
        RETURN siamese._queue_missing(collection_id);
    END IF;
    RETURN siamese.backfill(name);
END
$$;
COMMENT ON FUNCTION siamese.create_collection(
    text, regclass, text, text, text, text, boolean, text, bigint, bigint, text, text, text
) IS 'create a collection; returns rows embedded or queued';

CREATE FUNCTION siamese.alter_collection(
    name text,
    on_error text DEFAULT NULL,
    max_bytes bigint DEFAULT NULL,
    max_pixels bigint DEFAULT NULL,
    group_column text DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    relation regclass;
BEGIN
    SELECT c.relation INTO relation FROM siamese.collections AS c WHERE c.name = alter_collection.name;
    IF NOT FOUND THEN
        PERFORM siamese._unknown_collection(name);
    END IF;
    PERFORM siamese._check_owner(relation);
    PERFORM siamese._check_settings(on_error, max_bytes, max_pixels);
    PERFORM siamese._check_group_column(relation, group_column);
    UPDATE siamese.collections AS c SET
        on_error = coalesce(alter_collection.on_error, c.on_error),
        max_bytes = nullif(coalesce(alter_collection.max_bytes, c.max_bytes), -1),
        max_pixels = nullif(coalesce(alter_collection.max_pixels, c.max_pixels), -1),
        group_column = nullif(coalesce(alter_collection.group_column, c.group_column::text), '')
    WHERE c.name = alter_collection.name;
    -- Dropped while this waited.
    IF NOT FOUND THEN
        PERFORM siamese._unknown_collection(name);
    END IF;
END
$$;
COMMENT ON FUNCTION siamese.alter_collection(text, text, bigint, bigint, text)
IS 'change settings; -1 means the model''s limit';

CREATE FUNCTION siamese.drop_collection(name text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
-- What is not there is no news.
SET search_path = pg_catalog, pg_temp SET client_min_messages = warning
AS $$
DECLARE
    collection siamese.collections;
    companion text;
BEGIN
    SELECT c.* INTO collection FROM siamese.collections AS c WHERE c.name = drop_collection.name;
    IF NOT FOUND THEN
        PERFORM siamese._unknown_collection(name);
    END IF;
    PERFORM siamese._check_owner(collection.relation);
    -- In the order of the rules above. A build may take minutes, in which the table is free for others.
    PERFORM pg_advisory_xact_lock(hashtext('pg_siamese build'), collection.collection_id);
    PERFORM FROM siamese.collections AS c
    WHERE c.collection_id = collection.collection_id AND c.name = drop_collection.name FOR KEY SHARE;
    -- Dropped or renamed while this waited.
    IF NOT FOUND THEN
        PERFORM siamese._unknown_collection(name);
    END IF;
    SELECT c.name INTO companion FROM siamese.collections AS c
    WHERE c.companion_of = collection.collection_id;
    IF FOUND THEN
        RAISE EXCEPTION 'cannot drop collection "%" because it has a companion', name
        USING ERRCODE = 'dependent_objects_still_exist', HINT = format('Drop collection "%s" first.', companion);
    END IF;
    PERFORM siamese._drop_vectors_view(collection.collection_id);
    PERFORM siamese._lock_relation(collection.relation, 'ACCESS EXCLUSIVE');
    PERFORM siamese._drop_triggers(collection.collection_id);
    PERFORM siamese._drop_objects(collection.collection_id);
    DELETE FROM siamese.embedding_batches AS b WHERE b.collection_id = collection.collection_id;
    DELETE FROM siamese.embedding_attempts AS a WHERE a.collection_id = collection.collection_id;
    DELETE FROM siamese.collections AS c WHERE c.collection_id = collection.collection_id;
END
$$;
COMMENT ON FUNCTION siamese.drop_collection(text) IS 'drop a collection; the table stays';

CREATE FUNCTION siamese.backfill(collection text DEFAULT 'images', max_rows bigint DEFAULT 9223372036854775807)
RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer text[] := siamese._backfill(collection, max_rows);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN answer[2];
END
$$;
COMMENT ON FUNCTION siamese.backfill(text, bigint) IS 'embed rows without a vector; returns how many';

CREATE FUNCTION siamese.renew_collections() RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    number integer;
BEGIN
    FOR number IN SELECT c.collection_id FROM siamese.collections AS c ORDER BY c.collection_id LOOP
        PERFORM siamese._renew_collection(number);
    END LOOP;
END
$$;
COMMENT ON FUNCTION siamese.renew_collections() IS 'update the objects of all collections';

-- === Private functions: checks ===

CREATE FUNCTION siamese._check_settings(on_error text, max_bytes bigint, max_pixels bigint) RETURNS void
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF on_error NOT IN ('reject', 'quarantine') THEN
        RAISE EXCEPTION 'invalid value for "on_error": "%"', on_error
        USING ERRCODE = 'invalid_parameter_value', HINT = 'Use "reject" or "quarantine".';
    END IF;
    -- PostgreSQL's own limit of a value.
    IF max_bytes <> -1 AND max_bytes NOT BETWEEN 1 AND 1073741823 THEN
        RAISE EXCEPTION 'max_bytes must be between 1 and 1073741823, or -1 for the model''s limit'
        USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF max_pixels <> -1 AND max_pixels NOT BETWEEN 1 AND 65535 * 65535::bigint THEN
        RAISE EXCEPTION 'max_pixels must be between 1 and 4294836225, or -1 for the model''s limit'
        USING ERRCODE = 'invalid_parameter_value';
    END IF;
END
$$;
COMMENT ON FUNCTION siamese._check_settings(text, bigint, bigint) IS 'check settings of a collection';

CREATE FUNCTION siamese._check_group_column(relation regclass, group_column text) RETURNS void
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF group_column <> '' AND NOT EXISTS (
        SELECT FROM pg_attribute AS a
        WHERE a.attrelid = relation AND a.attname = group_column AND a.attnum > 0 AND NOT a.attisdropped
    ) THEN
        RAISE EXCEPTION 'column "%" of table % does not exist', group_column, relation
        USING ERRCODE = 'undefined_column', HINT = 'Name a column of the table as group_column, or "" for none.';
    END IF;
END
$$;
COMMENT ON FUNCTION siamese._check_group_column(regclass, text) IS 'check that a group column exists';

CREATE FUNCTION siamese._check_window(dicom_window text) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].check_window(plpy, dicom_window)
$python$;
COMMENT ON FUNCTION siamese._check_window(text) IS 'error of an unknown window, if it is one';

CREATE FUNCTION siamese._check_owner(relation regclass) RETURNS void
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    owner oid;
BEGIN
    SELECT c.relowner INTO owner FROM pg_class AS c WHERE c.oid = relation;
    -- A table that is gone has no owner to ask. The ready-made one is every administrator's.
    IF owner IS NOT NULL AND relation IS DISTINCT FROM to_regclass('siamese.images')
        AND NOT pg_has_role(siamese._caller(), owner, 'USAGE') THEN
        RAISE EXCEPTION 'must be owner of table %', relation USING ERRCODE = 'insufficient_privilege';
    END IF;
END
$$;
COMMENT ON FUNCTION siamese._check_owner(regclass) IS 'refuse a caller who does not own the table';

CREATE FUNCTION siamese._check_local() RETURNS void
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Numbers drawn here would meet those that come from the publisher, and end the replication.
    IF EXISTS (
        SELECT FROM pg_subscription_rel AS s
        WHERE s.srrelid IN ('siamese.collections'::regclass, 'siamese.generations'::regclass)
    ) THEN
        RAISE EXCEPTION 'tables of schema siamese are replicated into this database'
        USING ERRCODE = 'object_not_in_prerequisite_state',
            DETAIL = 'A subscription brings collections and index generations from the publisher.',
            HINT = 'Publish the tables of images by name instead of all tables, and refresh the subscription (docs/operations.md).';
    END IF;
END
$$;
COMMENT ON FUNCTION siamese._check_local() IS 'refuse a subscriber''s database';

CREATE FUNCTION siamese._check_relation(relation regclass, image_column text) RETURNS void
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    obstacle record;
    attribute pg_attribute;
BEGIN
    SELECT o.* INTO obstacle FROM siamese._obstacle(relation) AS o;
    IF obstacle.kind IS NOT NULL THEN
        RAISE EXCEPTION '% % cannot be a collection', obstacle.kind, relation
        USING ERRCODE = 'feature_not_supported',
            DETAIL = 'A collection is an ordinary, permanent table without partitions or inheritance, whose owner sees all rows.',
            HINT = obstacle.hint;
    END IF;
    SELECT a.* INTO attribute FROM pg_attribute AS a
    WHERE a.attrelid = relation AND a.attname = image_column AND a.attnum > 0 AND NOT a.attisdropped;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'column "%" of table % does not exist', image_column, relation
        USING ERRCODE = 'undefined_column';
    END IF;
    IF attribute.atttypid <> 'bytea'::regtype THEN
        RAISE EXCEPTION 'image column "%" has type %, not bytea', image_column,
            format_type(attribute.atttypid, attribute.atttypmod)
        USING ERRCODE = 'datatype_mismatch';
    END IF;
    -- From PostgreSQL 18 on: triggers see no value, and no UPDATE that changes it.
    IF attribute.attgenerated = 'v' THEN
        RAISE EXCEPTION 'image column "%" is a virtual generated column', image_column
        USING ERRCODE = 'feature_not_supported', HINT = 'Make it a stored one (STORED).';
    END IF;
END
$$;
COMMENT ON FUNCTION siamese._check_relation(regclass, text) IS 'check a table and its image column';

CREATE FUNCTION siamese._obstacle(relation regclass, OUT kind text, OUT hint text)
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    class pg_class;
    parent regclass;
    child regclass;
BEGIN
    SELECT c.* INTO class FROM pg_class AS c WHERE c.oid = relation;
    SELECT i.inhparent INTO parent FROM pg_inherits AS i WHERE i.inhrelid = relation LIMIT 1;
    SELECT i.inhrelid INTO child FROM pg_inherits AS i WHERE i.inhparent = relation LIMIT 1;
    CASE
    WHEN class.relkind = 'p' THEN
        kind := 'partitioned table';
        hint := 'Keep the images in an ordinary table that the rows of this one refer to.';
    WHEN class.relkind IN ('v', 'm') THEN
        kind := CASE class.relkind WHEN 'v' THEN 'view' ELSE 'materialized view' END;
        hint := 'Create the collection on the table that holds the images, and join searches with the view.';
    WHEN class.relkind = 'f' THEN
        kind := 'foreign table';
        hint := 'Copy its rows into an ordinary table, or create the collection on the server that has them.';
    WHEN class.relkind <> 'r' THEN
        kind := 'relation';
        hint := 'Name a table.';
    WHEN class.relpersistence = 't' THEN
        kind := 'temporary table';
        hint := 'Copy its rows into a permanent table.';
    WHEN class.relpersistence = 'u' THEN
        kind := 'unlogged table';
        hint := format('Run ALTER TABLE %s SET LOGGED.', relation);
    WHEN class.relispartition THEN
        kind := 'partition';
        hint := format('Run ALTER TABLE %s DETACH PARTITION %s, or keep the images in an ordinary table.', parent, relation);
    WHEN parent IS NOT NULL THEN
        kind := 'child table';
        hint := format('Run ALTER TABLE %s NO INHERIT %s.', relation, parent);
    WHEN child IS NOT NULL THEN
        kind := 'parent table';
        hint := format('Run ALTER TABLE %s NO INHERIT %s for each child.', child, relation);
    WHEN class.relforcerowsecurity THEN
        kind := 'table with forced row-level security';
        hint := format('Run ALTER TABLE %s NO FORCE ROW LEVEL SECURITY: its owner must see all rows.', relation);
    ELSE
        NULL;
    END CASE;
END
$$;
COMMENT ON FUNCTION siamese._obstacle(regclass) IS 'why a table cannot be a collection';

CREATE FUNCTION siamese._key_type(relation regclass, column_name text) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    attribute pg_attribute;
    type_name text;
    constraint_name text;
BEGIN
    SELECT a.* INTO attribute FROM pg_attribute AS a
    WHERE a.attrelid = relation AND a.attname = column_name AND a.attnum > 0 AND NOT a.attisdropped;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'column "%" of table % does not exist', column_name, relation
        USING ERRCODE = 'undefined_column';
    END IF;
    type_name := siamese._compared_type(attribute.atttypid);
    IF type_name IS NULL THEN
        RAISE EXCEPTION 'key column "%" has type %', column_name,
            format_type(attribute.atttypid, attribute.atttypmod)
        USING ERRCODE = 'feature_not_supported',
            HINT = 'Keys of type smallint, integer, bigint, uuid, text and varchar, and of domains over these, are supported.';
    END IF;
    IF EXISTS (
        SELECT FROM pg_collation AS l WHERE l.oid = attribute.attcollation AND NOT l.collisdeterministic
    ) THEN
        RAISE EXCEPTION 'key column "%" has a nondeterministic collation', column_name
        USING ERRCODE = 'feature_not_supported';
    END IF;
    -- From PostgreSQL 18 on, NOT NULL may be NOT VALID: rows from before may hold NULL.
    SELECT k.conname INTO constraint_name FROM pg_constraint AS k
    WHERE k.conrelid = relation AND k.contype = 'n' AND k.conkey = ARRAY[attribute.attnum] AND NOT k.convalidated;
    IF FOUND THEN
        RAISE EXCEPTION 'column "%" of table % is not a key', column_name, relation
        USING ERRCODE = 'invalid_table_definition',
            DETAIL = format('Its constraint "%s" is NOT VALID, so rows may hold NULL.', constraint_name),
            HINT = format('Run ALTER TABLE %s VALIDATE CONSTRAINT %I.', relation, constraint_name);
    END IF;
    IF NOT attribute.attnotnull OR NOT EXISTS (
        SELECT FROM pg_index AS i
        WHERE i.indrelid = relation AND i.indisunique AND i.indisvalid AND i.indimmediate
            AND i.indpred IS NULL AND i.indnkeyatts = 1 AND i.indkey[0] = attribute.attnum
    ) THEN
        RAISE EXCEPTION 'column "%" of table % is not a key', column_name, relation
        USING ERRCODE = 'invalid_table_definition',
            DETAIL = 'It must be NOT NULL, with a unique index or primary key on it alone that is not deferrable.';
    END IF;
    RETURN type_name;
END
$$;
COMMENT ON FUNCTION siamese._key_type(regclass, text) IS 'check a key column and return its type';

CREATE FUNCTION siamese._compared_type(type oid) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    base oid := type;
    known text;
BEGIN
    LOOP
        -- Each is compared with the type that it is mapped to by indexable operators of pg_catalog.
        known := CASE base
            WHEN 'int2'::regtype THEN 'integer' WHEN 'int4'::regtype THEN 'integer'
            WHEN 'int8'::regtype THEN 'bigint' WHEN 'uuid'::regtype THEN 'uuid'
            WHEN 'text'::regtype THEN 'text' WHEN 'varchar'::regtype THEN 'text' END;
        EXIT WHEN known IS NOT NULL;
        SELECT t.typbasetype INTO base FROM pg_type AS t WHERE t.oid = base AND t.typtype = 'd';
        EXIT WHEN NOT FOUND;
    END LOOP;
    RETURN known;
END
$$;
COMMENT ON FUNCTION siamese._compared_type(oid) IS 'type that keys are compared as, or NULL';

-- === Private functions: steps ===

CREATE FUNCTION siamese._create_images_table() RETURNS regclass
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    role text;
BEGIN
    IF to_regclass('siamese.images') IS NOT NULL THEN
        RETURN 'siamese.images'::regclass;
    END IF;
    -- Not part of the extension: its rows are the user's, and dumps take it whole.
    CREATE TABLE siamese.images (
        image_id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
        image bytea NOT NULL,
        dataset text,
        split text,
        label text,
        source text,
        inserted_at timestamptz NOT NULL DEFAULT pg_catalog.now()
    );
    CREATE INDEX images_dataset_split_idx ON siamese.images (dataset, split);
    COMMENT ON TABLE siamese.images IS 'ready-made table of images';
    COMMENT ON COLUMN siamese.images.image IS 'the image file';
    COMMENT ON COLUMN siamese.images.source IS 'where the image came from';
    FOR role IN SELECT siamese._grantees('siamese.build_index') LOOP
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON siamese.images TO %I', role);
    END LOOP;
    FOR role IN SELECT siamese._grantees('siamese.image_distance') LOOP
        EXECUTE format('GRANT SELECT ON siamese.images TO %I', role);
    END LOOP;
    RETURN 'siamese.images'::regclass;
END
$$;
COMMENT ON FUNCTION siamese._create_images_table() IS 'create the ready-made table of images';

CREATE FUNCTION siamese._backfill(collection text, max_rows bigint) RETURNS text[]
LANGUAGE plpython3u VOLATILE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].backfill(plpy, collection, max_rows)
$python$;
COMMENT ON FUNCTION siamese._backfill(text, bigint) IS 'embed rows without a vector';

CREATE FUNCTION siamese._renew_collection(collection_id integer) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    collection siamese.collections;
    vectors regclass;
    signature text;
BEGIN
    -- No trigger or worker may be between two of the functions. Searches go on.
    IF NOT siamese._lock_table(collection_id, 'EXCLUSIVE') THEN
        -- Without its table, somebody may be dropping the collection all the same.
        PERFORM pg_advisory_xact_lock(hashtext('pg_siamese build'), collection_id);
    END IF;
    SELECT c.* INTO collection FROM siamese.collections AS c
    WHERE c.collection_id = _renew_collection.collection_id;
    vectors := to_regclass(format('siamese.embedding_%s', collection_id));
    IF NOT FOUND OR vectors IS NULL THEN
        RETURN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = vectors AND a.attname = 'image_hash') THEN
        EXECUTE format('ALTER TABLE %s ADD COLUMN image_hash bytea', vectors);
    END IF;
    PERFORM siamese._comment_on_tables(collection_id);
    -- A table that is gone has no triggers, and nothing to read.
    IF NOT EXISTS (SELECT FROM pg_class AS t WHERE t.oid = collection.relation::oid) THEN
        RETURN;
    END IF;
    FOR signature IN
        SELECT p.oid::regprocedure FROM pg_proc AS p
        WHERE p.pronamespace = 'siamese'::regnamespace
            AND p.proname::text = ANY(siamese._row_function_names(collection_id))
    LOOP
        EXECUTE format('DROP FUNCTION %s', signature);
    END LOOP;
    PERFORM siamese._create_row_functions(collection_id);
    IF NOT EXISTS (
        SELECT FROM pg_trigger AS t WHERE t.tgrelid = collection.relation
            AND t.tgname = format('pg_siamese_%s_change', collection_id)) THEN
        PERFORM siamese._create_change_trigger(collection_id);
    END IF;
    IF collection.embed = 'deferred' THEN
        PERFORM siamese._create_insert_trigger(collection_id);
    END IF;
END
$$;
COMMENT ON FUNCTION siamese._renew_collection(integer) IS 'update a collection''s objects';

CREATE FUNCTION siamese._unknown_collection(name text) RETURNS void
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer text[];
BEGIN
    IF name IS NULL THEN
        RAISE EXCEPTION 'name is null' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    answer := siamese._near_collection(name);
    -- Collections can be dropped without the server package, which knows the hint.
    RAISE EXCEPTION 'collection "%" does not exist', name
    USING ERRCODE = 'undefined_object',
        HINT = CASE WHEN answer[1] IS NULL THEN answer[2] ELSE 'Collections are listed in siamese.collections.' END;
END
$$;
COMMENT ON FUNCTION siamese._unknown_collection(text) IS 'raise that a collection does not exist';

CREATE FUNCTION siamese._near_collection(name text) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].near_collection(plpy, name)
$python$;
COMMENT ON FUNCTION siamese._near_collection(text) IS 'hint on an unknown collection''s name';
