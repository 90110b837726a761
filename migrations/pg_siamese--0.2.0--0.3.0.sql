\echo Use "ALTER EXTENSION pg_siamese UPDATE" to load this file. \quit

ALTER TABLE siamese.generations ADD COLUMN ef_search_many integer[];

-- Parameters became as wide as drivers send them, and one more came.
DROP FUNCTION siamese.register_model(
    text, bytea, integer, integer, real[], real[], text, text, text, jsonb, real, bigint, bigint
);

-- Their arguments are wider now, and none has two forms.
DROP FUNCTION siamese.similar_images(bytea, integer, text, jsonb, bigint[], real, text);
DROP FUNCTION siamese.similar_images(bigint, integer, text, jsonb, bigint[], real, text);
DROP FUNCTION siamese._similar_keys(bytea, integer, text, jsonb, text[], real, text);
DROP FUNCTION siamese.similar_rows(anyelement, bytea, integer, text, jsonb, text[], real, text);
DROP FUNCTION siamese.classify_image(bytea, integer, text, text);
DROP FUNCTION siamese.build_index(text, integer, integer, real, integer);
DROP FUNCTION siamese.embed_pending(text, integer);

CREATE TYPE siamese.filter;

CREATE FUNCTION siamese._filter_in(cstring) RETURNS siamese.filter
LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE
AS 'jsonb_in';

CREATE FUNCTION siamese._filter_out(siamese.filter) RETURNS cstring
LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE
AS 'jsonb_out';

CREATE FUNCTION siamese._filter_recv(internal) RETURNS siamese.filter
LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE
AS 'jsonb_recv';

CREATE FUNCTION siamese._filter_send(siamese.filter) RETURNS bytea
LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE
AS 'jsonb_send';

CREATE TYPE siamese.filter (
    INPUT = siamese._filter_in,
    OUTPUT = siamese._filter_out,
    RECEIVE = siamese._filter_recv,
    SEND = siamese._filter_send,
    LIKE = pg_catalog.jsonb
);

CREATE CAST (jsonb AS siamese.filter) WITHOUT FUNCTION AS IMPLICIT;

CREATE CAST (json AS siamese.filter) WITH INOUT AS IMPLICIT;

CREATE CAST (text AS siamese.filter) WITH INOUT AS IMPLICIT;

CREATE CAST (varchar AS siamese.filter) WITH INOUT AS IMPLICIT;

CREATE TYPE siamese.key;

CREATE FUNCTION siamese._key_in(cstring) RETURNS siamese.key
LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE
AS 'textin';

CREATE FUNCTION siamese._key_out(siamese.key) RETURNS cstring
LANGUAGE internal IMMUTABLE STRICT PARALLEL SAFE
AS 'textout';

CREATE FUNCTION siamese._key_recv(internal) RETURNS siamese.key
LANGUAGE internal STABLE STRICT PARALLEL SAFE
AS 'textrecv';

CREATE FUNCTION siamese._key_send(siamese.key) RETURNS bytea
LANGUAGE internal STABLE STRICT PARALLEL SAFE
AS 'textsend';

CREATE TYPE siamese.key (
    INPUT = siamese._key_in,
    OUTPUT = siamese._key_out,
    RECEIVE = siamese._key_recv,
    SEND = siamese._key_send,
    LIKE = pg_catalog.text
);

CREATE CAST (text AS siamese.key) WITHOUT FUNCTION AS IMPLICIT;

CREATE CAST (varchar AS siamese.key) WITHOUT FUNCTION AS IMPLICIT;

CREATE CAST (smallint AS siamese.key) WITH INOUT AS IMPLICIT;

CREATE CAST (integer AS siamese.key) WITH INOUT AS IMPLICIT;

CREATE CAST (bigint AS siamese.key) WITH INOUT AS IMPLICIT;

CREATE CAST (numeric AS siamese.key) WITH INOUT AS IMPLICIT;

CREATE CAST (uuid AS siamese.key) WITH INOUT AS IMPLICIT;

CREATE TYPE siamese.similar_image AS (rank integer, image_id bigint, distance real, similarity real);

-- @REPLACEABLE@

CREATE TRIGGER follow_name AFTER UPDATE OF name ON siamese.collections
FOR EACH ROW WHEN (old.name IS DISTINCT FROM new.name) EXECUTE FUNCTION siamese._on_rename();

-- Views of vectors belong to their collections, not to the extension.
DO $$
DECLARE
    collection record;
BEGIN
    FOR collection IN SELECT c.collection_id, c.embed FROM siamese.collections AS c LOOP
        IF collection.embed OPERATOR(pg_catalog.=) 'deferred' THEN
            EXECUTE pg_catalog.format(
                'ALTER FUNCTION siamese._queue_insert_%s SET jit = off', collection.collection_id);
        END IF;
        PERFORM siamese._create_vectors_view(collection.collection_id);
        EXECUTE pg_catalog.format(
            'ALTER EXTENSION pg_siamese DROP VIEW %s', siamese._vectors_view(collection.collection_id));
    END LOOP;
END
$$;

-- What an update creates gets PostgreSQL's defaults, and so may be executed by everyone. Tables of the
-- user's own in this schema (siamese.images) are not members of the extension and keep their privileges.
DO $$
DECLARE
    object record;
BEGIN
    FOR object IN
        SELECT i.type, i.identity
        FROM pg_catalog.pg_depend AS d
        INNER JOIN pg_catalog.pg_extension AS x
            ON d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass AND d.refobjid = x.oid
        CROSS JOIN LATERAL pg_catalog.pg_identify_object(d.classid, d.objid, d.objsubid) AS i
        WHERE x.extname = 'pg_siamese' AND d.deptype = 'e' AND i.type IN ('function', 'table', 'view', 'sequence')
    LOOP
        EXECUTE pg_catalog.format(
            'REVOKE ALL ON %s %s FROM public',
            CASE WHEN object.type OPERATOR(pg_catalog.=) 'view' THEN 'table' ELSE object.type END, object.identity);
    END LOOP;
END
$$;
