"""Low-rank factors: the theorem of Eckart and Young, and adapters that PEFT loads and merges."""

import copy
import json
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import LowRank, TaskVector, adapter_vector, aligned, low_rank, task_arithmetic

pytestmark = [
    # what PEFT says about its own configurations
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def product(factors, key):
    return factors.B[key].double() @ factors.A[key].double()


@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 14),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_eckart_and_young(seed, rows, columns, rank, dtype):
    matrix = normal(seed, rows, columns, dtype=dtype)
    factors = low_rank({"w": matrix}, rank)
    r = min(rank, rows, columns)
    assert factors.A["w"].shape == (r, columns)
    assert factors.B["w"].shape == (rows, r)
    assert factors.A["w"].dtype == factors.B["w"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = matrix.double()
    values = torch.linalg.svdvals(exact)
    close = 1e-12 if dtype == torch.float64 else 2e-6
    tail = float(values[r:].square().sum().sqrt() / values.square().sum().sqrt())
    assert factors.error["w"] == pytest.approx(tail, abs=close)
    assert factors.total_error == factors.error["w"]
    lost = float((exact - product(factors, "w")).norm() / exact.norm())
    assert lost == pytest.approx(factors.error["w"], abs=1e-12)
    # the singular values are split evenly
    size_A, size_B = factors.A["w"].double().norm(dim=1), factors.B["w"].double().norm(dim=0)
    torch.testing.assert_close(size_A, size_B, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(size_A * size_B, values[:r], rtol=1e-4, atol=close * float(values[0]))
    # and nothing of that rank is nearer: not at random, and not close by
    for trial in range(5):
        other = normal(seed + trial, rows, r).double() @ normal(seed - trial, r, columns).double()
        assert (exact - other).norm() >= (exact - product(factors, "w")).norm() - close * exact.norm()
        near = factors.B["w"].double() + 0.01 * normal(seed + trial, rows, r).double()
        assert (exact - near @ factors.A["w"].double()).norm() / exact.norm() >= tail - close


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_exact_from_the_true_rank_on(shape, dtype, size):
    matrix = (normal(1, shape[0], 3).double() @ normal(2, 3, shape[1]).double() * size).to(dtype)
    for rank in (3, 5, 100):
        factors = low_rank({"w": matrix}, rank)
        assert factors.error["w"] < (1e-13 if dtype == torch.float64 else 3e-7)
        torch.testing.assert_close(factors.dense()["w"] / size, matrix / size, rtol=1e-4, atol=1e-5)
    assert low_rank({"w": matrix}, 2).error["w"] > 0.01


def test_squares_of_entries_may_overflow():
    big = torch.diag(torch.tensor([4.0, 3.0], dtype=torch.float64)) * 1e200
    factors = low_rank({"w": big}, 1)
    assert (factors.error["w"], factors.total_error) == (pytest.approx(0.6), pytest.approx(0.6))
    torch.testing.assert_close(factors.dense()["w"] / 1e200, torch.diag(torch.tensor([4.0, 0.0], dtype=torch.float64)))


def test_small_singular_values_beside_large_ones():
    values = 10.0 ** -torch.arange(8, dtype=torch.float64)
    left, right = torch.linalg.qr(normal(1, 30, 8).double())[0], torch.linalg.qr(normal(2, 40, 8).double())[0]
    matrix = ((left * values) @ right.T).float()
    for turned in (matrix, matrix.T):
        for rank in range(1, 6):
            exact = torch.linalg.svdvals(turned.double())
            tail = float(exact[rank:].norm() / exact.norm())
            assert low_rank({"w": turned}, rank).error["w"] == pytest.approx(tail, rel=0.02)


def test_values_far_apart_and_matrices_of_zeros():
    spread = torch.diag(torch.tensor([1.0, 1e-3, 1e-6, 0.0]))
    factors = low_rank({"w": spread, "zero": torch.zeros(3, 2)}, 2)
    assert factors.error["w"] == pytest.approx(1e-6, rel=1e-3)
    assert factors.error["zero"] == 0
    assert not factors.dense()["zero"].any()
    assert low_rank({"zero": torch.zeros(3, 2)}, 1).total_error == 0


UPDATE = {
    "fc.weight": normal(1, 6, 5),
    "fc.bias": normal(2, 6),
    "conv.weight": normal(3, 4, 3, 2, 2),
    "stack": normal(4, 2, 3, 4),
    "scalar": torch.tensor(2.0),
    "none": torch.zeros(0, 3),
}


def test_what_is_factored_and_what_is_rest():
    factors = low_rank(UPDATE, 2)
    assert isinstance(factors, LowRank)
    assert list(factors.A) == list(factors.B) == list(factors.error) == ["fc.weight", "conv.weight"]
    assert list(factors.rest) == ["fc.bias", "stack", "scalar", "none"]
    assert factors.A["conv.weight"].shape == (2, 12)
    dense = factors.dense()
    assert isinstance(dense, TaskVector)
    assert list(dense) == list(UPDATE)
    assert {key: tuple(value.shape) for key, value in UPDATE.items()} == factors.shapes
    assert all(torch.equal(dense[key], UPDATE[key]) for key in factors.rest)
    lost = math.sqrt(sum(float((dense[key] - UPDATE[key]).double().square().sum()) for key in UPDATE))
    size = math.sqrt(sum(float(value.double().square().sum()) for value in UPDATE.values()))
    assert factors.total_error == pytest.approx(lost / size, rel=1e-5)
    assert repr(factors) == f"LowRank(2 matrices of rank 2, 4 other tensors, error {factors.total_error:.3g})"
    for name in ("A", "rest", "total_error"):
        with pytest.raises(AttributeError):
            setattr(factors, name, None)
    with pytest.raises(TypeError):
        factors.A["fc.weight"] = None


def test_names():
    assert list(low_rank(UPDATE, 2, names="fc.*").A) == ["fc.weight"], "a glob that also names a vector"
    chosen = low_rank(UPDATE, 2, names=["stack"])
    assert chosen.A["stack"].shape == (2, 12)
    assert set(chosen.rest) == set(UPDATE) - {"stack"}
    assert list(low_rank(UPDATE, 1, names=[]).rest) == list(UPDATE)


def test_tied_tensors_are_factored_once():
    shared = normal(1, 4, 3)
    update = TaskVector({"a": shared, "b": shared, "c": shared.clone(), "v": shared[0], "w": shared[0]})
    factors = low_rank(update, 1)
    assert factors.A["a"] is factors.A["b"]
    assert factors.A["a"] is not factors.A["c"]
    assert factors.rest["v"] is factors.rest["w"]
    dense = factors.dense()
    assert dense["a"] is dense["b"]
    part = low_rank(update, 1, names=["a"])
    assert list(part.A) == ["a"]
    assert torch.equal(part.rest["b"], shared)


def test_the_same_bits_for_any_number_of_threads():
    update = {str(index): normal(index, 20 + index, 30) for index in range(7)}
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(low_rank(update, 4))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert other.error == results[0].error
        assert other.total_error == results[0].total_error
        for key in update:
            assert torch.equal(other.A[key], results[0].A[key])
            assert torch.equal(other.B[key], results[0].B[key])


def test_bad_input():
    good = {"w": torch.ones(2, 2)}
    with pytest.raises(InputError, match="rank: expected a whole number of at least 1, got 0"):
        low_rank(good, 0)
    with pytest.raises(TypeError, match="rank"):
        low_rank(good, 1.5)
    with pytest.raises(TypeError, match="update: expected a mapping"):
        low_rank([good], 1)
    with pytest.raises(InputError, match="empty mapping"):
        low_rank({}, 1)
    with pytest.raises(TypeError, match=r"update\['steps'\] is torch.int64"):
        low_rank({"steps": torch.tensor(1)}, 1)
    with pytest.raises(InputError, match="names: 'x' matches none"):
        low_rank(good, 1, names="x")
    for bad in ({"w": torch.full((2, 2), torch.nan)}, {"w": torch.full((2,), torch.inf)}):
        with pytest.raises(NonFiniteError, match=r"update\['w'\]"):
            low_rank(bad, 1)


def test_gradients_are_not_dropped_in_silence():
    update = {"w": torch.ones(2, 2, requires_grad=True)}
    with pytest.raises(InputError, match="update: gradients do not flow"):
        low_rank(update, 1)
    with torch.no_grad():
        assert not low_rank(update, 1).A["w"].requires_grad
    assert not low_rank({"w": update["w"].detach()}, 1).A["w"].requires_grad


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 5)
        self.inner = nn.ModuleDict({"fc": nn.Linear(5, 3), "fc_x": nn.Linear(3, 2)})
        self.conv = nn.Conv2d(3, 4, 3)
        self.point = nn.Conv2d(4, 5, 1)

    def forward(self, tokens):
        return self.inner["fc_x"](self.inner["fc"](self.fc(self.embed(tokens))))


def base_model():
    torch.manual_seed(0)
    return Tiny()


def update_of(base, seed=0):
    keys = [key for key in base.state_dict() if key.endswith("weight")]
    return TaskVector({key: normal(seed + i, *base.state_dict()[key].shape) for i, key in enumerate(keys)})


def loaded(base, folder):
    peft = pytest.importorskip("peft", reason="the adapter is for PEFT")
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)


def check_merged(base, folder, update):
    """PEFT loads the folder, complains about nothing, and its merged model is base + update."""
    merged = loaded(base, folder).merge_and_unload().state_dict()
    for key, before in base.state_dict().items():
        expected = before + update[key] if key in update else before
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=2e-6)


@pytest.mark.filterwarnings("error::UserWarning")  # keys that are missing or were not expected
@pytest.mark.parametrize("rank", [1, 4, 100])
@pytest.mark.parametrize("told", ["by the model", "by name"])
def test_peft_loads_and_merges_what_is_saved(tmp_path, rank, told):
    """Ranks differ: a matrix gets its full rank where it has no more."""
    base = base_model()
    factors = low_rank(update_of(base), rank)
    given = {"model": base} if told == "by the model" else {"embeddings": "embed.weight"}
    factors.save_adapter(tmp_path / "new" / "fused", "some/base", **given)
    assert sorted(os.listdir(tmp_path / "new")) == ["fused"], "nothing temporary is left"
    assert sorted(os.listdir(tmp_path / "new" / "fused")) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "new" / "fused" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    check_merged(base, tmp_path / "new" / "fused", factors.dense())
    read = adapter_vector(tmp_path / "new" / "fused")
    assert set(read) == set(factors.A)
    for key in read:
        torch.testing.assert_close(read[key], factors.dense()[key], rtol=1e-5, atol=2e-6)


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=17, n_positions=6)
    )


@pytest.mark.parametrize("given", [{"fan_in_fan_out": True}, {"model": True}])
def test_layers_that_store_in_out(tmp_path, given):
    base = gpt2()
    keys = [f"transformer.h.0.attn.{name}.weight" for name in ("c_attn", "c_proj")]
    update = TaskVector({key: normal(i, *base.state_dict()[key].shape) for i, key in enumerate(keys)})
    factors = low_rank(update, 3)
    with pytest.raises(InputError, match=r"fan_in_fan_out: 'transformer.h.0.attn.c_attn.weight'.*model="):
        factors.save_adapter(tmp_path / "fused")
    assert os.listdir(tmp_path) == []
    factors.save_adapter(tmp_path / "fused", **({"model": base} if "model" in given else given))
    check_merged(base, tmp_path / "fused", factors.dense())


def test_fused_adapters_become_an_adapter_in_one_line(tmp_path):
    base = base_model()
    paths = []
    for seed, keys in enumerate((["fc.weight"], ["fc.weight", "inner.fc.weight"], ["conv.weight"])):
        paths.append(tmp_path / str(seed))
        low_rank(update_of(base, seed).select(keys), 1).save_adapter(paths[-1])
    low_rank(task_arithmetic(aligned([adapter_vector(p) for p in paths])), rank=16).save_adapter(tmp_path / "fused")
    fused = task_arithmetic(aligned([adapter_vector(p) for p in paths]))
    assert fused.norm() > 0
    check_merged(base, tmp_path / "fused", fused)


def test_nothing_is_lost_in_silence(tmp_path):
    fc, bias, table = normal(1, 5, 6), normal(2, 5), normal(3, 4, 4)
    cases = {
        "a bias": ({"fc.weight": fc, "fc.bias": bias}, "'fc.bias'"),
        "a matrix that is no layer's": ({"fc.weight": fc, "attn.in_proj_weight": table}, "'attn.in_proj_weight'"),
        "ties": ({"fc.weight": fc, "a.weight": table, "b.weight": table}, "'a.weight', 'b.weight'"),
    }
    for name, (update, lost) in cases.items():
        factors = low_rank(update, 2)
        with pytest.raises(InputError, match=f"rest: an adapter cannot hold {lost}.*'drop'.*dense"):
            factors.save_adapter(tmp_path / name)
        assert not (tmp_path / name).exists()
        factors.save_adapter(tmp_path / name, rest="drop")
        assert set(adapter_vector(tmp_path / name)) == {"fc.weight"}
        zeros = {key: value if key == "fc.weight" else torch.zeros_like(value) for key, value in update.items()}
        low_rank(zeros, 2).save_adapter(tmp_path / f"{name} of zeros")
    with pytest.raises(InputError, match="nothing to write"):
        low_rank({"fc.bias": bias}, 2).save_adapter(tmp_path / "x", rest="drop")
    with pytest.raises(InputError, match="rest: expected 'error' or 'drop', got 'keep'"):
        factors.save_adapter(tmp_path / "x", rest="keep")
    with pytest.raises(InputError, match=r"embeddings: 'embed_tokens.weight' may be.*model="):
        low_rank({"embed_tokens.weight": fc}, 2).save_adapter(tmp_path / "x")
    with pytest.raises(InputError, match="embeddings: 'z' matches none"):
        factors.save_adapter(tmp_path / "x", embeddings="z")
    low_rank({"embed_tokens.weight": fc}, 2).save_adapter(tmp_path / "linear", embeddings=())
    grouped = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=2)})
    kernels = low_rank({"conv.weight": normal(1, 4, 2, 3, 3)}, 2)
    with pytest.raises(InputError, match=r"cannot hold 'conv.weight'"):
        kernels.save_adapter(tmp_path / "x", model=grouped)
    assert not (tmp_path / "x").exists()


def test_a_model_that_does_not_fit(tmp_path):
    with pytest.raises(StateMismatchError, match=r"model lacks 'other.weight'"):
        low_rank({"other.weight": torch.ones(2, 2)}, 1).save_adapter(tmp_path / "x", model=base_model())
    with pytest.raises(StateMismatchError, match=r"model\['fc.weight'\] has shape \(5, 6\); the update has \(2, 2\)"):
        low_rank({"fc.weight": torch.ones(2, 2)}, 1).save_adapter(tmp_path / "x", model=base_model())


def test_what_is_there_is_kept_unless_told(tmp_path, monkeypatch):
    first, second = (low_rank({"fc.weight": normal(seed, 5, 6)}, 2) for seed in (1, 2))
    folder = tmp_path / "fused"
    first.save_adapter(folder)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        second.save_adapter(folder)

    def broken(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("rmtllmf.taskvec._adapter_save.write", broken)
        for target in (folder, tmp_path / "other"):
            with pytest.raises(OSError, match="no space left"):
                second.save_adapter(target, overwrite=True)
    with monkeypatch.context() as patch:
        rename = os.rename
        patch.setattr("rmtllmf.taskvec._adapter_save._exchanged", lambda one, other: False)
        patch.setattr(os, "rename", lambda a, b: broken() if str(a).endswith(".part") else rename(a, b))
        with pytest.raises(OSError, match="no space left"):
            second.save_adapter(folder, overwrite=True)
    assert os.listdir(tmp_path) == ["fused"]
    torch.testing.assert_close(adapter_vector(folder)["fc.weight"], first.dense()["fc.weight"])
    second.save_adapter(folder, overwrite=True)
    assert os.listdir(tmp_path) == ["fused"]
    torch.testing.assert_close(adapter_vector(folder)["fc.weight"], second.dense()["fc.weight"])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds more than an adapter: 'notes.txt'"):
        first.save_adapter(folder, overwrite=True)
    with pytest.raises(FileExistsError):
        first.save_adapter(folder / "notes.txt", overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
