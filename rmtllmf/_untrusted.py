"""What others have written: regular files, no link that leads out of their folder, JSON of one meaning."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import Repr
from typing import Any

from .errors import InputError

StrPath = str | os.PathLike[str]

LONGEST_JSON = 100_000_000  # bytes, as of the header of a safetensors file

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 100
brief = _REPR.repr
"""``repr`` for an error message, of what may be as long as a file."""


def opened(path: StrPath, label: str, *, inside: StrPath | None = None) -> int:
    """The descriptor of a regular file, for reading; with `inside`, of one that lies in that folder, links followed."""
    name = os.fspath(path)
    if inside is not None:
        check_inside(path, inside, label)
    try:  # a pipe would wait for whoever writes to it
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FileNotFoundError(f"{label}: there is no file {name!r}") from None
    except ValueError as error:  # a name that no file can have
        raise InputError(f"{label}: {name!r} is no path ({error})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{label}: {name!r} is no regular file")
    return descriptor


def check_inside(path: StrPath, folder: StrPath, label: str) -> None:
    """Raise if a file that was found in a folder is a link that leads out of it: nobody has asked for that file.

    Links in a cache of the Hugging Face hub lead to its ``blobs``, and may.
    """
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    allowed = [home]
    for parent in (home, *home.parents):
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            allowed.append(parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in allowed):
        raise InputError(
            f"{label}: {os.fspath(path)!r} is a link that leads out of its folder, to {str(real)!r}, and is not "
            "followed: whoever made the folder may have meant a file that is not theirs. Copy or hard-link the "
            "file into the folder, or pass the path that it leads to"
        )


def read_json(path: StrPath, label: str, *, inside: StrPath | None = None) -> Any:
    """The content of a file of JSON, by the rules of `parsed`."""
    return parsed(read_whole(path, label, inside=inside), f"{label}: {os.fspath(path)!r} is no JSON")


def read_whole(path: StrPath, label: str, *, inside: StrPath | None = None) -> bytes:
    """The bytes of a file that should be JSON."""
    with open(opened(path, label, inside=inside), "rb") as file:
        content = file.read(LONGEST_JSON + 1)
    if len(content) > LONGEST_JSON:
        raise InputError(f"{label}: {os.fspath(path)!r} is longer than {LONGEST_JSON} bytes; expected a file of JSON")
    return content


def parsed(text: str | bytes, problem: str) -> Any:
    """What JSON says, if it says it once, in UTF-8, in numbers and whole characters; else an error, of a `problem`."""
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_not_a_number)
        if "\\ud" in text.lower():  # half a character, which nothing could write again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{problem} ({error})") from None
    return value


@contextmanager
def naming(path: StrPath) -> Iterator[None]:
    """The system's errors inside say which file they are about."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name comes twice")
    return result


def _not_a_number(text: str) -> float:
    raise ValueError(f"{text} is no number")
