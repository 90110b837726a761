\echo Use "ALTER EXTENSION pg_siamese UPDATE" to load this file. \quit

ALTER TABLE siamese.collections
ADD COLUMN embed text NOT NULL DEFAULT 'sync' CHECK (embed IN ('sync', 'deferred'));

CREATE TABLE siamese.embedding_batches (
    collection_id integer NOT NULL,
    embedded_at timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    rows integer NOT NULL
);

CREATE TABLE siamese.embedding_attempts (
    collection_id integer NOT NULL,
    ticket bigint NOT NULL,
    begun integer NOT NULL DEFAULT 1,
    PRIMARY KEY (collection_id, ticket)
);

-- It has one argument more now.
DROP FUNCTION siamese.create_collection(text, regclass, text, text, text, text, boolean);

-- @REPLACEABLE@

REVOKE ALL ON TABLE
siamese.embedding_batches, siamese.embedding_attempts, siamese.embedding_queue_status FROM public;
REVOKE ALL ON FUNCTION siamese.create_collection(text, regclass, text, text, text, text, boolean, text) FROM public;
REVOKE ALL ON FUNCTION siamese._create_queue(integer, text) FROM public;
REVOKE ALL ON FUNCTION siamese._add_tickets(integer, text[]) FROM public;
REVOKE ALL ON FUNCTION siamese._create_insert_trigger(integer) FROM public;
REVOKE ALL ON FUNCTION siamese._check_columns(integer, oid) FROM public;
REVOKE ALL ON FUNCTION siamese._forget_vectors(integer, text[]) FROM public;
REVOKE ALL ON FUNCTION siamese._queue_change() FROM public;
REVOKE ALL ON FUNCTION siamese._queued_collections() FROM public;
REVOKE ALL ON FUNCTION siamese._is_waiting(integer) FROM public;
REVOKE ALL ON FUNCTION siamese._take_tickets(integer, integer) FROM public;
REVOKE ALL ON FUNCTION siamese._begin_tickets(integer, bigint[]) FROM public;
REVOKE ALL ON FUNCTION siamese._end_tickets(integer, bigint[]) FROM public;
REVOKE ALL ON FUNCTION siamese._isolate_tickets(integer) FROM public;
REVOKE ALL ON FUNCTION siamese._read_images(integer, text[]) FROM public;
REVOKE ALL ON FUNCTION siamese._store_vectors(
    integer, text, bigint[], text[], text[], bytea[], text[], text[], bytea[], text[], text[], boolean[]
) FROM public;
REVOKE ALL ON FUNCTION siamese._build_if_needed(integer, bigint, real) FROM public;
REVOKE ALL ON FUNCTION siamese._queue_missing(integer) FROM public;
REVOKE ALL ON FUNCTION siamese.rebuild_file(text) FROM public;
REVOKE ALL ON FUNCTION siamese.embed_pending(text, integer) FROM public;
REVOKE ALL ON FUNCTION siamese._queue_counts(integer) FROM public;
REVOKE ALL ON FUNCTION siamese.grant_worker(text) FROM public;
REVOKE ALL ON FUNCTION siamese.renew_grants() FROM public;
