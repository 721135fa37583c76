"""The `contiguouskv` command: look after a store from the shell.

Exit status: 0 done, 1 problems were found, 2 could not be done; 128 and the number of a signal that ended it (143:
SIGTERM). Errors are one line on stderr; with `--json`, stdout holds one JSON document and nothing else, also when there
is an error: `{"error": {"type": ..., "message": ...}}`.
"""

# Importing them registers their commands, in the order in which `--help` lists them.
from . import show as _show  # noqa: F401, I001
from . import care as _care  # noqa: F401
from . import repack as _repack  # noqa: F401
from . import warm as _warm  # noqa: F401
from . import bundle as _bundle  # noqa: F401
from . import fleet as _fleet  # noqa: F401
from . import plan as _plan  # noqa: F401
from .app import app
from .messages import messages_instead_of_tracebacks
from .output import human_bytes

__all__ = ["app", "human_bytes", "messages_instead_of_tracebacks"]
