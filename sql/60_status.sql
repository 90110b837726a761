-- What monitoring reads: self_check and the views. Views need the functions that they name, so these come first.

-- === Public functions ===

CREATE FUNCTION siamese.self_check("full" boolean DEFAULT false) RETURNS TABLE (subject text, ok boolean, detail text)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer text[] := siamese._self_check("full");
BEGIN
    PERFORM siamese._raise(answer);
    RETURN QUERY SELECT u.* FROM unnest(answer[2]::text[], answer[3]::boolean[], answer[4]::text[]) AS u;
END
$$;
COMMENT ON FUNCTION siamese.self_check(boolean) IS 'check the installation; full: every vector, too';

-- === Private functions ===

CREATE FUNCTION siamese._self_check("full" boolean) RETURNS text[]
LANGUAGE plpython3u VOLATILE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].self_check(plpy, full)
$python$;
COMMENT ON FUNCTION siamese._self_check(boolean) IS 'check the installation';

CREATE FUNCTION siamese._may_see(relation oid) RETURNS boolean
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    -- A table that is gone has nothing to hide.
    SELECT coalesce(has_any_column_privilege(siamese._caller(), relation, 'SELECT'), true)
        OR has_function_privilege(siamese._caller(), 'siamese.drop_model'::regproc::oid, 'EXECUTE')
$$;
COMMENT ON FUNCTION siamese._may_see(oid) IS 'whether the caller may read a table or administer';

CREATE FUNCTION siamese._check_may_see(collection_id integer) RETURNS void
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    relation oid := (
        SELECT c.relation::oid FROM siamese.collections AS c WHERE c.collection_id = _check_may_see.collection_id);
BEGIN
    IF NOT siamese._may_see(relation) THEN
        RAISE EXCEPTION 'permission denied for table %', relation::regclass
        USING ERRCODE = 'insufficient_privilege';
    END IF;
END
$$;
COMMENT ON FUNCTION siamese._check_may_see(integer) IS 'refuse a caller who may not read the table';

CREATE FUNCTION siamese._collection_counts(collection_id integer)
RETURNS TABLE (rows_embedded bigint, pending bigint, dead bigint)
LANGUAGE plpgsql STABLE PARALLEL UNSAFE SECURITY DEFINER ROWS 1
SET search_path = pg_catalog, pg_temp SET jit = off
AS $$
BEGIN
    PERFORM siamese._check_may_see(collection_id);
    -- What is pending first, for the order of locks.
    RETURN QUERY EXECUTE format($sql$
        SELECT c.rows_embedded, c.pending, c.dead FROM (SELECT
            (SELECT count(*) FROM siamese.pending_%1$s AS p
                INNER JOIN siamese.embedding_%1$s AS e USING (embedding_id) WHERE NOT p.deleted) AS pending,
            (SELECT count(*) FROM siamese.embedding_%1$s) AS rows_embedded,
            (SELECT count(*) FROM siamese.pending_%1$s AS p WHERE p.deleted
                AND NOT EXISTS (SELECT FROM siamese.pending_%1$s AS a
                    WHERE a.embedding_id = p.embedding_id AND NOT a.deleted)) AS dead) AS c
        $sql$, collection_id);
EXCEPTION WHEN undefined_table THEN -- Dropped after this statement began: the others have their counts.
    RETURN NEXT;
END
$$;
COMMENT ON FUNCTION siamese._collection_counts(integer) IS 'counts for collection_status';

CREATE FUNCTION siamese._queue_counts(collection_id integer)
RETURNS TABLE (waiting bigint, retrying bigint, oldest_at timestamptz, rows_per_second real)
LANGUAGE plpgsql STABLE PARALLEL UNSAFE SECURITY DEFINER ROWS 1
SET search_path = pg_catalog, pg_temp SET jit = off
AS $$
BEGIN
    PERFORM siamese._check_may_see(collection_id);
    IF NOT EXISTS (
        SELECT FROM siamese.collections AS c
        WHERE c.collection_id = _queue_counts.collection_id AND c.embed = 'deferred'
    ) THEN
        waiting := 0;
        RETURN NEXT;
        RETURN;
    END IF;
    RETURN QUERY EXECUTE format($sql$
        SELECT coalesce(sum(cardinality(q.keys)), 0)::bigint,
            coalesce(sum(cardinality(q.keys)) FILTER (WHERE q.attempts > 0), 0)::bigint,
            min(q.queued_at),
            (SELECT coalesce(sum(b.rows), 0) / 60.0 FROM siamese.embedding_batches AS b
                WHERE b.collection_id = %1$s
                    AND b.embedded_at > clock_timestamp() - interval '1 minute')::real
        FROM siamese.queue_%1$s AS q
        $sql$, collection_id);
EXCEPTION WHEN undefined_table THEN -- Dropped after this statement began.
    RETURN NEXT;
END
$$;
COMMENT ON FUNCTION siamese._queue_counts(integer) IS 'counts for the status views';

CREATE FUNCTION siamese._generation_file(collection_id integer, generation bigint) RETURNS text
LANGUAGE plpgsql STABLE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer text[] := siamese._state_of_file(collection_id, generation);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN answer[2];
END
$$;
COMMENT ON FUNCTION siamese._generation_file(integer, bigint)
IS 'state of a generation''s file on this server';

CREATE FUNCTION siamese._state_of_file(collection_id integer, generation bigint) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].generation_file(plpy, collection_id, generation)
$python$;
COMMENT ON FUNCTION siamese._state_of_file(integer, bigint) IS 'state of a generation''s file';

CREATE FUNCTION siamese._progress()
RETURNS TABLE (
    collection text,
    kind text,
    phase text,
    done bigint,
    total bigint,
    started_at timestamptz,
    ends_at timestamptz,
    pid integer
)
LANGUAGE plpgsql STABLE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off
AS $$
DECLARE
    own_database oid := (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database());
    answer text[] := siamese._read_progress(own_database);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN QUERY
    WITH reported AS (
        -- What a killed backend left is not of a transaction that runs.
        SELECT e.collection, e.kind, e.phase, e.done, e.total, to_timestamp(e.started_at) AS started_at,
            to_timestamp(e.ends_at) AS ends_at, e.pid, e.relation::oid AS relation
        FROM jsonb_to_recordset(answer[2]::jsonb) AS e (
            collection text, kind text, phase text, done bigint, total bigint, started_at float8, ends_at float8,
            pid integer, relation bigint, transaction bigint)
        INNER JOIN pg_stat_activity AS a
            ON a.pid = e.pid AND (extract(epoch FROM a.xact_start) * 1000000)::bigint = e.transaction
    ), batch AS MATERIALIZED (
        -- A worker holds this lock during a batch. Others can take it, too, but they are no workers.
        SELECT c.collection_id, c.name, c.relation::oid AS relation, a.pid, a.xact_start, a.backend_start
        FROM pg_locks AS l
        INNER JOIN pg_stat_activity AS a ON l.pid = a.pid
        INNER JOIN siamese.collections AS c ON l.objid = c.collection_id::oid
        WHERE l.locktype = 'advisory' AND l.database = own_database AND l.objsubid = 2
            AND l.classid = hashtext('pg_siamese worker')::oid
            AND has_function_privilege(a.usesysid, 'siamese._take_tickets(integer, integer)', 'EXECUTE')
            AND siamese._may_see(c.relation)
    ), change AS MATERIALIZED (
        -- Rows wait for the new model before the switch, and for the previous one afterwards.
        SELECT o.collection_id, c.name, c.relation::oid AS relation, o.created_at
        FROM siamese.collections AS o
        INNER JOIN siamese.collections AS c ON o.companion_of = c.collection_id
        WHERE siamese._may_see(c.relation)
    ), work AS (
        SELECT r.* FROM reported AS r
        UNION ALL
        SELECT g.name, 'change_model', 'embedding', n.rows_embedded, n.rows_embedded + q.waiting, g.created_at,
            clock_timestamp() + q.waiting / nullif(q.rows_per_second, 0) * interval '1 s', NULL, g.relation
        FROM change AS g
        CROSS JOIN LATERAL siamese._queue_counts(g.collection_id) AS q
        CROSS JOIN LATERAL siamese._collection_counts(g.collection_id) AS n
        WHERE q.waiting > 0
        UNION ALL
        SELECT b.name, 'worker', 'embedding', d.rows, d.rows + q.waiting, least(b.xact_start, d.since),
            clock_timestamp() + q.waiting / nullif(q.rows_per_second, 0) * interval '1 s', b.pid, b.relation
        FROM batch AS b
        CROSS JOIN LATERAL siamese._queue_counts(b.collection_id) AS q
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(e.rows), 0) AS rows, min(e.embedded_at) AS since FROM siamese.embedding_batches AS e
            WHERE e.collection_id = b.collection_id AND e.pid = b.pid
                AND e.embedded_at > greatest(b.backend_start, clock_timestamp() - interval '10 minutes')) AS d
    ), visible AS (
        SELECT w.*, NOT t.relrowsecurity OR u.rolsuper OR u.rolbypassrls
            OR (pg_has_role(u.oid, t.relowner, 'USAGE') AND NOT t.relforcerowsecurity) AS is_open
        FROM work AS w
        -- A table that has not been committed is nobody else's business.
        INNER JOIN pg_class AS t ON w.relation = t.oid
        INNER JOIN pg_roles AS u ON u.rolname = siamese._caller()
        WHERE siamese._may_see(w.relation)
    )
    SELECT v.collection, v.kind, v.phase, CASE WHEN v.is_open THEN v.done END,
        CASE WHEN v.is_open THEN v.total END, v.started_at, CASE WHEN v.is_open THEN v.ends_at END, v.pid
    FROM visible AS v;
END
$$;
COMMENT ON FUNCTION siamese._progress() IS 'work under way that the caller may see';

CREATE FUNCTION siamese._read_progress(database oid) RETURNS text[]
LANGUAGE plpython3u VOLATILE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].progress(plpy, database)
$python$;
COMMENT ON FUNCTION siamese._read_progress(oid) IS 'what backends report of their work';

-- === Views ===

CREATE VIEW siamese.collection_status AS
SELECT
    c.name AS collection,
    c.relation,
    m.name AS model,
    m.dimension,
    c.on_error,
    n.rows_embedded,
    n.pending,
    n.dead,
    n.dead::real / nullif(g.rows, 0) AS dead_share,
    (
        SELECT pg_catalog.count(*) FROM siamese.failures AS f
        WHERE f.collection_id = c.collection_id
    ) AS failures,
    c.generation,
    g.rows AS rows_indexed,
    g.recall,
    g.built_at,
    siamese._generation_file(c.collection_id, c.generation) AS generation_file,
    c.embed,
    q.waiting,
    c.group_column,
    c.dicom_window
FROM siamese.collections AS c
INNER JOIN siamese.models AS m ON c.model_id = m.model_id
LEFT JOIN siamese.generations AS g ON c.generation = g.generation
CROSS JOIN LATERAL siamese._collection_counts(c.collection_id) AS n
CROSS JOIN LATERAL siamese._queue_counts(c.collection_id) AS q
WHERE siamese._may_see(c.relation::pg_catalog.oid);
COMMENT ON VIEW siamese.collection_status IS 'vectors, pending changes and index per collection';

CREATE VIEW siamese.index_generations AS
SELECT
    c.name AS collection,
    g.generation,
    coalesce(c.generation = g.generation, false) AS is_current,
    siamese._generation_file(c.collection_id, g.generation) AS generation_file,
    g.rows,
    g.vectors,
    g.index_type,
    g.m,
    g.ef_construction,
    g.ef_search_stored,
    g.ef_search,
    g.recall,
    g.bytes,
    g.seconds,
    g.built_at,
    g.ef_search_many
FROM siamese.generations AS g
INNER JOIN siamese.collections AS c ON g.collection_id = c.collection_id;
COMMENT ON VIEW siamese.index_generations IS 'index generations of all collections';

CREATE VIEW siamese.embedding_failures AS
SELECT c.name AS collection, f.key, f.sqlstate, f.message, f.failed_at
FROM siamese.failures AS f
INNER JOIN siamese.collections AS c ON f.collection_id = c.collection_id;
COMMENT ON VIEW siamese.embedding_failures IS 'rows that could not be embedded';

CREATE VIEW siamese.embedding_queue_status AS
SELECT
    c.name AS collection,
    q.waiting,
    pg_catalog.date_trunc('milliseconds', pg_catalog.clock_timestamp() - q.oldest_at) AS oldest_age,
    q.retrying,
    (
        SELECT pg_catalog.count(*) FROM siamese.failures AS f
        WHERE f.collection_id = c.collection_id
    ) AS failures,
    q.rows_per_second
FROM siamese.collections AS c
CROSS JOIN LATERAL siamese._queue_counts(c.collection_id) AS q
WHERE c.embed = 'deferred';
COMMENT ON VIEW siamese.embedding_queue_status IS 'queue length, retries and rate';

CREATE VIEW siamese.progress AS
SELECT p.collection, p.kind, p.phase, p.done, p.total, p.started_at, p.ends_at, p.pid
FROM siamese._progress() AS p;
COMMENT ON VIEW siamese.progress IS 'builds, backfills and workers under way';
