"""Adapters that have no task vector: what is wrong with a folder, a base or a model, and what the error says."""

import json
import re

import pytest
import torch
from torch import nn

from helpers.adapted_models import NEEDS_BASE, PEFT_IS_THE_ORACLE, QUIET, adapted, base_model
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.taskvec import adapter_vector, task_arithmetic

peft = pytest.importorskip("peft", reason=PEFT_IS_THE_ORACLE)

pytestmark = QUIET


@pytest.fixture
def folder(tmp_path):
    adapted(peft.LoraConfig(r=2, target_modules=["first"])).save_pretrained(tmp_path)
    return tmp_path


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CONFIGURED = {
    "kind": ({"peft_type": "IA3"}, "peft_type is 'IA3'.*PeftModel"),
    "prompts": ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
    "none": ({"peft_type": None}, "peft_type is None"),
    "start": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base.*path_initial_model"),
    "DoRA without magnitude": ({"use_dora": True}, "use_dora is set, but 'first' lacks lora_magnitude_vector"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices is set"),
    "singular values": ({"kasa_config": {"beta": 1}}, "kasa_config changes the base"),
    "activated": ({"alora_invocation_tokens": [3]}, "acts on some tokens only"),
    "no rank": ({"r": None}, r"the rank \(r\) of 'first' is None in adapter_config.json"),
    "rank of zero": ({"rank_pattern": {"first": 0}}, r"the rank \(r\) of 'first' is 0"),
    "rank in words": ({"r": "two"}, r"the rank \(r\) of 'first' is 'two'"),
    "no alpha": ({"lora_alpha": None}, "the lora_alpha of 'first' is None"),
    "infinite alpha": ({"lora_alpha": float("inf")}, r"adapter_config.json' is no JSON \(Infinity is no number"),
    "huge alpha": ({"lora_alpha": 10**400}, "the lora_alpha of 'first' is 1000"),
    "huge rank": ({"r": 10**12}, "expected the rank 1000000000000"),
    "alpha in words": ({"alpha_pattern": {"first": "8"}}, "the lora_alpha of 'first' is '8'"),
    "patterns in a list": ({"rank_pattern": ["first"]}, r"rank_pattern in adapter_config.json is \['first'\]"),
    "no pattern": ({"alpha_pattern": {"fir(": 1}}, r"alpha_pattern in adapter_config.json holds 'fir\(', no pattern"),
    "rank": ({"r": 3}, r"'first' has factors A \(2, 6\) and B \(5, 2\); expected the rank 3"),
}


@pytest.mark.parametrize(("values", "message"), CONFIGURED.values(), ids=CONFIGURED)
def test_what_has_no_task_vector_is_refused(folder, values, message):
    change(folder, **values)
    with pytest.raises(InputError, match=message) as error:
        adapter_vector(folder)
    assert isinstance(error.value, ShapeError) == (values.get("r") in (3, 10**12))


def test_dora_and_whole_modules_name_what_needs_the_base(tmp_path):
    for index, (name, needed) in enumerate(
        [("DoRA", "use_dora.*'blocks.0.0'.*base="), ("whole modules", "'head.bias', 'head.weight'.*base=")]
    ):
        adapted(peft.LoraConfig(**NEEDS_BASE[name])).save_pretrained(tmp_path / str(index))
        with pytest.raises(InputError, match=needed):
            adapter_vector(tmp_path / str(index))
    with pytest.raises(InputError, match=r"'blocks.0.0.bias'.*base="):
        adapter_vector(adapted(peft.LoraConfig(**NEEDS_BASE["all biases"])))


def test_files_that_are_missing_pickled_or_damaged(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        adapter_vector(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json"):
        adapter_vector(tmp_path / "empty")
    weights = folder / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(b"not a safetensors file")
    with pytest.raises(InputError, match="no safetensors file"):
        adapter_vector(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model.safetensors"):
        adapter_vector(folder)
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(InputError, match=r"pickled.*safe_serialization=True"):
        adapter_vector(folder)
    weights.write_bytes(good)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="no JSON"):
        adapter_vector(folder)


def test_factors_that_are_missing_or_not_finite(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    (name,) = (key for key in tensors if "lora_A" in key)
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, path)
    with pytest.raises(NonFiniteError, match=re.escape("'first.weight'")):
        task_arithmetic([adapter_vector(folder)])
    prefix = name.removesuffix("lora_A.weight")
    for added, values, message in (
        ("lora_A.weight", torch.ones(2, 6, dtype=torch.int32), r"lora_A of 'first' is torch.int32"),
        ("lora_A.weight", torch.ones(2, 6, 1), r"A \(2, 6, 1\) and B \(5, 2\); expected B \(5, 2, 1\)"),
        ("lora_A.bias", torch.ones(2), r"'first' has both lora_A and lora_A.bias"),
        ("lora_embedding_A", torch.ones(2, 6), "'first' lacks lora_embedding_B"),
        ("lora_B.bias", torch.ones(6), r"lora_B.bias \(6,\); expected \(5,\)"),
        ("lora_magnitude_vector", torch.ones(5), "use_dora is not set, but 'first' has lora_magnitude_vector"),
    ):
        save_file(tensors | {prefix + added: values}, path)
        with pytest.raises(InputError, match=message):
            adapter_vector(folder)
    save_file(tensors | {f"{prefix}lora_magnitude_vector": torch.ones(1)}, path)
    change(folder, use_dora=True)
    with pytest.raises(ShapeError, match=r"lora_magnitude_vector \(1,\); expected 5 magnitudes"):
        adapter_vector(folder, base=base_model())
    change(folder, use_dora=False)
    save_file(tensors | {f"{prefix}lora_B.bias": torch.ones(5)}, path)
    with pytest.raises(StateMismatchError, match=r"base lacks 'first.bias'"):
        adapter_vector(folder, base={"first.weight": torch.ones(5, 6)})
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(InputError, match="'first' lacks lora_A"):
        adapter_vector(folder)
    save_file({}, path)
    with pytest.raises(InputError, match="holds no tensors"):
        adapter_vector(folder)


def test_a_base_that_does_not_fit(folder, tmp_path):
    state = base_model().state_dict()
    with pytest.raises(StateMismatchError, match=r"base lacks 'first.weight'"):
        adapter_vector(folder, base={key: value for key, value in state.items() if "first" not in key})
    with pytest.raises(StateMismatchError, match=r"has shape \(2, 2\).*has \(5, 6\)"):
        adapter_vector(folder, base=state | {"first.weight": torch.ones(2, 2)})
    adapted(peft.LoraConfig(**NEEDS_BASE["whole modules"])).save_pretrained(tmp_path / "whole")
    with pytest.raises(StateMismatchError, match=r"base lacks 'head.bias'"):
        adapter_vector(tmp_path / "whole", base={key: v for key, v in state.items() if key != "head.bias"})
    with pytest.raises(StateMismatchError, match=r"base\['head.bias'\] has shape \(9,\)"):
        adapter_vector(tmp_path / "whole", base=state | {"head.bias": torch.ones(9)})


def test_modules_without_a_task_vector():
    with pytest.raises(InputError, match="holds no PEFT layers"):
        adapter_vector(base_model())
    with pytest.raises(TypeError, match="got dict"):
        adapter_vector({})
    model = adapted(peft.LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(InputError, match="no adapter 'x'; expected one of 'default'"):
        adapter_vector(model, adapter_name="x")
    with pytest.raises(InputError, match="'pissa' changes the base"):
        adapter_vector(adapted(peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights="pissa")))
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["first"]))
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(InputError, match=r"several adapters.*'b', 'default'"):
        adapter_vector(model)
    activated = adapted(peft.LoraConfig(r=2, target_modules=["first"], alora_invocation_tokens=[1]))
    with pytest.raises(InputError, match=r"layer 'base_model.model.first': cannot be merged"):
        adapter_vector(activated)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(InputError, match="in groups"):
        adapter_vector(peft.get_peft_model(grouped, peft.LoraConfig(r=2, target_modules=["0"])))
