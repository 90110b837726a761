"""The FAISS index on disk: its file, its graph, its generations, builds and rebuilds."""
