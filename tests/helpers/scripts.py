"""Scripts of this folder, run in an interpreter of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def printed_by(script, *arguments, launch=(), timeout=300):
    """What a script prints, on one thread; it must end well."""
    search = [TESTS, TESTS.parent / "examples", TESTS.parent]
    run = subprocess.run(
        [sys.executable, *launch, str(TESTS / "helpers" / script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, search))},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout
