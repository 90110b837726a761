CREATE FUNCTION siamese.register_shipped_models()
RETURNS TABLE (model text, model_id integer, registered boolean)
LANGUAGE plpython3u VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].register_shipped_models(plpy, '@PACKAGES@/@VERSION@/models')
$python$;
COMMENT ON FUNCTION siamese.register_shipped_models()
IS 'register the encoders that the installation brought';
