"""A search, from its request to the rows: FAISS, exact scans, filters, pending changes."""
