"""Files of results: processes that write one, what it holds whole, and that it is left alone where it is refused."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from helpers.results_worker import PROTOCOL, jobs, opened
from paper.results import run

TESTS = Path(__file__).parents[1]


def started(what, folder, count, **options):
    """A process of tests/helpers/results_worker.py."""
    arguments = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    return subprocess.Popen(
        [sys.executable, str(TESTS / "helpers" / "results_worker.py"), what, str(folder), str(count), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent / "examples")},
    )


def ended(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err[-4000:]
    return out


def ran(folder):
    path = folder / "ran"
    return Counter(path.read_text().split()) if path.exists() else Counter()


def until(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def whole(folder, count, **options):
    """What a process alone writes that nothing interrupts, as bytes."""
    folder.mkdir()
    path = folder / "results.jsonl"
    run(jobs(folder, count), opened(path), progress=False, **options)
    return path.read_bytes()


def untouched(path, content, error, match, protocol=PROTOCOL):
    path.write_bytes(content)
    with pytest.raises(error, match=match) as caught:
        opened(path, protocol)
    assert path.read_bytes() == content
    return str(caught.value)


HEADER = json.dumps({"format": 1, "protocol": PROTOCOL}).encode() + b"\n"


def job_row(name, number=None):
    number = int(name.split("-")[1]) if number is None else number
    return {"job": name, "accuracy": number / 7, "per_task": {"é": [1, None, 2.5] * (number % 3)}}


def interrupt():
    raise KeyboardInterrupt
