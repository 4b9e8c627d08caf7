"""The report of the paper's experiment, on rows whose statistics are known."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import scipy.stats

from helpers.paper_rows import PROTOCOL, TASKS, by_hand, chosen, make_rows
from paper.claims import claims
from paper.report import as_json, formatted, numbers_table, protections_table, shots_table, uplinks_table
from paper.table import half_width, tabulate


def claim(rows, part, protocol=None):
    (found,) = (c for c in claims(rows, protocol) if part in c.text)
    return found


@pytest.fixture(scope="module")
def rows():
    return make_rows()


def test_every_cell_against_numpy(rows):
    table = tabulate(rows[::-1])
    assert (table.seeds, table.shots, sorted(table.tasks), table.missing) == ((0, 1, 2), 10, sorted(TASKS), ())
    expected = {(c, p, s, len(t)) for c, p, s, t in chosen(PROTOCOL) if c != "individual"}
    assert {(c.condition, c.protection, c.shots, c.number) for c in table.cells} == expected
    assert len(table.cells) == len(expected)
    for cell in table.cells:
        values = [by_hand(rows, s, cell.condition, cell.protection, cell.shots, cell.number) for s in (0, 1, 2)]
        means = np.array([v.mean() for v in values])
        assert cell.by_seed == pytest.approx(means)
        assert cell.mean == pytest.approx(means.mean())
        low, high = scipy.stats.t.interval(0.95, 2, means.mean(), means.std(ddof=1) / 3**0.5)
        assert cell.interval == pytest.approx((high - low) / 2)
        if len(values[0]) == 1:
            assert cell.spread is None
        else:
            assert cell.spread == pytest.approx(np.mean([v.var(ddof=1) for v in values]) ** 0.5)
        assert (cell.lowest, cell.highest) == pytest.approx((np.min(values), np.max(values)))
        assert cell.unfinished == ()


def test_the_protocol_and_the_rows_expect_the_same(rows):
    assert asdict(tabulate(rows)) == asdict(tabulate(rows, PROTOCOL)) == asdict(tabulate(rows[::-1], PROTOCOL))


def test_rows_that_the_protocol_does_not_ask_for_are_left_out(rows):
    small = replace(PROTOCOL, seeds=(0, 2), subsets=2)
    subsets = {tuple(TASKS[index] for index in subset) for subset in small.chosen_subsets()}
    part = [r for r in rows if r["seed"] != 1 and ("uplink" in r or tuple(r["tasks"]) in subsets)]
    assert 0 < len(part) < len(rows)
    assert tabulate(rows, small).left_out == len(rows) - len(part)
    assert asdict(tabulate(rows, small)) | {"left_out": 0} == asdict(tabulate(part))
    assert f"({len(rows) - len(part)} that the protocol does not ask for are left out)" in formatted(rows, small)


def test_one_seed_has_no_interval():
    cell = tabulate(make_rows((7,))).cell("ideal", "both", number=3)
    assert (cell.seeds, cell.interval) == ((7,), None)
    assert cell.spread > 0
    assert half_width([0.5]) is None


def test_uplinks_are_means_over_users_and_seeds(rows):
    for up in tabulate(rows).uplinks:
        facts = [row["uplink"] for row in rows if "uplink" in row and row["condition"] == up.condition]
        assert up.mse == pytest.approx(np.mean([f["mse"] for f in facts]))
        assert up.snr_db == pytest.approx(np.mean([f["snr_db"] for f in facts]))
        for kind, matrix in up.cosines.items():
            assert matrix == pytest.approx(np.mean([f[kind] for f in facts], axis=0))
        assert up.ranges["cosine"] == {"ideal": (0.0, 0.24), "sum_rate": (0.48, 0.52)}.get(up.condition, (0.1, 0.3))


def test_text_tables_hold_the_numbers(rows):
    table = tabulate(rows)
    both = table.cell("sum_rate", "both")
    line = next(line for line in protections_table(table).splitlines() if line.startswith("restored and realigned"))
    assert line.rstrip().endswith(f" {100 * both.mean:.1f} ± {100 * both.interval:.1f}")
    three = table.cell("ideal", "unprotected", number=3)
    line = next(line for line in numbers_table(table).splitlines() if line.startswith("ideal, unprotected"))
    assert line.split("ideal, unprotected")[1].split()[3:6] == [
        f"{100 * three.mean:.1f}",
        "±",
        f"{100 * three.spread:.1f}",
    ]
    line = next(line for line in uplinks_table(table).splitlines() if line.startswith("sum rate"))
    assert line.split()[3] == "0.21"
    assert line.split()[5] == "-27.3"
    assert line.endswith("0.48 to 0.52")
    lines = shots_table(table).splitlines()
    assert "ideal" in lines[0]
    assert lines[1].split() == ["0", "1", "10", "50"]
    assert [line.split()[0] for line in lines[2:]] == ["unprotected", "restored", "realigned", "restored", "restored,"]
    text = formatted(rows)
    assert "missing" not in text
    assert "*" not in text
    assert "seeds: 0, 1, 2" in text


def test_differences_are_taken_seed_by_seed(rows):
    table = tabulate(rows)
    both, base = table.cell("sum_rate", "both"), table.cell("base")
    apart = np.subtract(both.by_seed, base.by_seed)
    line = next(line for line in protections_table(table).splitlines() if line.startswith("both less the base"))
    assert line.rstrip().endswith(f" {100 * apart.mean():.1f} ± {100 * half_width(apart.tolist()):.1f}")
    assert both.seeds == base.seeds
    some = [row for row in rows if not (row["seed"] == 1 and row["condition"] == "base")]
    assert tabulate(some).differences(("sum_rate", "both"), ("base",)) == pytest.approx(apart[[0, 2]])


def test_json_reads_back(rows):
    value = as_json(rows)
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert len(value["claims"]) == 13
    assert value["cells"][0]["mean"] == tabulate(rows).cells[0].mean


def test_the_papers_numbers_bear_out_all_claims():
    found = claims(make_rows(wobble=0))
    assert [(c.text, c.measured) for c in found if not c.holds] == []
    assert all(c.paper and c.decided and c.measured and str(c).startswith("  holds") for c in found)


NEAR, FAR, ALIKE, TIMES = "comes close", "stay far below", "as much harm", "many times"
POOR, WORTH, FALLS, RISES = "poor fusion", "worth more", "do not increase", "accuracy increases"
ORTHOGONAL, SIMILAR, PARTS, ORDER, FEW = (
    "orthogonal",
    "vectors similar",
    "is much worse",
    "and that than both",
    "bring little",
)


@pytest.mark.parametrize(
    ("part", "changes", "measured", "also"),
    [
        (NEAR, {"shares": {("ideal", "both"): 0.85}}, "85.0 % against 91.0 %", []),
        (FAR, {"shares": {("sum_rate", "both"): 0.8}}, "sum rate 80.0 % against 91.0 %", [ALIKE, TIMES]),
        (ALIKE, {"shares": {("sum_rate", "both"): 0.59}}, "59.0 % and 55.0 %", []),
        (TIMES, {"shares": {("sum_rate", "unprotected"): 0.055}}, "sum rate 9.6 (53.0 % / 5.5 %)", None),
        (TIMES, {"shares": {("sum_rate", "unprotected"): 0.25}}, "sum rate 2.1 (53.0 % / 25.0 %)", [ORDER]),
        (TIMES, {"shares": {("sum_rate", "unprotected"): 0.01}}, "sum rate 53.0 (53.0 % / 1.0 %)", []),
        (TIMES, {"shares": {("sum_rate", "unprotected"): 0.0}}, "sum rate inf (53.0 % / 0.0 %)", []),
        (POOR, {"shares": {("ideal", "unprotected"): 0.6}}, "60.0 %, base 50.0 %", [ORDER]),
        (WORTH, {"shares": {("base", "unprotected"): 0.54}}, "sum rate 53.0 %, base 54.0 %", []),
        (FALLS, {"slopes": {("sum_rate", "both"): 0.01}}, "sum rate, both +1.00 points a task", []),
        (RISES, {"slopes": {("ideal", "both"): -0.01}}, "-1.00 points a task", []),
        (ORTHOGONAL, {"cosines": {"ideal": (0.0, 0.3)}}, "at most 0.30", []),
        (SIMILAR, {"cosines": {"sum_rate": (0.0, 0.01)}}, "between 0.00 and 0.01", []),
        (PARTS, {"shares": {("ideal", "realigned"): 0.8}}, "realigned 10.1 % (80.0 % / 89.0 %)", []),
        (PARTS, {"shares": {("ideal", "restored"): 0.38}}, "restored 57.3 % (38.0 % / 89.0 %)", []),
        (ORDER, {"shares": {("sum_rate", "restored"): 0.01}}, "sum rate: unprotected 5.0 %, restored 1.0 %", []),
        (FEW, {"of_shots": {50: 0.05}}, "+5.0 points from 10 to 50, +20.0 points from 1 to 10", []),
    ],
)
def test_a_claim_fails_and_shows_why(part, changes, measured, also):
    """`also` are other claims that the change contradicts; None: none at all, not even this."""
    rows = make_rows(wobble=0, **changes)
    assert measured in claim(rows, part).measured
    expected = [] if also is None else [part, *also]
    assert {c.text for c in claims(rows) if c.holds is False} == {claim(rows, name).text for name in expected}
    assert None not in {c.holds for c in claims(rows)}


def test_without_rows_nothing_is_claimed():
    found = claims([])
    assert {c.holds for c in found} == {None}
    assert {c.measured for c in found} == {""}
    assert "not in these rows" in formatted([])


def test_a_violation_decides_even_where_rows_are_missing():
    rows = [r for r in make_rows(wobble=0, shares={("ideal", "realigned"): 0.95}) if r["condition"] != "sum_rate"]
    assert claim(rows, ORDER).holds is False
    assert claim(make_rows((0,), wobble=0)[:-20], ORDER).holds is None


def test_seeds_are_compared_only_where_both_have_rows():
    rows = make_rows(wobble=0)
    for row in rows:  # the first seed is twice as good, but has no unprotected fusion
        if row["seed"] == 0 and row["condition"] == "sum_rate" and "uplink" not in row:
            row["accuracy"] = {name: 2 * value for name, value in row["accuracy"].items()}
    rows = [r for r in rows if (r["seed"], r["condition"], r.get("protection")) != (0, "sum_rate", "unprotected")]
    assert "sum rate 10.6 (53.0 % / 5.0 %)" in claim(rows, TIMES).measured


def test_unfinished_rows_are_reported_and_marked(rows):
    part = [r for r in rows if r["seed"] < 2 or r["condition"] in ("base", "individual", "clean")]
    gone = next(r for r in part if r["condition"] == "ideal" and r["protection"] == "both" and len(r["tasks"]) == 3)
    part.remove(gone)
    table = tabulate(part, PROTOCOL)
    assert table.missing == (
        f"seed {gone['seed']}, ideal, both, 10 shots: 1 of {len(PROTOCOL.chosen_subsets())} rows",
        "seed 2, ideal: everything",
        "seed 2, strongest_user: everything",
        "seed 2, sum_rate: everything",
    )
    assert tabulate(part).missing == table.missing
    assert table.cell("ideal", "both", number=3).unfinished == (0, 2)
    assert table.cell("ideal", "both", number=4).unfinished == (2,)
    assert table.cell("ideal", "both").seeds == (0, 1)
    assert table.cell("clean", number=3).unfinished == ()
    text = formatted(part)
    assert "seed 2, sum_rate: everything" in text
    assert text.endswith("* a mean over fewer seeds or subsets than there should be")
    # the slope is that of the one seed which is finished
    sizes = range(2, 6)
    slope = np.polyfit(sizes, [by_hand(rows, 1, "ideal", "both", 10, size).mean() for size in sizes], 1)[0]
    assert claim(part, RISES).measured == f"{100 * slope:+.2f} points a task"


def test_what_is_missing_is_said_as_widely_as_it_can_be(rows):
    def without(**wanted):
        return tabulate([r for r in rows if any(r.get(k) != v for k, v in wanted.items())], PROTOCOL).missing

    assert without(seed=1) == ("seed 1: everything",)
    assert without(seed=1, condition="ideal") == ("seed 1, ideal: everything",)
    assert without(seed=1, condition="ideal", protection="both") == ("seed 1, ideal, both: everything",)
    assert without(seed=1, protection="both", shots=1) == ("seed 1, ideal, both, 1 shot: everything",)
    assert without(seed=1, protection="both", tasks=list(TASKS)) == (
        "seed 1, ideal, both, 1, 50 shots: everything",
        "seed 1, ideal, both, 10 shots: 1 of 13 rows",
        "seed 1, strongest_user, both, 10 shots: 1 of 13 rows",
        "seed 1, sum_rate, both, 10 shots: 1 of 13 rows",
    )


def test_every_beginning_of_a_file_gives_a_report():
    rows = make_rows((0, 1))
    for stop in range(0, len(rows), 7):
        assert "missing" in formatted(rows[:stop], PROTOCOL)
        as_json(rows[:stop], PROTOCOL)
        formatted(rows[:stop])


def test_without_individual_accuracies_nothing_is_normalised(rows):
    table = tabulate([row for row in rows if row["condition"] != "individual" or row["seed"] == 0])
    assert {cell.seeds for cell in table.cells} == {(0,)}
    assert {cell.unfinished for cell in table.cells} == {(1, 2)}
    assert table.missing[0] == "seed 1, individual: everything; nothing of this seed can be normalised"


def test_rows_twice_or_unknown_are_refused(rows):
    with pytest.raises(ValueError, match=r"rows\[5\]: a second row"):
        tabulate([*rows[:5], dict(rows[2])])
    with pytest.raises(ValueError, match=r"rows\[0\]: unknown condition 'cosmic'"):
        tabulate([rows[3] | {"condition": "cosmic"}])
