"""OPCM: what a vector may bring in, one vector at a time, difficult spectra, and other tools' values."""

import pytest
import torch

from helpers import fusion_bench_peer
from helpers.subspace_definitions import opcm as naive
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import ContinualMerge, opcm


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(actual, expected):
    return float(torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected))


SHAPES = {"square": (24, 24), "tall": (40, 16), "wide": (16, 40), "b": (5,), "conv": (4, 3, 2, 2), "scalar": ()}


def make(count, dtype=torch.float64):
    return [
        {k: normal(*s, seed=10 * q + i, dtype=dtype) for i, (k, s) in enumerate(SHAPES.items())} for q in range(count)
    ]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_definition(alpha, dtype):
    vectors = make(4, dtype)
    expected = naive([{k: t.double() for k, t in vector.items()} for vector in vectors], alpha)
    for key, tensor in opcm(vectors, alpha).items():
        assert tensor.dtype == dtype
        assert error(tensor, expected[key]) < (1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("orders", [1, 4])
def test_decaying_spectra(orders):
    def one(seed):
        Q, R = (torch.linalg.qr(normal(30, 30, seed=seed + k)).Q for k in (0, 50))
        return {"w": ((Q * torch.logspace(0, -orders, 30)) @ R).float()}

    vectors = [one(seed) for seed in range(4)]
    expected = naive([{"w": vector["w"].double()} for vector in vectors])["w"]
    assert error(opcm(vectors)["w"], expected) < 1e-4


def test_what_comes_is_orthogonal_to_what_was_there_and_the_norm_is_kept():
    """The paper's two claims."""
    vectors = make(5)
    merge = ContinualMerge(alpha=0.6)
    for vector in vectors:
        before, merge = merge.total, merge.add(vector)
        if before is not None:
            for key in ("square", "tall", "wide"):
                come = merge.total[key] - before[key]
                U, s, Vh = torch.linalg.svd(before[key])
                known = int((s.cumsum(0) <= 0.6 * s.sum()).sum())
                assert known > 3
                assert (U[:, :known].mT @ come @ Vh[:known].mT).abs().max() < 1e-9
                assert abs((come * before[key]).sum()) < 1e-9 * torch.linalg.norm(come) * torch.linalg.norm(before[key])
        norms = [sum((t**2).sum() for t in v.values()).sqrt() for v in vectors[: merge.count]]
        torch.testing.assert_close(merge.update.norm(), float(sum(norms) / merge.count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_at_a_time_is_the_rule(dtype):
    vectors = make(4, dtype)
    merge = ContinualMerge()
    for vector in vectors:
        kept = merge
        merge = merge.add(vector)
        assert kept.count == merge.count - 1
    for key, tensor in opcm(vectors, dtype=torch.float32).items():
        torch.testing.assert_close(merge.update[key], tensor, rtol=1e-4, atol=1e-5)


def test_vectors_in_the_span_of_the_first_add_nothing():
    """With alpha = 1 all of the block is taken out."""
    first = {"w": normal(8, 2) @ normal(2, 6, seed=1)}
    U, _, Vh = torch.linalg.svd(first["w"])
    second = {"w": U[:, :2] @ normal(2, 2, seed=2) @ Vh[:2]}
    update = opcm([first, second], 1.0)["w"]
    torch.testing.assert_close(update / update.norm(), first["w"] / first["w"].norm())


def test_what_a_low_rank_sum_has_no_direction_for_comes_in_whole():
    first = {"w": (normal(12, 2) @ normal(2, 12, seed=1)).float()}
    U, _, Vh = torch.linalg.svd(first["w"].double())
    second = {"w": (U[:, 2:] @ normal(10, 10, seed=2) @ Vh[2:]).float()}
    update = opcm([first, second])["w"]
    expected = first["w"].double() + second["w"].double()
    assert error(update / update.norm(), expected / expected.norm()) < 1e-5


def test_one_vector_comes_back_and_so_does_nothing():
    vector = make(1)[0]
    for key, tensor in opcm([vector], scale=2.0).items():
        torch.testing.assert_close(tensor, 2 * vector[key])
    zeros = {"w": torch.zeros(3, 2)}
    merge = ContinualMerge().add(zeros).add(zeros)
    assert not merge.update["w"].any()
    torch.testing.assert_close(merge.add({"w": torch.ones(3, 2)}).update["w"], torch.full((3, 2), 1 / 3))


def test_out_in_half_precision():
    vectors = make(3, torch.float32)
    out = {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in SHAPES.items()}
    update = opcm(vectors, out=out, dtype=torch.bfloat16)
    for key, tensor in opcm(vectors).items():
        assert update[key].data_ptr() == out[key].data_ptr()
        assert torch.equal(update[key], tensor.bfloat16())


def test_the_values_of_fusion_bench():
    vectors = make(5)
    theirs = fusion_bench_peer.opcm(vectors, 0.5)
    for key, tensor in opcm(vectors).items():
        assert error(tensor, theirs[key]) < 1e-8


def test_bad_input_is_named():
    for alpha in (-0.1, 1.5):
        with pytest.raises(InputError, match=r"alpha: expected a share in \[0, 1\]"):
            opcm(make(1), alpha)
        with pytest.raises(InputError, match=r"alpha: expected a share in \[0, 1\]"):
            ContinualMerge(alpha)
    with pytest.raises(InputError, match="nothing has been merged yet"):
        _ = ContinualMerge().update
    merge = ContinualMerge().add({"w": torch.ones(2, 2)})
    with pytest.raises(StateMismatchError, match="shape"):
        merge.add({"w": torch.ones(3, 2)})
    with pytest.raises(NonFiniteError, match=r"vector\[1\]\['w'\] holds 1 non-finite"):
        merge.add({"w": torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])})
