"""DARE: the masks, their statistics, and the formula."""

import math

import pytest
import torch

import rmtllmf.taskvec._engine as engine
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import dare, task_arithmetic, ties
from rmtllmf.taskvec._sources import source_of
from rmtllmf.taskvec.rules._draws import CHUNK
from rmtllmf.taskvec.rules.dare import Dropped, _Masks

ONES = {"a": torch.ones(3, 50), "b": torch.ones(40), "c": torch.ones(()), "e": torch.ones(0)}


def dropped(vector, drop=0.5, seed=0, index=0):
    return Dropped(source_of(vector, "vectors[0]"), index, _Masks(seed, drop))


def test_kept_entries_are_divided_by_the_share_that_is_kept():
    fused = dare([ONES], 0.75, scale=1.0, seed=3)
    assert set(torch.cat([tensor.reshape(-1) for tensor in fused.values()]).tolist()) == {0.0, 4.0}


def test_the_formula_of_peft():
    """PEFT prunes by ``bernoulli``; given the same mask the results have the same bits."""
    utils = pytest.importorskip("peft.utils.merge_utils")
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    mask = dropped({"w": torch.ones(1000)}, 0.7)["w"].ne(0).float()
    patch = pytest.MonkeyPatch()
    try:
        patch.setattr(utils.torch, "bernoulli", lambda input: mask)
        expected = utils.random_pruning(tensor, 1 - 0.7, rescale=True)
    finally:
        patch.undo()
    assert torch.equal(dare([{"w": tensor}], 0.7, scale=1.0, seed=0)["w"], expected)


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9, 0.999])
def test_the_share_that_is_kept(drop):
    """Within five standard deviations of the binomial, over the whole and over halves of chunks."""
    n = 2_000_000
    kept = dropped({"w": torch.ones(n)}, drop)["w"] != 0
    for part in (kept, kept[::2], kept[: CHUNK // 2], kept[-1000:]):
        error = 5 * math.sqrt(drop * (1 - drop) / len(part))
        assert abs(float(part.double().mean()) - (1 - drop)) <= error + 1e-12
    pairs = (kept[:-1] & kept[1:]).double().mean()  # neighbours are independent
    assert abs(float(pairs) - (1 - drop) ** 2) <= 10 * math.sqrt((1 - drop) ** 2 / n)


def test_a_few_in_a_million():
    """24 bits would keep 17 of 2^24 where 1e-6 means 16.8."""
    keep, n = 1e-6, 1 << 26
    source = dropped({"w": torch.ones(1).expand(n)}, 1 - keep)
    masks = source.masks
    kept = sum(int(masks.chunk(0, "w", chunk, torch.empty(0)).sum()) for chunk in range(n // CHUNK))
    assert abs(kept - n * keep) <= 5 * math.sqrt(n * keep)
    assert masks._of_thread.uniform.dtype == torch.float64


def test_unbiased():
    """The mean over many seeds is the vector, within five standard errors, entry by entry and on average."""
    tau = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drop, draws = 0.8, 4000
    mean = sum(dare([{"w": tau}], drop, scale=1.0, seed=seed)["w"] for seed in range(draws)) / draws
    error = tau.abs() * math.sqrt(drop / (1 - drop) / draws)
    assert ((mean - tau).abs() <= 5 * error).all()
    assert ((mean - tau) / error).square().mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / 200))


def test_masks_differ_between_vectors_names_chunks_and_seeds():
    n = 3 * CHUNK
    vector = {"a": torch.ones(n), "b": torch.ones(n)}
    masks = [dropped(vector)["a"], dropped(vector)["b"], dropped(vector, index=1)["a"], dropped(vector, seed=1)["a"]]
    chunks = [part for mask in masks for part in mask.ne(0).split(CHUNK)]
    for i, left in enumerate(chunks):
        for right in chunks[:i]:
            assert abs(float((left == right).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(CHUNK)


def test_the_same_bits_whatever_is_read(monkeypatch):
    n = 3 * CHUNK + 77
    vector = {"w": torch.randn(n, generator=torch.Generator().manual_seed(0)), "v": torch.ones(5)}
    source = dropped(vector, 0.3)
    expected = source["w"].clone()
    for start, stop in ((0, 1), (5, 5), (CHUNK - 1, CHUNK + 1), (CHUNK, 2 * CHUNK), (17, n), (n - 1, n), (0, n)):
        assert torch.equal(source.read("w", start, stop, torch.empty(stop - start)), expected[start:stop])
    whole = dare([vector], 0.3, seed=0, scale=1.0)
    assert torch.equal(whole["w"], expected)
    monkeypatch.setattr(engine, "PIECE", 10_001)
    assert torch.equal(dare([vector], 0.3, seed=0, scale=1.0)["w"], expected)
    other = dict(reversed(vector.items()))
    assert torch.equal(dare([other], 0.3, seed=0, scale=1.0, skip="v")["w"], expected)
    assert torch.equal(dare([vector, vector], 0.3, seed=0, scale=1.0)["v"], sum_of_two(vector, 0.3))


def sum_of_two(vector, drop):
    return dropped(vector, drop)["v"] + dropped(vector, drop, index=1)["v"]


def test_a_generator_is_a_seed_that_moves_on():
    seed = torch.Generator().manual_seed(0)
    first, second = dare([ONES], seed=seed), dare([ONES], seed=seed)
    again = dare([ONES], seed=torch.Generator().manual_seed(0))
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"], second["a"])


def test_nothing_dropped_is_the_rule_itself():
    draw = torch.Generator().manual_seed(0)
    vectors = [{key: torch.randn(tensor.shape, generator=draw) for key, tensor in ONES.items()} for _ in range(3)]
    for rule, options in ((task_arithmetic, {}), (ties, {"density": 0.4, "trim": "tensor"})):
        fused, expected = dare(vectors, 0, seed=0, rule=rule, **options), rule(vectors, **options)
        assert all(torch.equal(fused[key], expected[key]) for key in ONES)


@pytest.mark.parametrize("options", [{"density": 1.0}, {"density": 0.3, "trim": "tensor"}, {"combine": "sum"}])
def test_with_ties(options):
    draw = torch.Generator().manual_seed(0)
    vectors = [{"w": torch.randn(200_000, generator=draw), "v": torch.randn(7, generator=draw)} for _ in range(3)]
    fused = dare(vectors, 0.6, seed=5, rule=ties, **options)
    made = [dict(dropped(vector, 0.6, 5, index)) for index, vector in enumerate(vectors)]
    expected = ties(made, **options)
    assert all(torch.equal(fused[key], expected[key]) for key in fused)
    scaled = dare(vectors, 0.6, seed=5, rule=ties, scale=2.0, **options)
    assert torch.equal(scaled["w"], 2 * fused["w"])


def test_the_scale_is_the_rules_own_unless_given():
    one, two = dare([ONES, ONES], 0.0, seed=0), dare([ONES, ONES], 0.0, seed=0, scale=1.0)
    assert one["b"][0].item() == pytest.approx(0.6)
    assert two["b"][0].item() == 2


def test_tied_names_have_one_mask():
    shared = torch.ones(1000)
    fused = dare([{"z": shared, "a": shared}], seed=0)
    assert fused["a"].data_ptr() == fused["z"].data_ptr()
    assert torch.equal(dropped({"z": shared, "a": shared})["z"], dropped({"a": shared})["a"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    vector = {"w": torch.randn(500, generator=torch.Generator().manual_seed(0)).to(dtype)}
    fused = dare([vector], 0.5, seed=0, scale=1.0)["w"]
    assert fused.dtype == dtype
    assert torch.equal(fused[fused != 0], (2 * vector["w"])[fused != 0])


def test_gradients_flow_to_what_is_kept():
    vectors = [{"w": torch.ones(4, 5, requires_grad=True)} for _ in range(2)]
    fused = dare(vectors, 0.5, seed=0, scale=1.0)["w"]
    fused.sum().backward()
    assert torch.equal(vectors[0]["w"].grad + vectors[1]["w"].grad, fused.detach())
    assert set(vectors[0]["w"].grad.reshape(-1).tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("drop", [-0.1, 1.0, 1, 2, float("nan")])
def test_drop_is_a_probability_below_one(drop):
    with pytest.raises(InputError, match="drop"):
        dare([ONES], drop, seed=0)


def test_what_is_not_finite_is_named_even_if_it_is_dropped():
    for place in range(8):
        vector = {"w": torch.ones(8)}
        vector["w"][place] = float("inf")
        with pytest.raises(NonFiniteError, match=r"vectors\[0\]\['w'\] holds 1 non-finite"):
            dare([vector], seed=0)


def test_out_must_not_be_one_of_the_vectors():
    vector = {"w": torch.ones(8)}
    with pytest.raises(InputError, match="shares memory"):
        dare([vector], seed=0, out=vector)


def test_seed_is_needed():
    with pytest.raises(TypeError, match="seed"):
        dare([ONES])


@pytest.mark.gpu
def test_on_the_device():
    vector = {"w": torch.ones(3 * CHUNK, device="cuda")}
    fused = dare([vector], 0.3, seed=0, scale=1.0)["w"]
    assert fused.device.type == "cuda"
    assert abs(float((fused != 0).double().mean()) - 0.7) < 0.01
    assert torch.equal(fused, dare([vector], 0.3, seed=0, scale=1.0)["w"])
