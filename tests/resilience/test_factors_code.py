"""Codes of factors that exist: the same product with less noise, real adapters, and what is shared."""

import numpy as np
import pytest
import torch
from torch import nn

from helpers.draws import double
from helpers.sent_codes import errors_after_transmission, numbers
from rmtllmf.channel import transmit
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.resilience.coding import channel_uses
from rmtllmf.resilience.factors_code import factors_code
from rmtllmf.resilience.low_rank_code import low_rank_code


def test_factors_that_exist_are_sent_as_they_are_or_balanced():
    B, A = 1e-3 * double(20, 4, seed=1), double(4, 30, seed=2)
    as_is = factors_code({"w": (B, A)}, {"bias": torch.ones(3), "n": torch.tensor(2)}, balance=False)
    assert torch.equal(as_is.sent["w/B"], B)
    assert torch.equal(as_is.sent["w/A"], A)
    balanced = factors_code({"w": (B, A)})
    assert numbers(balanced) == 4 * 50
    for code in (as_is, balanced):
        torch.testing.assert_close(code.decode(code.sent)["w"], B @ A, rtol=1e-9, atol=1e-12)
    assert as_is.decode(as_is.sent)["n"].item() == 2
    norms = [float(balanced.sent[name].norm()) for name in ("w/B", "w/A")]
    nuclear = np.linalg.svd((B @ A).numpy(), compute_uv=False).sum()
    assert norms[0] * norms[1] == pytest.approx(nuclear * 600**0.25, rel=1e-9)
    own = low_rank_code({"w": B @ A}, 4)  # the same factors as of the product
    assert norms == pytest.approx([float(own.sent[name].norm()) for name in ("w/B", "w/A")], rel=1e-6)
    exact = factors_code({"w": (B, A)}, balance=False)
    noise = [errors_after_transmission(code, 0.1, 50).mean() for code in (balanced, exact)]
    assert 20 * noise[0] < noise[1]


def test_surplus_rank_is_dropped_by_balancing():
    B, A = double(5, 12, seed=1), double(12, 7, seed=2)
    code = factors_code({"w": (B, A)})
    assert code.sent["w/B"].shape == (5, 5)
    torch.testing.assert_close(code.decode(code.sent)["w"], B @ A, rtol=1e-9, atol=1e-9)


def test_a_fresh_adapter_is_no_update():
    code = factors_code({"w": (torch.zeros(5, 2), torch.ones(2, 7))})
    assert not code.decode(code.sent)["w"].any()
    assert all(tensor.isfinite().all() for tensor in code.sent.values())


def test_factors_shared_by_two_layers_are_sent_once():
    A = double(2, 30)
    factors = {"u": (double(10, 2, seed=1), A), "v": (double(10, 2, seed=2), A)}
    code = factors_code(factors, balance=False)
    assert channel_uses(code) == (20 + 20 + 60) // 2
    (received,) = transmit([code.sent], [[0.1]] * 50, seed=0)
    assert received["u/A"] is received["v/A"]


def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 6))
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"]))
    factors, expected = {}, {}
    for name, layer in tuned.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            nn.init.normal_(layer.lora_B["default"].weight)
            B, A = (part["default"].weight for part in (layer.lora_B, layer.lora_A))
            factors[name] = layer.scaling["default"] * B, A
            expected[name] = layer.get_delta_weight("default").detach()
    code = factors_code(factors)
    assert len(factors) == 2
    assert numbers(code) == 3 * (12 + 20) + 3 * (20 + 6)
    for name, update in code.decode(code.sent).items():
        torch.testing.assert_close(update, expected[name])


PAIR = torch.ones(4, 1), torch.ones(1, 3)
BAD = {
    "a list": (lambda: factors_code([1]), TypeError, "factors: expected a mapping"),
    "rest in a list": (lambda: factors_code({"w": PAIR}, [1]), TypeError, "rest: expected a mapping"),
    "no factors": (lambda: factors_code({}), InputError, "factors: expected at least one pair"),
    "swapped": (lambda: factors_code({"w": PAIR[::-1]}), ShapeError, "expected B .m, r. and A .r, n., got"),
    "a triple": (lambda: factors_code({"w": (*PAIR, 1)}), TypeError, "expected a pair"),
    "no tensors": (lambda: factors_code({"w": (1, 2)}), TypeError, "expected a floating-point tensor as B, got int"),
    "mixed": (lambda: factors_code({"w": (PAIR[0].double(), PAIR[1])}), StateMismatchError, "B is torch.float64"),
    "nan in a factor": (lambda: factors_code({"w": (PAIR[0] * torch.nan, PAIR[1])}), NonFiniteError, "B holds NaN"),
    "twice": (lambda: factors_code({"w": PAIR}, {"w": torch.ones(1)}), InputError, "rest: 'w' stands among"),
    "no rank": (lambda: factors_code({"w": (torch.ones(4, 0), torch.ones(0, 3))}), ShapeError, "expected B"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
