"""The file of results: whatever happens to the processes that write it, nothing is lost and nothing done twice."""

import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import paper.results as module
from helpers.results_worker import PROTOCOL, jobs, key, opened
from paper.results import ProtocolError, Results, ResultsError, run

TESTS = Path(__file__).parents[1]


def started(what, folder, count, **options):
    """A process of tests/helpers/results_worker.py."""
    arguments = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    return subprocess.Popen(
        [sys.executable, str(TESTS / "helpers" / "results_worker.py"), what, str(folder), str(count), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(TESTS.parent / "examples")},
    )


def ended(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err[-4000:]
    return out


def ran(folder):
    path = folder / "ran"
    return Counter(path.read_text().split()) if path.exists() else Counter()


def until(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def whole(folder, count, **options):
    """What a process alone writes that nothing interrupts, as bytes."""
    folder.mkdir()
    path = folder / "results.jsonl"
    run(jobs(folder, count), opened(path), progress=False, **options)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """What processes write is in the system's cache, and no test pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def untouched(path, content, error, match, protocol=PROTOCOL):
    path.write_bytes(content)
    with pytest.raises(error, match=match) as caught:
        opened(path, protocol)
    assert path.read_bytes() == content
    return str(caught.value)


HEADER = json.dumps({"format": 1, "protocol": PROTOCOL}).encode() + b"\n"


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


def test_another_protocol_is_refused_by_name(tmp_path):
    other = {"seeds": 3, "tasks": ["mnist", "svhn"], "uplink": {"users": 8.0, "power": 0.1}, "new": {}}
    message = untouched(tmp_path / "r", HEADER + b'{"job": "a"}\n', ProtocolError, "another protocol", other)
    differences = message.split("another protocol: ")[1].split("; ")
    assert sorted(differences) == [
        "new: expected {}, found nothing",
        "seeds: expected 3, found 2",
        "uplink.users: expected 8.0, found 8",
    ]
    del other["tasks"]
    message = untouched(tmp_path / "r", HEADER, ProtocolError, "another protocol", other)
    assert 'tasks: expected nothing, found ["mnist", "svhn"]' in message
    # neither the order of fields nor tuples make another protocol
    same = {"uplink": {"power": 0.1, "users": 8}, "tasks": ("mnist", "svhn"), "seeds": 2}
    assert opened(tmp_path / "r", same).rows() == []
    opened(tmp_path / "nested", {"users": [{"id": 1, "power": 2}]})
    opened(tmp_path / "nested", {"users": [{"power": 2, "id": 1}]})
    with pytest.raises(ValueError, match="JSON compliant"):
        opened(tmp_path / "nan", {"power": float("nan")})
    assert not (tmp_path / "nan").exists()


@pytest.mark.parametrize(
    "content",
    [
        random.Random(0).randbytes(3000),
        random.Random(0).randbytes(50).replace(b"\n", b""),
        b"{}\n",
        b"[]",
        b"\n",
        b"null\n",
        b'{"format": 1}\n',
        b'{"format": 1, "protocol": [1]}\n',
        HEADER.replace(b"1", b"2", 1),
        HEADER.replace(b"1", b"true", 1),
        HEADER.replace(b"0.1", b"NaN"),
        HEADER[: HEADER.index(b"svhn")] + b"cars",  # cut short, but of another protocol
        b"[" * 100_000 + b"\n",
    ],
)
def test_what_is_no_file_of_results_is_refused(tmp_path, content):
    untouched(tmp_path / "r", content, ResultsError, r"/r' (is no file of results|holds results of another protocol)")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"job": "x", "y": 1', "is damaged: "),
        (b'{"job": "x", "y": NaN}', "is damaged: NaN is not a finite number"),
        (b'{"job": "x", "y": [-Infinity]}', "is damaged: -Infinity is not"),
        (b'{"job": "x", "y": 1e999}', "is damaged: 1e999 is not"),
        (b'["job"]', "is damaged: expected an object"),
        (b"", "is damaged: "),
        (b"\0" * 40, "is damaged: "),
        (b'{"job": "\xff"}', "is damaged: .*utf-8"),
        (b"[" * 100_000, "is damaged: .*recursion"),
        (b'{"jab": "x"}', r"is not a row of this experiment: KeyError\('job'\)"),
        (b'{"job": 7}', "is not a row of this experiment: TypeError.*expected a string"),
        (HEADER[:-1], "is not a row"),  # two files, one behind the other
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, what):
    rows = [b'{"job": "a"}', b'{"job": "b"}', line, b'{"job": "c"}', b'{"jo']
    untouched(tmp_path / "r", HEADER + b"\n".join(rows), ResultsError, f"line 4 of '.*/r' {what}")
    # it may also be damaged later, by whomever
    results = opened(tmp_path / "later")
    with open(tmp_path / "later", "ab") as file:
        file.write(b"\n".join(rows))
    before = (tmp_path / "later").read_bytes()
    for act in (results.refresh, results.refresh, lambda: results.add({"job": "d"})):
        with pytest.raises(ResultsError, match=f"line 4 of '.*/later' {what}"):
            act()
    assert (tmp_path / "later").read_bytes() == before


def test_a_file_cut_at_any_byte_is_gone_on_with(tmp_path):
    expected = whole(tmp_path / "whole", 4)
    path = tmp_path / "r"
    for size in range(len(expected) + 1):
        path.write_bytes(expected[:size])
        results = opened(path)
        complete = max(0, expected[:size].count(b"\n") - 1)
        assert len(results) == complete
        if complete or expected[:size] == HEADER:
            assert path.read_bytes() == expected[:size]  # only he who appends cuts off
        run(jobs(tmp_path, 4), results, progress=False)
        assert path.read_bytes() == expected, size
        assert sum(ran(tmp_path).values()) == 4 - complete
        (tmp_path / "ran").unlink(missing_ok=True)


def test_a_file_that_is_only_read_may_be_read_only(tmp_path, monkeypatch):
    path = tmp_path / "r"
    path.write_bytes(HEADER + b'{"job": "a"}\n{"jo')
    original = os.open

    def reads_only(name, flags, *arguments):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise PermissionError(errno.EACCES, "read-only", str(name))
        return original(name, flags, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", reads_only)
        results = opened(path)
        assert results.rows() == [{"job": "a"}]
        run([("a", lambda: 1 / 0)], results, progress=False)  # done
        with pytest.raises(PermissionError):
            results.add({"job": "b"})


def test_a_file_that_was_replaced_or_cut_in_use_is_noticed(tmp_path):
    path = tmp_path / "r"
    for change in (lambda: os.truncate(path, len(HEADER)), lambda: os.replace(tmp_path / "other", path)):
        path.unlink(missing_ok=True)
        results = opened(path)
        results.add({"job": "a"})
        opened(tmp_path / "other").add({"job": f"a long name that makes it longer {change}"})
        change()
        before = path.read_bytes()
        for act in (results.refresh, lambda: results.add({"job": "b"})):  # noqa: B023 (called here)
            with pytest.raises(ResultsError, match="was replaced or cut while it was in use"):
                act()
        assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(FileNotFoundError):
        results.add({"job": "b"})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        opened(tmp_path / "nowhere" / "r")


@pytest.mark.parametrize("fails", ["write", "fsync"])
@pytest.mark.parametrize("undone", [True, False])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, fails, undone):
    """Some of the line fits, or all of it does until the system looks; and even the undoing may fail."""
    expected = whole(tmp_path / "whole", 3)
    write, truncate = os.write, os.ftruncate
    for room in range(3, len(expected), 10):
        path = tmp_path / f"{room}"
        left = room

        def limited(file, data):
            nonlocal left
            if fails == "write" and data.startswith(b'{"job"') and left < len(data):
                left, data = -1, data[: max(0, left)]
                if data:
                    return write(file, data)
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            left -= len(data) if data.startswith(b'{"job"') else 0
            return write(file, data)

        def failing(file):
            status = os.fstat(file)
            if fails == "fsync" and stat.S_ISREG(status.st_mode) and status.st_size > len(HEADER) + room:  # noqa: B023
                raise OSError(errno.ENOSPC, "No space left on device")

        def truncated(file, size):
            if not undone and os.fstat(file).st_size > size:
                raise OSError(errno.EIO, "Input/output error")
            truncate(file, size)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", limited)
            patch.setattr(os, "fsync", failing)
            patch.setattr(os, "ftruncate", truncated)
            results = opened(path)
            plain = [(name, lambda name=name: job_row(name)) for name in ("job-0", "job-1", "job-2")]
            if room < len(expected) - len(HEADER):
                with pytest.raises(OSError, match="No space"):
                    run(plain, results, progress=False)
            else:
                run(plain, results, progress=False)
        found = path.read_bytes()
        assert expected.startswith(found)
        if undone:
            assert found.endswith(b"\n")
            assert found == HEADER + b"".join(line_of(expected, n) for n in range(len(results)))
        run(plain, results, progress=False)  # the same process, when there is room again
        assert path.read_bytes() == expected
        path.write_bytes(found)
        run(plain, opened(path), progress=False)  # and another
        assert path.read_bytes() == expected


def job_row(name, number=None):
    number = int(name.split("-")[1]) if number is None else number
    return {"job": name, "accuracy": number / 7, "per_task": {"é": [1, None, 2.5] * (number % 3)}}


def line_of(content, number):
    return content.splitlines(keepends=True)[number + 1]


def test_a_full_disk_of_the_system(tmp_path):
    pytest.importorskip("resource")
    expected = whole(tmp_path / "whole", 4)
    for limit in (0, 20, len(HEADER), len(HEADER) + 10, len(expected) - 1):
        folder = tmp_path / str(limit)
        folder.mkdir()
        process = started("work", folder, 4, limit=max(limit, 1))
        _, err = process.communicate(timeout=60)
        assert "File too large" in err
        found = (folder / "results.jsonl").read_bytes()
        assert found == expected[: expected[:limit].rfind(b"\n") + 1]
        run(jobs(folder, 4), opened(folder / "results.jsonl"), progress=False)
        assert (folder / "results.jsonl").read_bytes() == expected


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


def interrupt():
    raise KeyboardInterrupt


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
