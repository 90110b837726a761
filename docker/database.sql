-- Run by the entry point, once, in the new database: the extension, the shipped encoders, and the
-- ready-made collection "images". Variable: database.

-- After public, so that CREATE TABLE without a schema goes where people expect it.
ALTER DATABASE :"database" SET search_path = "$user", public, siamese;

CREATE EXTENSION pg_siamese CASCADE;

\o /dev/null
SELECT FROM siamese.register_shipped_models();
SELECT siamese.create_collection(model => 'medical');
\o
