CREATE FUNCTION siamese.embed_image(image bytea, model text DEFAULT NULL) RETURNS vector
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].embed_image(plpy, image, model)
$python$;
COMMENT ON FUNCTION siamese.embed_image(bytea, text) IS 'embedding of an image';

CREATE FUNCTION siamese.image_distance(a bytea, b bytea, model text DEFAULT NULL) RETURNS real
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].image_distance(plpy, a, b, model)
$python$;
COMMENT ON FUNCTION siamese.image_distance(bytea, bytea, text)
IS 'distance of two images in the metric of a model';

CREATE FUNCTION siamese.same_class(a bytea, b bytea, model text DEFAULT NULL) RETURNS real
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].same_class(plpy, a, b, model)
$python$;
COMMENT ON FUNCTION siamese.same_class(bytea, bytea, text)
IS 'probability that two images match, by the Siamese head of a model';

CREATE FUNCTION siamese.any_two_match(VARIADIC images bytea[]) RETURNS boolean
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
if 'pg_siamese @VERSION@' not in GD:
    plpy.execute('SELECT siamese._load()')
return GD['pg_siamese @VERSION@'].any_two_match(plpy, images)
$python$;
COMMENT ON FUNCTION siamese.any_two_match(bytea[])
IS 'whether at least two of the images match, by the decision threshold of the default model';
