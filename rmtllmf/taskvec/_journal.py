"""The journal of a checkpoint that is being written: what it is a part of, and what of it is complete."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # for what we write to: a link could lead anywhere


def boot() -> str | None:
    """Differs from boot to boot; None where that cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def names(lines: Sequence[str], known: Container[str]) -> set[str] | None:
    """The names that the lines of a journal hold; None if it is damaged."""
    try:
        found = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return None
    return set(found) if all(isinstance(name, str) and name in known for name in found) else None


def locked(path: Path) -> Any:
    """The journal, open and ours alone."""
    while True:
        try:
            file = open(path, "a+", encoding="utf-8", errors="replace", opener=_no_link)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise type(error)(error.errno, f"out: the folder {str(path.parent)!r} cannot be written to") from None
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InputError(f"out: another process is writing {path.name!r}") from None
        except (ImportError, OSError):  # not on this system: two runs into one target are the caller's to avoid
            return file
        try:
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        file.close()  # another process has finished and removed it since it was opened


def _no_link(path: str, flags: int) -> int:
    """Open a file of ours; what others have put in its place is none."""
    try:
        descriptor = os.open(path, flags | NO_LINK | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"out: {path!r} is a link, which is not written through; remove it") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise InputError(f"out: {path!r} is no file of its own, and not written to; remove it")
    return descriptor
