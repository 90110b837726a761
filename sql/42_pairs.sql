-- Pairs of stored rows: near each other, the same picture, or in several splits. As with nearest, rows come a portion
-- at a time, and arrays become rows in the select list.

-- === Public functions ===

CREATE FUNCTION siamese.similar_pairs(
    collection text,
    max_distance double precision,
    filter siamese.filter DEFAULT '{}',
    engine text DEFAULT 'auto',
    exclude siamese.filter DEFAULT '{}',
    group_by text DEFAULT '',
    own_group boolean DEFAULT TRUE,
    threads bigint DEFAULT 1
) RETURNS TABLE (a text, b text, distance real)
LANGUAGE sql STABLE PARALLEL UNSAFE ROWS 1000
AS $$
    SELECT
        pg_catalog.unnest(p.answer[2]::pg_catalog.text[]),
        pg_catalog.unnest(p.answer[3]::pg_catalog.text[]),
        pg_catalog.unnest(p.answer[4]::pg_catalog.float4[])
    FROM (
        SELECT siamese._similar_pairs(
            collection, max_distance, filter, engine, exclude, group_by, own_group, threads) AS answer
        OFFSET 0
    ) AS p
    WHERE p.answer[1] IS NULL OR siamese._raise(p.answer) IS NULL
$$;
COMMENT ON FUNCTION siamese.similar_pairs IS 'all pairs of stored rows within a distance';

CREATE FUNCTION siamese.near_duplicates(
    collection text DEFAULT 'images',
    max_distance double precision DEFAULT 0.25,
    max_difference double precision DEFAULT 3.6,
    mirrored boolean DEFAULT FALSE,
    filter siamese.filter DEFAULT '{}',
    exclude siamese.filter DEFAULT '{}',
    engine text DEFAULT 'auto',
    threads bigint DEFAULT 1
) RETURNS TABLE (
    group_number integer, key text, representative text, difference real, distance real, is_mirrored boolean
)
LANGUAGE sql STABLE PARALLEL UNSAFE ROWS 1000
AS $$
    SELECT
        pg_catalog.unnest(p.answer[2]::pg_catalog.int4[]),
        pg_catalog.unnest(p.answer[3]::pg_catalog.text[]),
        pg_catalog.unnest(p.answer[4]::pg_catalog.text[]),
        pg_catalog.unnest(p.answer[5]::pg_catalog.float4[]),
        pg_catalog.unnest(p.answer[6]::pg_catalog.float4[]),
        pg_catalog.unnest(p.answer[7]::pg_catalog.bool[])
    FROM (
        SELECT siamese._near_duplicates(
            collection, max_distance, max_difference, mirrored, filter, exclude, engine, threads) AS answer
        OFFSET 0
    ) AS p
    WHERE p.answer[1] IS NULL OR siamese._raise(p.answer) IS NULL
$$;
COMMENT ON FUNCTION siamese.near_duplicates IS 'groups of stored images that are the same picture';

CREATE FUNCTION siamese.leaks(
    collection text DEFAULT 'images',
    split_column text DEFAULT 'split',
    -- The collection's group column, if it has one. '' means no groups, as in searches.
    group_column text DEFAULT '-',
    max_distance double precision DEFAULT 0.25,
    max_difference double precision DEFAULT 3.6,
    filter siamese.filter DEFAULT '{}',
    exclude siamese.filter DEFAULT '{}',
    engine text DEFAULT 'auto',
    threads bigint DEFAULT 1
) RETURNS TABLE (kind text, a text, split_a text, b text, split_b text, group_label text, difference real)
LANGUAGE sql STABLE PARALLEL UNSAFE ROWS 1000
AS $$
    SELECT
        pg_catalog.unnest(p.answer[2]::pg_catalog.text[]),
        pg_catalog.unnest(p.answer[3]::pg_catalog.text[]),
        pg_catalog.unnest(p.answer[4]::pg_catalog.text[]),
        pg_catalog.unnest(p.answer[5]::pg_catalog.text[]),
        pg_catalog.unnest(p.answer[6]::pg_catalog.text[]),
        pg_catalog.unnest(p.answer[7]::pg_catalog.text[]),
        pg_catalog.unnest(p.answer[8]::pg_catalog.float4[])
    FROM (
        SELECT siamese._leaks(
            collection, split_column, group_column, max_distance, max_difference, filter, exclude, engine,
            threads) AS answer
        OFFSET 0
    ) AS p
    WHERE p.answer[1] IS NULL OR siamese._raise(p.answer) IS NULL
$$;
COMMENT ON FUNCTION siamese.leaks IS 'images and groups that are in several splits';

-- === Private functions ===

CREATE FUNCTION siamese._similar_pairs(
    collection text, max_distance double precision, filter siamese.filter, engine text, exclude siamese.filter,
    group_by text, own_group boolean, threads bigint
) RETURNS SETOF text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE ROWS 100
AS $python$
# @LOAD_OF_SET@
return GD['pg_siamese @VERSION@'].similar_pairs(plpy, *args)
$python$;
COMMENT ON FUNCTION siamese._similar_pairs IS 'search for pairs of stored rows, in portions';

CREATE FUNCTION siamese._near_duplicates(
    collection text, max_distance double precision, max_difference double precision, mirrored boolean,
    filter siamese.filter, exclude siamese.filter, engine text, threads bigint
) RETURNS SETOF text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE ROWS 100
AS $python$
# @LOAD_OF_SET@
return GD['pg_siamese @VERSION@'].near_duplicates(plpy, *args)
$python$;
COMMENT ON FUNCTION siamese._near_duplicates IS 'group stored images that are the same picture';

CREATE FUNCTION siamese._leaks(
    collection text, split_column text, group_column text, max_distance double precision,
    max_difference double precision, filter siamese.filter, exclude siamese.filter, engine text, threads bigint
) RETURNS SETOF text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE ROWS 100
AS $python$
# @LOAD_OF_SET@
return GD['pg_siamese @VERSION@'].leaks(plpy, *args)
$python$;
COMMENT ON FUNCTION siamese._leaks IS 'find images and groups in several splits, in portions';
