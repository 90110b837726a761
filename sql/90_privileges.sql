CREATE FUNCTION siamese._grant(role_name text, admin boolean) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    target text;
    signature text;
    table_name text;
BEGIN
    SELECT quote_ident(r.rolname) INTO target FROM pg_roles AS r WHERE r.rolname = role_name;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'role "%" does not exist', role_name USING ERRCODE = 'undefined_object';
    END IF;
    EXECUTE format('GRANT USAGE ON SCHEMA siamese TO %s', target);
    FOR signature IN
        SELECT p.oid::regprocedure::text FROM pg_proc AS p
        WHERE p.pronamespace = 'siamese'::regnamespace
            AND (
                p.proname IN (
                    '_load', 'similar_images', '_similar_keys', 'similar_rows', 'classify_image',
                    'embed_image', 'image_distance', 'same_class', 'any_two_match', '_model_id', 'warm_up')
                OR (admin AND p.proname IN (
                    'register_model', 'drop_model', 'create_collection', 'drop_collection', 'backfill',
                    'build_index', 'self_check', '_collection_counts', '_generation_file',
                    'grant_usage', 'grant_admin'))
            )
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', signature, target);
    END LOOP;
    EXECUTE format('GRANT SELECT ON siamese.models, siamese.collections, siamese.generations TO %s', target);
    FOR table_name IN
        SELECT format('siamese.embedding_%1$s, siamese.pending_%1$s', c.collection_id)
        FROM siamese.collections AS c
    LOOP
        EXECUTE format('GRANT SELECT ON %s TO %s', table_name, target);
    END LOOP;
    IF to_regclass('siamese.images') IS NOT NULL THEN
        EXECUTE format(
            'GRANT %s ON siamese.images TO %s',
            CASE WHEN admin THEN 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE' ELSE 'SELECT' END, target);
    END IF;
    IF admin THEN
        EXECUTE format(
            'GRANT SELECT ON siamese.failures, siamese.collection_status, siamese.index_generations,
                siamese.embedding_failures TO %s', target);
    END IF;
END
$$;
COMMENT ON FUNCTION siamese._grant(text, boolean) IS 'grant an analyst''s or an administrator''s privileges';

CREATE FUNCTION siamese.grant_usage(role text) RETURNS void
LANGUAGE sql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$ SELECT siamese._grant(role, false) $$;
COMMENT ON FUNCTION siamese.grant_usage(text)
IS 'let a role search; privileges on the tables of collections are granted by their owners';

CREATE FUNCTION siamese.grant_admin(role text) RETURNS void
LANGUAGE sql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$ SELECT siamese._grant(role, true) $$;
COMMENT ON FUNCTION siamese.grant_admin(text)
IS 'let a role register models, make its own tables collections, and build indexes';

REVOKE ALL ON ALL TABLES IN SCHEMA siamese FROM public;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA siamese FROM public;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA siamese FROM public;
REVOKE ALL ON SCHEMA siamese FROM public;
