-- Triggers of deferred collections: they delete the vectors of changed rows and add tickets.

CREATE FUNCTION siamese._create_insert_trigger(collection_id integer) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    collection siamese.collections;
    is_number boolean;
BEGIN
    SELECT c.* INTO collection FROM siamese.collections AS c
    WHERE c.collection_id = _create_insert_trigger.collection_id;
    is_number := collection.key_type IN ('integer', 'bigint');
    -- One for each collection, since a session keeps the plans of what stands in a function as it is. This
    -- one must be quick, also for single rows. Vectors of rows that are new are left-overs of changes with
    -- triggers off. Numbers beyond the last vector's key have none. Arrays of items of a fixed length are cut
    -- up in no time. Of texts, each slice would be looked for from the start.
    EXECUTE format($sql$
        CREATE OR REPLACE FUNCTION siamese._queue_insert_%1$s() RETURNS trigger
        LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
        SET search_path = pg_catalog, pg_temp SET jit = off
        AS $f$
        BEGIN
            PERFORM siamese._check_table(%1$s, TG_RELID);
            IF NOT EXISTS (SELECT FROM siamese.queue_%1$s AS q WHERE q.not_before IS NULL) THEN
                PERFORM pg_notify('pg_siamese_queue', '%1$s');
            END IF;
            WITH added AS MATERIALIZED (
                SELECT array_agg(n.%2$I::%6$s) AS keys, %3$s AS first,
                    array_agg(n.%2$I::%6$s) FILTER (WHERE n.%7$I IS NOT NULL) AS wanted
                FROM new_rows AS n
            ), gone AS (
                DELETE FROM siamese.embedding_%1$s AS e WHERE e.embedding_id = ANY(ARRAY(
                    SELECT v.embedding_id FROM added CROSS JOIN unnest(added.keys) AS k (key)
                    CROSS JOIN LATERAL (
                        SELECT e.embedding_id FROM siamese.embedding_%1$s AS e
                        WHERE e.key = k.key OFFSET 0) AS v
                    WHERE %4$s))
                RETURNING e.embedding_id
            ), dead AS (
                INSERT INTO siamese.pending_%1$s (embedding_id, deleted) SELECT g.embedding_id, true FROM gone AS g
            )
            INSERT INTO siamese.queue_%1$s (keys) %5$s;
            IF EXISTS (SELECT FROM siamese.failures AS f WHERE f.collection_id = %1$s) THEN
                DELETE FROM siamese.failures AS f USING new_rows AS n
                WHERE f.collection_id = %1$s AND f.key = n.%2$I::text;
            END IF;
            RETURN NULL;
        END
        $f$
        $sql$, collection_id, collection.key_column,
        CASE WHEN is_number THEN format('min(n.%I)', collection.key_column) ELSE 'NULL' END,
        CASE WHEN is_number
            THEN format('added.first <= (SELECT max(e.key) FROM siamese.embedding_%s AS e)', collection_id)
            ELSE 'true' END,
        CASE collection.key_type WHEN 'text' THEN
            'SELECT array_agg(k.key ORDER BY k.place)
            FROM added CROSS JOIN unnest(added.wanted) WITH ORDINALITY AS k (key, place)
            GROUP BY (k.place - 1) / 64 ORDER BY min(k.place)'
        ELSE
            'SELECT added.wanted[i:i + 63] FROM added CROSS JOIN generate_series(1, cardinality(added.wanted), 64) AS i'
        END, collection.key_type, collection.image_column);
    EXECUTE format('REVOKE ALL ON FUNCTION siamese._queue_insert_%s FROM public', collection_id);
    EXECUTE format(
        'COMMENT ON FUNCTION siamese._queue_insert_%s IS %L', collection_id,
        'insert trigger of collection ' || collection.name);
END
$$;
COMMENT ON FUNCTION siamese._create_insert_trigger(integer)
IS 'create the function that queues inserted rows';

CREATE FUNCTION siamese._queue_change() RETURNS trigger
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET jit = off
AS $$
DECLARE
    number integer := TG_ARGV[0];
    collection siamese.collections;
    query text;
    changed record;
    keys text[];
BEGIN
    PERFORM siamese._check_table(number, TG_RELID);
    SELECT c.* INTO collection FROM siamese.collections AS c WHERE c.collection_id = number;
    CASE TG_OP
    WHEN 'UPDATE' THEN
        query := siamese._changed_keys_query(number, TG_RELID);
        IF query IS NOT NULL THEN
            EXECUTE query INTO changed;
            keys := changed.keys::text[];
        END IF;
        IF keys IS NOT NULL THEN
            PERFORM siamese._forget_vectors(number, keys);
            PERFORM siamese._add_tickets(number, keys);
        END IF;
    WHEN 'DELETE' THEN
        EXECUTE format('SELECT array_agg(o.%I::text) FROM old_rows AS o', collection.key_column) INTO keys;
        IF keys IS NOT NULL THEN
            PERFORM siamese._forget_vectors(number, keys);
            PERFORM siamese._let_owner_read(number);
            -- What is there again was inserted by the same statement, and may have been embedded since.
            EXECUTE format(
                'SELECT array_agg(p.key::text) FROM siamese._present_%s($1::%s[]) AS p (key)',
                number, collection.key_type)
            INTO keys USING keys;
            IF keys IS NOT NULL THEN
                PERFORM siamese._add_tickets(number, keys);
            END IF;
        END IF;
    WHEN 'TRUNCATE' THEN
        PERFORM siamese._forget_all(number);
        EXECUTE format($sql$
            DELETE FROM siamese.queue_%1$s AS q
            WHERE q.ticket IN (SELECT t.ticket FROM siamese.queue_%1$s AS t FOR UPDATE SKIP LOCKED)
            $sql$, number);
    END CASE;
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION siamese._queue_change() IS 'statement trigger of deferred collections';
