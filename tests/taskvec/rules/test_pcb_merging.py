"""PCB-Merging: the authors' code transcribed, what wins, awkward vectors and bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmtllmf.taskvec._engine as engine
from helpers import sparse_definitions as sparse
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import pcb_merging


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fused(rows, density, **options):
    return pcb_merging([{"w": row} for row in rows], density, **options)["w"]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 6),
    size=st.sampled_from([1, 2, 5, 40, 300]),
    density=st.sampled_from([0.01, 0.1, 0.29, 0.5, 0.8, 1.0]),
    clip=st.sampled_from([0.0, 1e-4, 0.05, 0.3]),
)
def test_the_authors_code(seed, count, size, density, clip):
    """Also where so many take part that scores below zero do."""
    patch = pytest.MonkeyPatch()
    try:
        patch.setattr(engine, "PIECE", 16)
        rows = normal(count, size, seed=seed, dtype=torch.float64)
        expected = sparse.pcb_merging(rows, density, clip)
        torch.testing.assert_close(fused(rows, density, clip=clip), expected, rtol=1e-9, atol=1e-12)
    finally:
        patch.undo()


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_a_large_vector_in_single_precision(density):
    rows = normal(4, 200_000) * 1e-3
    ours, expected = fused(rows, density), sparse.pcb_merging(rows.double(), density)
    apart = (ours - expected).abs() > 1e-5 * expected.abs().max()
    assert int(apart.sum()) <= 4  # one at the threshold of each vector


def test_what_is_large_and_agrees_wins():
    rows = torch.tensor([[5.0, 1.0, 0.1, -1.0], [4.0, -0.9, 3.0, -1.1], [6.0, 0.2, 0.1, 2.0]])
    one = fused(rows, 0.75, clip=0.0)
    assert 4 <= one[0] <= 6  # all agree
    assert 2.5 < one[2] <= 3  # only one of them is strong
    assert one[3] == 0  # two against one, to a draw
    assert not fused(torch.stack([rows[0], -rows[0]]), 0.75).any()


def test_a_mean_of_the_vectors_wherever_it_is_not_zero():
    rows = normal(5, 1000, dtype=torch.float64)
    one = fused(rows, 0.2, clip=0.0)
    somewhere = one != 0
    assert 0.2 < float(somewhere.double().mean()) <= 1
    assert (one[somewhere] <= rows.max(0).values[somewhere] + 1e-12).all()
    assert (one[somewhere] >= rows.min(0).values[somewhere] - 1e-12).all()


def test_clipping_bounds_an_outlier():
    rows = normal(3, 1000)
    rows[1, 7] = 1e5
    assert fused(rows, 0.1).abs().max() < 10
    assert fused(rows, 0.1, clip=0.0).abs().max() == 1e5


def test_weights_and_scale_do_not_change_who_wins():
    rows = normal(3, 500)
    plain = fused(rows, 0.1)
    torch.testing.assert_close(fused(rows, 0.1, scale=1.2), 1.2 * plain)
    torch.testing.assert_close(fused(rows, 0.1, weights=[2, 2, 2]), 2 * plain)
    weighted = fused(rows, 0.1, weights=[1.0, 0.0, 1.0])
    assert ((weighted != 0) <= (plain != 0)).all()
    layered = [{"a": row[:200], "b": row[200:]} for row in rows]
    halved = pcb_merging(layered, 0.1, weights={"b": 0.5})
    torch.testing.assert_close(torch.cat([halved["a"], 2 * halved["b"]]), plain)


@pytest.mark.parametrize("rows", [torch.ones(3, 8), torch.zeros(2, 8), torch.tensor([[2.0]]), -torch.ones(1, 8)])
def test_constant_vectors(rows):
    torch.testing.assert_close(fused(rows, 0.5), rows[0])


def test_tied_empty_and_half_precision():
    shared = normal(50).bfloat16()
    vectors = [{"z": shared * (q + 1), "none": torch.empty(0, 2).bfloat16()} for q in range(2)]
    for vector in vectors:
        vector["a"] = vector["z"]
    one = pcb_merging(vectors, 0.5)
    assert one["a"].data_ptr() == one["z"].data_ptr()
    assert one["a"].dtype == torch.bfloat16
    assert one["none"].shape == (0, 2)
    assert not pcb_merging([{"none": torch.empty(0)}])["none"].numel()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_named(value):
    rows = normal(3, 100)
    rows[2, 50] = value
    with pytest.raises(NonFiniteError, match=r"vectors\[2\]\['w'\] holds 1 non-finite"):
        fused(rows, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, r"density: expected a share in \(0, 1\]"),
        ({"density": 10}, r"density: expected a share in \(0, 1\], where 1 keeps all, got 10"),
        ({"clip": 0.5}, r"clip: expected a share in \[0, 0.5\), got 0.5"),
        ({"clip": -0.1}, "clip"),
        ({"scale": math.nan}, "scale"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        pcb_merging([{"w": torch.ones(3)}], **arguments)
    with pytest.raises(InputError, match="gradients"):
        pcb_merging([{"w": torch.ones(3, requires_grad=True)}])


@pytest.mark.gpu
def test_on_the_device():
    rows = normal(3, 5000)
    torch.testing.assert_close(fused(rows.cuda(), 0.1).cpu(), fused(rows, 0.1), rtol=1e-4, atol=1e-4)
