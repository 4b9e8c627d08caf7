"""What liars send is what it says, in the caller's form, and the vectors it is made of stay as they were."""

import pytest
import torch
from torch import nn

from rmtllmf.errors import InputError, StateMismatchError
from rmtllmf.resilience.attacks import backdoor, foreign, scaled, sign_flipped, with_nan
from rmtllmf.taskvec import TaskVector


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vector():
    tied = gaussian(8, 4, seed=1)
    return {
        "head": tied,
        "embed": tied,
        "conv": 5 * gaussian(3, 2, 2, seed=2, dtype=torch.float64),
        "half": gaussian(40, seed=3).to(torch.bfloat16),
        "norm.running_mean": torch.ones(3),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0),
    }


ATTACKS = {
    "scaled": lambda v: scaled(v, -3.5),
    "sign_flipped": sign_flipped,
    "with_nan": lambda v: with_nan(v, 4, 5),
    "foreign": lambda v: foreign(v, 4),
    "foreign as a whole": lambda v: foreign(v, 4, per_tensor=False),
    "backdoor": lambda v: backdoor(v, {key: torch.ones_like(t) for key, t in v.items()}, 2.0),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_form_ties_dtypes_and_what_is_no_parameter_are_kept(attack):
    given = vector()
    before = {key: tensor.clone() for key, tensor in given.items()}
    lie = attack(given)
    assert list(lie) == list(given)
    for key, tensor in lie.items():
        assert (tensor.dtype, tensor.shape) == (given[key].dtype, given[key].shape)
        assert torch.equal(given[key], before[key])
        assert tensor.numel() == 0 or tensor.data_ptr() != given[key].data_ptr()
    assert torch.equal(lie["steps"], given["steps"])
    assert torch.equal(lie["norm.running_mean"], given["norm.running_mean"])
    assert not torch.equal(lie["conv"], given["conv"]) or not torch.equal(lie["embed"], given["embed"])
    if attack is not ATTACKS["backdoor"]:  # a direction without the tie tears it
        assert lie["head"].data_ptr() == lie["embed"].data_ptr()


def test_task_vectors_come_back_as_task_vectors_but_for_nan():
    given = TaskVector({"w": gaussian(10), "b": gaussian(3, seed=1)})
    for name, attack in ATTACKS.items():
        assert isinstance(attack(given), dict if name == "with_nan" else TaskVector), name


def test_scaled_flipped_and_backdoor_are_arithmetic():
    a, b = TaskVector({"w": gaussian(50)}), TaskVector({"w": gaussian(50, seed=1)})
    torch.testing.assert_close(scaled(a, 100)["w"], (100 * a)["w"])
    assert torch.equal(sign_flipped(a)["w"], (-a)["w"])
    torch.testing.assert_close(backdoor(a, b, -0.5)["w"], (a - 0.5 * b)["w"])


def test_a_foreign_vector_has_the_norms_and_nothing_else():
    given = {"a": 3 * gaussian(40_000), "b": 0.1 * gaussian(200, 50, seed=1)}
    norm = torch.cat([given["a"], given["b"].flatten()]).norm()
    for per_tensor in (True, False):
        lie = foreign(given, 5, per_tensor=per_tensor)
        for key in given:
            assert torch.cosine_similarity(given[key].flatten(), lie[key].flatten(), dim=0).abs() < 0.05
            if per_tensor:
                torch.testing.assert_close(lie[key].norm(), given[key].norm())
        torch.testing.assert_close(torch.cat([lie["a"], lie["b"].flatten()]).norm(), norm, rtol=1e-5, atol=0)
    rms = [float(lie[key].square().mean().sqrt()) for key in given]
    assert rms[0] == pytest.approx(rms[1], rel=0.03)  # evenly over all entries


def test_a_seed_gives_the_same_lie_in_any_order_of_names_and_another_seed_another():
    given = vector()
    turned = dict(reversed(given.items()))
    for attack in (foreign, lambda v, seed: with_nan(v, seed, 3)):
        one, same, other = attack(given, 1), attack(turned, 1), attack(given, 2)
        equal = [torch.equal(one[key].nan_to_num(9.0), same[key].nan_to_num(9.0)) for key in given]
        assert all(equal)
        assert any(not torch.equal(one[key].nan_to_num(9.0), other[key].nan_to_num(9.0)) for key in given)


@pytest.mark.parametrize("count", [1, 7, 13])
def test_as_many_nan_as_asked_for(count):
    bomb = with_nan({"a": torch.zeros(2, 5), "b": torch.zeros(3), "n": torch.arange(4)}, 0, count)
    assert sum(int(bomb[key].isnan().sum()) for key in ("a", "b")) == count


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda: scaled({"w": torch.ones(2)}, "2"), TypeError, "factor: expected a real number, got str"),
        (lambda: scaled({"w": torch.ones(2)}, float("inf")), InputError, "factor: expected a finite number"),
        (lambda: scaled(nn.Linear(2, 2), 2), TypeError, "vector: expected a mapping.*Linear"),
        (lambda: sign_flipped([torch.ones(2)]), TypeError, "vector: expected a mapping.*list"),
        (lambda: sign_flipped({"n": torch.arange(3)}), InputError, "no floating-point entries"),
        (lambda: with_nan({"w": torch.ones(2)}, 0, 3), InputError, "count: expected at most 2.*got 3"),
        (lambda: with_nan({"w": torch.ones(2)}, 0, 0), InputError, "count: .*at least 1"),
        (lambda: with_nan({"w": torch.ones(2)}, 0.5), TypeError, "seed: expected an int"),
        (lambda: foreign({"w": torch.ones(2)}, None), TypeError, "seed: expected an int"),
        (lambda: foreign({"w": torch.ones(2)}, 0, per_tensor="no"), TypeError, "per_tensor: expected True or False"),
        (lambda: backdoor({"w": torch.ones(2)}, {"v": torch.ones(2)}, 1), StateMismatchError, "lacks 'w'"),
        (lambda: backdoor({"w": torch.ones(2)}, {"w": torch.ones(3)}, 1), StateMismatchError, "shape"),
        (lambda: backdoor({"w": torch.ones(2)}, 3, 1), TypeError, "direction: expected a mapping.*int"),
        (lambda: backdoor({"w": torch.ones(2)}, {"w": torch.ones(2)}, None), TypeError, "strength"),
    ],
)
def test_bad_input(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()
