-- Search. Arguments are as wide as drivers send them: a filter may be jsonb, json or text, a key any type of key.
-- No function has two forms, so that no call with untyped parameters is ambiguous. similar_images is SQL, so the
-- private functions that it calls come before it.

-- === Types of arguments ===

-- As jsonb and text, by names that other types can be cast to implicitly.
DO $do$
DECLARE
    made text[];
    part text[];
BEGIN
    FOREACH made SLICE 1 IN ARRAY ARRAY[
        ['filter', 'jsonb', 'jsonb_', 'IMMUTABLE'], ['key', 'text', 'text', 'STABLE']]
    LOOP
        EXECUTE pg_catalog.format('CREATE TYPE siamese.%s', made[1]);
        FOREACH part SLICE 1 IN ARRAY ARRAY[
            ['in', 'cstring', 'siamese.' || made[1], 'IMMUTABLE', 'text input'],
            ['out', 'siamese.' || made[1], 'cstring', 'IMMUTABLE', 'text output'],
            ['recv', 'internal', 'siamese.' || made[1], made[4], 'binary input'],
            ['send', 'siamese.' || made[1], 'bytea', made[4], 'binary output']]
        LOOP
            EXECUTE pg_catalog.format($sql$
                CREATE FUNCTION siamese._%1$s_%2$s(%3$s) RETURNS %4$s
                LANGUAGE internal %5$s STRICT PARALLEL SAFE AS %6$L
                $sql$, made[1], part[1], part[2], part[3], part[4], made[3] || part[1]);
            EXECUTE pg_catalog.format(
                'COMMENT ON FUNCTION siamese._%s_%s IS %L', made[1], part[1], part[5] || ' of type ' || made[1]);
        END LOOP;
        EXECUTE pg_catalog.format($sql$
            CREATE TYPE siamese.%1$s (
                INPUT = siamese._%1$s_in, OUTPUT = siamese._%1$s_out,
                RECEIVE = siamese._%1$s_recv, SEND = siamese._%1$s_send, LIKE = pg_catalog.%2$s)
            $sql$, made[1], made[2]);
    END LOOP;
END
$do$;
COMMENT ON TYPE siamese.filter IS 'conditions on columns, as JSON';
COMMENT ON TYPE siamese.key IS 'key of a stored row, of any type';

CREATE CAST (jsonb AS siamese.filter) WITHOUT FUNCTION AS IMPLICIT;
CREATE CAST (json AS siamese.filter) WITH INOUT AS IMPLICIT;
CREATE CAST (text AS siamese.filter) WITH INOUT AS IMPLICIT;
CREATE CAST (varchar AS siamese.filter) WITH INOUT AS IMPLICIT;
CREATE CAST (text AS siamese.key) WITHOUT FUNCTION AS IMPLICIT;
CREATE CAST (varchar AS siamese.key) WITHOUT FUNCTION AS IMPLICIT;
CREATE CAST (smallint AS siamese.key) WITH INOUT AS IMPLICIT;
CREATE CAST (integer AS siamese.key) WITH INOUT AS IMPLICIT;
CREATE CAST (bigint AS siamese.key) WITH INOUT AS IMPLICIT;
CREATE CAST (numeric AS siamese.key) WITH INOUT AS IMPLICIT;
CREATE CAST (uuid AS siamese.key) WITH INOUT AS IMPLICIT;

-- === Private functions of similar_images ===

CREATE FUNCTION siamese._similar_images(
    image bytea, image_id bigint, k bigint, collection text, filter siamese.filter, candidates bigint[],
    max_distance double precision, engine text, options text[], examples text[], like_images bytea[],
    unlike_images bytea[]
) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].similar_images(plpy, *args)
$python$;
COMMENT ON FUNCTION siamese._similar_images IS 'search with keys of type bigint';

CREATE FUNCTION siamese._match_line(model_id text, query text) RETURNS double precision[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
if 'pg_siamese @VERSION@' in GD:
    return GD['pg_siamese @VERSION@'].match_line(plpy, model_id, query)
$python$;
COMMENT ON FUNCTION siamese._match_line(text, text)
IS 'weight and bias of match probabilities within the domain';

-- === Public functions ===

CREATE TYPE siamese.similar_image AS (rank integer, image_id bigint, distance real, similarity real, frame integer);
COMMENT ON TYPE siamese.similar_image IS 'one answer of similar_images';

CREATE FUNCTION siamese.similar_images(
    image bytea DEFAULT NULL,
    k bigint DEFAULT 10,
    collection text DEFAULT 'images',
    filter siamese.filter DEFAULT '{}',
    -- All rows: a value that no list of keys can have by accident, since NULL is what array_agg gives of no rows.
    candidates bigint[] DEFAULT '{{{{{{NULL}}}}}}',
    max_distance double precision DEFAULT 'Infinity',
    engine text DEFAULT 'auto',
    image_id bigint DEFAULT NULL,
    exclude siamese.filter DEFAULT '{}',
    group_by text DEFAULT '',
    per_group bigint DEFAULT 1,
    own_group boolean DEFAULT TRUE,
    query_frame bigint DEFAULT 0,
    -- All of the image. Within 0 and 1, shares of its sides, else pixels, from the top left corner.
    region box DEFAULT '(0,0),(1,1)',
    "like" bigint[] DEFAULT '{}',
    unlike bigint[] DEFAULT '{}',
    like_images bytea[] DEFAULT '{}',
    unlike_images bytea[] DEFAULT '{}',
    strategy text DEFAULT 'mean',
    penalty double precision DEFAULT 1
) RETURNS SETOF siamese.similar_image
-- SQL without settings of its own, so that the planner makes it part of the query that calls it: as PL/pgSQL it
-- would take as long again as the search.
LANGUAGE sql STABLE PARALLEL UNSAFE ROWS 10
AS $$
    -- LEAST and GREATEST keep exp in range, and the result in that of real.
    SELECT s.rank::pg_catalog.int4, s.image_id, s.distance,
        CASE WHEN m.line IS NOT NULL THEN (
            1::pg_catalog.float8 OPERATOR(pg_catalog./) (1::pg_catalog.float8 OPERATOR(pg_catalog.+) pg_catalog.exp(
                LEAST(85::pg_catalog.float8, GREATEST(-700::pg_catalog.float8, OPERATOR(pg_catalog.-) (
                    m.line[1] OPERATOR(pg_catalog.*) s.distance::pg_catalog.float8
                    OPERATOR(pg_catalog.+) m.line[2]))))))::pg_catalog.float4 END,
        s.frame
    -- OFFSET: evaluated once, and not by way of a temporary table, as a function in FROM would be.
    FROM (
        SELECT siamese._similar_images(
            image, image_id, k, collection, filter,
            CASE WHEN pg_catalog.array_ndims(candidates) OPERATOR(pg_catalog.=) 6 THEN NULL
                ELSE coalesce(candidates, '{}') END,
            -- Folded when it is planned: NULL if none of these is given, as in most searches.
            max_distance, engine, CASE WHEN exclude::pg_catalog.text OPERATOR(pg_catalog.=) '{}' AND group_by OPERATOR(pg_catalog.=) ''
                AND per_group OPERATOR(pg_catalog.=) 1 AND own_group AND query_frame OPERATOR(pg_catalog.=) 0
                AND region::pg_catalog.text OPERATOR(pg_catalog.=) '(1,1),(0,0)' THEN NULL
                ELSE ARRAY[exclude::pg_catalog.text, group_by, per_group::pg_catalog.text, own_group::pg_catalog.text,
                    query_frame::pg_catalog.text, region::pg_catalog.text] END,
            CASE WHEN pg_catalog.cardinality("like") OPERATOR(pg_catalog.=) 0
                AND pg_catalog.cardinality(unlike) OPERATOR(pg_catalog.=) 0
                AND pg_catalog.cardinality(like_images) OPERATOR(pg_catalog.=) 0
                AND pg_catalog.cardinality(unlike_images) OPERATOR(pg_catalog.=) 0
                AND strategy IS NOT NULL AND penalty IS NOT NULL THEN NULL
                ELSE ARRAY["like"::pg_catalog.text, unlike::pg_catalog.text, strategy, penalty::pg_catalog.text] END,
            like_images, unlike_images) AS answer
        OFFSET 0
    ) AS a
    -- Of one row, as an aggregate is, the planner leaves it out if nobody asks for the similarity.
    LEFT JOIN LATERAL (
        SELECT pg_catalog.max(l.line) AS line FROM siamese._match_line(a.answer[4], a.answer[5]) AS l (line)
    ) AS m ON true
    CROSS JOIN LATERAL ROWS FROM (
        pg_catalog.unnest(a.answer[2]::pg_catalog.int8[]),
        pg_catalog.unnest(a.answer[3]::pg_catalog.float4[]),
        pg_catalog.unnest(a.answer[6]::pg_catalog.int4[])
    ) WITH ORDINALITY AS s (image_id, distance, frame, rank)
    WHERE a.answer[1] IS NULL OR siamese._raise(a.answer) IS NULL
$$;
COMMENT ON FUNCTION siamese.similar_images IS 'k nearest images of a collection';

CREATE FUNCTION siamese.similar_rows(
    of_table anyelement,
    image bytea DEFAULT NULL,
    k bigint DEFAULT 10,
    collection text DEFAULT '',
    filter siamese.filter DEFAULT '{}',
    candidates siamese.key[] DEFAULT '{{{{{{NULL}}}}}}',
    max_distance double precision DEFAULT 'Infinity',
    engine text DEFAULT 'auto',
    key siamese.key DEFAULT NULL,
    exclude siamese.filter DEFAULT '{}',
    group_by text DEFAULT '',
    per_group bigint DEFAULT 1,
    own_group boolean DEFAULT TRUE,
    query_frame bigint DEFAULT 0,
    region box DEFAULT '(0,0),(1,1)',
    "like" siamese.key[] DEFAULT '{}',
    unlike siamese.key[] DEFAULT '{}',
    like_images bytea[] DEFAULT '{}',
    unlike_images bytea[] DEFAULT '{}',
    strategy text DEFAULT 'mean',
    penalty double precision DEFAULT 1
) RETURNS TABLE (item anyelement, distance real, frame integer)
LANGUAGE plpgsql STABLE PARALLEL UNSAFE ROWS 10
SET jit = off
AS $$
DECLARE
    found siamese.collections;
    known integer;
    answer text[];
    searched pg_catalog.oid := (SELECT t.typrelid FROM pg_catalog.pg_type AS t
        WHERE t.oid OPERATOR(pg_catalog.=) pg_catalog.pg_typeof(of_table)::pg_catalog.oid);
BEGIN
    SELECT pg_catalog.count(*) INTO known FROM siamese.collections AS c
    WHERE c.relation::pg_catalog.oid OPERATOR(pg_catalog.=) searched
        AND CASE WHEN collection OPERATOR(pg_catalog.=) '' THEN c.companion_of IS NULL
            ELSE c.name OPERATOR(pg_catalog.=) collection END;
    IF known OPERATOR(pg_catalog.<>) 1 THEN
        PERFORM siamese._no_collection(searched, collection);
    END IF;
    SELECT c.* INTO found FROM siamese.collections AS c
    WHERE c.relation::pg_catalog.oid OPERATOR(pg_catalog.=) searched
        AND CASE WHEN collection OPERATOR(pg_catalog.=) '' THEN c.companion_of IS NULL
            ELSE c.name OPERATOR(pg_catalog.=) collection END;
    -- First by itself: joined to an empty table, the search would never run, and a bad image go unnoticed.
    answer := siamese._similar_keys(
        image, key::pg_catalog.text, k, found.name, filter,
        CASE WHEN pg_catalog.array_ndims(candidates) OPERATOR(pg_catalog.=) 6 THEN NULL
            ELSE coalesce(candidates::pg_catalog.text[], '{}') END,
        max_distance, engine,
        ARRAY[exclude::pg_catalog.text, group_by, per_group::pg_catalog.text, own_group::pg_catalog.text,
            query_frame::pg_catalog.text, region::pg_catalog.text],
        CASE WHEN pg_catalog.cardinality("like") OPERATOR(pg_catalog.=) 0
            AND pg_catalog.cardinality(unlike) OPERATOR(pg_catalog.=) 0
            AND pg_catalog.cardinality(like_images) OPERATOR(pg_catalog.=) 0
            AND pg_catalog.cardinality(unlike_images) OPERATOR(pg_catalog.=) 0
            AND strategy IS NOT NULL AND penalty IS NOT NULL THEN NULL
            ELSE ARRAY["like"::pg_catalog.text, unlike::pg_catalog.text, strategy, penalty::pg_catalog.text] END,
        like_images, unlike_images);
    IF answer[1] IS NOT NULL THEN
        PERFORM siamese._raise(answer);
    END IF;
    -- Row by row: a join by hash would read the whole table, images and all. The names of the user's columns
    -- can't meet these, since nothing here stands by itself.
    RETURN QUERY EXECUTE pg_catalog.format($sql$
        SELECT b.item, u.distance, u.frame
        FROM unnest($1::%1$s[], $2, $3) WITH ORDINALITY AS u (key, distance, frame, rank)
        CROSS JOIN LATERAL (
            SELECT CAST(t.* AS %2$s) AS item FROM %2$s AS t
            WHERE t.%3$I OPERATOR(pg_catalog.=) u.key OFFSET 0) AS b
        ORDER BY u.rank
        $sql$, found.key_type, found.relation, found.key_column)
    USING answer[2], answer[3]::pg_catalog.float4[], answer[6]::pg_catalog.int4[];
END
$$;
COMMENT ON FUNCTION siamese.similar_rows IS 'k nearest rows of any collection''s table';

CREATE FUNCTION siamese.nearest(
    collection text DEFAULT 'images',
    -- All rows, as of candidates above.
    keys siamese.key[] DEFAULT '{{{{{{NULL}}}}}}',
    k bigint DEFAULT 10,
    filter siamese.filter DEFAULT '{}',
    max_distance double precision DEFAULT 'Infinity',
    engine text DEFAULT 'auto',
    exclude siamese.filter DEFAULT '{}',
    group_by text DEFAULT '',
    per_group bigint DEFAULT 1,
    own_group boolean DEFAULT TRUE,
    threads bigint DEFAULT 1
) RETURNS TABLE (key text, rank integer, neighbour text, distance real, frame integer)
-- As similar_images. Rows come a portion at a time, since a function in a select list hands over each of its rows
-- before it goes on.
LANGUAGE sql STABLE PARALLEL UNSAFE ROWS 1000
AS $$
    -- In the select list, since unnest in FROM would write all rows to a temporary table first.
    SELECT
        pg_catalog.unnest(a.answer[2]::pg_catalog.text[]),
        pg_catalog.unnest(a.answer[3]::pg_catalog.int4[]),
        pg_catalog.unnest(a.answer[4]::pg_catalog.text[]),
        pg_catalog.unnest(a.answer[5]::pg_catalog.float4[]),
        pg_catalog.unnest(a.answer[6]::pg_catalog.int4[])
    FROM (
        SELECT siamese._nearest(
            CASE WHEN pg_catalog.array_ndims(keys) OPERATOR(pg_catalog.=) 6 THEN NULL
                ELSE coalesce(keys::pg_catalog.text, '{}') END,
            k, collection, filter, max_distance, engine, exclude, group_by, per_group, own_group, threads) AS answer
        OFFSET 0
    ) AS a
    WHERE a.answer[1] IS NULL OR siamese._raise(a.answer) IS NULL
$$;
COMMENT ON FUNCTION siamese.nearest IS 'k nearest rows of each of many stored rows';

CREATE FUNCTION siamese.classify_image(
    image bytea DEFAULT NULL,
    k bigint DEFAULT 10,
    collection text DEFAULT 'images',
    label_column text DEFAULT 'label',
    image_id siamese.key DEFAULT NULL,
    filter siamese.filter DEFAULT '{}',
    exclude siamese.filter DEFAULT '{}',
    -- The collection's group column, if it has one. '' means no groups, as in searches.
    group_by text DEFAULT '-',
    own_group boolean DEFAULT FALSE
) RETURNS TABLE (label text, votes integer, share real)
LANGUAGE plpgsql STABLE PARALLEL UNSAFE ROWS 5
AS $$
DECLARE
    answer text[] := siamese._classify_image(
        image, image_id::pg_catalog.text, k, collection, label_column, filter, exclude, group_by, own_group);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN QUERY SELECT s.label, s.votes, s.share
    FROM unnest(
        answer[2]::pg_catalog.text[], answer[3]::pg_catalog.int4[], answer[4]::pg_catalog.float4[]
    ) AS s (label, votes, share);
END
$$;
COMMENT ON FUNCTION siamese.classify_image IS 'labels of the k nearest images, with votes';

-- === Private functions ===

CREATE FUNCTION siamese._similar_keys(
    image bytea, key text, k bigint, collection text, filter siamese.filter, candidates text[],
    max_distance double precision, engine text, options text[], examples text[], like_images bytea[],
    unlike_images bytea[]
) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].similar_keys(plpy, *args)
$python$;
COMMENT ON FUNCTION siamese._similar_keys IS 'search with keys of any type';

CREATE FUNCTION siamese._nearest(
    keys text, k bigint, collection text, filter siamese.filter, max_distance double precision, engine text,
    exclude siamese.filter, group_by text, per_group bigint, own_group boolean, threads bigint
) RETURNS SETOF text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE ROWS 100
AS $python$
# @LOAD_OF_SET@
return GD['pg_siamese @VERSION@'].nearest(plpy, *args)
$python$;
COMMENT ON FUNCTION siamese._nearest IS 'search for many stored rows, in portions';

CREATE FUNCTION siamese._no_collection(relation oid, collection text) RETURNS void
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    names text[];
BEGIN
    IF collection IS NULL THEN
        RAISE EXCEPTION 'collection is null' USING ERRCODE = 'null_value_not_allowed';
    END IF;
    SELECT pg_catalog.array_agg(pg_catalog.format('"%s"', c.name) ORDER BY c.name) INTO names
    FROM siamese.collections AS c WHERE c.relation::pg_catalog.oid OPERATOR(pg_catalog.=) _no_collection.relation;
    IF names IS NULL THEN
        RAISE EXCEPTION 'first argument is not a row of a table with a collection'
        USING ERRCODE = 'undefined_object',
            HINT = 'Write NULL::t, with a table t for which create_collection was called.';
    ELSIF collection OPERATOR(pg_catalog.=) '' THEN
        RAISE EXCEPTION 'table % has several collections', relation::pg_catalog.regclass
        USING ERRCODE = 'ambiguous_parameter',
            HINT = pg_catalog.format('Name one as collection: %s.', pg_catalog.array_to_string(names, ', '));
    END IF;
    RAISE EXCEPTION 'collection "%" is not one of table %', collection, relation::pg_catalog.regclass
    USING ERRCODE = 'undefined_object',
        HINT = pg_catalog.format('Name one as collection: %s.', pg_catalog.array_to_string(names, ', '));
END
$$;
COMMENT ON FUNCTION siamese._no_collection(oid, text) IS 'raise why similar_rows has no collection';

CREATE FUNCTION siamese._classify_image(
    image bytea, key text, k bigint, collection text, label_column text, filter siamese.filter,
    exclude siamese.filter, group_by text, own_group boolean
) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].classify_image(plpy, *args)
$python$;
COMMENT ON FUNCTION siamese._classify_image IS 'classify an image';

-- A search, which is STABLE, may not run EXPLAIN. This function is VOLATILE, and has the rights of whoever
-- searches. It explains what the search that calls it has noted in the session's memory, and nothing else.
CREATE FUNCTION siamese._estimate() RETURNS text
LANGUAGE plpython3u VOLATILE PARALLEL UNSAFE
AS $python$
if 'pg_siamese @VERSION@' in GD:
    return GD['pg_siamese @VERSION@'].estimate(plpy)
$python$;
COMMENT ON FUNCTION siamese._estimate() IS 'planner''s estimate for a search';
