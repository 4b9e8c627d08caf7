"""Checkpoints on disk: the same bits as in memory, one file or shards, and a channel on the way."""

import json
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rmtllmf.taskvec._engine as engine
from helpers.checkpoint_files import loaded, model, same_bits, sharded, written
from helpers.fusion_rules import ROWS
from rmtllmf.channel import transmit
from rmtllmf.errors import InputError, ShapeError
from rmtllmf.taskvec import TaskVector, fuse, fuse_files, task_arithmetic

pytestmark = pytest.mark.usefixtures("small_pieces")


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


@pytest.mark.parametrize("name", ["Llama-3.1-8B-fused", "v0.1"])
def test_folders_with_a_point_in_their_name(name, tmp_path):
    _, paths = written(tmp_path, count=1)
    fuse_files(paths[0], paths[1:], tmp_path / name)
    assert (tmp_path / name / "0.safetensors").is_file()


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
