"""Running an evaluation: every system makes all requests, and each request leaves a row in the run's folder."""

from __future__ import annotations

from .config import RunConfig
from .folder import RunFolder, RunFolderError
from .requests import NotServedError
from .run import run

__all__ = ["NotServedError", "RunConfig", "RunFolder", "RunFolderError", "run"]
