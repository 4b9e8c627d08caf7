"""Reading several files of a folder that another process may exchange for another one meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from ..errors import InputError

Found = TypeVar("Found")

TRIES = 100


def steady(folder: str, read: Callable[[], Found], label: str) -> Found:
    """What `read` finds in `folder`: all of it in one and the same, and no error that only an exchange explains."""
    for _ in range(TRIES):
        held = _held(folder)  # the system gives its number to no other while it is open
        try:
            before = os.stat(folder) if held is None else os.fstat(held)
            try:
                found = read()
            except (OSError, InputError):
                if _is(folder, before):
                    raise
                continue
            if _is(folder, before):
                return found
        finally:
            if held is not None:
                os.close(held)
    raise InputError(f"{label}: the folder is replaced whenever it is read; expected one that stays for a moment")


def _held(folder: str) -> int | None:
    with suppress(PermissionError):  # of folders, some systems open none
        return os.open(folder, os.O_RDONLY)
    return None


def _is(folder: str, before: os.stat_result) -> bool:
    with suppress(OSError):
        return os.path.samestat(before, os.stat(folder))
    return False
