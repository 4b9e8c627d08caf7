"""Processes that write one file of results: killed, interrupted or several, nothing is lost and nothing done twice."""

import os
import random
import signal
import time

import pytest

import paper.results as module
from helpers.results_files import HEADER, ended, interrupt, job_row, ran, started, until, whole
from helpers.results_worker import jobs, opened
from paper.results import ResultsError, run

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(("count", "step"), [(1, 1), (3, 17)])
def test_killed_anywhere(tmp_path, count, step):
    out = ended(started("killed", tmp_path, count, step=step))
    lines, writes = (int(line.split()[-2]) for line in out.splitlines())
    assert lines * step > 200
    assert writes > 2


def test_killed_at_random_times(tmp_path):
    expected, source = whole(tmp_path / "whole", 60), random.Random(1)
    path, kills = tmp_path / "results.jsonl", 0
    while kills < 8:
        process = started("work", tmp_path, 60, delay=0.004)
        before = sum(ran(tmp_path).values())
        until(lambda: sum(ran(tmp_path).values()) > before, process)  # noqa: B023
        time.sleep(source.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        assert expected.startswith(path.read_bytes())
    ended(started("work", tmp_path, 60))
    assert path.read_bytes() == expected
    assert set(ran(tmp_path)) == {f"job-{number}" for number in range(60)}
    assert sum(ran(tmp_path).values()) <= 60 + kills  # the one that was killed


def test_interrupted_from_the_keyboard(tmp_path):
    expected = whole(tmp_path / "whole", 40)
    for _ in range(3):
        process = started("work", tmp_path, 40, delay=0.01)
        before = sum(ran(tmp_path).values())
        until(lambda: sum(ran(tmp_path).values()) > before + 2, process)  # noqa: B023
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
        found = (tmp_path / "results.jsonl").read_bytes()
        assert expected.startswith(found)
        assert found.endswith(b"\n")
    ended(started("work", tmp_path, 40))
    assert (tmp_path / "results.jsonl").read_bytes() == expected
    assert sum(ran(tmp_path).values()) <= 43
    # and here, with the claim let go
    results = opened(tmp_path / "r")
    with pytest.raises(KeyboardInterrupt):
        run([("job-0", interrupt), ("job-1", interrupt)], results, progress=False)
    run([("job-0", lambda: job_row("job-0"))], results, progress=False)
    assert opened(tmp_path / "r").rows() == [job_row("job-0")]


def same_rows(path, expected):
    """The same lines behind the first, in whatever order."""
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[0] == HEADER
    assert sorted(lines) == sorted(expected.splitlines(keepends=True))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_work(tmp_path, world):
    """Also if all of them, started twice, take themselves for the only one."""
    pytest.importorskip("fcntl")
    expected = whole(tmp_path / "whole", 60)
    ranks = range(world) if world > 1 else [0, 0]
    for process in [started("work", tmp_path, 60, delay=0.005, rank=rank, world=world) for rank in ranks]:
        ended(process)
    same_rows(tmp_path / "results.jsonl", expected)
    assert ran(tmp_path) == {f"job-{number}": 1 for number in range(60)}


@pytest.mark.parametrize("world", [2, 3])
def test_a_job_of_a_killed_process_is_taken_over(tmp_path, world):
    pytest.importorskip("fcntl")
    expected, path = whole(tmp_path / "whole", 30), tmp_path / "results.jsonl"
    killed = started("work", tmp_path, 30, delay=0.002, hang=3, world=world)
    until(lambda: "job-3" in ran(tmp_path), killed)
    others = [started("work", tmp_path, 30, rank=rank, world=world) for rank in range(1, world)]
    until(lambda: path.read_bytes().count(b"\n") == 30, others[0])  # all but one
    time.sleep(0.1)
    assert [process.poll() for process in others] == [None] * (world - 1)  # they wait
    assert ran(tmp_path) == {f"job-{number}": 1 for number in range(30)}
    killed.kill()
    killed.communicate()
    for process in others:
        ended(process)
    same_rows(path, expected)
    assert ran(tmp_path) == {f"job-{number}": 1 + (number == 3) for number in range(30)}


def test_what_others_are_at_may_be_left_to_them(tmp_path):
    pytest.importorskip("fcntl")
    other = started("work", tmp_path, 6, hang=2)
    until(lambda: "job-2" in ran(tmp_path), other)
    results = opened(tmp_path / "results.jsonl")
    run(jobs(tmp_path, 6), results, wait=False, progress=False)
    assert [name for name, _ in jobs(tmp_path, 6) if name not in results] == ["job-2"]
    with results.claim("job-2") as ours:
        assert not ours
    other.kill()
    other.communicate()
    with results.claim("job-2") as ours, results.claim("job-2") as again:
        assert ours
        assert not again
    with results.claim("job-2") as ours:
        assert ours
    ended(started("work", tmp_path, 6))  # it was let go
    assert ran(tmp_path) == {f"job-{number}": 1 + (number == 2) for number in range(6)}


def test_processes_that_create_a_file_at_once_agree(tmp_path):
    pytest.importorskip("fcntl")
    begin = time.time() + 1.5
    made = [started("create", tmp_path, 200, rank=rank, begin=begin) for rank in range(3)]
    won = [int(ended(process)) for process in made]
    assert sum(won) == 100  # each of those of several protocols has one
    for number in range(200):
        content = (tmp_path / f"{number}.jsonl").read_bytes()
        assert content.count(b"\n") == 1
        assert number % 2 or content == HEADER


def test_without_locks_there_is_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    expected = whole(tmp_path / "alone", 4)
    results = opened(tmp_path / "r")
    with pytest.raises(ResultsError, match="world: expected 1, got 2: this system lacks the locks"):
        run(jobs(tmp_path, 4), results, world=2, progress=False)
    assert not ran(tmp_path)
    with results.claim("a") as ours, results.claim("a") as again:
        assert ours
        assert not again
    monkeypatch.undo()
    assert whole(tmp_path / "with", 4) == expected
