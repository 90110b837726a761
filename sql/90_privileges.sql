-- Who may do what: one table of privileges, which all grants read. Nothing is granted to everybody.

-- === Public functions ===

CREATE FUNCTION siamese.grant_usage(role text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$ BEGIN PERFORM siamese._grant(role, 'usage'); END $$;
COMMENT ON FUNCTION siamese.grant_usage(text) IS 'let a role search';

CREATE FUNCTION siamese.grant_admin(role text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$ BEGIN PERFORM siamese._grant(role, 'admin'); END $$;
COMMENT ON FUNCTION siamese.grant_admin(text) IS 'let a role create collections on its own tables';

CREATE FUNCTION siamese.grant_worker(role text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$ BEGIN PERFORM siamese._grant(role, 'worker'); END $$;
COMMENT ON FUNCTION siamese.grant_worker(text) IS 'let a role run pg_siamese worker';

CREATE FUNCTION siamese.renew_grants() RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- A dump of an earlier version has none.
    PERFORM siamese._create_vectors_view(c.collection_id) FROM siamese.collections AS c
    WHERE siamese._vectors_view(c.collection_id) IS NULL
        AND to_regclass(format('siamese.embedding_%s', c.collection_id)) IS NOT NULL;
    -- Who has one of these functions, in whatever version, has been granted what it is listed with.
    PERFORM siamese._grant(r.role, k.kind)
    FROM (VALUES ('usage', 'embed_image'), ('admin', 'drop_model'), ('worker', '_take_tickets')) AS k (kind, sign)
    CROSS JOIN LATERAL siamese._grantees(format('siamese.%s', k.sign)::regproc) AS r (role);
END
$$;
COMMENT ON FUNCTION siamese.renew_grants() IS 'reapply grants after an upgrade';

-- === Private functions ===

CREATE FUNCTION siamese._privileges() RETURNS TABLE (object text, kinds text[])
LANGUAGE sql IMMUTABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
-- Tables and views to SELECT from, functions to EXECUTE.
VALUES
    ('models', '{usage,admin,worker}'::text[]),
    ('collections', '{usage,admin,worker}'),
    ('generations', '{usage,admin}'),
    ('collection_status', '{usage,admin}'),
    ('failures', '{admin}'),
    ('index_generations', '{admin}'),
    ('embedding_failures', '{admin}'),
    ('embedding_queue_status', '{admin}'),
    ('_load', '{usage,admin}'),
    ('_raise', '{usage,admin}'),
    ('_caller', '{usage,admin}'),
    ('_model_id', '{usage,admin}'),
    ('similar_images', '{usage,admin}'),
    ('_similar_images', '{usage,admin}'),
    ('_match_line', '{usage,admin}'),
    ('similar_rows', '{usage,admin}'),
    ('_similar_keys', '{usage,admin}'),
    ('_no_collection', '{usage,admin}'),
    ('classify_image', '{usage,admin}'),
    ('_classify_image', '{usage,admin}'),
    ('_estimate', '{usage,admin}'),
    ('embed_image', '{usage,admin}'),
    ('image_distance', '{usage,admin}'),
    ('same_class', '{usage,admin}'),
    ('any_two_match', '{usage,admin}'),
    ('_compare_images', '{usage,admin}'),
    ('dicom_keywords', '{usage,admin}'),
    ('dicom_tags', '{usage,admin}'),
    ('_dicom_tags', '{usage,admin}'),
    ('dicom_tag', '{usage,admin}'),
    ('_dicom_tag', '{usage,admin}'),
    ('warm_up', '{usage,admin}'),
    ('_warm_up', '{usage,admin}'),
    ('_is_waiting', '{usage,admin}'),
    ('_may_see', '{usage,admin}'),
    ('_collection_counts', '{usage,admin}'),
    ('_queue_counts', '{usage,admin}'),
    ('_generation_file', '{usage,admin}'),
    -- The planner calls these, as the caller, when it folds a constant.
    ('_key_in', '{usage,admin}'),
    ('_key_out', '{usage,admin}'),
    ('_filter_in', '{usage,admin}'),
    ('_filter_out', '{usage,admin}'),
    ('register_model', '{admin}'),
    ('register_shipped_models', '{admin}'),
    ('drop_model', '{admin}'),
    ('create_collection', '{admin}'),
    ('alter_collection', '{admin}'),
    ('drop_collection', '{admin}'),
    ('renew_collections', '{admin}'),
    ('backfill', '{admin}'),
    ('embed_pending', '{admin}'),
    ('build_index', '{admin}'),
    ('rebuild_file', '{admin}'),
    ('self_check', '{admin}'),
    ('grant_usage', '{admin}'),
    ('grant_admin', '{admin}'),
    ('grant_worker', '{admin}'),
    ('_queued_collections', '{worker}'),
    ('_take_tickets', '{worker}'),
    ('_begin_tickets', '{worker}'),
    ('_end_tickets', '{worker}'),
    ('_isolate_tickets', '{worker}'),
    ('_read_images', '{worker}'),
    ('_store_vectors', '{worker}'),
    ('_build_if_needed', '{worker}')
$$;
COMMENT ON FUNCTION siamese._privileges() IS 'what each kind of role may use';

CREATE FUNCTION siamese._grant(role text, kind text) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    privilege text;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles AS r WHERE r.rolname = role) THEN
        RAISE EXCEPTION 'role "%" does not exist', role USING ERRCODE = 'undefined_object';
    END IF;
    FOR privilege IN
        SELECT 'USAGE ON SCHEMA siamese'
        UNION ALL
        SELECT 'SELECT ON ' || t.oid::regclass FROM siamese._privileges() AS p
        INNER JOIN pg_class AS t ON t.relname = p.object AND t.relnamespace = 'siamese'::regnamespace
        WHERE kind = ANY(p.kinds)
        UNION ALL
        SELECT 'EXECUTE ON FUNCTION ' || f.oid::regprocedure FROM siamese._privileges() AS p
        INNER JOIN pg_proc AS f ON f.proname = p.object AND f.pronamespace = 'siamese'::regnamespace
        WHERE kind = ANY(p.kinds)
        UNION ALL
        SELECT 'SELECT ON ' || t.name FROM siamese.collections AS c
        CROSS JOIN LATERAL (VALUES
            (to_regclass(format('siamese.embedding_%s', c.collection_id))),
            (to_regclass(format('siamese.pending_%s', c.collection_id))),
            (siamese._vectors_view(c.collection_id))) AS t (name)
        WHERE kind <> 'worker' AND t.name IS NOT NULL
        UNION ALL
        SELECT CASE kind WHEN 'admin' THEN 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE' ELSE 'SELECT' END
            || ' ON siamese.images'
        WHERE kind <> 'worker' AND to_regclass('siamese.images') IS NOT NULL
    LOOP
        EXECUTE format('GRANT %s TO %I', privilege, role);
    END LOOP;
END
$$;
COMMENT ON FUNCTION siamese._grant(text, text) IS 'grant a kind of role its privileges';

CREATE FUNCTION siamese._grantees(function_name regproc) RETURNS SETOF text
LANGUAGE sql STABLE PARALLEL SAFE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT r.rolname::text
    FROM pg_proc AS p
    CROSS JOIN LATERAL aclexplode(p.proacl) AS a
    INNER JOIN pg_roles AS r ON a.grantee = r.oid
    WHERE p.oid = function_name AND a.privilege_type = 'EXECUTE' AND a.grantee <> p.proowner
$$;
COMMENT ON FUNCTION siamese._grantees(regproc) IS 'roles that may execute a function';

-- === Nothing for everybody ===

REVOKE ALL ON ALL TABLES IN SCHEMA siamese FROM public;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA siamese FROM public;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA siamese FROM public;
REVOKE ALL ON SCHEMA siamese FROM public;
