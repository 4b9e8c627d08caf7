"""Adapters as task vectors: against what PEFT itself merges, from files and from memory."""

import copy
import json
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from rmtllmf.channel import transmit
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.taskvec import (
    TaskVector,
    adapter_vector,
    aligned,
    coordinate_median,
    dare,
    lines,
    task_arithmetic,
)

peft = pytest.importorskip("peft", reason="the oracle is PEFT's own merging")

pytestmark = [
    # what PEFT says about its own configurations, and what torch says about what PEFT does
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Tiny(nn.Module):
    """Every kind of layer that LoRA adapts, and some that it leaves."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.ReLU()) for _ in range(3))
        self.conv = nn.Conv2d(3, 4, 3)
        self.point = nn.Conv2d(4, 5, 1)
        self.line = nn.Conv1d(3, 4, 3)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 2)

    def forward(self, tokens):
        x = self.first(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def base_model(kind=Tiny, seed=0):
    torch.manual_seed(seed)
    return kind()


def shaken(model, seed=1):
    """Adapters (and what else is trainable) as after training: nothing is zero."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=source).to(parameter) * 0.3)
    return model


def adapted(config, base=None, seed=1):
    return shaken(peft.get_peft_model(copy.deepcopy(base if base is not None else base_model()), config), seed)


def merged_minus_base(model, base):
    """The oracle: PEFT merges in double precision, what we compare with is the difference."""
    # the sum of ours and the base is not rounded to the base's precision, and so neither must theirs be
    merged = copy.deepcopy(model).double().merge_and_unload().state_dict()
    return {key: merged[key] - tensor.double() for key, tensor in base.state_dict().items()}


def check(vector, expected, *, exactly=None):
    """All that the oracle changes is in the vector with the same values, and nothing else is."""
    changed = {key for key, value in expected.items() if value.is_floating_point() and bool((value != 0).any())}
    assert changed
    assert changed <= set(vector)
    assert exactly is None or set(vector) == exactly
    for key in vector:
        assert vector[key].shape == expected[key].shape
        assert vector[key].dtype == torch.float32
        torch.testing.assert_close(vector[key].double(), expected[key], rtol=1e-5, atol=2e-6)


LINEAR = ["first", "blocks.0.0", "blocks.1.0", "blocks.2.0"]
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
NEEDS_BASE = {
    "whole modules": {"r": 2, "target_modules": ["first"], "modules_to_save": ["head", "norm"]},
    "all biases": {"r": 2, "target_modules": ["first"], "bias": "all"},
    "biases of adapted layers": {"r": 2, "target_modules": ["first"], "bias": "lora_only"},
    "DoRA": {"r": 2, "lora_alpha": 5, "target_modules": [*LINEAR, "embed", "conv", "point"], "use_dora": True},
    "all biases and whole modules": {"r": 2, "target_modules": ["first"], "modules_to_save": ["head"], "bias": "all"},
    "DoRA, rsLoRA and patterns": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": [*LINEAR, "line"],
        "rank_pattern": {"first": 1},
        "use_dora": True,
        "use_rslora": True,
    },
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


def gpt2(tie=True):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=17, n_positions=6, tie_word_embeddings=tie
    )
    return transformers.GPT2LMHeadModel(config)


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


def test_whole_tensors_against_a_file_of_the_base(tmp_path):
    base = base_model()
    model = adapted(peft.LoraConfig(**NEEDS_BASE["whole modules"]), base)
    model.save_pretrained(tmp_path)
    TaskVector({key: value for key, value in base.state_dict().items() if value.is_floating_point()}).save(
        tmp_path / "base.safetensors"
    )
    check(adapter_vector(tmp_path, base=tmp_path / "base.safetensors"), merged_minus_base(model, base))


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


def three(tmp_path, base):
    """Three adapters of different ranks on different layers, and their dense vectors."""
    paths, dense = [], []
    for seed, targets in enumerate((["first"], ["first", "blocks.1.0"], ["blocks.2.0", "conv"]), 1):
        model = adapted(peft.LoraConfig(r=seed, lora_alpha=4, target_modules=targets), base, seed)
        model.save_pretrained(tmp_path / str(seed))
        paths.append(tmp_path / str(seed))
        dense.append(merged_minus_base(model, base))
    return paths, dense


def test_adapters_of_different_layers_fuse_as_dense_models_do(tmp_path):
    base = base_model()
    paths, dense = three(tmp_path, base)
    with pytest.raises(StateMismatchError):
        task_arithmetic([adapter_vector(path) for path in paths])
    vectors = aligned([adapter_vector(path) for path in paths])
    fused = task_arithmetic(vectors, 0.4)
    assert set(fused) == {"first.weight", "blocks.1.0.weight", "blocks.2.0.weight", "conv.weight"}
    for key in fused:
        exact = 0.4 * sum(vector[key] for vector in dense)
        torch.testing.assert_close(fused[key].double(), exact, rtol=1e-5, atol=2e-6)
    # products of sums are something else
    moved = fused.apply_to(copy.deepcopy(base))
    assert not torch.equal(moved.conv.weight, base.conv.weight)
    heard = transmit(vectors, 0.0, seed=0)
    torch.testing.assert_close(heard[1]["blocks.1.0.weight"], vectors[1]["blocks.1.0.weight"], rtol=1e-4, atol=1e-5)


def test_the_same_bits_for_any_number_of_threads(tmp_path):
    paths, _ = three(tmp_path, base_model())
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(task_arithmetic(aligned([adapter_vector(path) for path in paths])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][key], other[key]) for other in results for key in results[0])


def test_aligned_keeps_ties_and_order():
    shared, alone = torch.ones(2), torch.full((2,), 3.0)
    a, b, c = aligned([{"x": shared, "y": shared}, {"y": alone}, {"z": torch.ones(1, dtype=torch.float64)}])
    assert list(a) == list(b) == list(c) == ["x", "y", "z"]
    assert torch.equal(b["x"], alone), "the other name of the same tensor"
    assert c["z"].dtype == torch.float64
    assert torch.equal(c["x"], torch.zeros(2))
    fused = task_arithmetic([a, b, c], 1.0)
    assert fused["x"] is fused["y"]
    assert torch.equal(fused["x"], torch.full((2,), 4.0))
    held = TaskVector(c)
    assert held["x"] is held["y"]
    (same,) = aligned([TaskVector({"x": shared})])
    assert same["x"].data_ptr() == shared.data_ptr(), "nothing is copied"


def test_aligned_zeros_are_tied_only_where_other_vectors_tie_them():
    shared = torch.ones(2)
    layers = {"blocks.0.w": torch.ones(2), "blocks.1.w": torch.full((2,), 2.0)}
    _, silent, _ = aligned([{**layers, "x": shared, "y": shared}, {"blocks.2.w": torch.ones(2)}, {"y": shared}])
    held = TaskVector(silent)
    assert held["x"] is held["y"]
    assert held["blocks.0.w"] is not held["blocks.1.w"]
    silent = {key: tensor for key, tensor in silent.items() if "blocks" in key}
    assert lines(silent, beta=0.5, alpha=0.25)["blocks.2.w"].tolist() == [0.75, 0.75]
    chain = {"y": layers["blocks.0.w"], "z": layers["blocks.0.w"]}
    fused = task_arithmetic(aligned([{"x": shared, "y": shared}, chain, {}, layers]), 1.0)
    assert fused["x"] is fused["z"]


def test_aligned_vectors_must_not_be_written_to_either():
    a, b = {"x": torch.ones(2)}, {"y": torch.ones(1)}
    for rule in (task_arithmetic, partial(dare, seed=0)):
        with pytest.raises(InputError, match=r"out\['x'\] shares memory with vectors\[0\]\['x'\]"):
            rule(aligned([a, b]), out={"x": a["x"], "y": torch.ones(1)})
    assert a["x"].tolist() == [1.0, 1.0]


def test_gradients_flow_through_aligned_vectors():
    a, b = {"x": torch.ones(2, requires_grad=True)}, {"y": torch.ones(1)}
    task_arithmetic(aligned([a, b]), 0.25)["x"].sum().backward()
    assert a["x"].grad.tolist() == [0.25, 0.25]
    a["x"].grad = None
    fused = dare(aligned([a, b]), 0.5, scale=1.0, seed=0)["x"]
    fused.sum().backward()
    assert torch.equal(a["x"].grad, fused.detach())
    with pytest.raises(InputError, match="gradients flow through linear rules only"):
        coordinate_median(aligned([a, b]))


def test_aligned_vectors_that_are_spread_over_processes():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        dense = [{"x": torch.arange(4.0), "y": torch.ones(3)}, {"x": -torch.ones(4), "z": torch.ones(2, 2)}]
        spread = [{k: distribute_tensor(t, mesh, [Shard(0)]) for k, t in vector.items()} for vector in dense]
        for rule in (task_arithmetic, coordinate_median, partial(dare, seed=0)):
            expected, found = rule(aligned(dense)), rule(aligned(spread))
            assert all(torch.equal(found[key].full_tensor(), expected[key]) for key in expected)
    finally:
        dist.destroy_process_group()


def test_aligned_refuses():
    with pytest.raises(InputError, match="empty sequence"):
        aligned([])
    for single in ({"a": torch.ones(1)}, TaskVector({"a": torch.ones(1)}), "text", torch.ones(1)):
        with pytest.raises(TypeError, match="expected a sequence"):
            aligned(single)
    with pytest.raises(TypeError, match=r"vectors\[1\]"):
        aligned([{"a": torch.ones(1)}, 3])
    with pytest.raises(StateMismatchError, match=r"vectors\[1\]\['a'\] has shape \(2,\)"):
        aligned([{"a": torch.ones(1)}, {"a": torch.ones(2)}])


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


def test_the_library_does_not_load_peft():
    code = "import sys, rmtllmf.taskvec; sys.exit(any(name.split('.')[0] == 'peft' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0
