"""Task vectors: what they hold, their algebra, and the round trips that checkpoints make."""

import copy
import pickle
from collections.abc import Mapping

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmtllmf.channel import transmit
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import TaskVector, task_arithmetic


def test_between_holds_what_fine_tuning_changed_and_nothing_else(pair):
    tau = TaskVector.between(*pair)
    assert set(tau) == {"embed.weight", "head.weight", "norm.weight", "norm.bias", "mask"}
    assert torch.allclose(tau["embed.weight"], torch.tensor(0.5))
    assert torch.equal(tau["norm.bias"], torch.full((4,), -0.25))
    assert torch.equal(tau["norm.weight"], torch.zeros(4))
    assert torch.equal(tau["mask"], torch.zeros(3, 3))  # -inf in both: unchanged
    assert tau["embed.weight"].data_ptr() == tau["head.weight"].data_ptr()


def test_base_plus_vector_is_the_fine_tuned_model(pair):
    base, tuned = pair
    before = {key: value.clone() for key, value in base.state_dict().items()}
    tau = TaskVector.between(base, tuned)
    state = tau.apply_to(base.state_dict())
    for key, value in tuned.state_dict().items():
        carried = key in ("used", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
        assert torch.allclose(state[key].double(), (before if carried else tuned.state_dict())[key].double()), key
        assert state[key].dtype == value.dtype
        assert torch.equal(base.state_dict()[key], before[key])
        assert state[key].data_ptr() != base.state_dict()[key].data_ptr()
    assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()

    loaded = tau.apply_to(base, scale=1.0)
    assert loaded is base
    assert base.head.weight is base.embed.weight
    assert torch.allclose(base.embed.weight, tuned.embed.weight)
    assert torch.equal(base.norm.running_mean, before["norm.running_mean"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_subtracted_in_float32(dtype):
    """In bf16 the difference of neighbours would still be exact, but 256.0 - 0.007 would lose the small one."""
    base = {"w": torch.tensor([0.00701, 1.0, 3.0]).to(dtype)}
    tuned = {"w": torch.tensor([256.0, 1.01, 3.0]).to(dtype)}
    tau = TaskVector.between(base, tuned)
    assert tau["w"].dtype == torch.float32
    assert torch.equal(tau["w"], tuned["w"].float() - base["w"].float())
    assert not torch.equal(tau["w"], (tuned["w"] - base["w"]).float())
    back = tau.apply_to(base)
    assert back["w"].dtype == dtype
    assert torch.equal(back["w"], tuned["w"])


def test_double_precision_stays():
    tau = TaskVector.between({"w": torch.ones(2).double()}, {"w": torch.full((2,), 1 + 1e-12).double()})
    assert tau["w"].dtype == torch.float64
    assert float(tau["w"][0]) == pytest.approx(1e-12, rel=1e-3)


@given(st.integers(0, 10**6), st.floats(-4, 4), st.floats(-4, 4))
def test_vector_space(seed, a, b):
    source = torch.Generator().manual_seed(seed)
    shapes = {"m": (3, 4), "v": (5,), "s": ()}
    u, v = ({k: torch.randn(s, generator=source, dtype=torch.float64) for k, s in shapes.items()} for _ in range(2))
    x, y = TaskVector(u), TaskVector(v)
    combined = a * x + y * b - x
    for key in shapes:
        torch.testing.assert_close(combined[key], (a - 1) * u[key] + b * v[key])
    assert (-x).dot(y) == pytest.approx(-x.dot(y), abs=1e-12)
    assert x.norm() ** 2 == pytest.approx(x.dot(x))
    assert (x + y).norm() ** 2 == pytest.approx(x.norm() ** 2 + 2 * x.dot(y) + y.norm() ** 2)
    assert abs(x.dot(y)) <= x.norm() * y.norm() * (1 + 1e-12)
    torch.testing.assert_close((x / 3)["m"], u["m"] / 3)
    assert sum([x, y]).norm() == pytest.approx((x + y).norm())


def test_norm_and_dot_accumulate_in_float64():
    big = TaskVector({"w": torch.full((100_003,), 1e-4), "b": torch.tensor([1e4])})
    assert big.norm() ** 2 == pytest.approx(1e8 + 100_003 * 1e-8, rel=1e-12)
    assert big.norm() ** 2 - 1e8 == pytest.approx(1e-3, rel=1e-2)


def test_immutability_and_inputs_are_not_written(pair):
    tau = TaskVector.between(*pair)
    with pytest.raises(TypeError):
        tau["embed.weight"] = torch.zeros(7, 4)
    with pytest.raises(AttributeError, match="immutable"):
        tau.extra = 1
    before = {key: value.clone() for key, value in tau.items()}
    _ = (-tau, tau * 2, tau + tau, tau / 2, tau.to(torch.float64), tau.map(lambda _, t: t + 1))
    assert all(torch.equal(tau[key], before[key]) for key in tau)


def test_ties_survive_every_operation(pair):
    tau = TaskVector.between(*pair)
    for result in (-tau, tau * 2, tau + tau, tau - 0.5 * tau, tau / 2, tau.to(torch.float64), tau.map(lambda _, t: t)):
        assert result["embed.weight"].data_ptr() == result["head.weight"].data_ptr()
    untied = tau.map(lambda _, t: t.clone())
    assert untied["embed.weight"].data_ptr() != untied["head.weight"].data_ptr()


def test_select_and_partial_vectors(pair):
    base, tuned = pair
    tau = TaskVector.between(base, tuned)
    norm_only = tau.select("norm.*")
    assert set(norm_only) == {"norm.weight", "norm.bias"}
    state = norm_only.apply_to(base.state_dict())
    assert torch.equal(state["embed.weight"], base.embed.weight)
    assert torch.equal(state["norm.bias"], tuned.norm.bias)
    with pytest.raises(InputError, match="norn"):
        tau.select(["norm.*", "norn.*"])


def test_a_real_architecture_round_trips():
    model = open_clip.transformer.VisionTransformer(28, 7, 32, 2, 2, 4.0, output_dim=16)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.125
    tau = TaskVector.between(model, tuned)
    assert set(tau) == set(model.state_dict())
    tau.apply_to(model)
    x = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(model(x), tuned(x))


def test_differences_that_make_no_sense_are_refused(pair):
    base, tuned = (model.state_dict() for model in pair)
    with pytest.raises(StateMismatchError, match=r"lacks 'norm\.bias'"):
        TaskVector.between(base, {k: v for k, v in tuned.items() if k != "norm.bias"})
    with pytest.raises(StateMismatchError, match="unexpected 'extra'"):
        TaskVector.between(base, {**tuned, "extra": torch.ones(1)})
    with pytest.raises(StateMismatchError, match=r"shape \(8,\); base has \(4,\)"):
        TaskVector.between(base, {**tuned, "norm.bias": torch.ones(8)})
    with pytest.raises(StateMismatchError, match="float16"):
        TaskVector.between(base, {**tuned, "norm.bias": torch.ones(4, dtype=torch.float16)})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError, match=r"norm\.bias"):
            TaskVector.between(base, {**tuned, "norm.bias": torch.tensor([0, bad, 0, 0])})
        with pytest.raises(NonFiniteError, match=r"norm\.bias"):
            TaskVector.between({**base, "norm.bias": torch.tensor([0, bad, 0, 0])}, tuned)


def test_copies_and_repr():
    tau = TaskVector({"w": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.float64)})
    assert repr(tau) == "TaskVector(2 tensors, 10 entries, float32, float64)"
    assert torch.equal(copy.deepcopy(tau)["w"], tau["w"])
    assert torch.equal(pickle.loads(pickle.dumps(tau))["w"], tau["w"])  # noqa: S301 (worker processes of a DataLoader)
    assert tau == tau  # identity: comparing tensors has no single answer
    assert tau != TaskVector(dict(tau))


def test_gradients_pass_through_arithmetic():
    scale = torch.tensor(0.5, requires_grad=True)
    tau = TaskVector({"w": torch.tensor([1.0, 2.0])})
    (scale * tau)["w"].sum().backward()
    (tau / scale)["w"].sum().backward()
    assert float(scale.grad) == 3.0 - 3.0 / 0.25


def test_what_is_tied_moves_together(pair):
    """Under whichever of its names the vector has it; different changes to one memory are refused."""
    base, tuned = pair
    tau = TaskVector.between(base, tuned)
    before = base.embed.weight.detach().clone()
    for names in (["embed.*"], ["head.*"], ["embed.*", "head.*"]):
        state = tau.select(names).apply_to(base.state_dict())
        assert torch.allclose(state["embed.weight"], before + 0.5)
        assert state["embed.weight"].data_ptr() == state["head.weight"].data_ptr()
        model = copy.deepcopy(base)
        tau.select(names).apply_to(model)
        assert torch.allclose(model.embed.weight, before + 0.5)
        assert model.head.weight is model.embed.weight
    lost = TaskVector({"embed.weight": torch.ones(7, 4), "head.weight": torch.ones(7, 4)})
    assert torch.allclose(lost.apply_to(copy.deepcopy(base)).embed.weight, before + 1)
    torn = TaskVector({"embed.weight": torch.ones(7, 4), "head.weight": torch.zeros(7, 4)})
    model = copy.deepcopy(base)
    with pytest.raises(StateMismatchError, match="tied in base"):
        torn.apply_to(model)
    assert torch.equal(model.embed.weight, before)


def test_a_module_keeps_its_parameters_and_flags(pair):
    base, tuned = pair
    base.norm.weight.requires_grad_(False)
    found = dict(base.named_parameters())
    TaskVector.between(base, tuned).apply_to(base)
    assert all(parameter is found[name] for name, parameter in base.named_parameters())
    assert not base.norm.weight.requires_grad
    assert base.embed.weight.requires_grad


def test_mappings_that_make_their_tensors_on_access():
    """A casting view hands out temporaries, whose memory is reused: no tie may be seen there."""

    class Cast(Mapping):
        def __init__(self, state):
            self.state = state

        def __getitem__(self, key):
            return self.state[key].float()

        def __iter__(self):
            return iter(self.state)

        def __len__(self):
            return len(self.state)

    state = {f"l{k}": torch.full((64, 64), float(k), dtype=torch.float16) for k in range(1, 6)}
    for result in (task_arithmetic([Cast(state)]), transmit([Cast(state)], [0.0], seed=0)[0], TaskVector(Cast(state))):
        assert {key: float(tensor[0, 0]) for key, tensor in result.items()} == {f"l{k}": k for k in range(1, 6)}


def test_views_that_start_at_the_same_place_are_not_tied():
    memory = torch.arange(12.0)
    state = {"a": memory[:4], "b": memory[:8], "c": memory[::2][:4], "d": memory.view(3, 4)[:, 0]}
    doubled = 2 * TaskVector(state)
    for key, tensor in state.items():
        assert torch.equal(doubled[key], 2 * tensor)


def test_half_precision_models_are_added_up_in_float32():
    """1 + 2^-9 is no bf16, but twice that step is: the sum must not round the vector first."""
    base = {"w": torch.tensor([1.0], dtype=torch.bfloat16)}
    state = TaskVector({"w": torch.tensor([2.0**-8 + 2.0**-9])}).apply_to(base, scale=0.9)
    assert torch.equal(state["w"], torch.tensor([1.0 + 0.9 * (2.0**-8 + 2.0**-9)]).bfloat16())


def test_numpy_numbers_and_exact_division():
    tau = TaskVector({"w": torch.tensor([1.0, 49.0])})
    assert torch.equal((np.float64(0.5) * tau)["w"], torch.tensor([0.5, 24.5]))
    assert torch.equal((tau / 49)["w"], torch.tensor([1.0, 49.0]) / 49)


def test_ties_of_a_state_dict_survive_pickling_and_copies(pair):
    tau = TaskVector({"a": pair[0].state_dict()["embed.weight"], "b": pair[0].state_dict()["head.weight"]})
    for other in (copy.deepcopy(tau), pickle.loads(pickle.dumps(tau))):  # noqa: S301
        assert other["a"].data_ptr() == other["b"].data_ptr()
