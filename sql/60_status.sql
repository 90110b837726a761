CREATE FUNCTION siamese._collection_counts(collection_id integer)
RETURNS TABLE (rows_embedded bigint, pending bigint, dead bigint)
LANGUAGE plpgsql STABLE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY EXECUTE format(
        'SELECT
            (SELECT count(*) FROM siamese.embedding_%1$s),
            (SELECT count(*) FROM siamese.pending_%1$s AS p
                INNER JOIN siamese.embedding_%1$s AS e USING (embedding_id) WHERE NOT p.deleted),
            (SELECT count(*) FROM siamese.pending_%1$s AS p WHERE p.deleted
                AND NOT EXISTS (SELECT FROM siamese.pending_%1$s AS a
                    WHERE a.embedding_id = p.embedding_id AND NOT a.deleted))', collection_id);
END
$$;
COMMENT ON FUNCTION siamese._collection_counts(integer) IS 'counts for the view collection_status';

CREATE FUNCTION siamese._generation_file(collection_id integer, generation bigint) RETURNS text
LANGUAGE plpython3u STABLE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].generation_file(plpy, collection_id, generation)
$python$;
COMMENT ON FUNCTION siamese._generation_file(integer, bigint)
IS 'whether a generation''s file is on this node: present, missing or not readable';

CREATE FUNCTION siamese._queue_counts(collection_id integer)
RETURNS TABLE (waiting bigint, retrying bigint, oldest_at timestamptz, rows_per_second real)
LANGUAGE plpgsql STABLE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM siamese.collections AS c
        WHERE c.collection_id = _queue_counts.collection_id AND c.embed = 'deferred'
    ) THEN
        waiting := 0;
        RETURN NEXT;
        RETURN;
    END IF;
    RETURN QUERY EXECUTE format(
        'SELECT coalesce(sum(cardinality(q.keys)), 0)::bigint,
            coalesce(sum(cardinality(q.keys)) FILTER (WHERE q.attempts > 0), 0)::bigint,
            min(q.queued_at),
            (SELECT coalesce(sum(b.rows), 0) / 60.0 FROM siamese.embedding_batches AS b
                WHERE b.collection_id = %1$s
                    AND b.embedded_at > clock_timestamp() - interval ''1 minute'')::real
        FROM siamese.queue_%1$s AS q', collection_id);
END
$$;
COMMENT ON FUNCTION siamese._queue_counts(integer)
IS 'counts for the views collection_status and embedding_queue_status';

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
    q.waiting
FROM siamese.collections AS c
INNER JOIN siamese.models AS m ON c.model_id = m.model_id
LEFT JOIN siamese.generations AS g ON c.generation = g.generation
CROSS JOIN LATERAL siamese._collection_counts(c.collection_id) AS n
CROSS JOIN LATERAL siamese._queue_counts(c.collection_id) AS q;
COMMENT ON VIEW siamese.collection_status
IS 'collections with their vectors, what waits for the next index build, and the state of the index';

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
COMMENT ON VIEW siamese.index_generations IS 'FAISS generations of all collections';

CREATE VIEW siamese.embedding_failures AS
SELECT c.name AS collection, f.key, f.sqlstate, f.message, f.failed_at
FROM siamese.failures AS f
INNER JOIN siamese.collections AS c ON f.collection_id = c.collection_id;
COMMENT ON VIEW siamese.embedding_failures
IS 'rows that could not be embedded, with the reason; a row leaves it when its image is mended';

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
COMMENT ON VIEW siamese.embedding_queue_status
IS 'deferred collections: rows that wait to be embedded, those tried in vain so far, and the rate of the last minute';

CREATE FUNCTION siamese.self_check() RETURNS TABLE (subject text, ok boolean, detail text)
LANGUAGE plpython3u VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].self_check(plpy)
$python$;
COMMENT ON FUNCTION siamese.self_check()
IS 'check the installation and every collection: packages, triggers, vectors, index files';
