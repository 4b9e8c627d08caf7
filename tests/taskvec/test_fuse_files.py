"""Checkpoints on disk: the same bits as in memory, one file or shards, atomically, and on after being killed."""

import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rmtllmf.taskvec._engine as engine
from helpers.fusion_rules import ROWS
from rmtllmf.channel import transmit
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.taskvec import TaskVector, fuse, fuse_files, task_arithmetic
from rmtllmf.taskvec._checkpoint import Checkpoint


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(engine, "PIECE", 8)


def model(seed, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    shapes = {"emb": (5, 4), "l0.w": (6, 4), "l0.b": (6,), "s": (), "none": (0, 2)}
    state = {key: torch.randn(shape, generator=source).to(dtype) for key, shape in shapes.items()}
    mask = torch.full((3, 3), float("-inf")).triu(1)
    return state | {"mask": mask, "steps": torch.tensor(seed), "flags": torch.tensor([True, False, True])}


def sharded(state, folder, names):
    """As Hugging Face writes it: shards and an index."""
    folder.mkdir()
    weight_map = {key: names[i % len(names)] for i, key in enumerate(state)}
    for name in names:
        save_file({k: v for k, v in state.items() if weight_map[k] == name}, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def loaded(path):
    if path.is_dir():
        return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}
    return load_file(path)


def same_bits(left, right):
    assert set(left) == set(right)
    for key in left:
        assert left[key].dtype == right[key].dtype
        assert torch.equal(left[key], right[key]), key


def written(tmp_path, dtype=torch.float32, count=4):
    states = [model(seed, dtype) for seed in range(count + 1)]
    paths = [tmp_path / f"{index}.safetensors" for index in range(count + 1)]
    for state, path in zip(states, paths, strict=True):
        save_file(state, path)
    return states, paths


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_same_bits_as_in_memory(row, dtype, tmp_path):
    states, paths = written(tmp_path, dtype, max(4, row.fewest))
    expected = fuse(states[0], states[1:], row.rule)
    fuse_files(paths[0], paths[1:], tmp_path / "out.safetensors", row.rule)
    same_bits(load_file(tmp_path / "out.safetensors"), expected)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*(p.name for p in paths), "out.safetensors"])


def test_shards_in_and_out(tmp_path):
    states = [model(seed) for seed in range(3)]
    layouts = (["a.safetensors", "b.safetensors"], ["model.safetensors"], ["x.safetensors", "y.safetensors"])
    folders = [sharded(states[i], tmp_path / f"m{i}", layouts[i]) for i in range(3)]
    expected = fuse(states[0], states[1:], skip="emb")
    fuse_files(folders[0], folders[1:], tmp_path / "out", skip="emb")
    same_bits(loaded(tmp_path / "out"), expected)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((folders[0] / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    # an index can be named itself, and a single file comes of shards on request
    fuse_files(folders[0] / "model.safetensors.index.json", folders[1:], tmp_path / "one.safetensors", skip="emb")
    same_bits(load_file(tmp_path / "one.safetensors"), expected)
    with pytest.raises(FileExistsError, match="out: the folder"):
        fuse_files(folders[0], folders[1:], tmp_path / "out")
    with safe_open(tmp_path / "one.safetensors", "pt") as file:  # the reference implementation agrees with the format
        assert file.metadata() == {"format": "pt"}


def test_dtype_progress_and_a_rule_of_ones_own(tmp_path, capsys):
    states, paths = written(tmp_path, torch.bfloat16)
    fuse_files(paths[0], paths[1:], tmp_path / "o.safetensors", scale=0.4, dtype=torch.float32, progress=True)
    same_bits(load_file(tmp_path / "o.safetensors"), fuse(states[0], states[1:], scale=0.4, dtype=torch.float32))
    assert "fusing" in capsys.readouterr().err
    fuse_files(paths[0], paths[1:], tmp_path / "p.safetensors", lambda vectors: 0.4 * sum(vectors))
    same_bits(load_file(tmp_path / "p.safetensors"), fuse(states[0], states[1:], scale=0.4))


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


def test_a_run_that_failed_leaves_nothing(tmp_path):
    states, paths = written(tmp_path)
    states[2]["emb"][4, 3] = float("nan")
    save_file(states[2], paths[2])
    with pytest.raises(NonFiniteError, match=r"finetuned\[1\]\['emb'\] holds 1 non-finite"):
        fuse_files(paths[0], paths[1:], tmp_path / "out.safetensors")
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_two_processes_do_not_write_one_target(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    _, paths = written(tmp_path)
    with open(tmp_path / ".out.safetensors.part.journal", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process"):
            fuse_files(paths[0], paths[1:], tmp_path / "out.safetensors")


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


def raw(header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "3 bytes long"),
        (struct.pack("<Q", 1 << 60) + b"{}", "header would be"),
        (raw(b"{", b""), "cannot be read"),
        (raw(b"\xff\xfe{}", b""), "cannot be read"),
        (raw(b"[" * 10_000, b""), "cannot be read"),
        (raw(b"[]", b""), "no mapping"),
        (raw({"w": 3}), "makes no sense"),
        (raw({"w": GOOD["w"] | {"shape": [-4]}}), "shape"),
        (raw({"w": GOOD["w"] | {"shape": [True] * 4}}), "shape"),
        (raw({"w": GOOD["w"] | {"shape": [5]}}), "cannot take 16 bytes"),
        (raw({"w": GOOD["w"] | {"dtype": "F33"}}), "F33"),
        (raw({"w": GOOD["w"] | {"dtype": ["F32"]}}), "F32"),
        (raw({"w": GOOD["w"] | {"shape": [0, 2**70], "data_offsets": [0, 0]}}), "shape"),
        (raw({"\ud800": GOOD["w"]}), "cannot be read"),
        (raw({"w": GOOD["w"] | {"data_offsets": [0, 32]}}), "offsets"),
        (raw({"w": GOOD["w"] | {"data_offsets": [0.0, 16]}}), "offsets"),
        (raw(GOOD | {"v": GOOD["w"]}), "overlap"),
        (raw(GOOD, b"\0" * 20), "4 bytes at its end"),
        (raw(b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"w":{}}'), "twice"),
        (raw({"__metadata__": [], **GOOD}), "metadata is no mapping"),
    ],
)
def test_hostile_headers(content, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        Checkpoint(path, "base")


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_damaged_files_are_refused_or_read(tmp_path_factory, noise, at):
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "x.safetensors"
    save_file({"w": torch.ones(4), "v": torch.ones(2, 2)}, path)
    content = bytearray(path.read_bytes())
    content[at : at + len(noise)] = noise
    path.write_bytes(content)
    try:
        checkpoint = Checkpoint(path, "base")
    except InputError:
        return
    for key, spec in checkpoint.specs.items():
        assert checkpoint[key].shape == spec.shape
    checkpoint.close()


@pytest.mark.parametrize("shard", ["../0.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", 3])
def test_an_index_does_not_lead_elsewhere(shard, tmp_path):
    _, _ = written(tmp_path)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(InputError, match="plain name of a file beside it"):
        Checkpoint(tmp_path / "f", "base")


def test_an_index_that_lies(tmp_path):
    folder = sharded(model(0), tmp_path / "f", ["a.safetensors", "b.safetensors"])
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["s"]
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="the index says that 's' is in None"):
        Checkpoint(folder, "base")


@pytest.mark.parametrize("scale", ["rms", "peak", "tensor_rms", "tensor_peak", 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_channel_on_the_way_is_transmit(scale, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "PIECE", 1 << 17)
    states, paths = written(tmp_path, dtype, 3)
    for state, path in zip(states, paths, strict=True):
        del state["mask"]  # the same in all, which has no scale of its own
        state["long"] = torch.randn(150_001, generator=torch.Generator().manual_seed(int(state["steps"]))).to(dtype)
        save_file(state, path)
    vectors = [TaskVector.between(states[0], state) for state in states[1:]]
    mse = [0.1, 0.0, 2.0]
    expected = task_arithmetic(transmit(vectors, mse, seed=5, scale=scale), 0.3).apply_to(states[0])
    rule = partial(task_arithmetic, scale=0.3)
    fuse_files(paths[0], paths[1:], tmp_path / "o.safetensors", rule, mse=mse, scale=scale, seed=5)
    same_bits(load_file(tmp_path / "o.safetensors"), expected)
    # whatever the pieces
    monkeypatch.setattr(engine, "PIECE", 1 << 13)
    fuse_files(paths[0], paths[1:], tmp_path / "p.safetensors", rule, mse=mse, scale=scale, seed=5)
    same_bits(load_file(tmp_path / "p.safetensors"), expected)


def test_errors_of_the_channel(tmp_path):
    _, paths = written(tmp_path)
    out = tmp_path / "o.safetensors"
    with pytest.raises(InputError, match="seed: with mse"):
        fuse_files(paths[0], paths[1:], out, mse=0.1)
    with pytest.raises(ShapeError, match="each of the 4 models, got 2"):
        fuse_files(paths[0], paths[1:], out, mse=[0.1, 0.2], seed=0)
    with pytest.raises(InputError, match=r"mse\[1\]: expected at least 0"):
        fuse_files(paths[0], paths[1:], out, mse=[0.1, -0.2, 0.1, 0.1], seed=0)
    with pytest.raises(InputError, match="scale: expected one of 'rms'"):
        fuse_files(paths[0], paths[1:], out, mse=0.1, scale="max", seed=0)
    with pytest.raises(InputError, match="does not differ from base"):
        fuse_files(paths[0], [paths[0], paths[0]], out, mse=0.1, seed=0)
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("target", "step"), [("out.safetensors", 1), ("out", 3)])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_before_any_line(target, step, tmp_path):
    """What another request has left lies there, and either of the two is called next."""
    tests = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, str(tests / "helpers" / "killed_anywhere.py"), str(tmp_path), target, str(step)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "killed before each of" in run.stdout


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


@pytest.mark.parametrize("name", ["Llama-3.1-8B-fused", "v0.1"])
def test_folders_with_a_point_in_their_name(name, tmp_path):
    _, paths = written(tmp_path, count=1)
    fuse_files(paths[0], paths[1:], tmp_path / name)
    assert (tmp_path / name / "0.safetensors").is_file()


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


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_default_device_does_not_matter(device, tmp_path):
    states, paths = written(tmp_path, torch.bfloat16, count=2)
    for state in states:
        del state["mask"]
    for state, path in zip(states, paths, strict=True):
        save_file(state, path)
    out = tmp_path / "o.safetensors"
    rule = partial(task_arithmetic, scale=0.3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # what is calculated on threads does not see the context
    try:
        fuse_files(paths[0], paths[1:], out, rule, mse=0.1, scale=torch.tensor(0.5), seed=1)
        expected = load_file(out)
        with torch.device(device):
            fuse_files(paths[0], paths[1:], out, rule, mse=0.1, scale=0.5, seed=1)
    finally:
        torch.set_num_threads(before)
    same_bits(load_file(out), expected)


def test_the_channel_and_nothing_to_send(tmp_path):
    for index in range(2):
        save_file({"n": torch.tensor(index)}, tmp_path / f"{index}.safetensors")
    paths = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for scale in ("rms", 1.0):
        with pytest.raises(InputError, match="no floating-point entries"):
            fuse_files(paths[0], paths[1:], tmp_path / "o.safetensors", mse=0.1, seed=0, scale=scale)


def test_a_hugging_face_folder_comes_out_as_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(transformers.BertModel(config).eval())
        models[-1].save_pretrained(tmp_path / str(seed), max_shard_size="8KB")
    assert len(list((tmp_path / "0").glob("*.safetensors"))) > 1
    (tmp_path / "0" / "vocab.txt").write_text("one\ntwo\n")
    (tmp_path / "0" / "training_args.bin").write_bytes(b"could hold code")
    fuse_files(tmp_path / "0", [tmp_path / "1", tmp_path / "2"], tmp_path / "fused", scale=0.4)
    fused = transformers.BertModel.from_pretrained(tmp_path / "fused")
    same_bits(fused.state_dict(), fuse(models[0], models[1:], scale=0.4))
    assert (tmp_path / "fused" / "vocab.txt").read_text() == "one\ntwo\n"
    assert not (tmp_path / "fused" / "training_args.bin").exists()
