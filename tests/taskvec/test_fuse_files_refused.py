"""Checkpoints and paths that `fuse_files` refuses, and what it leaves alone when it does."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import rmtllmf.taskvec._engine as engine
from helpers.checkpoint_files import model, same_bits, written
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import fuse_files, task_arithmetic

pytestmark = pytest.mark.usefixtures("small_pieces")


def test_a_run_that_failed_leaves_nothing(tmp_path):
    states, paths = written(tmp_path)
    states[2]["emb"][4, 3] = float("nan")
    save_file(states[2], paths[2])
    with pytest.raises(NonFiniteError, match=r"finetuned\[1\]\['emb'\] holds 1 non-finite"):
        fuse_files(paths[0], paths[1:], tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_mismatches(tmp_path):
    states, paths = written(tmp_path)
    del states[1]["s"]
    save_file(states[1], paths[1])
    with pytest.raises(StateMismatchError, match=r"finetuned\[0\] lacks 's'"):
        fuse_files(paths[0], paths[1:], tmp_path / "out.safetensors")
    save_file(model(1, torch.float16), paths[1])
    with pytest.raises(StateMismatchError, match=r"finetuned\[0\].*float16.*cast in silence"):
        fuse_files(paths[0], paths[1:], tmp_path / "out.safetensors")
    with pytest.raises(InputError, match="out: is base itself"):
        fuse_files(paths[0], paths[2:], paths[0])
    with pytest.raises(InputError, match=r"out: expected a path that ends in \.safetensors"):
        fuse_files(paths[0], paths[2:], tmp_path / "out.bin")
    with pytest.raises(FileNotFoundError, match=r"finetuned\[0\]"):
        fuse_files(paths[0], [tmp_path / "gone.safetensors"], tmp_path / "out.safetensors")
    (tmp_path / "m.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="could hold code"):
        fuse_files(paths[0], [tmp_path / "m.bin"], tmp_path / "out.safetensors")
    with pytest.raises(TypeError, match="finetuned: expected a sequence"):
        fuse_files(paths[0], paths[1], tmp_path / "out.safetensors", task_arithmetic)


def test_inputs_are_never_replaced_nor_changed_meanwhile(tmp_path, monkeypatch):
    states, paths = written(tmp_path, count=2)
    (tmp_path / "link.safetensors").symlink_to(paths[2])
    for out in (paths[1], tmp_path / "link.safetensors"):
        with pytest.raises(InputError, match=r"out: is finetuned\[.\] itself"):
            fuse_files(paths[0], paths[1:], out)
    for path, state in zip(paths, states, strict=True):
        same_bits(load_file(path), state)

    original = engine.Fusion._piece

    def meanwhile(self, *arguments):
        with open(paths[2], "r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"abcd")
        return original(self, *arguments)

    monkeypatch.setattr(engine.Fusion, "_piece", meanwhile)
    with pytest.raises(InputError, match=r"finetuned\[1\]: .* was changed while it was read"):
        fuse_files(paths[0], paths[1:], tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == sorted([*paths, tmp_path / "link.safetensors"])


def test_paths_of_the_wrong_kind(tmp_path):
    states, paths = written(tmp_path, count=1)
    out = tmp_path / "o.safetensors"
    for wrong in (states[0], 3, None, b"x.safetensors"):
        with pytest.raises(TypeError, match="base: expected a path, got"):
            fuse_files(wrong, paths[1:], out)
        with pytest.raises(TypeError, match=r"finetuned\[0\]: expected a path"):
            fuse_files(paths[0], [wrong], out)
        with pytest.raises(TypeError, match="out: expected a path"):
            fuse_files(paths[0], paths[1:], wrong)
    for wrong in ("", "a\0b.safetensors"):
        with pytest.raises(InputError, match="out: expected a path"):
            fuse_files(paths[0], paths[1:], wrong)
    with pytest.raises(InputError, match="finetuned: expected at least one"):
        fuse_files(paths[0], [], out)
    with pytest.raises(TypeError, match="dtype: expected a floating"):
        fuse_files(paths[0], paths[1:], out, dtype="float16")
    with pytest.raises(FileNotFoundError, match="out: there is no folder"):
        fuse_files(paths[0], paths[1:], tmp_path / "gone" / "o.safetensors")
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(InputError, match=r"out: .* is a folder"):
        fuse_files(paths[0], paths[1:], tmp_path / "d.safetensors")
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    _, paths = written(tmp_path, count=1)

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match=r"out: the folder .* cannot be written to"):
        fuse_files(paths[0], paths[1:], tmp_path / "o.safetensors")
