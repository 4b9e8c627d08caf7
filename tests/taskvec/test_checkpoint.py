"""Damaged and hostile checkpoints: headers and indices that say what cannot be."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from helpers.checkpoint_files import model, sharded, written
from rmtllmf.errors import InputError
from rmtllmf.taskvec._checkpoint import Checkpoint


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
