"""Know the folders of an installed PostgreSQL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Installation:
    """One installed major version, in Debian's layout below ``prefix``."""

    major: int
    prefix: Path = Path("/usr")

    @property
    def bin(self) -> Path:
        """The programs."""
        return self.prefix / "lib" / "postgresql" / str(self.major) / "bin"

    @property
    def lib(self) -> Path:
        """The loadable modules ($libdir)."""
        return self.prefix / "lib" / "postgresql" / str(self.major) / "lib"

    @property
    def share(self) -> Path:
        """The share folder, with control files and install scripts in ``extension/``."""
        return self.prefix / "share" / "postgresql" / str(self.major)

    @property
    def extensions(self) -> Path:
        """The folder of control files and install scripts."""
        return self.share / "extension"

    def missing(self) -> list[str]:
        """Return the Debian packages that this version still needs to run the extension."""
        packages = []
        if not (self.bin / "postgres").exists() or not (self.bin / "psql").exists():
            packages.append(f"postgresql-{self.major}")
        if not (self.lib / "plpython3.so").exists():
            packages.append(f"postgresql-plpython3-{self.major}")
        return packages
