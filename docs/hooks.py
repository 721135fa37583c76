"""Hooks of the docs site: pages that lie in the repository's root, and links that leave `docs/`.

README.md, CONTRIBUTING.md, SECURITY.md and CHANGELOG.md stay where GitHub looks for them and are pages of the site as
well. A link from a page to a file of the repository that is not on the site becomes plain text. A page that loads
anything from another host fails the build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
_REMOTE = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\ssrc=["']?(?:https?:)?//"""
    r"""|<link\b[^>]*\brel=["']?(?:stylesheet|preconnect|icon)\b[^>]*\bhref=["']?(?:https?:)?//"""
)
_LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository's root."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that are right in the repository into links that are right on the site."""
    uri = page.file.src_uri
    sources = {made: source for source, made in ROOT_PAGES.items()}
    return relink(markdown, sources.get(uri, f"docs/{uri}"), uri)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse what the browser would load from another host."""
    if remote := _REMOTE.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {remote[0]}")
    return output


def relink(markdown: str, source: str, uri: str) -> str:
    """Rewrite the links of a page.

    Args:
        markdown: text of the page.
        source: its path in the repository; links in it are relative to that.
        uri: its path on the site.
    """

    def rewritten(link: re.Match[str]) -> str:
        target, hash_sign, anchor = link["target"].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in ROOT_PAGES:
            path = ROOT_PAGES[path]
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif not (ROOT / path).exists():
            return link[0]  # The strict build reports it.
        else:
            return link["text"]
        there = posixpath.relpath(path, posixpath.dirname(uri) or ".")
        return f"{link['picture']}[{link['text']}]({there}{hash_sign}{anchor})"

    return _LINK.sub(rewritten, markdown)
