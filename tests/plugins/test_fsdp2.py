"""Two processes, models spread over both by FSDP2: see fsdp2_worker.py beside this file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # three interpreters
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_fusion_of_sharded_models_is_that_of_one_process(tmp_path):
    pytest.importorskip("torch.distributed.fsdp", reason="FSDP2")
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("FSDP2 came with torch 2.6")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    search = [str(ROOT / "examples"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [*launch, str(Path(__file__).with_name("fsdp2_worker.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, search))},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.count("all is well") == 2
