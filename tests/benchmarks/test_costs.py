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


def lines():
    steps = cost_of_rule.STEPS
    for title, unit, rules in (
        ("from the vectors", "times task arithmetic", cost_of_rule.FROM_VECTORS),
        (f"with batches, {steps} steps", "times a training step", cost_of_rule.LEARNED),
    ):
        yield f"{title:28s}{unit:>24s}{'memory, in vectors':>22s}"
        for name in rules:
            cost = measured(name)
            yield f"{name:28s}{cost['seconds'] / cost['unit']:24.1f}{cost['memory']:22.1f}"


def test_costs():
    found = []
    print()
    for line in lines():
        print(line, flush=True)
        found.append(line)
    text = "\n".join(found)
    if "RMTLLMF_BENCH_TABLE" in os.environ:
        Path(os.environ["RMTLLMF_BENCH_TABLE"]).write_text(text + "\n")
