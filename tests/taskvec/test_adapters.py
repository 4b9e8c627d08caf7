"""Adapters as task vectors: against what PEFT itself merges, from files and from memory."""

import copy
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from helpers.adapted_models import (
    LINEAR,
    NEEDS_BASE,
    PEFT_IS_THE_ORACLE,
    QUIET,
    adapted,
    base_model,
    check,
    merged_minus_base,
    shaken,
)
from rmtllmf.errors import InputError
from rmtllmf.taskvec import TaskVector, adapter_vector

peft = pytest.importorskip("peft", reason=PEFT_IS_THE_ORACLE)

pytestmark = QUIET

LORA = {
    "plain": {"r": 2, "lora_alpha": 5, "target_modules": LINEAR},
    "rsLoRA": {"r": 4, "lora_alpha": 5, "target_modules": LINEAR, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": LINEAR,
        "rank_pattern": {"blocks.[12].0": 3, r"blocks.\d.0": 1, "^first": 4},
        "alpha_pattern": {r"blocks\.0.*": 7, "irst": 100, "2.0": 9},
    },
    "patterns and rsLoRA": {
        "r": 2,
        "target_modules": LINEAR,
        "rank_pattern": {"first": 3},
        "alpha_pattern": {"blocks.1.0": 7},
        "use_rslora": True,
    },
    "convolutions": {"r": 2, "lora_alpha": 5, "target_modules": ["conv", "point", "line"]},
    "embedding": {"r": 2, "lora_alpha": 5, "target_modules": ["embed", "first"]},
    "bias of B": {"r": 2, "lora_alpha": 5, "target_modules": [*LINEAR, "conv"], "lora_bias": True},
    "orthogonal start": {"r": 2, "target_modules": LINEAR, "init_lora_weights": "orthogonal"},
    "MiCA start": {"r": 2, "target_modules": LINEAR, "init_lora_weights": "mica"},
}

OTHERS = {
    "LoHa": lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=[*LINEAR, "conv"], rank_dropout=0.5),
    "LoKr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=[*LINEAR, "conv"]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=LINEAR),
    "VeRA": lambda: peft.VeraConfig(r=2, target_modules=LINEAR),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=4, target_modules=LINEAR),
    "OFT": lambda: peft.OFTConfig(oft_block_size=5, r=0, target_modules=LINEAR[1:]),
    "IA3": lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=["first"]),
    "SHiRA": lambda: peft.ShiraConfig(r=2, target_modules=LINEAR),
    "VB-LoRA": lambda: peft.VBLoRAConfig(num_vectors=8, vector_length=1, r=2, topk=2, target_modules=LINEAR),
    "RandLora": lambda: peft.RandLoraConfig(r=2, target_modules=LINEAR),
    "C3A": lambda: peft.C3AConfig(block_size=1, target_modules=LINEAR),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=LINEAR),
    "normalisation": lambda: peft.LNTuningConfig(target_modules=["norm"]),
}


@pytest.mark.parametrize("name", [*LORA, *NEEDS_BASE])
@pytest.mark.parametrize("place", ["file", "memory"])
def test_lora_is_what_peft_merges(tmp_path, name, place):
    base = base_model()
    model = adapted(peft.LoraConfig(**(LORA | NEEDS_BASE)[name]), base)
    if name == "whole modules":
        with torch.no_grad():
            model.base_model.model.norm.modules_to_save["default"].running_mean.add_(1)
    given = {"base": base} if name in NEEDS_BASE else {}
    if place == "file":
        model.save_pretrained(tmp_path)
        vector = adapter_vector(tmp_path, **given)
    else:
        vector = adapter_vector(model, **(given if "biases" in name else {}))
    expected = merged_minus_base(model, base)
    if name == "whole modules":
        expected["norm.running_mean"].zero_()  # running statistics are the base's
        assert not any("running" in key or "num_batches" in key for key in vector)
    check(vector, expected)


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_in_memory_are_what_peft_merges(name):
    base = base_model()
    model = adapted(OTHERS[name](), base).train()
    vector = adapter_vector(model)
    check(vector, merged_minus_base(copy.deepcopy(model).eval(), base))
    assert model.training


def test_whole_tensors_against_a_file_of_the_base(tmp_path):
    base = base_model()
    model = adapted(peft.LoraConfig(**NEEDS_BASE["whole modules"]), base)
    model.save_pretrained(tmp_path)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    check(adapter_vector(tmp_path, base=tmp_path / "base.safetensors"), merged_minus_base(model, base))
    TaskVector({"norm.weight": base.state_dict()["norm.weight"]}).save(tmp_path / "vector.safetensors")
    with pytest.raises(InputError, match="is no model: it holds a task vector"):
        adapter_vector(tmp_path, base=tmp_path / "vector.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("place", ["file", "memory"])
def test_products_are_made_in_single_precision_at_least(tmp_path, dtype, place):
    base = base_model().to(dtype)
    model = adapted(peft.LoraConfig(r=2, target_modules=LINEAR), base).to(dtype)
    model.save_pretrained(tmp_path)
    vector = adapter_vector(tmp_path if place == "file" else model)
    assert next(model.parameters()).dtype == dtype, "the model is as it was"
    for key, value in merged_minus_base(model, base).items():
        if key in vector:
            assert vector[key].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            close = 1e-14 if dtype == torch.float64 else 2e-6
            torch.testing.assert_close(vector[key].double(), value, rtol=close, atol=close)


def test_only_what_is_read_is_made(tmp_path):
    model = adapted(peft.LoraConfig(**LORA["plain"]))
    model.save_pretrained(tmp_path)
    vector, made = adapter_vector(tmp_path), []
    for key, parts in vector.parts.items():
        vector.parts[key] = [
            part._replace(make=lambda dtype, part=part, key=key: made.append(key) or part.make(dtype)) for part in parts
        ]
    assert (len(vector), "first.weight" in vector, next(iter(vector))) == (4, True, "blocks.0.0.weight")
    assert repr(vector)
    assert made == []
    assert vector["first.weight"].requires_grad is False
    assert made == ["first.weight"]


HOLDS_LITTLE = """
import resource, sys
from rmtllmf.taskvec import adapter_vector
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
vector = adapter_vector(sys.argv[1])
before = peak()
norms = [float(vector[key].norm()) for key in vector]
assert len(norms) == 40
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_a_matrix_not_the_model(tmp_path):
    """40 matrices of 16 MiB, 640 MiB in all."""
    from safetensors.torch import save_file

    factors = {}
    for index in range(40):
        factors[f"base_model.model.{index}.lora_A.weight"] = torch.ones(1, 2048)
        factors[f"base_model.model.{index}.lora_B.weight"] = torch.ones(2048, 1)
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    done = subprocess.run(
        [sys.executable, "-c", HOLDS_LITTLE, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200  # the allocator keeps some of what is freed


def test_several_adapters_in_memory_and_on_disk(tmp_path):
    base = base_model()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["first"]))
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["first", "blocks.0.0"]))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    shaken(model)
    model.save_pretrained(tmp_path)
    model.set_adapter("other")
    only = merged_minus_base(model, base)
    base_shift = {key: tensor for key, tensor in only.items() if "lora" not in key}  # the base was shaken too
    active, named = adapter_vector(model), adapter_vector(model, adapter_name="other")
    stored = adapter_vector(tmp_path, adapter_name="other")
    assert set(active) == set(named) == set(stored) == {"first.weight", "blocks.0.0.weight"}
    shaken_base = model.unload().state_dict()
    for key in named:
        expected = base_shift[key] - (shaken_base[key].double() - base.state_dict()[key].double())
        for vector in (active, named, stored):
            torch.testing.assert_close(vector[key].double(), expected, rtol=1e-5, atol=2e-6)
    assert set(adapter_vector(tmp_path)) == {"first.weight"}
    assert set(adapter_vector(tmp_path, adapter_name="default")) == {"first.weight"}
    assert set(adapter_vector(tmp_path / "other", adapter_name="other")) == set(stored)
    for elsewhere in ("othr", f"../{tmp_path.name}/other", str(tmp_path / "other")):
        with pytest.raises(InputError, match=f"there is no adapter '{re.escape(elsewhere)}'"):
            adapter_vector(tmp_path, adapter_name=elsewhere)
    with pytest.raises(TypeError, match="adapter_name: expected a str or None, got int"):
        adapter_vector(tmp_path, adapter_name=1)
    shutil.move(tmp_path / "adapter_config.json", tmp_path / "gone.json")
    with pytest.raises(FileNotFoundError, match="adapter_name=: 'other'"):
        adapter_vector(tmp_path)


def test_names_of_adapters_inside_the_file(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 3}))
    tensors = {}
    for index, name in enumerate(("one", "two.b"), 1):
        tensors[f"model.fc.lora_A.{name}.weight"] = torch.full((1, 2), float(index))
        tensors[f"model.fc.lora_B.{name}.weight"] = torch.ones(3, 1)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"'model.fc.lora_A.one.weight' does not start with .*prefix="):
        adapter_vector(tmp_path)
    with pytest.raises(InputError, match=r"adapter_name=: 'one', 'two.b'"):
        adapter_vector(tmp_path, prefix="model.")
    with pytest.raises(InputError, match="no adapter 'three'"):
        adapter_vector(tmp_path, prefix="model.", adapter_name="three")
    path = tmp_path / "adapter_model.safetensors"
    second = adapter_vector(path, prefix="model.", adapter_name="two.b")
    assert torch.equal(second["fc.weight"], torch.full((3, 2), 6.0))
    assert set(adapter_vector(path, prefix="", adapter_name="one")) == {"model.fc.weight"}


def test_injected_adapters_have_no_prefix_and_merged_ones_still_give_theirs():
    base = base_model()
    model = shaken(peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["first"]), base_model()))
    assert set(adapter_vector(model)) == {"first.weight"}
    lora, dora = (adapted(peft.LoraConfig(r=2, target_modules=["first"], use_dora=use), base) for use in (False, True))
    expected = merged_minus_base(lora, base)
    lora.merge_adapter()
    check(adapter_vector(lora), expected)
    dora.merge_adapter()
    with pytest.raises(InputError, match=r"is merged.*unmerge_adapter"):
        adapter_vector(dora)


def test_the_library_does_not_load_peft():
    code = "import sys, rmtllmf.taskvec; sys.exit(any(name.split('.')[0] == 'peft' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0
