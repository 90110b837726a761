CREATE FUNCTION siamese._forget_all(collection_id integer) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    UPDATE siamese.collections AS c SET generation = NULL, epoch = epoch + 1
    WHERE c.collection_id = _forget_all.collection_id;
    -- DELETE, since a TRUNCATE of ours could deadlock with searches and builds.
    EXECUTE format('DELETE FROM siamese.embedding_%s', collection_id);
    EXECUTE format('DELETE FROM siamese.pending_%s', collection_id);
    DELETE FROM siamese.failures AS f WHERE f.collection_id = _forget_all.collection_id;
END
$$;
COMMENT ON FUNCTION siamese._forget_all(integer) IS 'delete all vectors of a collection, after TRUNCATE';

CREATE FUNCTION siamese._follow_without_packages(
    event text, collection_id integer, relation oid, keys text[]
) RETURNS boolean
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    gone text[];
BEGIN
    PERFORM siamese._check_table(collection_id, relation);
    IF event IN ('INSERT', 'UPDATE') THEN
        RETURN keys IS NULL;
    ELSIF event = 'TRUNCATE' THEN
        PERFORM siamese._forget_all(collection_id);
    ELSIF keys IS NOT NULL THEN
        PERFORM siamese._let_owner_read(collection_id);
        -- One that is there again was inserted by the same statement, whose trigger sees to it.
        EXECUTE format(
            'SELECT array_agg(k.key) FROM unnest($1) AS k (key) WHERE NOT EXISTS (
                SELECT FROM siamese._present_%s($1::%s[]) AS p (key) WHERE p.key::text = k.key)',
            collection_id, (
                SELECT c.key_type FROM siamese.collections AS c
                WHERE c.collection_id = _follow_without_packages.collection_id))
        INTO gone USING keys;
        IF gone IS NOT NULL THEN
            PERFORM siamese._forget_vectors(collection_id, gone);
        END IF;
    END IF;
    RETURN true;
END
$$;
COMMENT ON FUNCTION siamese._follow_without_packages(text, integer, oid, text[])
IS 'follow a statement that needs no embedding, if it does';
