"""From the bytes of an image file to an embedding: formats, encoders, registered models."""
