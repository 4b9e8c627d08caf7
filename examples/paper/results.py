"""Results of many jobs in one append-only file: killed at any moment and started again, nothing is lost or repeated.

One line of JSON a row, the first says of which protocol they are. A line counts when its newline is there: what a
killed process or a full disk leaves of one is cut off before the next is appended. Several processes of one machine
may share the work. Each claims a job before it runs it, by a lock that the system releases when the process dies, so
that a killed process takes no job with it. Only the system's own locks do that: without them (Windows), one process.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: one process only
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
Row = dict[str, Any]  # JSON values only
Job = tuple[str, Callable[[], Row]]  # the key of its row, and what makes the row


class ResultsError(ValueError):
    """The file or the row cannot be used as it is; the file was left untouched."""


class ProtocolError(ResultsError):
    """The file holds results of another protocol."""


class Results:
    """The rows in the file at `path`, which is begun if it is not there.

    `protocol` is everything that decides the rows; a file of another one is refused. `key` names a row: two of the
    same key are an error, even if they are equal, because then a job was done twice, and locks do not work here.
    """

    def __init__(self, path: str | os.PathLike[str], protocol: Mapping[str, Any], *, key: Callable[[Row], str]) -> None:
        self.path = Path(path).resolve()  # beside the file itself, so that processes coming by links meet
        self.key = key
        self._header = (json.dumps({"format": FORMAT, "protocol": dict(protocol)}, allow_nan=False) + "\n").encode()
        self._rows: dict[str, Row] = {}
        self._lines: dict[str, int] = {}  # where they are
        self._at = self._line = 0  # bytes and lines that have been read
        self._status: os.stat_result | None = None
        self._mutex = threading.RLock()
        self._claims: int | None = None
        self._held: set[str] = set()
        if self.path.exists():
            self.refresh()
        if not self._at:
            self._begin()

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self) -> list[Row]:
        """The rows in the file's order, which is that of the jobs if one process did them all."""
        return copy.deepcopy(list(self._rows.values()))

    def refresh(self) -> None:
        """Read what other processes have appended since."""
        with self._open(os.O_RDONLY) as file:
            self._read(file)

    def add(self, row: Row) -> None:
        """Append a row; it is on disk when this returns. If that fails, the file is as it was before."""
        line, key = _line(row), self._key(row)
        with self._open(os.O_RDWR | os.O_APPEND) as file:
            self._read(file)
            if key in self:
                raise ResultsError(f"row: {key!r} is in line {self._lines[key]} of {str(self.path)!r} already")
            self._append(file, line)
            self._read(file)

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether the job of this key is ours alone, until the block ends or the process does."""
        if key in self._held or not self._lock(key):  # a process is given a lock that it holds again
            yield False
            return
        self._held.add(key)
        try:
            yield True
        finally:
            self._held.remove(key)
            self._lock(key, release=True)

    def _begin(self) -> None:
        """Append the first line, unless another process was faster."""
        with self._open(os.O_RDWR | os.O_APPEND | os.O_CREAT) as file:
            self._read(file)
            if self._at:
                return
            left = _bytes(file, 0)
            if not self._header.startswith(left):  # not what a killed process leaves of this very line
                raise ResultsError(
                    f"{str(self.path)!r} is no file of results: it begins {left[:60]!r}, and has no line"
                )
            self._append(file, self._header)
            self._read(file)
        if os.name == "posix":  # the name is on disk when the folder is
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    @contextmanager
    def _open(self, flags: int) -> Iterator[int]:
        """The file, opened anew and locked: against those who write, and to write against all."""
        with self._mutex:
            # a pipe would wait for somebody at its other end
            file = os.open(self.path, flags | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise ResultsError(f"{str(self.path)!r} is no regular file")
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_SH if flags == os.O_RDONLY else fcntl.LOCK_EX)
                status = os.fstat(file)
                self._status = self._status or status
                if status.st_size < self._at or not os.path.samestat(status, self._status):
                    raise ResultsError(f"{str(self.path)!r} was replaced or cut while it was in use")
                yield file
            finally:
                os.close(file)

    def _read(self, file: int) -> None:
        """Take in the complete lines that follow those read before."""
        for line in _bytes(file, self._at).split(b"\n")[:-1]:
            number = self._line + 1
            if number == 1:
                self._check_header(line)
            else:
                self._take_in(line, number)
            self._at, self._line = self._at + len(line) + 1, number

    def _check_header(self, line: bytes) -> None:
        found: dict[str, Any] = {}
        there: dict[tuple[str, ...], str] = {}
        with suppress(ValueError, RecursionError):
            found = _loads(line)
            there = _flat(found.get("protocol"))
        if found.keys() != {"format", "protocol"} or repr(found["format"]) != repr(FORMAT):
            raise ResultsError(f"{str(self.path)!r} is no file of results of format {FORMAT}: it begins {line[:60]!r}")
        expected = _flat(json.loads(self._header)["protocol"])
        different = (
            f"{'.'.join(field)}: expected {expected.get(field, 'nothing')}, found {there.get(field, 'nothing')}"
            for field in expected | there
            if expected.get(field) != there.get(field)
        )
        if expected != there:
            raise ProtocolError(f"{str(self.path)!r} holds results of another protocol: {'; '.join(different)}")

    def _take_in(self, line: bytes, number: int) -> None:
        where = f"line {number} of {str(self.path)!r}"
        try:
            row = _loads(line)
        except (ValueError, RecursionError) as error:
            raise ResultsError(f"{where} is damaged: {error}; it is {line[:60]!r}") from None
        try:
            key = self._key(row)
        except Exception as error:
            raise ResultsError(f"{where} is not a row of this experiment: {error!r}; it is {line[:60]!r}") from error
        if key in self._rows:
            how = "as it is there" if self._rows[key] == row else "with other values"
            raise ResultsError(f"{where} repeats {key!r} of line {self._lines[key]}, {how}; a job was done twice")
        self._rows[key], self._lines[key] = row, number

    def _key(self, row: Row) -> str:
        if isinstance(key := self.key(row), str):
            return key
        raise TypeError(f"key: expected a string of every row, got {key!r} of {row!r}")

    def _append(self, file: int, line: bytes) -> None:
        os.ftruncate(file, self._at)  # what is left of a line that was cut short
        try:
            while line:  # a full disk takes a part of it first, and only then complains
                line = line[os.write(file, line) :]
            os.fsync(file)
        except OSError:
            with suppress(OSError):  # else the next to append cuts it off
                os.ftruncate(file, self._at)
            raise

    def _lock(self, key: str, *, release: bool = False) -> bool:
        """Lock, or release, the byte that stands for a key, whether the file of claims has it or not."""
        if fcntl is None:
            return True
        if self._claims is None:
            # Never closed: with any descriptor of it that a process closes, all its locks are gone.
            self._claims = os.open(self.path.with_name(f".{self.path.name}.claims"), os.O_RDWR | os.O_CREAT, 0o666)
        # of the key, not of its place in a list, on which all processes would have to agree
        byte = int.from_bytes(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()) >> 2
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_UN if release else fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # which of them depends on the system
            return False
        return True


def run(
    jobs: Sequence[Job],
    results: Results,
    *,
    rank: int = 0,
    world: int = 1,
    wait: bool = True,
    poll: float = 0.5,
    progress: bool = True,
) -> None:
    """Run the jobs whose rows are not there yet, and return when all rows are.

    Of `world` processes the one of this `rank` (from 0) begins with its share, a contiguous block, because neighbours
    share work. Then it helps the others from the ends of theirs, so that the two that work on a block meet only once.
    The shares only order the work: a process that never starts, or dies, leaves nothing undone. What other processes
    are at is looked at every `poll` seconds, and taken over if they die; with `wait=False` it is left to them.
    """
    if not 0 <= rank < world:
        raise ResultsError(f"rank: expected a number from 0 to world - 1 = {world - 1}, got {rank}")
    if world > 1 and fcntl is None:
        raise ResultsError(f"world: expected 1, got {world}: this system lacks the locks by which processes share work")
    keys = [key for key, _ in jobs]
    if len(set(keys)) < len(keys):
        raise ResultsError(f"jobs: {next(key for key in keys if keys.count(key) > 1)!r} appears more than once")
    results.refresh()
    blocks = [jobs[len(jobs) * r // world : len(jobs) * (r + 1) // world] for r in range(world)]
    helped = [job for block in blocks[rank + 1 :] + blocks[:rank] for job in reversed(block)]
    left = [job for job in [*blocks[rank], *helped] if job[0] not in results]
    gone = len(results)  # of all rows, at the bar's last step
    with tqdm(desc="jobs", total=len(jobs), initial=len(jobs) - len(left), disable=not progress) as bar:
        while left:
            for key, make in left:
                if key not in results:
                    _run_one(key, make, results)
                    bar.update(len(results) - gone)  # other processes' too
                    gone = len(results)
            left = [job for job in left if job[0] not in results]
            if not wait:
                return
            if left:
                bar.set_postfix_str(f"{len(left)} in other processes")
                time.sleep(poll)


def _run_one(key: str, make: Callable[[], Row], results: Results) -> None:
    """Run a job and add its row, unless another process is at it or has finished it."""
    with results.claim(key) as ours:
        results.refresh()  # after the claim: a row that is not there now will not be added by anyone else
        if not ours or key in results:
            return
        row = make()
        if results.key(row) != key:
            raise ResultsError(f"jobs: the job {key!r} made the row of {results.key(row)!r}")
        results.add(row)


def _line(row: Row) -> bytes:
    """What reads back as this very row; NaN, infinity, tuples and keys that are not strings do not."""
    try:
        text = json.dumps(row, allow_nan=False)
    except ValueError as error:
        raise ResultsError(f"row: {error}, in {row!r}") from None
    if not isinstance(row, dict) or json.loads(text) != row:
        raise ResultsError(f"row: expected a dict of JSON values, which read back as they are, got {row!r}")
    return text.encode() + b"\n"


def _loads(line: bytes) -> dict[str, Any]:
    value = json.loads(line.decode(), parse_constant=_finite, parse_float=_finite)
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


def _flat(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Path of a field -> its value as JSON, in which 1 is neither 1.0 nor true."""
    if isinstance(value, dict) and value:
        return {k: text for field, inner in value.items() for k, text in _flat(inner, (*path, field)).items()}
    return {path: json.dumps(value, sort_keys=True)}


def _bytes(file: int, start: int) -> bytes:
    os.lseek(file, start, os.SEEK_SET)
    return b"".join(iter(lambda: os.read(file, 1 << 20), b""))
