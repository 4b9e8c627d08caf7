"""Task arithmetic against the formula, and its algebra."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import TaskVector, heuristic_scale, task_arithmetic

SHAPES = {"m": (3, 4), "v": (5,), "s": (), "none": (0,)}


def vectors(seed, count, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return [
        {key: torch.randn(shape, generator=source).to(dtype) for key, shape in SHAPES.items()} for _ in range(count)
    ]


@given(st.integers(0, 10**6), st.integers(1, 9), st.one_of(st.none(), st.floats(-2, 2)))
def test_the_formula(seed, count, scale):
    given_vectors = vectors(seed, count)
    fused = task_arithmetic(given_vectors, scale)
    factor = (1.0 if count == 1 else 0.3) if scale is None else scale
    for key in SHAPES:
        exact = factor * torch.stack([v[key].double() for v in given_vectors]).sum(0)
        torch.testing.assert_close(fused[key].double(), exact, rtol=0, atol=1e-6 * count)
        assert fused[key].dtype == torch.float32


@given(st.integers(0, 10**6), st.permutations(range(5)))
def test_order_does_not_matter_beyond_rounding_and_identical_vectors_add_up(seed, order):
    given_vectors = vectors(seed, 5)
    fused, shuffled = task_arithmetic(given_vectors, 0.3), task_arithmetic([given_vectors[i] for i in order], 0.3)
    same = task_arithmetic([given_vectors[0]] * 5, 0.2)
    for key in SHAPES:
        torch.testing.assert_close(fused[key], shuffled[key])
        torch.testing.assert_close(same[key], given_vectors[0][key])


def test_half_precision_is_added_up_in_float32():
    """A thousand times 1 + 2^-8: added up in bf16 the small part would be lost from 256 on."""
    term = torch.tensor([1.0078125], dtype=torch.bfloat16)
    fused = task_arithmetic([{"w": term}] * 1000, scale=1 / 1000)
    assert fused["w"].dtype == torch.bfloat16
    assert torch.equal(fused["w"], term)
    mixed = task_arithmetic([{"w": term}, {"w": torch.tensor([1.0])}])
    assert mixed["w"].dtype == torch.float32


def test_inputs_are_not_written_and_what_is_no_parameter_is_left_out():
    shared = torch.ones(3)
    vector = {"a": shared, "b": shared, "steps": torch.tensor(5), "bn.running_mean": torch.ones(2)}
    fused = task_arithmetic([vector, vector], 1.0)
    assert isinstance(fused, TaskVector)
    assert set(fused) == {"a", "b"}
    assert torch.equal(shared, torch.ones(3))
    assert torch.equal(fused["a"], torch.full((3,), 2.0))
    assert fused["a"].data_ptr() == fused["b"].data_ptr()


def test_the_culprit_is_named():
    good, bad = {"w": torch.ones(2)}, {"w": torch.tensor([1.0, float("nan")])}
    with pytest.raises(NonFiniteError, match=r"vectors\[1\]\['w'\]"):
        task_arithmetic([good, bad, good])
    huge = {"w": torch.tensor([3e38])}
    with pytest.raises(NonFiniteError, match="overflows"):
        task_arithmetic([huge, huge], 1.0)
    with pytest.raises(InputError, match="no floating-point"):
        task_arithmetic([{"steps": torch.tensor(1)}])


def test_heuristic_scale():
    assert [heuristic_scale(n) for n in (1, 2, 8, 100)] == [1.0, 0.3, 0.3, 0.3]


def test_gradients_flow_through_linear_rules():
    a, b = (torch.tensor([1.0, 2.0], requires_grad=True) for _ in range(2))
    fused = task_arithmetic([{"w": a}, {"w": b}], 0.5, weights=[1.0, 3.0])
    (fused["w"] * torch.tensor([1.0, 10.0])).sum().backward()
    assert a.grad.tolist() == [0.5, 5.0]
    assert b.grad.tolist() == [1.5, 15.0]
