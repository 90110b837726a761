\echo Use "CREATE EXTENSION pg_siamese CASCADE" to load this file. \quit

-- The schema, and what all other files need: loading the server package, raising its errors, and the role
-- that calls. tools/extension.py puts the call of _load into the other PL/Python bodies. In all files, a
-- parameter that has the name of a column is qualified with the function's name, as in create_collection.name.
-- Public functions are PL/pgSQL or SQL, which raise the errors that PL/Python returns. If PL/Python raises an
-- error itself, its message names an exception, and its CONTEXT has a traceback.

COMMENT ON SCHEMA siamese IS 'similar-image search';

CREATE FUNCTION siamese._load() RETURNS text[]
LANGUAGE plpython3u VOLATILE PARALLEL UNSAFE
AS $python$
import os
import sys

# Of the Python that runs here: a database moved to another server finds that server's packages.
link = f'@PACKAGES@/@VERSION@/python{sys.version_info.major}.{sys.version_info.minor}'
# Where the link leads now, so that a reinstallation doesn't change packages under this session.
directory = os.path.realpath(link)
if directory not in sys.path:
    sys.path.insert(0, directory)
try:
    import pg_siamese_server
    from pg_siamese_server import api
except ImportError as error:
    return [
        '58P01',
        'could not load the server package of pg_siamese',
        f'{error}.' if os.path.isdir(link) else f'There is no folder "{link}".',
        f'Run make install for this server; its packages belong in "{link}".',
    ]
if pg_siamese_server.__version__ != '@VERSION@':
    return [
        '55000',
        f'this session has loaded version {pg_siamese_server.__version__} of pg_siamese, '
        'but the extension is of version @VERSION@',
        None,
        'Start a new session; where that does not help, reinstall pg_siamese.',
    ]
GD['pg_siamese @VERSION@'] = api
$python$;
COMMENT ON FUNCTION siamese._load() IS 'load the server package; returns an error or nothing';

CREATE FUNCTION siamese._raise(failure text[]) RETURNS void
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- SQLSTATE, message, DETAIL, HINT. RAISE takes no NULL.
    IF failure[1] IS NULL THEN
        RETURN;
    ELSIF failure[3] IS NOT NULL AND failure[4] IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = failure[1], MESSAGE = failure[2], DETAIL = failure[3], HINT = failure[4];
    ELSIF failure[3] IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = failure[1], MESSAGE = failure[2], DETAIL = failure[3];
    ELSIF failure[4] IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = failure[1], MESSAGE = failure[2], HINT = failure[4];
    END IF;
    RAISE EXCEPTION USING ERRCODE = failure[1], MESSAGE = failure[2];
END
$$;
COMMENT ON FUNCTION siamese._raise(text[]) IS 'raise the error that PL/Python returned, if any';

CREATE FUNCTION siamese._caller() RETURNS name
LANGUAGE sql STABLE PARALLEL SAFE
AS $$
    SELECT CASE
        WHEN pg_catalog.current_setting('role') OPERATOR(pg_catalog.=) 'none' THEN session_user
        ELSE pg_catalog.current_setting('role')::pg_catalog.name
    END
$$;
COMMENT ON FUNCTION siamese._caller() IS 'role that the session acts as';

CREATE FUNCTION siamese._xact_id() RETURNS xid8
LANGUAGE plpgsql IMMUTABLE PARALLEL UNSAFE
-- IMMUTABLE, since generated columns ask for it: dumps leave these out, and restores draw them anew.
-- Not in SQL: each statement that calls such a function plans it anew.
AS $$ BEGIN RETURN pg_catalog.pg_current_xact_id(); END $$;
COMMENT ON FUNCTION siamese._xact_id() IS 'current transaction ID, immutable for use in generated columns';
