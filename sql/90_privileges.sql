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
    -- Who has one of these functions, with the same arguments in all versions, has been granted what it is listed with.
    PERFORM siamese._grant(r.role, k.kind)
    FROM (VALUES ('usage', 'image_distance'), ('admin', 'drop_model'), ('worker', '_take_tickets')) AS k (kind, sign)
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
SELECT unnest(p.objects), p.kinds
FROM (VALUES
    (ARRAY['models', 'collections'], ARRAY['usage', 'admin', 'worker']),
    (ARRAY['generations', 'collection_status', 'progress'], ARRAY['usage', 'admin']),
    (ARRAY['failures', 'index_generations', 'embedding_failures', 'embedding_queue_status'], ARRAY['admin']),
    (ARRAY[
        '_load', '_raise', '_caller', '_model_id', 'similar_images', '_similar_images', '_match_line', 'similar_rows',
        '_similar_keys', 'nearest', '_nearest', 'similar_pairs', '_similar_pairs', 'near_duplicates', '_near_duplicates',
        'leaks', '_leaks', '_no_collection', 'classify_image', '_classify_image', '_estimate',
        'explain_search', '_explain_search', 'measure_recall', '_measure_recall', 'retrieval_quality',
        '_retrieval_quality', 'similarity_map', '_similarity_map', 'embed_image',
        '_embed_image', 'image_distance', 'same_class', 'any_two_match', '_compare_images', 'warm_up', '_warm_up', '_is_waiting',
        '_may_see', '_collection_counts', '_queue_counts', '_generation_file', '_progress', 'dicom_keywords', 'dicom_tags',
        '_dicom_tags', 'dicom_tag', '_dicom_tag', 'thumbnail', '_thumbnail', 'contact_sheet', '_contact_sheet',
        'data_uri',
        -- The planner calls these, as the caller, when it folds a constant.
        '_key_in', '_key_out', '_filter_in', '_filter_out'], ARRAY['usage', 'admin']),
    (ARRAY[
        'register_model', 'register_shipped_models', 'drop_model', 'create_collection', 'alter_collection',
        'change_model', 'switch_model', 'drop_collection', 'renew_collections', 'backfill', 'embed_pending',
        'build_index', 'rebuild_file', 'self_check', 'grant_usage', 'grant_admin', 'grant_worker'], ARRAY['admin']),
    (ARRAY[
        '_queued_collections', '_take_tickets', '_begin_tickets', '_end_tickets', '_isolate_tickets', '_read_images',
        '_store_vectors', '_build_if_needed'], ARRAY['worker'])) AS p (objects, kinds)
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
