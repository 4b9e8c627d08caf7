"""float8_e4m3fn has no infinity, and torch takes its largest number instead: what overflows is found all the same."""

import pytest
import torch
from torch import nn

from rmtllmf.channel import transmit, transmit_sum
from rmtllmf.errors import NonFiniteError
from rmtllmf.resilience.attacks import scaled
from rmtllmf.taskvec import MaskedVectors, TaskVector, fuse, weighted_average

F8 = torch.float8_e4m3fn


def narrow(*values, dtype=F8):
    return torch.tensor(values).to(dtype)


def test_apply_to_a_state_dict_and_a_module():
    vector = TaskVector({"weight": torch.tensor([[200.0]])})
    with pytest.raises(NonFiniteError, match=r"base\['weight'\] plus the task vector overflows torch\.float8_e4m3fn"):
        vector.apply_to({"weight": narrow([300.0])})
    assert vector.apply_to({"weight": narrow([240.0])})["weight"].float() == 448  # 440 is between 416 and 448
    model = nn.Linear(1, 1, bias=False)
    model.weight = nn.Parameter(narrow([300.0]), requires_grad=False)
    with pytest.raises(NonFiniteError, match="overflows"):
        vector.apply_to(model)
    assert model.weight.float() == 288


@pytest.mark.parametrize("delta", [160.0, 175.0, 176.0])
def test_the_largest_sums_that_are_rounded_to_the_largest_number(delta):
    """464 is halfway between 448 and the next that there would be."""
    assert TaskVector({"w": torch.tensor([delta])}).apply_to({"w": narrow(288.0)})["w"].float() == 448
    with pytest.raises(NonFiniteError):
        TaskVector({"w": torch.tensor([176.5])}).apply_to({"w": narrow(288.0)})


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32])
def test_an_overflow_beside_what_was_infinite_before(dtype):
    """A mask of -inf, say, hides nothing."""
    most = torch.finfo(dtype).max
    base = torch.tensor([-torch.inf, most, 1.0]).to(dtype)
    kept = TaskVector({"w": torch.tensor([0.0, 0.0, 1.0])}).apply_to({"w": base})["w"].float()
    assert torch.equal(kept, torch.tensor([-torch.inf, most, 2.0]))
    with pytest.raises(NonFiniteError, match="overflows"):
        TaskVector({"w": torch.tensor([0.0, most / 2, 0.0])}).apply_to({"w": base})


def test_conversion():
    with pytest.raises(NonFiniteError, match=r"to: 'w' overflows torch\.float8_e4m3fn"):
        TaskVector({"w": torch.tensor([1e4])}).to(F8)
    with pytest.raises(NonFiniteError, match=r"to: 'w' overflows torch\.float16"):
        TaskVector({"w": torch.tensor([1e5])}).to(torch.float16)
    assert TaskVector({"w": torch.tensor([460.0])}).to(F8)["w"].float() == 448
    assert TaskVector({"w": narrow(1.0)}).to(F8)["w"].float() == 1


def masked():
    stored = MaskedVectors(TaskVector({"w": narrow(300.0)}), ({"w": torch.tensor([True])},), (2.0,))
    return stored.task_vector(0)


def attacked():
    return scaled({"w": narrow(300.0)}, 2.0)


CALLS = {
    "fused": lambda: fuse({"w": narrow(300.0)}, [{"w": narrow(448.0)}] * 2, scale=1.0),
    "weighted": lambda: weighted_average([{"w": torch.tensor([1e4])}], dtype=F8),
    "masked": masked,
    "transmitted": lambda: transmit([{"w": narrow(*[440.0] * 64)}], 4.0, seed=0),
    "transmitted, without noise": lambda: transmit([{"w": narrow(300.0)}], 0.0, seed=0, scale=1.0),
    "transmitted, traced": lambda: transmit([{"w": torch.full((64,), 440.0, requires_grad=True).to(F8)}], 4.0, seed=0),
    "added in the air": lambda: transmit_sum([{"w": narrow(300.0)}] * 2, 0.0, seed=0),
    "attacked": attacked,
}
FINE = {"transmitted, without noise"}


@pytest.mark.parametrize("name", CALLS)
def test_results_are_not_clipped(name):
    if name in FINE:
        assert CALLS[name]()[0]["w"].float() == 288
        return
    with pytest.raises(NonFiniteError):
        CALLS[name]()


def test_errors_of_vectors_in_float8():
    with pytest.raises(NonFiniteError, match=r"tensors\['w'\] holds 1 non-finite"):
        TaskVector({"w": narrow(1.0, torch.nan)})
