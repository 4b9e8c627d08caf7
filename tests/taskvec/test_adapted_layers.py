"""Adapters of layers that are stored, tied, named or called in ways of their own, against what PEFT merges."""

import copy
import json

import pytest
import torch
from torch import nn

from helpers.adapted_models import PEFT_IS_THE_ORACLE, QUIET, adapted, base_model, check, gpt2, merged_minus_base
from rmtllmf.errors import InputError
from rmtllmf.taskvec import TaskVector, adapter_vector, task_arithmetic

peft = pytest.importorskip("peft", reason=PEFT_IS_THE_ORACLE)

pytestmark = QUIET


@pytest.mark.parametrize("place", ["file", "file and base", "file and its state", "memory"])
def test_layers_that_store_in_out_are_transposed_back(tmp_path, place):
    base = gpt2()
    model = adapted(peft.LoraConfig(r=2, lora_alpha=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), base)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    given = {"file and base": base, "file and its state": base.state_dict()}.get(place)
    vector = adapter_vector(model) if place == "memory" else adapter_vector(tmp_path, base=given)
    assert vector["transformer.h.0.attn.c_attn.weight"].shape == (8, 24)
    check(vector, merged_minus_base(model, base))


def test_a_mixed_model_needs_the_base_to_know_which_layers_are_transposed(tmp_path):
    base = gpt2(tie=False)
    # one flag in the file for a square matrix stored (in, out) and an output head stored (out, in)
    model = adapted(peft.LoraConfig(r=2, target_modules=["attn.c_proj", "lm_head"]), base)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for flag in (True, False):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": flag}))
        check(adapter_vector(tmp_path, base=base), merged_minus_base(model, base))


def test_tied_embeddings_stay_tied(tmp_path):
    """PEFT saves the embedding and the tied head with the adapter: both names move together."""
    base = gpt2()
    model = adapted(peft.LoraConfig(r=2, target_modules=["wte"]), base)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(InputError, match=r"lm_head.weight.*transformer.wte.weight.*base="):
        adapter_vector(tmp_path)
    vector = adapter_vector(tmp_path, base=base)
    assert set(vector) == {"transformer.wte.weight", "lm_head.weight"}
    check(vector, merged_minus_base(model, base))
    held = TaskVector(vector)
    assert held["lm_head.weight"] is held["transformer.wte.weight"]
    fused = task_arithmetic([vector, vector], 0.5)
    assert fused["lm_head.weight"] is fused["transformer.wte.weight"]
    moved = fused.apply_to(copy.deepcopy(base))
    assert torch.equal(moved.lm_head.weight, moved.transformer.wte.weight)
    assert not torch.equal(moved.lm_head.weight, base.lm_head.weight)


def test_adapters_on_both_names_of_one_tensor_are_refused(tmp_path):
    base = gpt2()
    adapted(peft.LoraConfig(r=2, target_modules=["wte", "lm_head"]), base).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    with pytest.raises(InputError, match="one tensor in base"):
        adapter_vector(tmp_path, base=base)
    assert len(adapter_vector(tmp_path)) == 2


class Experts(nn.Module):
    """Parameters that are no layer's: adapted by name."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(3, 4, 5))
        self.experts.down = nn.Parameter(torch.randn(3, 5, 4))


def test_adapted_parameters_of_experts(tmp_path):
    base = base_model(Experts)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.up", "experts.down"])
    model = adapted(config, base)
    vector = adapter_vector(model)
    assert set(vector) == {"experts.up", "experts.down"}
    check(vector, merged_minus_base(model, base))
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="target_parameters is set"):
        adapter_vector(tmp_path)


def test_trained_rows_of_an_embedding():
    base = base_model()
    model = adapted(peft.LoraConfig(r=2, target_modules=["first"], trainable_token_indices={"embed": [3, 7]}), base)
    vector = adapter_vector(model)
    assert set(vector) == {"first.weight", "embed.weight"}
    check(vector, merged_minus_base(model, base))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 2)


def test_multihead_attention(tmp_path):
    """PEFT's own forward pass adds the update of the output projection twice: what it does counts, not the formula."""
    base = base_model(Attention)
    model = adapted(peft.LoraConfig(r=2, target_modules=["mha"]), base)
    model.save_pretrained(tmp_path)
    vector = adapter_vector(model)
    assert set(vector) == {"mha.in_proj_weight", "mha.out_proj.weight"}
    check(vector, merged_minus_base(model, base))
    with pytest.raises(InputError, match=r"'mha.out_proj' inside another adapted layer.*PeftModel"):
        adapter_vector(tmp_path)


@pytest.mark.parametrize("place", ["file", "memory"])
def test_a_layer_that_is_called_as_wrappers_call_theirs(tmp_path, place):
    base = nn.ModuleDict({"base_layer": nn.ModuleDict({"fc": nn.Linear(3, 4)})})
    model = adapted(peft.LoraConfig(r=2, target_modules=["fc"]), base)
    model.save_pretrained(tmp_path)
    vector = adapter_vector(model if place == "memory" else tmp_path)
    assert set(vector) == {"base_layer.fc.weight"}
    layer = model.base_model.model["base_layer"]["fc"]
    torch.testing.assert_close(vector["base_layer.fc.weight"], layer.get_delta_weight("default").detach())
