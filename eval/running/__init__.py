"""Running an evaluation: requests are made in every system, and each leaves a row in the run's folder."""

from __future__ import annotations

from .folder import RunFolder, RunFolderError
from .run import RunConfig, run

__all__ = ["RunConfig", "RunFolder", "RunFolderError", "run"]
