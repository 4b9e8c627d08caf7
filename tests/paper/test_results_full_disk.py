"""A full disk loses no row of the file of results."""

import errno
import os
import stat

import pytest

from helpers.results_files import HEADER, job_row, started, whole
from helpers.results_worker import jobs, opened
from paper.results import run

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.mark.parametrize("fails", ["write", "fsync"])
@pytest.mark.parametrize("undone", [True, False])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, fails, undone):
    """Some of the line fits, or all of it does until the system looks; and even the undoing may fail."""
    expected = whole(tmp_path / "whole", 3)
    write, truncate = os.write, os.ftruncate
    for room in range(3, len(expected), 10):
        path = tmp_path / f"{room}"
        left = room

        def limited(file, data):
            nonlocal left
            if fails == "write" and data.startswith(b'{"job"') and left < len(data):
                left, data = -1, data[: max(0, left)]
                if data:
                    return write(file, data)
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            left -= len(data) if data.startswith(b'{"job"') else 0
            return write(file, data)

        def failing(file):
            status = os.fstat(file)
            if fails == "fsync" and stat.S_ISREG(status.st_mode) and status.st_size > len(HEADER) + room:  # noqa: B023
                raise OSError(errno.ENOSPC, "No space left on device")

        def truncated(file, size):
            if not undone and os.fstat(file).st_size > size:
                raise OSError(errno.EIO, "Input/output error")
            truncate(file, size)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", limited)
            patch.setattr(os, "fsync", failing)
            patch.setattr(os, "ftruncate", truncated)
            results = opened(path)
            plain = [(name, lambda name=name: job_row(name)) for name in ("job-0", "job-1", "job-2")]
            if room < len(expected) - len(HEADER):
                with pytest.raises(OSError, match="No space"):
                    run(plain, results, progress=False)
            else:
                run(plain, results, progress=False)
        found = path.read_bytes()
        assert expected.startswith(found)
        if undone:
            assert found.endswith(b"\n")
            assert found == HEADER + b"".join(line_of(expected, n) for n in range(len(results)))
        run(plain, results, progress=False)  # the same process, when there is room again
        assert path.read_bytes() == expected
        path.write_bytes(found)
        run(plain, opened(path), progress=False)  # and another
        assert path.read_bytes() == expected


def line_of(content, number):
    return content.splitlines(keepends=True)[number + 1]


def test_a_full_disk_of_the_system(tmp_path):
    pytest.importorskip("resource")
    expected = whole(tmp_path / "whole", 4)
    for limit in (0, 20, len(HEADER), len(HEADER) + 10, len(expected) - 1):
        folder = tmp_path / str(limit)
        folder.mkdir()
        process = started("work", folder, 4, limit=max(limit, 1))
        _, err = process.communicate(timeout=60)
        assert "File too large" in err
        found = (folder / "results.jsonl").read_bytes()
        assert found == expected[: expected[:limit].rfind(b"\n") + 1]
        run(jobs(folder, 4), opened(folder / "results.jsonl"), progress=False)
        assert (folder / "results.jsonl").read_bytes() == expected
