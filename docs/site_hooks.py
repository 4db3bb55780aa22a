"""Hooks of mkdocs: repository files that pages link to become a part of the site.

Pages link as GitHub reads them: ``../CONTRIBUTING.md``, ``../benchmarks/results/fidelity/pareto.png``. Each such file
is added to the site below ``repository/``, and links are rewritten to it; so are the links of the pages that are added.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = "repository"
"""Where the site keeps files from outside of the folder ``docs``."""

_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)")
_CODE = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$|(?P<tick>`+)(?!`).+?(?<!`)(?P=tick)(?!`)", re.M | re.S)


def links(text: str) -> list[tuple[int, int, str]]:
    """Start, end and target of each inline link and image of a page, without what is code."""
    masked = _CODE.sub(lambda found: "x" * len(found.group()), text)
    return [(found.start(1), found.end(1), found.group(1)) for found in _LINK.finditer(masked)]


def in_repository(page: str, target: str) -> str | None:
    """Path within the repository that a link leads to.

    Args:
        page: path of the page with the link, within the repository: ``docs/index.md``.
        target: the link without its anchor.

    Returns:
        None for links to other sites, to an anchor, and out of the repository.
    """
    if not target or re.match(r"[a-zA-Z][\w+.-]*:|/", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    return None if path.startswith("..") else path


def source_of(uri: str) -> str:
    """Path within the repository of a file of the site."""
    outside = f"{FOLDER}/"
    return uri.removeprefix(outside) if uri.startswith(outside) else f"docs/{uri}"


def uri_of(path: str) -> str:
    """Name within the site of a file of the repository."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{FOLDER}/{path}"


def rewritten(text: str, page: str, is_file: Callable[[str], bool]) -> tuple[str, list[str]]:
    """A page's text with links as the site needs them, and the repository files that it links to.

    Links to what is no file stay as they are, so that mkdocs says they are broken.
    """
    needed, end, parts = [], 0, []
    here = posixpath.dirname(uri_of(page))
    for start, stop, link in links(text):
        target, mark, anchor = link.partition("#")
        path = in_repository(page, target)
        if path is not None and is_file(path):
            if not path.startswith("docs/"):
                needed.append(path)
            parts += [text[end:start], posixpath.relpath(uri_of(path), here or ".") + mark + anchor]
            end = stop
    return "".join(parts) + text[end:], needed


def roles(html: str) -> str:
    """HTML of docstrings without the roles of reStructuredText, which markdown does not know."""
    return re.sub(r":(?:func|class|meth|mod|attr|data):<code>(?:~[\w.]*\.)?", "<code>", html)


def on_files(files: Any, config: Any) -> Any:
    """Add what pages link to, and what the added pages link to."""
    from mkdocs.structure.files import File, InclusionLevel  # tests use the rest of this file without mkdocs

    root = Path(config["config_file_path"]).parent

    def is_file(path: str) -> bool:
        return (root / path).is_file()

    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for path in rewritten((root / page).read_text(encoding="utf-8"), page, is_file)[1]:
            if files.get_file_from_path(uri_of(path)) is None:
                added = File.generated(
                    config, uri_of(path), abs_src_path=str(root / path), inclusion=InclusionLevel.NOT_IN_NAV
                )
                files.append(added)
                if added.is_documentation_page():
                    waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page."""
    root = Path(config["config_file_path"]).parent
    return rewritten(markdown, source_of(page.file.src_uri), lambda path: (root / path).is_file())[0]


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Clean what docstrings became."""
    return roles(html)
