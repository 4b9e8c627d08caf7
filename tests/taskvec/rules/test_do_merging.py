"""DO-Merging: magnitudes do not tilt directions, factors move apart, and full-rank updates are only decoupled."""

import pytest
import torch

from helpers.subspace_definitions import decoupled, moved_apart, overlap
from rmtllmf.errors import InputError
from rmtllmf.taskvec import do_merging


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tasks(m=10, n=8, rank=2, count=3):
    return torch.stack([normal(m, rank, seed=q) @ normal(rank, n, seed=50 + q) for q in range(count)])


def factors(x, rank=2):
    U, s, Vh = torch.linalg.svd(x, full_matrices=False)
    root = s[:, None, :rank].sqrt()
    return (U[..., :rank] * root).mT, root.mT * Vh[:, :rank]


def fused(x, **options):
    return do_merging([{"w": task} for task in x], **options)["w"]


@pytest.mark.parametrize("stay", [0.1, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 30])
def test_the_definition(stay, steps):
    x = tasks()
    B, A = (moved_apart(factor, stay, steps) for factor in factors(x))
    torch.testing.assert_close(fused(x, stay=stay, steps=steps), decoupled(B.mT @ A), rtol=0, atol=1e-9)
    single = fused(x.float(), stay=stay, steps=steps)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), decoupled(B.mT @ A), rtol=0, atol=1e-4)


def test_the_loss_never_grows_and_tasks_interfere_less():
    for factor in factors(tasks()):
        size = torch.linalg.matrix_norm(factor.flatten(0, 1), 2)
        seen = [moved_apart(factor, 0.5, steps) for steps in range(6)]
        losses = [float(overlap(f / size) + 0.5 * (((f - factor) / size) ** 2).sum()) for f in seen]
        assert losses == sorted(losses, reverse=True)
        assert overlap(seen[-1]) < 0.9 * overlap(factor)


def test_a_task_with_large_entries_does_not_tilt_the_direction():
    """The paper's reason to decouple."""
    x = tasks()
    loud = x.clone()
    loud[0] *= 100
    plain, louder = fused(x, steps=0), fused(loud, steps=0)
    torch.testing.assert_close(plain / plain.norm(dim=0), louder / louder.norm(dim=0))
    assert ((louder / plain) > 10).all()


def test_orthogonal_tasks_are_left_as_they_are():
    U, V = torch.linalg.qr(normal(10, 10)).Q, torch.linalg.qr(normal(8, 8, seed=1)).Q
    x = torch.stack([U[:, 2 * q : 2 * q + 2] @ V[:, 2 * q : 2 * q + 2].mT for q in range(3)])
    torch.testing.assert_close(fused(x), decoupled(x))


def test_full_rank_updates_have_no_room_and_are_only_decoupled():
    x = torch.stack([normal(6, 5, seed=q) for q in range(3)])
    assert torch.equal(fused(x), fused(x, steps=0))


def test_a_silent_task_and_silent_columns():
    x = tasks()
    x[1] = 0
    x[:, :, 3] = 0
    assert torch.isfinite(fused(x)).all()
    assert not fused(x)[:, 3].any()


@pytest.mark.parametrize("silent", [[0, 1], [0, 1, 2]])
def test_nothing_moves_where_one_task_or_none_says_anything(silent):
    x = tasks()
    x[silent] = 0
    assert torch.equal(fused(x), fused(x, steps=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stay": 0.0}, "stay: expected a positive number, got 0"),
        ({"steps": -1}, "steps"),
        ({"scale": float("nan")}, "scale"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        fused(tasks(), **options)
