"""The `contiguouskv` command; also `python -m hf_contiguouskv`."""

from .cli import app

__all__ = ["app"]

if __name__ == "__main__":
    app()
