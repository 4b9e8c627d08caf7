"""The file of results: what was added comes back, nothing comes twice, and jobs are done in order."""

import json
import os
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.results_files import HEADER, interrupt, untouched
from helpers.results_worker import PROTOCOL, jobs, key, opened
from paper.results import Results, ResultsError, run

pytestmark = pytest.mark.usefixtures("unsynced")


def test_rows_come_back_as_they_were_added(tmp_path):
    path = tmp_path / "results.jsonl"
    results = opened(path)
    rows = [{"job": "b", "x": 0.1 + 0.2, "none": None}, {"job": "a", "x": -0.0, "list": [True, "é\u2028\n", {}]}]
    for row in rows:
        results.add(row)
    assert path.read_bytes() == HEADER + b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    for found in (results, opened(path)):
        assert found.rows() == rows
        assert len(found) == 2
        assert "a" in found
        assert "c" not in found
        assert repr(found.rows()[1]["x"]) == "-0.0"
    results.rows()[0]["x"] = 5
    rows[1]["list"].append(5)
    assert results.rows()[0]["x"] == 0.1 + 0.2
    assert results.rows()[1]["list"] == [True, "é\u2028\n", {}]
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_row_is_on_disk_when_it_is_added(tmp_path, monkeypatch):
    synced = []

    def sync(file):
        synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        if synced[-1] == "r":
            synced.append((tmp_path / "r").read_bytes().count(b"\n"))

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs the names of descriptors")
    monkeypatch.setattr(os, "fsync", sync)
    results = opened(tmp_path / "r")
    assert synced == ["r", 1, tmp_path.name]  # the line, and the folder that has its name
    results.add({"job": "a"})
    assert synced[3:] == ["r", 2]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("round_trip") / "results.jsonl"


finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=4))
def test_any_rows_of_json_values_round_trip(scratch, rows):
    scratch.unlink(missing_ok=True)
    rows = [row | {"job": f"{number} {row.get('job')!r}"} for number, row in enumerate(rows)]
    results = opened(scratch)
    for row in rows:
        results.add(row)
    assert repr(results.rows()) == repr(opened(scratch).rows()) == repr(rows)  # 1 is not 1.0, and -0.0 not 0.0
    assert scratch.read_bytes().count(b"\n") == len(rows) + 1


@pytest.mark.parametrize(
    "row",
    [
        {"job": "x", "y": float("nan")},
        {"job": "x", "y": [{"z": float("inf")}]},
        {"job": "x", "y": (1, 2)},
        {"job": "x", 3: "y"},
        {"job": "x", "y": "\ud83d\ude00"},  # two halves of one character
        ["job"],
    ],
)
def test_a_row_that_would_not_come_back_is_refused(tmp_path, row):
    results = opened(tmp_path / "r")
    with pytest.raises(ResultsError, match="row: "):
        results.add(row)
    with pytest.raises(TypeError, match="not JSON serializable"):
        results.add({"job": "x", "y": {1}})
    with pytest.raises(TypeError, match="key: expected a string"):
        results.add({"job": 4})
    assert (tmp_path / "r").read_bytes() == HEADER


def test_a_key_twice_is_refused(tmp_path):
    first, second = opened(tmp_path / "r"), opened(tmp_path / "r")
    first.add({"job": "x"})
    before = (tmp_path / "r").read_bytes()
    for results in (first, second):  # the second has not looked since
        with pytest.raises(ResultsError, match=r"row: 'x' is in line 2 of '.*/r' already"):
            results.add({"job": "x", "y": 2})
    assert (tmp_path / "r").read_bytes() == before
    path = tmp_path / "edited"
    rows = b'{"job": "a"}\n{"job": "x", "y": 1}\n{"job": "b"}\n'
    untouched(
        path, HEADER + rows + b'{"job": "x", "y": 1}\n', ResultsError, "line 5 .* repeats 'x' of line 3, as it is"
    )
    untouched(
        path, HEADER + rows + b'{"job": "x", "y": 1.5}\n', ResultsError, "line 5 .* 'x' of line 3, with other val"
    )


def test_the_order_of_the_work(tmp_path):
    """One's own block forwards, then what others have left of theirs, from the end."""
    orders = {
        (0, 1): "0123456",
        (0, 2): "0126543",
        (1, 2): "3456210",
        (1, 3): "2365410",
        (2, 3): "4561032",
    }
    for (rank, world), order in orders.items():
        done = []
        todo = [(str(n), lambda n=n, done=done: (done.append(str(n)), {"job": str(n)})[1]) for n in range(7)]
        run(todo, opened(tmp_path / f"{rank}{world}"), rank=rank, world=world, progress=False)
        assert "".join(done) == order


def test_threads_may_add_and_refresh(tmp_path):
    """Several take in at once what another has added, and add their own."""
    results, other = opened(tmp_path / "r"), opened(tmp_path / "r")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(thread):
        for number in range(40):
            if thread < 2:
                (other if thread else results).add({"job": f"{thread} {number}"})
            results.refresh()

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(5)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(results) == len(opened(tmp_path / "r")) == 80


def test_bad_jobs(tmp_path):
    results = opened(tmp_path / "r")
    with pytest.raises(ResultsError, match="jobs: 'a' appears more than once"):
        run([("a", interrupt), ("b", interrupt), ("a", interrupt)], results)
    with pytest.raises(ResultsError, match="jobs: the job 'a' made the row of 'b'"):
        run([("a", lambda: {"job": "b"})], results, progress=False)
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ResultsError, match="rank: expected a number from 0 to world - 1"):
            run([], results, rank=rank, world=world)
    with pytest.raises(ZeroDivisionError):
        run([("a", lambda: 1 / 0)], results, progress=False)
    run([("a", lambda: {"job": "a"})], results, progress=False)  # what failed may be tried again
    assert Results(tmp_path / "r", PROTOCOL, key=key).rows() == [{"job": "a"}]


def test_the_bar_shows_what_remains(tmp_path, capsys):
    results = opened(tmp_path / "r")
    run(jobs(tmp_path, 2), results, progress=False)
    assert capsys.readouterr() == ("", "")
    run(jobs(tmp_path, 5), results)
    out, err = capsys.readouterr()
    assert out == ""
    assert "40%" in err.split("\r")[1]
    assert "5/5" in err
