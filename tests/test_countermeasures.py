"""The example countermeasures.py against the reference figures, and against the table in docs/theory.md."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python examples/countermeasures.py"

# Mean squared errors under the strongest-user and the sum-rate jammer, from 400 draws of an independent derivation.
# All: error-free cancellation, strongest user first, real noise = jammer + thermal floor, P_N = 124 s2.
REFERENCE = {
    "unaware of the jammer": (0.146, 0.210),  # designed for the floor alone
    "C known": (0.039, 0.165),
    "C from 256 snapshots": (0.040, 0.172),  # of jammer plus thermal noise, without loading
    "C from 64 snapshots": (0.045, 0.202),
    "C from 32 snapshots": (0.056, 0.274),
    "power of the noise known": (0.128, 0.174),  # white, with the trace of the whole noise
    # fading independent from block to block, users at rest; P_N in each block, the jammer optimal for it alone; C
    # known; order by power averaged over the blocks
    "HARQ, 2 independent blocks": (0.017, 0.086),
    "HARQ, 4 independent blocks": (0.007, 0.044),
    "repetition, 2 times": (0.022, 0.093),  # fresh noise with the same C, which is known
    "repetition, 4 times": (0.012, 0.050),
    "32 antennas": (0.021, 0.084),  # C known
    "64 antennas": (0.011, 0.042),
    "nulling, 1 direction": (0.139, 0.272),  # C known in what is left; decoding order from before the projection
    # of the path loss, not of the fading, so that each user is received like one at 1000 m with full power
    "channel inversion, unaware": (0.43, 0.43),
    "channel inversion, C known": (0.11, 0.30),
}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("countermeasures", ROOT / "examples" / "countermeasures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def table(example):
    return {row.name: row for row in example.main(["--draws", "400"])}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE)
def test_every_row_of_the_reference_is_reproduced(table, name):
    """Within 3 standard errors plus 5 %."""
    for jammer, expected in zip(("SU", "SR"), REFERENCE[name], strict=True):
        mean, error = table[name].mean[jammer], table[name].error[jammer]
        assert abs(mean - expected) <= 3 * error + 0.05 * expected, f"{jammer}: {mean:.4f} ± {error:.4f}"


@pytest.mark.slow
def test_what_the_notes_claim(table):
    def mean(name, jammer="SR"):
        return table[name].mean[jammer]

    for K in (2, 4):  # HARQ: half the error per doubling; repeating in the same block gains a little less
        assert mean(f"HARQ, {K} independent blocks") * K == pytest.approx(mean("C known"), rel=0.15)
        assert mean(f"HARQ, {K} independent blocks") < mean(f"repetition, {K} times")
    assert mean("nulling, 2 directions") > mean("nulling, 1 direction") > mean("unaware of the jammer")
    for cure in ("loading 0.1", "Ledoit-Wolf"):  # few snapshots need one or the other
        assert mean(f"C from 32 snapshots, {cure}") < 0.75 * mean("C from 32 snapshots")
        assert mean(f"C from 32 snapshots, {cure}", "SU") < mean("C from 32 snapshots", "SU")
    assert mean("users in turn, C known") > mean("repetition, 8 times")
    # alone, a user is the strongest user and the whole sum: one jammer
    assert mean("users in turn, C known") == pytest.approx(mean("users in turn, C known", "SU"), rel=1e-9)


@pytest.mark.slow
def test_the_table_on_the_theory_page_is_what_the_command_prints(table):
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    assert page.count(COMMAND) == 1
    section = page.split("## Protection on the physical layer")[1].split("\n## ")[0]
    found = re.findall(r"^\| ([^|]+) \| (\d+) \| (\.\d+) ± (\.\d+) \| (\.\d+) ± (\.\d+) \|$", section, re.MULTILINE)
    assert [name.replace("$C$", "C") for name, *_ in found] == list(table)
    for row, (_, uses, *figures) in zip(table.values(), found, strict=True):
        assert row.uses == int(uses)
        # to the last digit on the machine that it was printed on; another stream of random numbers may come elsewhere
        for jammer, mean, error in zip(("SU", "SR"), figures[::2], figures[1::2], strict=True):
            assert abs(float(mean) - row.mean[jammer]) <= 4 * row.error[jammer] + 0.0001
            assert float(error) == pytest.approx(row.error[jammer], rel=0.3, abs=0.0001)


def test_a_few_draws_run_and_print(example, capsys):
    rows = example.main(["--draws", "4", "--seed", "2"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows) + 2
    assert all(row.name in line for row, line in zip(rows, printed[1:-1], strict=True))
    assert rows[0].mean == {row.name: row for row in example.main(["--draws", "4", "--seed", "2"])}[rows[0].name].mean


def test_it_takes_two_draws_for_a_standard_error(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--draws", "1"])
    assert "--draws: expected at least 2, got 1" in capsys.readouterr().err
