"""Set-up and the embedded cluster. Standard library only: it runs before anything is installed."""

from __future__ import annotations
