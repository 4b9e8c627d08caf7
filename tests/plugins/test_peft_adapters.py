"""Adapters trained by PEFT, fused, and loaded by PEFT again: against what PEFT itself merges."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

peft = pytest.importorskip("peft")

from plugins.peft_adapters import fuse_adapters, save_as_adapter  # noqa: E402
from rmtllmf.taskvec import weighted_average  # noqa: E402

LAYERS = (["first", "second"], ["second", "third"])  # of the two adapters
# what PEFT says about modules that are no models of transformers
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.third(self.second(self.first(x).relu()).relu())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, two folders of trained adapters, and what PEFT's merging adds to the base for each of them."""
    torch.manual_seed(0)
    base = Tiny()
    before = copy.deepcopy(base.state_dict())
    folders, added = [], []
    for number, layers in enumerate(LAYERS):
        config = peft.LoraConfig(r=2 + number, lora_alpha=8, target_modules=layers)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        x = torch.randn(64, 6)
        y = (x @ torch.randn(6, 3)).argmax(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        folders.append(tmp_path_factory.mktemp(f"adapter-{number}"))
        model.save_pretrained(folders[-1])
        merged = model.double().merge_and_unload().state_dict()
        added.append({name: merged[name] - tensor.double() for name, tensor in before.items()})
    return base, folders, added


def test_the_fusion_is_that_of_what_peft_merges(world):
    base, folders, added = world
    before = copy.deepcopy(base.state_dict())
    update = fuse_adapters(base, folders, weighted_average, weights=[3, 1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert set(update) == {"first.weight", "second.weight", "third.weight"}
    for name in update:
        expected = 0.75 * added[0][name] + 0.25 * added[1][name]
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(update[name].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_fused_adapter_is_loaded_by_peft_and_loses_nothing(world, tmp_path):
    base, folders, added = world
    update = fuse_adapters(base, folders, scale=1.0)
    save_as_adapter(update, tmp_path / "fused", base, rank=5)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "fused")
    merged = loaded.merge_and_unload().state_dict()
    for name, tensor in base.state_dict().items():
        expected = tensor.double() + added[0][name] + added[1][name]
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=2e-6)


def test_adapters_are_heard_with_the_noise_of_the_channel(world):
    base, folders, added = world
    clean = fuse_adapters(base, folders, scale=1.0)
    heard = fuse_adapters(base, folders, scale=1.0, reception=[0.1, 0.3], seed=0)
    noise = sum(float((heard[name] - clean[name]).square().sum()) for name in clean)
    energies = [sum(float(tensor.square().sum()) for tensor in vector.values()) for vector in added]
    assert noise == pytest.approx(0.1 * energies[0] + 0.3 * energies[1], rel=0.25)  # of 400 entries


def test_an_adapter_in_memory_is_as_good_as_its_folder(world):
    base, folders, _ = world
    live = [peft.PeftModel.from_pretrained(copy.deepcopy(base), folder) for folder in folders]
    expected = fuse_adapters(base, folders)
    for name, tensor in fuse_adapters(base, live).items():
        torch.testing.assert_close(tensor, expected[name])
