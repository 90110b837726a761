-- Images by themselves, without a collection: embed and compare them.

-- === Public functions ===

CREATE FUNCTION siamese.embed_image(
    image bytea, model text DEFAULT '', dicom_window text DEFAULT '', frame bigint DEFAULT 0
) RETURNS vector
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer text[] := siamese._embed_image(image, model, dicom_window, frame);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN answer[2];
END
$$;
COMMENT ON FUNCTION siamese.embed_image(bytea, text, text, bigint) IS 'embedding of an image or a frame';

CREATE FUNCTION siamese.image_distance(a bytea, b bytea, model text DEFAULT '') RETURNS real
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer text[] := siamese._compare_images('image_distance', ARRAY[a, b], model);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN answer[2];
END
$$;
COMMENT ON FUNCTION siamese.image_distance(bytea, bytea, text)
IS 'distance of two images in a model''s metric';

CREATE FUNCTION siamese.same_class(a bytea, b bytea, model text DEFAULT '') RETURNS real
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer text[] := siamese._compare_images('same_class', ARRAY[a, b], model);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN answer[2];
END
$$;
COMMENT ON FUNCTION siamese.same_class(bytea, bytea, text) IS 'probability that two images match';

CREATE FUNCTION siamese.any_two_match(VARIADIC images bytea[]) RETURNS boolean
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer text[] := siamese._compare_images('any_two_match', images, '');
BEGIN
    PERFORM siamese._raise(answer);
    RETURN answer[2];
END
$$;
COMMENT ON FUNCTION siamese.any_two_match(bytea[])
IS 'whether two images match at the default model''s threshold';

-- === Private functions ===

CREATE FUNCTION siamese._embed_image(image bytea, model text, dicom_window text, frame bigint) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].embed_image(plpy, image, model, dicom_window, frame)
$python$;
COMMENT ON FUNCTION siamese._embed_image(bytea, text, text, bigint) IS 'embed an image';

CREATE FUNCTION siamese._compare_images(function text, images bytea[], model text) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].compare_images(plpy, function, images, model)
$python$;
COMMENT ON FUNCTION siamese._compare_images(text, bytea[], text) IS 'compare images';
