CREATE FUNCTION siamese.build_index(
    collection text DEFAULT 'images',
    m integer DEFAULT 32,
    ef_construction integer DEFAULT 40,
    target_recall real DEFAULT 0.995,
    threads integer DEFAULT NULL
) RETURNS bigint
LANGUAGE plpython3u VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].build_index(
    plpy, collection, m, ef_construction, target_recall, threads)
$python$;
COMMENT ON FUNCTION siamese.build_index(text, integer, integer, real, integer)
IS 'build a new FAISS generation of a collection and make it current; returns its number';

-- STABLE: all that it reads must be of one snapshot.
CREATE FUNCTION siamese.rebuild_file(collection text DEFAULT 'images') RETURNS bigint
LANGUAGE plpython3u STABLE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].rebuild_file(plpy, collection)
$python$;
COMMENT ON FUNCTION siamese.rebuild_file(text)
IS 'on a standby, make its own file of the current FAISS generation, unless it is there whole; returns its number';

CREATE FUNCTION siamese.warm_up(collection text DEFAULT 'images')
RETURNS TABLE (engine text, detail text)
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].warm_up(plpy, collection)
$python$;
COMMENT ON FUNCTION siamese.warm_up(text)
IS 'open a collection''s model and index in this session, so that its first search is quick';
