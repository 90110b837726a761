-- What workers and embed_pending call: take tickets, read their images, store results, build the index if
-- needed. An image that crashes a worker must not do so permanently. A worker records what it begins over
-- another connection, which a crash doesn't roll back. Tickets that crash workers again and again are split,
-- taken one by one, and at last given up.

-- === Tickets ===

CREATE FUNCTION siamese._queued_collections()
RETURNS TABLE (collection_id integer, name text, model_id integer, sha256 text)
LANGUAGE plpgsql STABLE PARALLEL UNSAFE SECURITY DEFINER
-- A collection that somebody is dropping must not hold up the others. Long enough for VACUUM, which gives way.
SET search_path = pg_catalog, pg_temp SET jit = off SET lock_timeout = '200ms'
AS $$
DECLARE
    has_tickets boolean;
BEGIN
    FOR collection_id, name, model_id, sha256 IN
        SELECT c.collection_id, c.name, c.model_id, m.sha256
        FROM siamese.collections AS c
        INNER JOIN siamese.models AS m USING (model_id)
        INNER JOIN pg_class AS r ON r.oid = c.relation::oid
        WHERE c.embed = 'deferred' ORDER BY c.collection_id
    LOOP
        BEGIN
            EXECUTE format($sql$
                SELECT EXISTS (SELECT FROM siamese.queue_%s AS q
                    WHERE q.not_before IS NULL OR q.not_before <= clock_timestamp())
                $sql$, collection_id)
            INTO has_tickets;
        EXCEPTION WHEN lock_not_available OR undefined_table THEN -- Being dropped, or dropped by now.
            has_tickets := false;
        END;
        IF has_tickets THEN
            RETURN NEXT;
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION siamese._queued_collections() IS 'collections with due tickets';

CREATE FUNCTION siamese._take_tickets(collection_id integer, max_rows integer)
RETURNS TABLE (ticket bigint, keys text[])
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off
AS $$
DECLARE
    space integer := max_rows;
    last bigint := 0;
    largest integer := 64;
    wanted integer;
    found integer;
    is_suspect boolean;
BEGIN
    -- The table's lock first: see the rules above. Of a collection that is gone, nothing is waiting.
    IF NOT siamese._lock_table(collection_id) THEN
        RETURN;
    END IF;
    PERFORM siamese._let_owner_read(collection_id, true);
    -- No more than needed, since others leave out what is locked here. So steps are small if tickets are
    -- large. What a worker may have died of comes alone, so that nothing else is suspected with it.
    LOOP
        wanted := greatest(1, space / largest);
        found := 0;
        largest := 1;
        FOR ticket, keys, is_suspect IN EXECUTE format($sql$
            SELECT q.ticket, q.keys::text[], EXISTS (
                SELECT FROM siamese.embedding_attempts AS a
                WHERE a.collection_id = %1$s AND a.ticket = q.ticket AND a.begun > 1)
            FROM siamese.queue_%1$s AS q
            WHERE q.ticket > $1 AND (q.not_before IS NULL OR q.not_before <= clock_timestamp())
            ORDER BY q.ticket LIMIT $2 FOR UPDATE OF q SKIP LOCKED
            $sql$, collection_id)
        USING last, wanted
        LOOP
            IF is_suspect AND last > 0 THEN
                RETURN;
            END IF;
            last := ticket;
            found := found + 1;
            largest := greatest(largest, cardinality(keys));
            space := space - cardinality(keys);
            RETURN NEXT;
            IF is_suspect THEN
                RETURN;
            END IF;
        END LOOP;
        EXIT WHEN found < wanted OR space <= 0;
    END LOOP;
END
$$;
COMMENT ON FUNCTION siamese._take_tickets(integer, integer)
IS 'lock tickets of about max_rows rows, skipping locked ones';

CREATE FUNCTION siamese._begin_tickets(collection_id integer, tickets bigint[]) RETURNS void
LANGUAGE sql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off
AS $$
INSERT INTO siamese.embedding_attempts AS a (collection_id, ticket)
SELECT _begin_tickets.collection_id, t.ticket FROM unnest(tickets) AS t (ticket)
ON CONFLICT (collection_id, ticket) DO UPDATE SET begun = a.begun + 1
$$;
COMMENT ON FUNCTION siamese._begin_tickets(integer, bigint[]) IS 'record the start of these tickets';

CREATE FUNCTION siamese._end_tickets(collection_id integer, tickets bigint[]) RETURNS void
LANGUAGE sql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off
AS $$
DELETE FROM siamese.embedding_attempts AS a
WHERE a.collection_id = _end_tickets.collection_id AND a.ticket = ANY(tickets)
$$;
COMMENT ON FUNCTION siamese._end_tickets(integer, bigint[]) IS 'clear the start of these tickets';

CREATE FUNCTION siamese._isolate_tickets(collection_id integer) RETURNS integer
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off
AS $$
DECLARE
    item record;
    given_up text[] := '{}';
    key_type text := (SELECT c.key_type FROM siamese.collections AS c
        WHERE c.collection_id = _isolate_tickets.collection_id);
BEGIN
    IF NOT EXISTS (
        SELECT FROM siamese.embedding_attempts AS a WHERE a.collection_id = _isolate_tickets.collection_id AND a.begun > 1
    ) THEN
        RETURN 0;
    END IF;
    IF NOT siamese._lock_table(collection_id) THEN
        RETURN 0;
    END IF;
    PERFORM siamese._let_owner_read(collection_id, true);
    EXECUTE format($sql$
        DELETE FROM siamese.embedding_attempts AS a WHERE a.collection_id = %1$s
            AND NOT EXISTS (SELECT FROM siamese.queue_%1$s AS q WHERE q.ticket = a.ticket)
        $sql$, collection_id);
    FOR item IN EXECUTE format($sql$
        SELECT q.ticket, q.keys::text[] AS keys, a.begun
        FROM siamese.queue_%1$s AS q INNER JOIN siamese.embedding_attempts AS a USING (ticket)
        WHERE a.collection_id = %1$s AND a.begun > 1 AND (cardinality(q.keys) > 1 OR a.begun > 3)
        FOR UPDATE OF q SKIP LOCKED
        $sql$, collection_id)
    LOOP
        IF cardinality(item.keys) > 1 THEN
            EXECUTE format($sql$
                WITH single AS (
                    INSERT INTO siamese.queue_%1$s (keys, attempts, not_before, last_error, queued_at)
                    SELECT ARRAY[k.key], q.attempts, q.not_before, q.last_error, q.queued_at
                    FROM siamese.queue_%1$s AS q CROSS JOIN unnest(q.keys) AS k (key) WHERE q.ticket = $1
                    RETURNING ticket)
                INSERT INTO siamese.embedding_attempts (collection_id, ticket, begun)
                SELECT %1$s, s.ticket, $2 FROM single AS s
                $sql$, collection_id)
            USING item.ticket, item.begun;
        ELSE
            given_up := given_up || item.keys;
        END IF;
        EXECUTE format('DELETE FROM siamese.queue_%s AS q WHERE q.ticket = $1', collection_id)
        USING item.ticket;
        PERFORM siamese._end_tickets(collection_id, ARRAY[item.ticket]);
    END LOOP;
    -- The row may be in other tickets as well. One that nobody has died with is of an image that came later.
    EXECUTE format($sql$
        DELETE FROM siamese.queue_%1$s AS q USING siamese.embedding_attempts AS a
        WHERE a.collection_id = %1$s AND a.ticket = q.ticket AND a.begun > 1 AND q.keys::text[] <@ $1
        $sql$, collection_id)
    USING given_up;
    DELETE FROM siamese.failures AS f
    WHERE f.collection_id = _isolate_tickets.collection_id AND f.key = ANY(given_up);
    EXECUTE format($sql$
        INSERT INTO siamese.failures (collection_id, key, sqlstate, message)
        SELECT %1$s, p.key::text, '58000', 'workers crashed each time they embedded this row'
        FROM siamese._present_%1$s($1::%2$s[]) AS p (key) ORDER BY p.key
        ON CONFLICT (collection_id, key) DO NOTHING
        $sql$, collection_id, key_type)
    USING given_up;
    RETURN cardinality(given_up);
END
$$;
COMMENT ON FUNCTION siamese._isolate_tickets(integer) IS 'split or give up tickets that crash workers';

-- === Images and results ===

CREATE FUNCTION siamese._read_images(collection_id integer, keys text[])
RETURNS TABLE (key text, image bytea)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off
AS $$
DECLARE
    key_type text;
BEGIN
    SELECT c.key_type INTO STRICT key_type FROM siamese.collections AS c
    WHERE c.collection_id = _read_images.collection_id AND c.embed = 'deferred';
    RETURN QUERY EXECUTE format($sql$
        SELECT r.key::text, r.image FROM siamese._rows_%1$s(ARRAY(
            SELECT k.key FROM unnest($1::%2$s[]) AS k (key)
            WHERE NOT EXISTS (SELECT FROM siamese.embedding_%1$s AS e WHERE e.key = k.key))) AS r
        $sql$, collection_id, key_type)
    USING keys;
END
$$;
COMMENT ON FUNCTION siamese._read_images(integer, text[]) IS 'images of queued rows without a vector';

CREATE TYPE siamese.embedding_result AS (
    key text, digest bytea, embedding text, sqlstate text, message text, may_retry boolean, frame integer,
    representative boolean
);
COMMENT ON TYPE siamese.embedding_result IS 'vector of a row or frame, or failure';

CREATE FUNCTION siamese._store_vectors(
    collection_id integer,
    model_sha256 text,
    tickets bigint[],
    seen text[],
    results siamese.embedding_result[]
) RETURNS integer
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off
AS $$
DECLARE
    collection record;
    -- Of several frames, one stands for the row.
    keys text[] := ARRAY(SELECT r.key FROM unnest(results) AS r WHERE r.representative IS NOT FALSE);
    unchanged text[];
    done text[];
    stored integer;
BEGIN
    SELECT c.key_type, quote_ident(n.nspname) || '.vector' AS vector_type,
        CASE c.frames WHEN 'all' THEN ', frame' ELSE '' END AS frame,
        CASE c.frames WHEN 'all' THEN ', representative' ELSE '' END AS representative
    INTO collection
    FROM siamese.collections AS c
    INNER JOIN siamese.models AS m USING (model_id)
    CROSS JOIN pg_extension AS e
    INNER JOIN pg_namespace AS n ON e.extnamespace = n.oid
    WHERE c.collection_id = _store_vectors.collection_id AND m.sha256 = model_sha256
        AND c.embed = 'deferred' AND e.extname = 'vector';
    IF NOT FOUND THEN
        RAISE EXCEPTION 'vectors are not of the model of collection %', collection_id
        USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    EXECUTE format($sql$
        SELECT coalesce(array_agg(r.key::text), '{}')
        FROM siamese._locked_rows_%s($1::%s[]) AS r
        INNER JOIN unnest($2) AS g ON r.key::text = g.key
        WHERE g.representative IS NOT FALSE AND sha256(r.image) IS NOT DISTINCT FROM g.digest
        $sql$, collection_id, collection.key_type)
    INTO unchanged USING keys, results;
    EXECUTE format($sql$
        WITH added AS (
            INSERT INTO siamese.embedding_%1$s (key, embedding, image_hash %4$s %5$s)
            SELECT g.key::%2$s, g.embedding::%3$s, substring(g.digest FROM 1 FOR 16) %4$s %5$s
            FROM unnest($1) AS g
            WHERE g.embedding IS NOT NULL AND g.key = ANY($2) ORDER BY g.key::%2$s %4$s
            ON CONFLICT (key %4$s) DO NOTHING RETURNING embedding_id %5$s
        ), noted AS (
            INSERT INTO siamese.pending_%1$s (embedding_id) SELECT embedding_id FROM added
        )
        SELECT count(*) FROM added %6$s
        $sql$, collection_id, collection.key_type, collection.vector_type, collection.frame,
        collection.representative, CASE WHEN collection.frame <> '' THEN 'WHERE representative' ELSE '' END)
    INTO stored USING results, unchanged;
    DELETE FROM siamese.failures AS f
    WHERE f.collection_id = _store_vectors.collection_id AND f.key = ANY(unchanged);
    -- Rows that failed for a reason that may pass come again in tickets of their own, up to five times.
    EXECUTE format($sql$
        WITH failed AS (
            SELECT g.key, g.sqlstate, g.message, q.queued_at, q.attempts + 1 AS attempts,
                g.may_retry IS TRUE AND q.attempts < 4 AS is_again
            FROM unnest($1) AS g
            CROSS JOIN LATERAL (
                SELECT max(q.attempts) AS attempts, min(q.queued_at) AS queued_at FROM siamese.queue_%1$s AS q
                WHERE q.ticket = ANY($3) AND g.key::%2$s = ANY(q.keys)) AS q
            WHERE g.embedding IS NULL AND g.key = ANY($2)
        ), again AS (
            INSERT INTO siamese.queue_%1$s (keys, attempts, not_before, last_error, queued_at)
            SELECT ARRAY[f.key::%2$s], f.attempts, clock_timestamp() + interval '2.5 s' * 4 ^ f.attempts,
                f.message, f.queued_at
            FROM failed AS f WHERE f.is_again
        )
        INSERT INTO siamese.failures (collection_id, key, sqlstate, message)
        SELECT %1$s, f.key, f.sqlstate, f.message FROM failed AS f WHERE NOT f.is_again ORDER BY f.key::%2$s
        -- Another worker may have met the row in another ticket.
        ON CONFLICT (collection_id, key) DO UPDATE
        SET sqlstate = excluded.sqlstate, message = excluded.message, failed_at = now()
        $sql$, collection_id, collection.key_type)
    USING results, unchanged, tickets;
    -- Done with are also rows that are gone, and those that have a vector by now. Others had the row locked,
    -- or changed its image: it keeps its ticket.
    done := unchanged || ARRAY(SELECT unnest(seen) EXCEPT SELECT unnest(keys));
    EXECUTE format($sql$
        DELETE FROM siamese.queue_%s AS q WHERE q.ticket = ANY($1)
            AND NOT EXISTS (SELECT FROM unnest(q.keys) AS k (key) WHERE k.key <> ALL($2::%s[]))
        $sql$, collection_id, collection.key_type)
    USING tickets, done;
    EXECUTE format($sql$
        UPDATE siamese.queue_%s AS q
        SET keys = ARRAY(SELECT unnest(q.keys) EXCEPT SELECT unnest($2::%s[])),
            not_before = CASE WHEN q.keys::text[] && $3 THEN clock_timestamp() + interval '1 s' END
        WHERE q.ticket = ANY($1)
        $sql$, collection_id, collection.key_type)
    USING tickets, done, ARRAY(SELECT unnest(keys) EXCEPT SELECT unnest(unchanged));
    PERFORM siamese._end_tickets(collection_id, tickets);
    INSERT INTO siamese.embedding_batches (collection_id, rows) VALUES (collection_id, stored);
    IF random() < 0.05 THEN
        DELETE FROM siamese.embedding_batches AS b WHERE b.batch_id = ANY(ARRAY(
            SELECT o.batch_id FROM siamese.embedding_batches AS o
            WHERE o.embedded_at < now() - interval '10 minutes' FOR UPDATE SKIP LOCKED));
    END IF;
    RETURN stored;
END
$$;
COMMENT ON FUNCTION siamese._store_vectors(integer, text, bigint[], text[], siamese.embedding_result[])
IS 'store results of unchanged images; returns rows stored';

-- === Index ===

CREATE FUNCTION siamese._build_if_needed(collection_id integer, max_pending bigint, max_dead real)
RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off
AS $$
DECLARE
    collection record;
    added bigint;
    deleted bigint;
BEGIN
    -- Who builds has it, and who drops the collection. So what is found after it stays.
    IF NOT pg_try_advisory_xact_lock(hashtext('pg_siamese build'), collection_id) THEN
        RETURN NULL;
    END IF;
    SELECT c.name, coalesce(g.rows, 0) AS indexed INTO collection
    FROM siamese.collections AS c
    INNER JOIN pg_class AS r ON r.oid = c.relation::oid
    LEFT JOIN siamese.generations AS g USING (generation)
    WHERE c.collection_id = _build_if_needed.collection_id;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    EXECUTE format($sql$
        SELECT count(*) FILTER (WHERE NOT p.deleted), count(*) FILTER (WHERE p.deleted)
        FROM siamese.pending_%s AS p
        $sql$, collection_id)
    INTO added, deleted;
    IF added >= max_pending OR (deleted > 0 AND deleted >= max_dead * collection.indexed) THEN
        RETURN siamese.build_index(collection.name);
    END IF;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION siamese._build_if_needed(integer, bigint, real)
IS 'build the index if enough vectors are pending or dead';
