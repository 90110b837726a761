-- How a search was answered, why two images are similar, and how well searches find what they should.

-- === Public functions ===

CREATE FUNCTION siamese.explain_search(
    image bytea DEFAULT NULL,
    k bigint DEFAULT 10,
    collection text DEFAULT 'images',
    filter siamese.filter DEFAULT '{}',
    candidates siamese.key[] DEFAULT '{{{{{{NULL}}}}}}',
    max_distance double precision DEFAULT 'Infinity',
    engine text DEFAULT 'auto',
    image_id siamese.key DEFAULT NULL,
    exclude siamese.filter DEFAULT '{}',
    group_by text DEFAULT '',
    per_group bigint DEFAULT 1,
    own_group boolean DEFAULT TRUE,
    query_frame bigint DEFAULT 0,
    region box DEFAULT '(0,0),(1,1)'
) RETURNS TABLE (fact text, value text, detail text)
LANGUAGE plpgsql STABLE PARALLEL UNSAFE ROWS 20
AS $$
DECLARE
    answer text[] := siamese._explain_search(
        image, image_id::pg_catalog.text, k, collection, filter,
        CASE WHEN pg_catalog.array_ndims(candidates) OPERATOR(pg_catalog.=) 6 THEN NULL
            ELSE coalesce(candidates::pg_catalog.text[], '{}') END,
        max_distance, engine,
        ARRAY[exclude::pg_catalog.text, group_by, per_group::pg_catalog.text, own_group::pg_catalog.text,
            query_frame::pg_catalog.text, region::pg_catalog.text]);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN QUERY SELECT f.fact, f.value, f.detail
    FROM unnest(
        answer[2]::pg_catalog.text[], answer[3]::pg_catalog.text[], answer[4]::pg_catalog.text[]
    ) AS f (fact, value, detail);
END
$$;
COMMENT ON FUNCTION siamese.explain_search IS 'how a search is answered: engine, candidates, times';

CREATE FUNCTION siamese.measure_recall(
    collection text DEFAULT 'images',
    queries bigint DEFAULT 100,
    k bigint DEFAULT 10,
    filter siamese.filter DEFAULT '{}',
    seed bigint DEFAULT 0
) RETURNS TABLE (sampled integer, recall real, minimum real, milliseconds real, exact_milliseconds real)
LANGUAGE plpgsql STABLE PARALLEL UNSAFE ROWS 1
AS $$
DECLARE
    answer text[] := siamese._measure_recall(collection, queries, k, filter, seed);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN QUERY SELECT answer[2]::pg_catalog.int4, answer[3]::pg_catalog.float4, answer[4]::pg_catalog.float4,
        answer[5]::pg_catalog.float4, answer[6]::pg_catalog.float4;
END
$$;
COMMENT ON FUNCTION siamese.measure_recall IS 'recall of default searches against exact ones';

CREATE FUNCTION siamese.retrieval_quality(
    collection text DEFAULT 'images',
    label_column text DEFAULT 'label',
    queries siamese.filter DEFAULT '{}',
    gallery siamese.filter DEFAULT '{}',
    sample bigint DEFAULT 1000,
    seed bigint DEFAULT 0,
    own_group boolean DEFAULT FALSE
) RETURNS TABLE (sampled integer, map5 real, mmv5 real, acc1 real, acc3 real, acc5 real)
LANGUAGE plpgsql STABLE PARALLEL UNSAFE ROWS 1
AS $$
DECLARE
    answer text[] := siamese._retrieval_quality(
        collection, label_column, queries, gallery, sample, seed, own_group);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN QUERY SELECT answer[2]::pg_catalog.int4, answer[3]::pg_catalog.float4, answer[4]::pg_catalog.float4,
        answer[5]::pg_catalog.float4, answer[6]::pg_catalog.float4, answer[7]::pg_catalog.float4;
END
$$;
COMMENT ON FUNCTION siamese.retrieval_quality IS 'how well neighbours agree with labels, in per cent';

CREATE FUNCTION siamese.similarity_map(
    image bytea DEFAULT NULL,
    neighbour bytea DEFAULT NULL,
    collection text DEFAULT 'images',
    image_id siamese.key DEFAULT NULL,
    neighbour_id siamese.key DEFAULT NULL,
    model text DEFAULT '',
    query_frame bigint DEFAULT 0,
    neighbour_frame bigint DEFAULT 0,
    masks bigint DEFAULT 125,
    side bigint DEFAULT 512,
    legend boolean DEFAULT TRUE
) RETURNS bytea
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
AS $$
DECLARE
    answer text[] := siamese._similarity_map(
        image, neighbour, collection, image_id::pg_catalog.text, neighbour_id::pg_catalog.text, model, query_frame,
        neighbour_frame, masks, side, legend);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN pg_catalog.decode(answer[2], 'hex');
END
$$;
COMMENT ON FUNCTION siamese.similarity_map IS 'PNG: parts that make an image similar to another';

-- === Private functions ===

CREATE FUNCTION siamese._explain_search(
    image bytea, key text, k bigint, collection text, filter siamese.filter, candidates text[],
    max_distance double precision, engine text, options text[]
) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].explain_search(plpy, *args)
$python$;
COMMENT ON FUNCTION siamese._explain_search IS 'search and explain';

CREATE FUNCTION siamese._measure_recall(
    collection text, queries bigint, k bigint, filter siamese.filter, seed bigint
) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].measure_recall(plpy, *args)
$python$;
COMMENT ON FUNCTION siamese._measure_recall IS 'measure recall';

CREATE FUNCTION siamese._retrieval_quality(
    collection text, label_column text, queries siamese.filter, gallery siamese.filter, sample bigint, seed bigint,
    own_group boolean
) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].retrieval_quality(plpy, *args)
$python$;
COMMENT ON FUNCTION siamese._retrieval_quality IS 'measure agreement with labels';

CREATE FUNCTION siamese._similarity_map(
    image bytea, neighbour bytea, collection text, key text, neighbour_key text, model text, frame bigint,
    neighbour_frame bigint, masks bigint, side bigint, legend boolean
) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].similarity_map(plpy, *args)
$python$;
COMMENT ON FUNCTION siamese._similarity_map IS 'draw a similarity map';
