"""Server side of pg_siamese: what the PL/Python functions of the extension import.

It runs and is tested without PostgreSQL, too. Every function that talks to the database takes
``plpy`` as its first argument. Nothing heavy is imported here, since every session's first
statement pays for it.
"""

from pg_siamese_server import telemetry

__version__ = "0.3.0"

# Before the server, the client or a worker can import ONNX Runtime.
telemetry.switch_off()
