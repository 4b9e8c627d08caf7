"""Small models as checkpoints on disk, one file or shards, and whether two hold the same bits."""

import json

import torch
from safetensors.torch import load_file, save_file


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
