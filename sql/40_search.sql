-- A search, which is STABLE, may not run EXPLAIN. This function is VOLATILE, and has the rights of whoever
-- searches. It explains what the search that calls it has noted in the session's memory, and nothing else.
CREATE FUNCTION siamese._estimate() RETURNS text
LANGUAGE plpython3u VOLATILE PARALLEL UNSAFE
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].estimate(plpy)
$python$;
COMMENT ON FUNCTION siamese._estimate() IS 'planner''s estimate for the search that calls it';

CREATE FUNCTION siamese.similar_images(
    image bytea,
    k integer DEFAULT 10,
    collection text DEFAULT 'images',
    filter jsonb DEFAULT NULL,
    candidates bigint[] DEFAULT NULL,
    max_distance real DEFAULT NULL,
    engine text DEFAULT 'auto'
) RETURNS TABLE (rank integer, image_id bigint, distance real, similarity real)
LANGUAGE plpython3u STABLE PARALLEL UNSAFE ROWS 10
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].similar_images(
    plpy, image, None, k, collection, filter, candidates, max_distance, engine, False)
$python$;
COMMENT ON FUNCTION siamese.similar_images(bytea, integer, text, jsonb, bigint[], real, text)
IS 'the k images of a collection that are most similar to an image';

CREATE FUNCTION siamese.similar_images(
    image_id bigint,
    k integer DEFAULT 10,
    collection text DEFAULT 'images',
    filter jsonb DEFAULT NULL,
    candidates bigint[] DEFAULT NULL,
    max_distance real DEFAULT NULL,
    engine text DEFAULT 'auto'
) RETURNS TABLE (rank integer, image_id bigint, distance real, similarity real)
LANGUAGE plpython3u STABLE PARALLEL UNSAFE ROWS 10
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].similar_images(
    plpy, None, image_id, k, collection, filter, candidates, max_distance, engine, True)
$python$;
COMMENT ON FUNCTION siamese.similar_images(bigint, integer, text, jsonb, bigint[], real, text)
IS 'the k images of a collection that are most similar to one of its own, which is left out';

CREATE FUNCTION siamese._similar_keys(
    image bytea, k integer, collection text, filter jsonb, candidates text[], max_distance real, engine text
) RETURNS TABLE (rank integer, key text, distance real, similarity real)
LANGUAGE plpython3u STABLE PARALLEL UNSAFE ROWS 10
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].similar_keys(
    plpy, image, k, collection, filter, candidates, max_distance, engine)
$python$;
COMMENT ON FUNCTION siamese._similar_keys(bytea, integer, text, jsonb, text[], real, text)
IS 'similar_images for keys of any type, as text';

CREATE FUNCTION siamese.similar_rows(
    of_table anyelement,
    image bytea,
    k integer DEFAULT 10,
    collection text DEFAULT NULL,
    filter jsonb DEFAULT NULL,
    candidates text[] DEFAULT NULL,
    max_distance real DEFAULT NULL,
    engine text DEFAULT 'auto'
) RETURNS TABLE (item anyelement, distance real)
LANGUAGE plpgsql STABLE PARALLEL UNSAFE ROWS 10
AS $$
#variable_conflict use_variable
DECLARE
    found siamese.collections;
    known integer;
    keys text[];
    distances real[];
    relation pg_catalog.oid := (SELECT t.typrelid FROM pg_catalog.pg_type AS t WHERE t.oid = pg_catalog.pg_typeof($1)::pg_catalog.oid);
BEGIN
    SELECT pg_catalog.count(*) INTO known FROM siamese.collections AS c
    WHERE c.relation::pg_catalog.oid = relation AND (collection IS NULL OR c.name = collection);
    IF known <> 1 THEN
        RAISE EXCEPTION '% has % collections', pg_catalog.pg_typeof($1), known
        USING ERRCODE = CASE WHEN known = 0 THEN 'undefined_object' ELSE 'ambiguous_parameter' END,
            HINT = CASE WHEN known = 0
                THEN 'The first argument is NULL::t, with a table t for which create_collection was called.'
                ELSE 'Name one of them as collection.' END;
    END IF;
    SELECT c.* INTO found FROM siamese.collections AS c
    WHERE c.relation::pg_catalog.oid = relation AND (collection IS NULL OR c.name = collection);
    -- First by itself: joined to an empty table, the search would never run, and a bad image go unnoticed.
    SELECT pg_catalog.array_agg(s.key ORDER BY s.rank), pg_catalog.array_agg(s.distance ORDER BY s.rank)
    INTO keys, distances
    FROM siamese._similar_keys(image, k, found.name, filter, candidates, max_distance, engine) AS s;
    RETURN QUERY EXECUTE pg_catalog.format(
        'SELECT b, u.distance
        FROM unnest($1::%1$s[], $2) WITH ORDINALITY AS u (key, distance, rank)
        INNER JOIN %2$s AS b ON b.%3$I = u.key
        ORDER BY u.rank', found.key_type, found.relation, found.key_column)
    USING keys, distances;
END
$$;
COMMENT ON FUNCTION siamese.similar_rows(anyelement, bytea, integer, text, jsonb, text[], real, text)
IS 'the k rows of any table with a collection whose images are most similar to an image';

CREATE FUNCTION siamese.classify_image(
    image bytea,
    k integer DEFAULT 10,
    collection text DEFAULT 'images',
    label_column text DEFAULT 'label'
) RETURNS TABLE (label text, votes integer, share real)
LANGUAGE plpython3u STABLE PARALLEL UNSAFE ROWS 5
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].classify_image(plpy, image, k, collection, label_column)
$python$;
COMMENT ON FUNCTION siamese.classify_image(bytea, integer, text, text)
IS 'labels of the k most similar images, with their votes';
