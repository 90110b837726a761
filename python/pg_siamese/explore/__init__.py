"""The page of ``pg_siamese explore``: look through collections in a browser."""
