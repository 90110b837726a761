-- Pictures to look at, as PNG files: of one image, of many stored ones, and as text for tools that show web pages.

-- === Public functions ===

CREATE FUNCTION siamese.thumbnail(
    image bytea,
    size bigint DEFAULT 128,
    dicom_window text DEFAULT '',
    frame bigint DEFAULT 0,
    -- Whose limits, window and model hold. '' means none.
    collection text DEFAULT ''
) RETURNS bytea
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer text[] := siamese._thumbnail(image, size, dicom_window, frame, collection);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN decode(answer[2], 'hex');
END
$$;
COMMENT ON FUNCTION siamese.thumbnail(bytea, bigint, text, bigint, text) IS 'PNG: an image in a small size';

CREATE FUNCTION siamese.contact_sheet(
    collection text,
    keys siamese.key[],
    captions text[] DEFAULT '{}',
    columns bigint DEFAULT 8,
    size bigint DEFAULT 128,
    frames bigint[] DEFAULT '{}'
) RETURNS bytea
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
AS $$
DECLARE
    answer text[] := siamese._contact_sheet(
        collection, keys::pg_catalog.text[], captions, columns, size, frames);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN pg_catalog.decode(answer[2], 'hex');
END
$$;
COMMENT ON FUNCTION siamese.contact_sheet IS 'PNG: stored images in lines, with captions';

CREATE FUNCTION siamese.data_uri(png bytea) RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF substr(png, 1, 8) <> '\x89504e470d0a1a0a' THEN
        RAISE EXCEPTION 'png is not a PNG file' USING
            ERRCODE = 'invalid_parameter_value',
            HINT = 'Use data_uri(thumbnail(image)) for images of other formats.';
    END IF;
    RETURN 'data:image/png;base64,' || translate(encode(png, 'base64'), E'\n', '');
END
$$;
COMMENT ON FUNCTION siamese.data_uri(bytea) IS 'PNG file as a data URI, for web pages';

-- === Private functions ===

CREATE FUNCTION siamese._thumbnail(
    image bytea, size bigint, dicom_window text, frame bigint, collection text
) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].thumbnail(plpy, *args)
$python$;
COMMENT ON FUNCTION siamese._thumbnail(bytea, bigint, text, bigint, text) IS 'draw a thumbnail';

CREATE FUNCTION siamese._contact_sheet(
    collection text, keys text[], captions text[], columns bigint, size bigint, frames bigint[]
) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].contact_sheet(plpy, *args)
$python$;
COMMENT ON FUNCTION siamese._contact_sheet IS 'draw a contact sheet';
