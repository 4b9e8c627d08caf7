"""Files damaged in every way: whoever reads them gets what is valid, or an error of the library; nothing else."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.mutations import Choices, damaged
from helpers.readers import READERS, REFUSALS, files

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10


@pytest.fixture(params=READERS)
def prepared(request, tmp_path, monkeypatch):
    """A reader, a folder of valid files for it, and what these are."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    reader = READERS[request.param]
    reader.make(tmp_path)
    reader.read(tmp_path)
    return reader, tmp_path, {path: path.read_bytes() for path in files(tmp_path)}


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=40))
def test_damaged_files_are_read_or_refused(prepared, data):
    reader, folder, valid = prepared
    choices = Choices(data)
    path = choices.of(sorted(valid))
    path.write_bytes(damaged(valid[path], choices))
    message = ""
    try:
        reader.read(folder)
    except REFUSALS as error:
        message = str(error)
    finally:
        path.write_bytes(valid[path])
    assert len(message) < 20_000
    assert files(folder) == sorted(valid)


@pytest.mark.slow
def test_a_fuzzer_finds_nothing(tmp_path):
    """Guided by which lines of the library are reached."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed")
    run = subprocess.run(
        [
            sys.executable, str(ROOT / "tests" / "fuzz" / "harness.py"), str(tmp_path / "corpus"),
            "-seed=1", f"-max_total_time={SECONDS}", "-timeout=20", "-rss_limit_mb=8192", "-max_len=64",
            "-len_control=0", f"-artifact_prefix={tmp_path}/",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    assert "DONE" in run.stderr, run.stderr[-4000:]
