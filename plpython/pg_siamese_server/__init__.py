"""Server side of pg_siamese: what the PL/Python functions of the extension import.

Importable and testable without PostgreSQL: every function that talks to the database takes the
``plpy`` module as its first argument. Nothing heavy is imported here, since the first statement of
every session pays for it.
"""

from pg_siamese_server import telemetry

__version__ = "0.3.0"

# Before anything of the server, the client or a worker can import ONNX Runtime.
telemetry.switch_off()
