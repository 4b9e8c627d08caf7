"""What each rule costs, beside task arithmetic and beside training steps; each in a process of its own.

Run with ``python -m pytest tests/benchmarks/test_costs.py -s``. `helpers/cost_of_rule.py` says on what.
RMTLLMF_BENCH_TABLE names a file for the table of the documentation.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers import cost_of_rule


def measured(name):
    script = Path(cost_of_rule.__file__)
    given = os.environ | {"PYTHONPATH": str(script.parents[1]), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, script, name], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_costs():
    lines = [f"{'from the vectors':28s}{'times task arithmetic':>24s}{'memory, in vectors':>22s}"]
    for name in cost_of_rule.FROM_VECTORS:
        cost = measured(name)
        lines.append(f"{name:28s}{cost['seconds'] / cost['unit']:24.1f}{cost['memory']:22.1f}")
    unit = f"training steps, of {cost_of_rule.STEPS}"
    lines += ["", f"{'with model and batches':28s}{unit:>24s}{'memory, in vectors':>22s}"]
    for name in cost_of_rule.LEARNED:
        cost = measured(name)
        lines.append(f"{name:28s}{cost['seconds'] / cost['unit']:24.1f}{cost['memory']:22.1f}")
    text = "\n".join(lines)
    print("\n" + text)
    if "RMTLLMF_BENCH_TABLE" in os.environ:
        Path(os.environ["RMTLLMF_BENCH_TABLE"]).write_text(text + "\n")
