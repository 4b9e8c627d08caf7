"""Routed models on disk."""

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from helpers.routed_models import MODELS, made, random_vectors, run
from rmtllmf.errors import StateMismatchError
from rmtllmf.taskvec import load_routed, smile, train_router, twin_merging


def fresh(name):
    base, _ = made(name)
    for parameter in base.parameters():
        nn.init.zeros_(parameter)
    return base


@pytest.mark.parametrize("name", MODELS)
def test_smile_there_and_back(name, tmp_path):
    base, inputs = made(name)
    routed = smile(base, random_vectors(base), rank=2, gate_rank=3, top_k=2)
    save_file(routed.state_dict(), tmp_path / "smile.safetensors")
    again = load_routed(fresh(name), tmp_path / "smile.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(run(again, inputs), run(routed, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_twin_there_and_back(name, tmp_path):
    base, inputs = made(name)
    twin = twin_merging(base, random_vectors(base), rank=2)
    train_router(twin, {str(index): [inputs + index] for index in range(3)}, epochs=2, seed=0)
    save_model(twin, str(tmp_path / "twin.safetensors"))
    again = load_routed(fresh(name), tmp_path / "twin.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(run(again, inputs), run(twin, inputs), rtol=0, atol=0)


def test_what_is_no_routed_model():
    base = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(StateMismatchError, match="source: holds no experts"):
        load_routed(base, base.state_dict())
    routed = smile(base, random_vectors(base), rank=1, gate_rank=1).state_dict()
    with pytest.raises(StateMismatchError, match="experts for '0', which is no linear layer"):
        load_routed(nn.Sequential(nn.ReLU()), routed)
    with pytest.raises(StateMismatchError, match=r"source\['0.weight'\] has shape \(2, 3\)"):
        load_routed(nn.Sequential(nn.Linear(4, 2)), routed)
    with pytest.raises(StateMismatchError, match=r"lacks '1\.bias', '1\.weight'"):
        load_routed(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), routed)
