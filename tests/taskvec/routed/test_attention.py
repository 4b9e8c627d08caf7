"""The opened attention does what torch's does."""

import pytest
import torch
from torch import nn

from rmtllmf.errors import InputError
from rmtllmf.taskvec.routed._attention import OpenAttention, can_open


def attention(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.MultiheadAttention(8, 2, **options).double().eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return module


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 4}])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "by head", "padding", "both", "causal"])
def test_as_torchs(batch_first, options, need_weights, masks):
    module = attention(batch_first=batch_first, **options)
    L, S, B = 5, 5 if masks == "causal" else 7, 3
    shape = (lambda n, d: (B, n, d)) if batch_first else (lambda n, d: (n, B, d))
    inputs = [tokens(*shape(L, 8)), tokens(*shape(S, module.kdim), seed=1), tokens(*shape(S, module.vdim), seed=2)]
    mask = torch.rand(L, S, generator=torch.Generator().manual_seed(3)) > 0.7
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, -2:] = True
    given = {
        "none": {},
        "bool": {"attn_mask": mask},
        "float": {"attn_mask": tokens(L, S)},
        "by head": {"attn_mask": tokens(B * 2, L, S)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": mask, "key_padding_mask": padding},
        "causal": {"attn_mask": torch.triu(torch.ones(L, S), 1).bool(), "is_causal": True},
    }[masks]
    for average in (True, False):
        settings = {"need_weights": need_weights, "average_attn_weights": average}
        expected, weights = module(*inputs, **given, **settings)
        output, found = OpenAttention(module)(*inputs, **given, **settings)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(found, weights)


@pytest.mark.parametrize("batch_first", [True, False])
def test_without_a_batch(batch_first):
    module, x = attention(batch_first=batch_first), tokens(5, 8)
    mask = torch.tensor([False, False, True, False, True])
    expected = module(x, x, x, key_padding_mask=mask)
    output = OpenAttention(module)(x, x, x, key_padding_mask=mask)
    torch.testing.assert_close(output, expected)
    by_head = tokens(2, 5, 5)
    torch.testing.assert_close(OpenAttention(module)(x, x, x, attn_mask=by_head), module(x, x, x, attn_mask=by_head))


def test_dropout_only_while_training():
    module, x = attention(dropout=0.5, batch_first=True), tokens(2, 5, 8)
    opened = OpenAttention(module)
    torch.testing.assert_close(opened(x, x, x)[0], module(x, x, x)[0])
    opened.train()
    assert not torch.equal(opened(x, x, x)[0], opened(x, x, x)[0])


def test_what_stays_closed():
    assert can_open(attention())
    assert not can_open(attention(add_bias_kv=True))
    assert not can_open(attention(add_zero_attn=True))


def test_a_causal_hint_needs_its_mask():
    x = tokens(2, 5, 8)
    with pytest.raises(InputError, match="attn_mask: expected the causal mask"):
        OpenAttention(attention())(x, x, x, is_causal=True)
