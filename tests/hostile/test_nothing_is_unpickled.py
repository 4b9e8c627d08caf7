"""Nothing is unpickled, neither here nor by a package that is asked to read something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--as-before-torch-2.6"]])
def test_pickles_under_every_name(options, tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "unpickling_worker.py"), str(tmp_path), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    *before, last = run.stdout.splitlines()
    assert last == "done"
    # the watcher's line of the one load that was meant to unpickle, and what the pickle printed
    assert len([line for line in before if "UNPICKLED" in line]) == 2, run.stdout
