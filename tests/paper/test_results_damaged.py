"""Files of results that are of another protocol, damaged, cut, replaced or read-only."""

import errno
import os
import random

import pytest

from helpers.results_files import HEADER, ran, untouched, whole
from helpers.results_worker import jobs, opened
from paper.results import ProtocolError, ResultsError, run

pytestmark = pytest.mark.usefixtures("unsynced")


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
