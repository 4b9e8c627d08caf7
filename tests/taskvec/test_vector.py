"""Task vectors: what they hold, their algebra, and the round trips that checkpoints make."""

import copy
import pickle

import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import TaskVector


class Net(nn.Module):
    """Everything a checkpoint may hold: norm statistics, integers, booleans, a tied head."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(7, 4)
            self.norm = nn.BatchNorm1d(4)
            self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.register_buffer("used", torch.tensor([True, False]))


@pytest.fixture
def pair():
    base = Net()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.embed.weight += 0.5
        tuned.norm.bias -= 0.25
    tuned.norm.running_mean += 9
    tuned.norm.num_batches_tracked += 3
    tuned.used[1] = True
    return base, tuned


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


def test_from_safetensors_files(pair, tmp_path):
    base, tuned = pair
    for name, model in (("base", base), ("tuned", tuned)):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    from_files = TaskVector.between(tmp_path / "base.safetensors", str(tmp_path / "tuned.safetensors"))
    direct = TaskVector.between(base, tuned)
    assert all(torch.equal(from_files[key], direct[key]) for key in direct)


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


def test_save_and_load(pair, tmp_path):
    """Tied, non-contiguous, expanded, empty and 0-d tensors, views of one buffer, and half precision."""
    buffer = torch.arange(24.0)
    tau = TaskVector(
        {
            **TaskVector.between(*pair),
            "transposed": torch.arange(12.0).view(3, 4).T,
            "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
            "head view": buffer[:8],
            "overlapping view": buffer[4:12],
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(3.5),
            "half": torch.tensor([1.5], dtype=torch.bfloat16),
            "stepped": torch.arange(10.0)[::3],
        }
    )
    path = tmp_path / "tau.safetensors"
    tau.save(path)
    back = TaskVector.load(path)
    assert set(back) == set(tau)
    for key in tau:
        assert torch.equal(back[key], tau[key]), key
        assert back[key].dtype == tau[key].dtype
        assert back[key].shape == tau[key].shape
    assert back["embed.weight"].data_ptr() == back["head.weight"].data_ptr()
    assert "head.weight" not in load_file(path)  # stored once
    assert [p.name for p in tmp_path.iterdir()] == ["tau.safetensors"]


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "tau.safetensors"
    old = TaskVector({"w": torch.ones(3)})
    old.save(path)
    import safetensors.torch

    def full_disk(tensors, target, metadata):
        with open(target, "wb") as file:
            file.write(b"half a header")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        TaskVector({"w": torch.zeros(3)}).save(path)
    assert torch.equal(TaskVector.load(path)["w"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["tau.safetensors"]


def test_load_refuses_what_is_no_task_vector(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(InputError, match="no task vector"):
        TaskVector.load(path)
    with pytest.raises(FileNotFoundError):
        TaskVector.load(tmp_path / "absent.safetensors")
    save_file({"w": torch.tensor([float("nan")])}, path, {"rmtllmf": "task_vector", "tied": "{}"})
    with pytest.raises(NonFiniteError, match="'w'"):
        TaskVector.load(path)
    save_file({"w": torch.ones(2)}, path, {"rmtllmf": "task_vector", "tied": '{"v": "nobody"}'})
    with pytest.raises(InputError, match="damaged"):
        TaskVector.load(path)


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
    (scale * tau if False else tau * scale)["w"].sum().backward()
    assert float(scale.grad) == 3.0
