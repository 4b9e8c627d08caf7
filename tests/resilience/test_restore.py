"""What `restore` takes from the base, what it leaves, and that nobody's tensors are written or shared."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rmtllmf.resilience import restore


class Tied(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.mlp = nn.Linear(2, 2)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(value)


def test_named_entries_are_the_base_models_and_the_others_are_not():
    state = {"a.w": torch.ones(2), "b.w": torch.ones(2), "b.n": torch.tensor(3)}
    base = {"a.w": torch.zeros(2), "b.w": torch.zeros(2), "b.n": torch.tensor(0), "unused": torch.zeros(9)}
    before = {name: tensor.clone() for name, tensor in {**state, **base}.items()}
    result = restore(state, base, ("a.*", "b.n"))
    assert list(result) == list(state)
    assert result["a.w"].tolist() == [0, 0]
    assert result["b.n"].item() == 0
    assert result["b.w"] is state["b.w"]
    result["a.w"].fill_(7)
    assert state["a.w"].tolist() == [1, 1]
    for name, tensor in base.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_no_names_restore_nothing():
    state, base = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    assert restore(state, base, ())["w"] is state["w"]


def test_module_state_dict_and_file_are_the_same(tmp_path):
    fused, base = Tied(1.0), Tied(0.0)
    save_file({name: tensor.clone() for name, tensor in base.state_dict().items()}, tmp_path / "base.safetensors")
    for source in (base, base.state_dict(), tmp_path / "base.safetensors", str(tmp_path / "base.safetensors")):
        result = restore(fused, source, "embed.weight")
        assert not result["embed.weight"].any()
        assert not result["embed.weight"].requires_grad
        assert result["mlp.weight"].all()


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_ties_hold_under_either_name(name):
    fused, base = Tied(1.0), Tied(0.0)
    result = restore(fused, base, name)
    assert result["embed.weight"] is result["head.weight"]
    assert result["embed.weight"].data_ptr() != base.embed.weight.data_ptr()
    fused.load_state_dict(result)
    assert not fused.embed.weight.any()
    assert fused.mlp.weight.all()


def test_half_precision_and_strides_survive():
    base = {"w": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T}
    state = {"w": torch.zeros(3, 2, dtype=torch.bfloat16)}
    result = restore(state, base, "w")["w"]
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, base["w"])
