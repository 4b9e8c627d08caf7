"""Everything that reads files, each with small valid files of its kind: for tests that damage them."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from paper import _checkpoints
from paper.results import Results, ResultsError
from rmtllmf._state import check_finite
from rmtllmf.clip import load_finetuned, to_hugging_face
from rmtllmf.errors import InputError, NonFiniteError, RmtllmfWarning
from rmtllmf.taskvec import (
    MaskedVectors,
    TaskVector,
    adapter_vector,
    emr,
    fuse_files,
    load_routed,
    low_rank,
    smile,
    train_router,
    twin_merging,
)

REFUSALS = (InputError, ResultsError, FileNotFoundError)
"""What a damaged file may end in; the last where an index names a shard that is not there."""


class Reader(NamedTuple):
    """`make` writes valid files into a folder; `read` reads them, and raises if what it got is not what it says."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]


def state(seed=0):
    source = torch.Generator().manual_seed(seed)
    return {
        "fc.weight": torch.randn(3, 2, generator=source),
        "fc.bias": torch.randn(3, generator=source),
        "half": torch.randn(4, generator=source).to(torch.bfloat16),
        "steps": torch.tensor(seed),
        "mask": torch.tensor([True, False]),
    }


def vectors():
    return [{key: state(seed)[key] for key in ("fc.weight", "fc.bias")} for seed in (1, 2)]


def layer():
    model = nn.Sequential(nn.Linear(2, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def changes():
    return [{f"0.{key.removeprefix('fc.')}": tensor for key, tensor in vector.items()} for vector in vectors()]


def sharded(folder, content):
    folder.mkdir()
    names = list(content)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, keys in parts.items():
        save_file({key: content[key] for key in keys}, folder / file)
    index = {key: file for file, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text("{}")


def _fused(base, finetuned, out):
    """Fuse, see that the reference implementation reads the result, and remove it."""
    try:
        fuse_files(base, [finetuned], out)
        files = sorted(out.glob("*.safetensors")) if out.is_dir() else [out]
        for file in files:
            load_file(file)
    finally:
        left = [path for path in out.parent.iterdir() if path.name.startswith(".")]
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
    assert not left, "temporary files were left"


def _between(folder):
    delta = TaskVector.between(folder / "base.safetensors", folder / "tuned.safetensors")
    check_finite(delta, "delta")


def _make_pair(folder):
    for name, seed in (("base", 0), ("tuned", 1)):
        save_file(state(seed), folder / f"{name}.safetensors")


def _make_adapter(folder):
    factors = low_rank({"fc.weight": state()["fc.weight"]}, 1)
    factors.save_adapter(folder / "adapter")


def _adapter(folder):
    for key, tensor in adapter_vector(folder / "adapter").items():
        assert isinstance(key, str)
        assert tensor.is_floating_point()


def _make_routed(folder):
    save_file(smile(layer(), changes(), rank=1, gate_rank=1).state_dict(), folder / "smile.safetensors")


def _make_twin(folder):
    twin = twin_merging(layer(), changes(), rank=1)
    train_router(twin, {"a": [torch.zeros(4, 2)], "b": [torch.ones(4, 2)]}, epochs=1, hidden=4, seed=0)
    save_file(twin.state_dict(), folder / "twin.safetensors")


def _routed(name):
    def read(folder):
        with torch.no_grad():
            assert load_routed(layer(), folder / name)(torch.ones(2, 2)).shape == (2, 3)

    return read


def _load_vector(folder):
    check_finite(TaskVector.load(folder / "v.safetensors"), "what was loaded")


def _load_masked(folder):
    stored = MaskedVectors.load(folder / "m.safetensors")
    for task in range(len(stored)):
        with suppress(NonFiniteError):  # a factor that is too large for the vector's dtype
            check_finite(stored.task_vector(task), "task")


def _make_shards(folder):
    for name, seed in (("base", 0), ("tuned", 1)):
        sharded(folder / name, state(seed))


def _make_results(folder):
    results = Results(folder / "r.jsonl", {"seed": 1}, key=lambda row: row["key"])
    results.add({"key": "a", "value": 0.5})
    results.add({"key": "b", "value": [1, 2]})


def _results(folder):
    try:
        rows = Results(folder / "r.jsonl", {"seed": 1}, key=lambda row: row["key"]).rows()
    finally:
        assert not [path for path in folder.iterdir() if path.name != "r.jsonl"]
    json.dumps(rows, allow_nan=False)


def _make_run(folder):
    _checkpoints.write(folder, {"lr": 0.1}, 3, {f"model.{key}": tensor for key, tensor in layer().state_dict().items()})


def _run(folder):
    found = _checkpoints.read(folder, {"lr": 0.1})
    assert found.steps >= 0
    _checkpoints.put(layer(), found.tensors)


@cache
def _tower():
    from open_clip.transformer import VisionTransformer  # takes seconds to import

    torch.manual_seed(0)
    return VisionTransformer(8, 4, width=16, layers=1, heads=2, mlp_ratio=2.0, output_dim=8)


def _make_published(folder):
    theirs = {key: tensor.clone() for key, tensor in to_hugging_face(_tower()).items()}
    save_file(theirs, folder / "model.safetensors")
    config = {"hidden_act": "gelu", "num_attention_heads": 2, "layer_norm_eps": 1e-5, "image_size": [8, 8]}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": config}))


def _published(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RmtllmfWarning)  # it differs a lot from the base
        check_finite(load_finetuned(folder, _tower()), "the tower")


READERS = {
    "between": Reader(_make_pair, _between),
    "fuse_files": Reader(
        _make_pair, lambda f: _fused(f / "base.safetensors", f / "tuned.safetensors", f / "out.safetensors")
    ),
    "fuse_files, shards": Reader(_make_shards, lambda f: _fused(f / "base", f / "tuned", f / "out")),
    "TaskVector": Reader(lambda f: TaskVector(vectors()[0]).save(f / "v.safetensors"), _load_vector),
    "MaskedVectors": Reader(lambda f: emr(vectors()).save(f / "m.safetensors"), _load_masked),
    "adapter": Reader(_make_adapter, _adapter),
    "smile": Reader(_make_routed, _routed("smile.safetensors")),
    "twin": Reader(_make_twin, _routed("twin.safetensors")),
    "load_finetuned": Reader(_make_published, _published),
    "results": Reader(_make_results, _results),
    "a run's checkpoint": Reader(_make_run, _run),
}


def files(folder: Path) -> list[Path]:
    """All files below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def packed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of a header, as JSON or as it is, that claims to be so long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def unpacked(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
