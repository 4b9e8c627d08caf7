"""Full disks, folders that are read only, processes that are killed: the old file stays, and the error says where."""

import errno
import json
import os
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.scripts import printed_by
from helpers.writers import SIZE, WRITERS
from rmtllmf.taskvec import fuse_files

resource = pytest.importorskip("resource", reason="limits of POSIX")


@contextmanager
def little_disk(size):
    """No file gets larger than that, whoever writes it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("fails", ["header", "middle", "fsync", "replace"])
def test_a_full_disk(name, fails, tmp_path, monkeypatch):
    save, load = WRITERS[name]
    save(tmp_path, 1)
    assert load(tmp_path) == [1.0]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        if fails == "fsync":
            patch.setattr(os, "fsync", full)
        elif fails == "replace":
            for call in ("replace", "rename"):
                patch.setattr(os, call, full)
            patch.setattr("rmtllmf.taskvec._adapter_save._exchanged", lambda one, other: False)
        size = {"header": 60, "middle": SIZE}.get(fails, 1 << 30)
        with pytest.raises(OSError) as error, little_disk(size):  # noqa: PT011 (the number below)
            save(tmp_path, 2)
    assert error.value.errno in (errno.EFBIG, errno.ENOSPC)
    if fails != "replace":  # which is the system's to name
        assert str(tmp_path) in str(error.value), "the error says which file"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert load(tmp_path) == [1.0]
    save(tmp_path, 2)
    assert load(tmp_path) == [2.0]


@pytest.mark.parametrize("size", [10, 300, 9000])
@pytest.mark.parametrize("target", ["out.safetensors", "out"])
def test_a_full_disk_while_files_are_fused(size, target, tmp_path):
    """What is left says so by its name, and the next run goes on with it; what was there stays meanwhile."""
    (tmp_path / "in").mkdir()
    for seed in (0, 1):
        save_file(
            {"w": torch.full((SIZE,), float(seed)), "v": torch.ones(SIZE)}, tmp_path / "in" / f"{seed}.safetensors"
        )
    base, tuned = tmp_path / "in" / "0.safetensors", [tmp_path / "in" / "1.safetensors"]
    out = tmp_path / target
    if target == "out.safetensors":
        save_file({"w": torch.full((1,), 7.0)}, out)
    with pytest.raises(OSError) as error, little_disk(size):  # noqa: PT011 (the number below)
        fuse_files(base, tuned, out)
    assert error.value.errno == errno.EFBIG
    assert str(tmp_path) in str(error.value)
    if target == "out.safetensors":
        assert load_file(out)["w"].tolist() == [7.0]
    else:
        assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"in", target, f".{target}.part", f".{target}.part.journal"}
    fuse_files(base, tuned, out, scale=1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"in", target}
    found = load_file(out / "0.safetensors" if out.is_dir() else out)
    assert found["w"].unique().tolist() == [1.0]


def test_a_run_that_was_interrupted_when_only_the_name_was_missing(tmp_path, monkeypatch):
    """The small files beside the shards are there already: they are written again, and a link in their place is not."""
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((3,), value)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(name)
    victim = tmp_path / "victim"
    victim.write_text("somebody's notes")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            fuse_files(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out")
    planted = tmp_path / ".out.part" / "config.json"
    assert planted.read_text() == "base"
    planted.unlink()
    planted.symlink_to(victim)
    fuse_files(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "base"
    assert not (tmp_path / "out" / "config.json").is_symlink()
    assert victim.read_text() == "somebody's notes"


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="users of POSIX")
def test_folders_that_are_read_only():
    """In a process that is not root, to whom no folder is read only."""
    found = json.loads(printed_by("read_only_worker.py").splitlines()[-1])
    assert set(found) == {"vector", "masks", "adapter", "a run's checkpoint", "fuse_files"}
    for name, (kind, message, same) in found.items():
        assert kind == "PermissionError", (name, message)
        assert "/locked" in message, (name, message)
        assert same, name


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("what", ["vector", "adapter"])
def test_killed_before_any_line(what, tmp_path):
    """A process that saves is killed at every line: what is there is the old or the new, as a whole."""
    lines, old, new = map(int, printed_by("killed_saves.py", tmp_path, what, timeout=600).split())
    assert lines > 20
    assert old > 0
    assert new > 0
