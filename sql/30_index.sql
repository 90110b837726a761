-- Index files: build them, make a standby's own, and open them early.

-- === Public functions ===

CREATE FUNCTION siamese.build_index(
    collection text DEFAULT 'images',
    m bigint DEFAULT 32,
    ef_construction bigint DEFAULT 40,
    target_recall double precision DEFAULT 0.995,
    threads bigint DEFAULT 0
) RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer text[] := siamese._build_index(collection, m, ef_construction, target_recall, threads);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN answer[2];
END
$$;
COMMENT ON FUNCTION siamese.build_index(text, bigint, bigint, double precision, bigint)
IS 'build and publish an index; returns its generation';

CREATE FUNCTION siamese.rebuild_file(collection text DEFAULT 'images') RETURNS bigint
LANGUAGE plpgsql STABLE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer text[] := siamese._rebuild_file(collection);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN answer[2];
END
$$;
COMMENT ON FUNCTION siamese.rebuild_file(text) IS 'rebuild this standby''s index file';

CREATE FUNCTION siamese.warm_up(collection text DEFAULT 'images')
RETURNS TABLE (engine text, detail text)
LANGUAGE plpgsql STABLE PARALLEL UNSAFE ROWS 2
AS $$
DECLARE
    answer text[] := siamese._warm_up(collection);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN QUERY SELECT s.engine, s.detail
    FROM unnest(answer[2]::pg_catalog.text[], answer[3]::pg_catalog.text[]) AS s (engine, detail);
END
$$;
COMMENT ON FUNCTION siamese.warm_up(text) IS 'preload model and index';

-- === Private functions ===

CREATE FUNCTION siamese._build_index(
    collection text, m bigint, ef_construction bigint, target_recall double precision, threads bigint
) RETURNS text[]
LANGUAGE plpython3u VOLATILE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].build_index(
    plpy, collection, m, ef_construction, target_recall, threads)
$python$;
COMMENT ON FUNCTION siamese._build_index(text, bigint, bigint, double precision, bigint)
IS 'build a generation';

-- STABLE, as the function that calls it: all that it reads must be of one snapshot.
CREATE FUNCTION siamese._rebuild_file(collection text) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].rebuild_file(plpy, collection)
$python$;
COMMENT ON FUNCTION siamese._rebuild_file(text) IS 'rebuild this standby''s index file';

CREATE FUNCTION siamese._warm_up(collection text) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].warm_up(plpy, collection)
$python$;
COMMENT ON FUNCTION siamese._warm_up(text) IS 'preload model and index';

CREATE FUNCTION siamese._next_generation() RETURNS bigint
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    sequence regclass := pg_get_serial_sequence('siamese.generations', 'generation');
    found bigint;
BEGIN
    PERFORM siamese._check_local();
    -- Rows that a subscription brought once have not moved the sequence.
    LOOP
        found := nextval(sequence);
        EXIT WHEN NOT EXISTS (SELECT FROM siamese.generations AS g WHERE g.generation >= found);
        PERFORM setval(sequence, (SELECT max(g.generation) FROM siamese.generations AS g));
    END LOOP;
    RETURN found;
END
$$;
COMMENT ON FUNCTION siamese._next_generation() IS 'draw the number of a new generation';
