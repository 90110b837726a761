CREATE FUNCTION siamese._register_shipped_models() RETURNS text[]
LANGUAGE plpython3u VOLATILE PARALLEL UNSAFE
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    failure = plpy.execute('SELECT siamese._load() AS failure')[0]['failure']
    if failure:
        return failure
return GD['pg_siamese @VERSION@'].register_shipped_models(plpy, '@PACKAGES@/@VERSION@/models')
$python$;
COMMENT ON FUNCTION siamese._register_shipped_models()
IS 'register the installation''s encoders; returns arrays or an error';

CREATE FUNCTION siamese.register_shipped_models()
RETURNS TABLE (model text, model_id integer, registered boolean)
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer text[] := siamese._register_shipped_models();
BEGIN
    IF answer[1] IS NOT NULL THEN
        PERFORM siamese._raise(answer);
    END IF;
    RETURN QUERY SELECT u.* FROM unnest(answer[2]::text[], answer[3]::integer[], answer[4]::boolean[]) AS u;
END
$$;
COMMENT ON FUNCTION siamese.register_shipped_models()
IS 'register the encoders that the installation brought';
