\echo Use "ALTER EXTENSION pg_siamese UPDATE" to load this file. \quit

ALTER TABLE siamese.generations ADD COLUMN ef_search_many integer[];

-- Parameters became as wide as drivers send them, and one more came.
DROP FUNCTION siamese.register_model(
    text, bytea, integer, integer, real[], real[], text, text, text, jsonb, real, bigint, bigint
);

-- @REPLACEABLE@

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
