"""Two processes, tensors spread over both: see helpers/sharded_fusion.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_every_rule_on_two_processes(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for turn in range(2):  # torch's own threads sometimes abort a process; ours would do it again
        folder = tmp_path / str(turn)
        folder.mkdir()
        run = subprocess.run(
            [*launch, str(TESTS / "helpers" / "sharded_fusion.py"), str(folder)],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        )
        if "SIGABRT" not in run.stderr:
            break
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.count("all is well") == 2
