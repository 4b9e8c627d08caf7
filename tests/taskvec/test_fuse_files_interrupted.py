"""A fusion of files that is killed, or runs out of disk, goes on; and with no request but its own."""

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import rmtllmf.taskvec._engine as engine
from helpers.checkpoint_files import loaded, model, same_bits, sharded, written
from helpers.scripts import printed_by
from rmtllmf.errors import InputError
from rmtllmf.taskvec import fuse, fuse_files

pytestmark = pytest.mark.usefixtures("small_pieces")


def _slowly(paths, out, delay):
    """In a process of its own: every piece takes a while."""
    engine.PIECE = 8
    original = engine.Fusion._piece

    def slow(self, *arguments):
        time.sleep(delay)
        return original(self, *arguments)

    engine.Fusion._piece = slow
    fuse_files(paths[0], paths[1:], out, scale=0.3)


@pytest.mark.parametrize("folder", [False, True])
def test_a_killed_run_goes_on(folder, tmp_path, monkeypatch):
    states = [model(seed) for seed in range(3)]
    (tmp_path / "in").mkdir()
    paths = [
        sharded(state, tmp_path / "in" / str(i), ["a.safetensors", "b.safetensors"]) for i, state in enumerate(states)
    ]
    out = tmp_path / ("out" if folder else "out.safetensors")
    process = multiprocessing.get_context("spawn").Process(target=_slowly, args=(paths, out, 0.2))
    process.start()
    journal = tmp_path / f".{out.name}.part.journal"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n") >= 4):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not out.exists()
    complete = {json.loads(line) for line in journal.read_text().split("\n")[1:-1]}
    assert complete
    with open(journal, "a") as file:
        file.write('"l0.')  # a line that was cut short

    seen = set()
    original = engine.Fusion._piece
    monkeypatch.setattr(
        engine.Fusion, "_piece", lambda self, space, key, *rest: (seen.add(key), original(self, space, key, *rest))[1]
    )
    fuse_files(paths[0], paths[1:], out, scale=0.3)
    assert seen
    assert not seen & complete
    same_bits(loaded(out), fuse(states[0], states[1:], scale=0.3))
    assert not list(tmp_path.glob(".*"))


def test_parts_of_another_request_are_not_gone_on_with(tmp_path, monkeypatch):
    states, paths = written(tmp_path)
    out = tmp_path / "out.safetensors"

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rmtllmf.taskvec._checkpoint_writer.Files.done", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fuse_files(paths[0], paths[1:], out, scale=0.3)
    assert (tmp_path / ".out.safetensors.part").exists()
    fuse_files(paths[0], paths[1:], out, scale=0.7)
    same_bits(load_file(out), fuse(states[0], states[1:], scale=0.7))
    # the same for an input that has changed since
    with monkeypatch.context() as patch:
        patch.setattr("rmtllmf.taskvec._checkpoint_writer.Files.done", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fuse_files(paths[0], paths[1:], out, scale=0.3)
    same_bits(load_file(out), fuse(states[0], states[1:], scale=0.7))  # what was there is still there
    states[1] = model(77)
    save_file(states[1], paths[1])
    fuse_files(paths[0], paths[1:], out, scale=0.3)
    same_bits(load_file(out), fuse(states[0], states[1:], scale=0.3))


def test_two_processes_do_not_write_one_target(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    _, paths = written(tmp_path)
    with open(tmp_path / ".out.safetensors.part.journal", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process"):
            fuse_files(paths[0], paths[1:], tmp_path / "out.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "step"), [("out.safetensors", 1), ("out", 3)])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_before_any_line(target, step, tmp_path):
    """What another request has left lies there, and either of the two is called next."""
    assert "killed before each of" in printed_by("killed_anywhere.py", tmp_path, target, step, timeout=600)


def interrupted(monkeypatch, *arguments, **options):
    """All but the last step of a fusion, as after a kill."""

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rmtllmf.taskvec._checkpoint_writer.Files.done", stop)
        with pytest.raises(KeyboardInterrupt):
            fuse_files(*arguments, **options)


def calculated(monkeypatch, *arguments, **options):
    """The names for which a fusion calculates anything."""
    seen = set()
    original = engine.Fusion._piece
    with monkeypatch.context() as patch:
        patch.setattr(
            engine.Fusion,
            "_piece",
            lambda self, space, key, *rest: (seen.add(key), original(self, space, key, *rest))[1],
        )
        fuse_files(*arguments, **options)
    return seen


def test_the_journal_is_empty_before_another_part_is_begun(tmp_path, monkeypatch):
    """Killed right after that, it would else speak of tensors that are not there any more."""
    _, paths = written(tmp_path, count=2)
    out = tmp_path / "out.safetensors"
    interrupted(monkeypatch, paths[0], paths[1:], out, scale=0.3)
    journal, sizes = tmp_path / ".out.safetensors.part.journal", []
    assert journal.stat().st_size
    monkeypatch.setattr(
        "rmtllmf.taskvec._checkpoint_writer._remove", lambda path: (sizes.append(journal.stat().st_size), path.unlink())
    )
    fuse_files(paths[0], paths[1:], out, scale=0.7)
    assert sizes == [0]


def test_only_the_very_same_request_is_gone_on_with(tmp_path, monkeypatch):
    states, paths = written(tmp_path, count=2)
    out = tmp_path / "out.safetensors"
    request = (paths[0], paths[1:], out)
    for options in (
        {"weights": {"*": torch.tensor([0.5, 1.0])}, "skip": ("emb",)},
        {"mse": 0.1, "scale": 1.0, "seed": 1},
    ):
        interrupted(monkeypatch, *request, **options)
        assert not calculated(monkeypatch, *request, **options)
    # numbers that print alike
    interrupted(monkeypatch, *request, weights={"*": torch.tensor([0.5, 1.0])})
    nearly = {"weights": {"*": torch.tensor([0.5, 1.0000002])}}
    assert calculated(monkeypatch, *request, **nearly)
    same_bits(load_file(out), fuse(states[0], states[1:], **nearly))
    # functions that are called alike
    rules = [lambda vectors: 0.4 * sum(vectors), lambda vectors: 0.8 * sum(vectors)]
    for rule in rules:
        rule.__qualname__ = "mine"
    interrupted(monkeypatch, *request, rules[0])
    fuse_files(*request, rules[1])
    same_bits(load_file(out), fuse(states[0], states[1:], rules[1]))


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"{]\n", b"3\n", b"[1]\n", b'"unknown"\n', b"\0" * 100 + b"\n"])
@pytest.mark.parametrize("at", [0, None])
def test_a_damaged_journal(damage, at, tmp_path, monkeypatch):
    states, paths = written(tmp_path, count=2)
    request = (paths[0], paths[1:], tmp_path / "out.safetensors")
    interrupted(monkeypatch, *request)
    journal = tmp_path / ".out.safetensors.part.journal"
    content = journal.read_bytes()
    journal.write_bytes(damage + content if at == 0 else content + damage)
    fuse_files(*request)
    same_bits(load_file(request[2]), fuse(states[0], states[1:]))
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk(tmp_path, monkeypatch):
    states, paths = written(tmp_path, count=2)
    request = (paths[0], paths[1:], tmp_path / "out.safetensors")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*/\.out\.safetensors\.part'"):
            fuse_files(*request)
    assert not request[2].exists()
    fuse_files(*request)
    same_bits(load_file(request[2]), fuse(states[0], states[1:]))


@pytest.mark.parametrize("background", [True, False])
def test_what_did_not_reach_the_disk_is_told_and_not_gone_on_with(background, tmp_path, monkeypatch):
    """A system tells of a failing disk once: to whoever asks first, while the file is written or at the end."""
    states, paths = written(tmp_path, count=2)
    request = (paths[0], paths[1:], tmp_path / "out.safetensors")
    monkeypatch.setattr("rmtllmf.taskvec._checkpoint_writer._FLUSH", 8 if background else 1 << 26)
    failed, fsync, pwrite, begun = threading.Event(), os.fsync, os.pwrite, []

    def fail_once(descriptor):
        if not failed.is_set():
            failed.set()
            raise OSError(5, "the disk is broken")
        fsync(descriptor)

    def write_slowly(*arguments):
        begun.append(arguments)
        assert len(begun) == 1 or not background or failed.wait(60)
        return pwrite(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_once)
        patch.setattr(os, "pwrite", write_slowly)
        with pytest.raises(OSError, match="the disk is broken"):
            fuse_files(*request)
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    fuse_files(*request)
    same_bits(load_file(request[2]), fuse(states[0], states[1:]))


def test_the_lock_of_a_journal_that_is_no_more(tmp_path, monkeypatch):
    """Opened while another process had it, which then finished and removed it: that lock keeps nobody out."""
    fcntl = pytest.importorskip("fcntl")
    states, paths = written(tmp_path, count=2)
    journal = tmp_path / ".out.safetensors.part.journal"
    original, calls = fcntl.flock, []

    def late(file, how):
        if not calls:
            os.unlink(journal)
        calls.append(how)
        return original(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    fuse_files(paths[0], paths[1:], tmp_path / "out.safetensors")
    assert len(calls) == 2
    same_bits(load_file(tmp_path / "out.safetensors"), fuse(states[0], states[1:]))
