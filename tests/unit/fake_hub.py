"""A Hugging Face Hub of folders, and a note of every call that it got."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Stands in for `huggingface_hub.HfApi`, with one repository, `owner/name`.

    Attributes:
        folder: its files.
        commit: what every revision leads to.
        calls: method, path or paths, revision.
        told: by path, what is said of a file in the place of the truth: `(length, SHA-256 or None)`, or `None` for a
            file that is not named.
        on_download: called with the path before a file is fetched.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commit: str | None = COMMIT
        self.calls: list[tuple[str, Any, str | None]] = []
        self.told: dict[str, tuple[int, str | None] | None] = {}
        self.on_download = lambda path: None

    def __call__(self) -> FakeHub:
        return self

    def fetched(self) -> list[str]:
        """Paths of the files that were fetched, in order."""
        return [path for method, path, _ in self.calls if method == "hf_hub_download"]

    def repo_info(self, name: str, *, repo_type: str, revision: str | None) -> Any:
        self._note("repo_info", None, revision, name, repo_type)
        return SimpleNamespace(sha=self.commit)

    def get_paths_info(self, name: str, paths: list[str], *, revision: str, repo_type: str) -> list[Any]:
        self._note("get_paths_info", tuple(paths), revision, name, repo_type)
        found = []
        for path in paths:
            if path in self.told:
                told = self.told[path]
            elif (self.folder / path).is_file():
                told = (self.folder / path).stat().st_size, None
            else:
                told = None
            if told is not None:
                lfs = None if told[1] is None else SimpleNamespace(sha256=told[1])
                found.append(SimpleNamespace(path=path, size=told[0], lfs=lfs))
        return found

    def hf_hub_download(self, name: str, path: str, *, repo_type: str, revision: str, local_dir: Path) -> str:
        self._note("hf_hub_download", path, revision, name, repo_type)
        self.on_download(path)
        notes = Path(local_dir) / ".cache" / "huggingface" / "download" / f"{path}.metadata"
        target = Path(local_dir) / path
        for place in (notes, target):
            place.parent.mkdir(parents=True, exist_ok=True)
        notes.write_text(f"{revision}\n")
        shutil.copyfile(self.folder / path, target)
        return str(target)

    def _note(self, method: str, path: Any, revision: str | None, name: str, repo_type: str) -> None:
        assert repo_type == "model"
        self.calls.append((method, path, revision))
        if name != "owner/name":
            raise huggingface_hub.errors.OfflineModeIsEnabled("no such\nrepository")
