-- Who may do what. Nothing is granted to everybody.

-- === Public functions ===

CREATE FUNCTION siamese.grant_usage(role text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$ BEGIN PERFORM siamese._grant(role, false); END $$;
COMMENT ON FUNCTION siamese.grant_usage(text)
IS 'let a role search; privileges on the tables of collections are granted by their owners';

CREATE FUNCTION siamese.grant_admin(role text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$ BEGIN PERFORM siamese._grant(role, true); END $$;
COMMENT ON FUNCTION siamese.grant_admin(text)
IS 'let a role register models, make its own tables collections, and build indexes';

CREATE FUNCTION siamese.grant_worker(role text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    target text;
    signature text;
BEGIN
    SELECT quote_ident(r.rolname) INTO target FROM pg_roles AS r WHERE r.rolname = grant_worker.role;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'role "%" does not exist', grant_worker.role USING ERRCODE = 'undefined_object';
    END IF;
    EXECUTE format('GRANT USAGE ON SCHEMA siamese TO %s', target);
    EXECUTE format('GRANT SELECT ON siamese.models, siamese.collections TO %s', target);
    FOR signature IN
        SELECT p.oid::regprocedure::text FROM pg_proc AS p
        WHERE p.pronamespace = 'siamese'::regnamespace AND p.proname IN (
            '_queued_collections', '_isolate_tickets', '_take_tickets', '_begin_tickets', '_end_tickets',
            '_read_images', '_store_vectors', '_build_if_needed')
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', signature, target);
    END LOOP;
END
$$;
COMMENT ON FUNCTION siamese.grant_worker(text)
IS 'let a role run pg_siamese worker: it reads the images of all deferred collections and stores their vectors';

CREATE FUNCTION siamese.renew_grants() RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    item record;
BEGIN
    -- A dump of an earlier version has none.
    PERFORM siamese._create_vectors_view(c.collection_id) FROM siamese.collections AS c
    WHERE siamese._vectors_view(c.collection_id) IS NULL
        AND to_regclass(format('siamese.embedding_%s', c.collection_id)) IS NOT NULL;
    FOR item IN
        SELECT r.rolname::text AS role, bool_or(p.proname = 'embed_image') AS is_reader,
            bool_or(p.proname = 'drop_model') AS is_admin, bool_or(p.proname = '_take_tickets') AS is_worker
        FROM pg_proc AS p
        CROSS JOIN LATERAL aclexplode(p.proacl) AS a
        INNER JOIN pg_roles AS r ON a.grantee = r.oid
        WHERE p.pronamespace = 'siamese'::regnamespace AND a.grantee <> p.proowner
            AND p.proname IN ('embed_image', 'drop_model', '_take_tickets')
        GROUP BY r.rolname
    LOOP
        IF item.is_reader OR item.is_admin THEN
            PERFORM siamese._grant(item.role, item.is_admin);
        END IF;
        IF item.is_worker THEN
            PERFORM siamese.grant_worker(item.role);
        END IF;
    END LOOP;
END
$$;
COMMENT ON FUNCTION siamese.renew_grants()
IS 'renew grants and views of vectors after an upgrade';

-- === Private functions ===

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
                    '_load', '_raise', 'similar_images', '_similar_images', '_match_line', 'similar_rows', '_similar_keys',
                    '_no_collection', 'classify_image', '_classify_image', 'embed_image', 'image_distance',
                    'same_class', 'any_two_match', '_compare_images', '_model_id', 'warm_up', '_warm_up',
                    '_is_waiting', '_estimate', '_may_see', '_caller', '_collection_counts', '_generation_file', '_queue_counts',
                    -- The planner calls these, as the caller, where it folds a constant.
                    '_key_in', '_key_out', '_filter_in', '_filter_out')
                OR (admin AND p.proname IN (
                    'register_model', 'register_shipped_models', 'drop_model', 'create_collection',
                    'alter_collection', 'drop_collection',
                    'renew_collections', 'backfill', 'build_index', 'rebuild_file', 'self_check', 'grant_usage',
                    'grant_admin', 'grant_worker', 'embed_pending'))
            )
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', signature, target);
    END LOOP;
    EXECUTE format('GRANT SELECT ON siamese.models, siamese.collections, siamese.generations TO %s', target);
    EXECUTE format('GRANT SELECT ON siamese.collection_status TO %s', target);
    FOR table_name IN
        SELECT format('siamese.embedding_%1$s, siamese.pending_%1$s', c.collection_id)
            || coalesce(', ' || siamese._vectors_view(c.collection_id)::text, '')
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
            'GRANT SELECT ON siamese.failures, siamese.index_generations,
                siamese.embedding_failures, siamese.embedding_queue_status TO %s', target);
    END IF;
END
$$;
COMMENT ON FUNCTION siamese._grant(text, boolean) IS 'grant an analyst''s or an administrator''s privileges';

CREATE FUNCTION siamese._grantees(function_name regproc) RETURNS SETOF text
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT quote_ident(r.rolname)
    FROM pg_proc AS p
    CROSS JOIN LATERAL aclexplode(p.proacl) AS a
    INNER JOIN pg_roles AS r ON a.grantee = r.oid
    WHERE p.oid = function_name AND a.privilege_type = 'EXECUTE' AND a.grantee <> p.proowner
$$;
COMMENT ON FUNCTION siamese._grantees(regproc) IS 'roles that may execute a function of the extension';

-- === Nothing for everybody ===

REVOKE ALL ON ALL TABLES IN SCHEMA siamese FROM public;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA siamese FROM public;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA siamese FROM public;
REVOKE ALL ON SCHEMA siamese FROM public;
