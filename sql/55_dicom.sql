-- DICOM: tags of the files in image columns.

-- === Tables ===

CREATE TABLE siamese.dicom_keywords (
    keyword text PRIMARY KEY,
    shown boolean NOT NULL DEFAULT true
);
COMMENT ON TABLE siamese.dicom_keywords IS 'changes to the list of dicom_tags, by administrators';
COMMENT ON COLUMN siamese.dicom_keywords.shown IS 'false takes a keyword off the list';
SELECT pg_catalog.pg_extension_config_dump('siamese.dicom_keywords', '');

-- === Public functions ===

CREATE FUNCTION siamese.dicom_tags(image bytea) RETURNS jsonb
LANGUAGE plpgsql STABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    more text[];
    less text[];
    answer text[];
BEGIN
    SELECT
        coalesce(array_agg(k.keyword ORDER BY k.keyword) FILTER (WHERE k.shown), '{}'),
        coalesce(array_agg(k.keyword) FILTER (WHERE NOT k.shown), '{}')
    INTO more, less
    FROM siamese.dicom_keywords AS k;
    answer := siamese._dicom_tags(image, more, less);
    PERFORM siamese._raise(answer);
    RETURN answer[2];
END
$$;
COMMENT ON FUNCTION siamese.dicom_tags(bytea) IS 'tags of a DICOM file, by keyword';

CREATE FUNCTION siamese.dicom_tag(image bytea, keyword text) RETURNS text
LANGUAGE plpgsql IMMUTABLE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    answer text[] := siamese._dicom_tag(image, keyword);
BEGIN
    PERFORM siamese._raise(answer);
    RETURN answer[2];
END
$$;
COMMENT ON FUNCTION siamese.dicom_tag(bytea, text) IS 'one tag of a DICOM file, for generated columns';

-- === Private functions ===

CREATE FUNCTION siamese._dicom_tags(image bytea, more text[], less text[]) RETURNS text[]
LANGUAGE plpython3u STABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].dicom_tags(plpy, image, more, less)
$python$;
COMMENT ON FUNCTION siamese._dicom_tags(bytea, text[], text[]) IS 'tags of a DICOM file, or an error';

CREATE FUNCTION siamese._dicom_tag(image bytea, keyword text) RETURNS text[]
LANGUAGE plpython3u IMMUTABLE PARALLEL UNSAFE
AS $python$
# @LOAD@
return GD['pg_siamese @VERSION@'].dicom_tag(plpy, image, keyword)
$python$;
COMMENT ON FUNCTION siamese._dicom_tag(bytea, text) IS 'one tag of a DICOM file, or an error';
