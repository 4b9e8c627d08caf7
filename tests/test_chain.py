"""The chain end to end: on the full ViT-B/16 tower in bounded memory, and the quickstart in a reduced form."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parent / "helpers"


@pytest.mark.slow
def test_vit_b_16_with_two_users_within_6_gb():
    run = subprocess.run(
        [sys.executable, HELPERS / "vit_b_16_chain.py"], capture_output=True, text=True, env=os.environ, timeout=900
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen["parameters"] == 86_192_640
    for mse, snr in zip(seen["mse"], seen["snr"], strict=True):
        # 43 million complex errors: the parameter SNR is -10 log10(mse) to a thousandth of a dB
        assert snr == pytest.approx(-10 * math.log10(mse), abs=0.005)
    assert set(seen["embeddings"]) == {"class_embedding", "conv1.weight", "positional_embedding"}
    assert seen["embeddings_are_the_base's"]
    assert seen["attention_changed"]
    assert len(seen["losses"]) == 1
    assert all(map(math.isfinite, seen["losses"]))
    assert seen["peak_bytes"] < 6e9


@pytest.fixture(scope="module")
def quickstart():
    """examples/quickstart.py as a module; it is a script, not part of a package."""
    path = Path(__file__).parents[1] / "examples" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quickstart"]


def test_quickstart_in_a_reduced_form(quickstart, tmp_path, capsys):
    """Three tasks, few images and steps: the table is complete and in form, redrawn from the cache, and redone."""
    protocol = quickstart.Protocol(
        tasks=quickstart.TASKS[:3],
        images=120,
        finetuning_steps=12,
        shots=3,
        realignment_steps=3,
        blocks=2,
        peak_to_rms=400.0,  # so loud that the unprotected sum must collapse
    )
    arguments = ["--seeds", "2", "--cache", f"{tmp_path}/cache", "--figure", f"{tmp_path}/figure.png"]
    rows = quickstart.main([*arguments, "--json", f"{tmp_path}/table.json"], protocol)
    first = capsys.readouterr().out

    assert json.loads((tmp_path / "table.json").read_text()) == rows
    cells = [(row["condition"], row["method"]) for row in rows]
    methods = ("unprotected", "restored", "realigned", "both")
    assert set(cells) == {("none", "base"), ("none", "clean")} | {
        (condition, method) for condition in ("ideal", "strongest_user", "sum_rate") for method in methods
    }
    assert len(cells) == 14
    for row in rows:
        assert set(row) == {"condition", "method", "mean", "values"}
        assert len(row["values"]) == 2
        assert row["mean"] == pytest.approx(sum(row["values"]) / 2)
        assert 0 <= row["mean"] <= 2
    value = {cell: row["mean"] for cell, row in zip(cells, rows, strict=True)}
    assert value["sum_rate", "unprotected"] < 0.6 * value["none", "clean"]
    assert any(row["values"][0] != row["values"][1] for row in rows)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert f"{100 * value['sum_rate', 'both']:.1f}" in first

    begun = len(list((tmp_path / "cache").rglob("*.safetensors")))
    assert begun == 6
    assert quickstart.main(arguments, protocol) == rows
    assert capsys.readouterr().out.count("cached") == 2
    assert quickstart.main([*arguments, "--seeds", "1", "--fresh"], protocol)[0]["values"] == rows[0]["values"][:1]
    assert "cached" not in capsys.readouterr().out
