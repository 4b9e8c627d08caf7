"""Small models with adapters of PEFT, and what PEFT merges of them, the oracle."""

import copy

import pytest
import torch
from torch import nn

PEFT_IS_THE_ORACLE = "the oracle is PEFT's own merging"

# what PEFT says about its own configurations
PEFT_SPEAKS = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
# and what torch says about what PEFT does
QUIET = [*PEFT_SPEAKS, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


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
    """A model of PEFT's with these adapters."""
    peft = pytest.importorskip("peft", reason=PEFT_IS_THE_ORACLE)
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


def gpt2(tie=True):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=17, n_positions=6, tie_word_embeddings=tie
    )
    return transformers.GPT2LMHeadModel(config)
