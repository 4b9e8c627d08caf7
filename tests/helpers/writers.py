"""All that writes files of one's own: how it saves a value to a folder, and reads the values that are there."""

from __future__ import annotations

import torch

from paper import _checkpoints
from rmtllmf.taskvec import MaskedVectors, TaskVector, adapter_vector, emr, low_rank

SIZE = 2000


def vector(value):
    return TaskVector({"fc.weight": torch.full((SIZE, 2), float(value))})


def save_vector(folder, value):
    vector(value).save(folder / "v.safetensors")


def load_vector(folder):
    return TaskVector.load(folder / "v.safetensors")["fc.weight"].unique().tolist()


def save_masks(folder, value):
    emr([vector(value)] * 2).save(folder / "m.safetensors")


def load_masks(folder):
    return MaskedVectors.load(folder / "m.safetensors").task_vector(0)["fc.weight"].unique().tolist()


def save_adapter(folder, value):
    low_rank(vector(value), int(value)).save_adapter(folder / "adapter", overwrite=True)


def load_adapter(folder):
    return adapter_vector(folder / "adapter")["fc.weight"].round(decimals=3).unique().tolist()


def save_run(folder, value):
    _checkpoints.write(folder, {"lr": 0.1}, 1, dict(vector(value)))


def load_run(folder):
    return _checkpoints.read(folder, {"lr": 0.1}).tensors["fc.weight"].unique().tolist()


WRITERS = {
    "vector": (save_vector, load_vector),
    "masks": (save_masks, load_masks),
    "adapter": (save_adapter, load_adapter),
    "a run's checkpoint": (save_run, load_run),
}
