"""The `contiguouskv` command with all its subcommands; also `python -m hf_contiguouskv`."""

from . import cli_model as _model_commands  # noqa: F401 - registers its commands
from .cli import app

__all__ = ["app"]

if __name__ == "__main__":
    app()
