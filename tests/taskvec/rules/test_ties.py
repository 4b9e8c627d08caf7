"""TIES against other people's code, transcribed or installed."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmtllmf.taskvec._engine as engine
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import ties

SHAPES = {"b": (6, 40), "a": (300,), "c": (), "e": (0, 2), "one": (1,)}


def make(seed, count=5, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return [{key: torch.randn(shape, generator=draw).to(dtype) for key, shape in SHAPES.items()} for _ in range(count)]


def whole(seed, count=4, peak=3):
    """Whole numbers: sums are exact, and many are exactly zero."""
    draw = torch.Generator().manual_seed(seed)
    return [
        {key: torch.randint(-peak, peak + 1, shape, generator=draw).float() for key, shape in SHAPES.items()}
        for _ in range(count)
    ]


def flat(vector):
    return torch.cat([vector[key].reshape(-1) for key in sorted(vector)])


def trimmed(rows, density):
    """All but the k largest of each row set to zero; of equal ones the first are kept."""
    rows = rows.clone()
    kept = max(1, int(density * rows.shape[1] + 1e-9))
    for row in rows:
        row[row.abs().argsort(descending=True, stable=True)[kept:]] = 0
    return rows


def authors(rows, density, how, minority_rule=True):
    """The authors' ``merge_methods`` (and FusionBench's) but for the trimming, which keeps one entry more there."""
    rows = trimmed(rows, density)
    signs = rows.sum(0).sign()
    if minority_rule:
        majority = signs.sum().sign()
        signs[signs == 0] = majority
    keep = torch.where(signs > 0, rows > 0, rows < 0) & (signs != 0)
    chosen = rows * keep
    return chosen.sum(0) if how == "sum" else chosen.sum(0) / (chosen != 0).sum(0).clamp(min=1)


def mergekit(rows, weights, density, how, normalize):
    """``GeneralizedTaskArithmeticMerge.merge_group`` of mergekit with ``consensus_method`` `how`."""
    weights = torch.tensor(weights, dtype=rows.dtype)[:, None]
    deltas = trimmed(rows, density) * weights
    votes = deltas if how == "mass" else deltas.sign()
    mask = deltas.sign() == (votes.sum(0) >= 0).to(rows.dtype) * 2 - 1
    mixed, divisor = (deltas * mask).sum(0), (weights * mask).sum(0)
    divisor[divisor == 0] = 1
    return mixed / divisor if normalize else mixed


def of_peft(vectors, weights, density, how):
    peft = pytest.importorskip("peft.utils.merge_utils")
    weights = torch.tensor(weights)
    # top-k of nothing, and a share that rounds to nothing, are not what PEFT's function is for
    keys = [key for key in vectors[0] if vectors[0][key].numel() > 1]
    return {key: peft.ties([v[key] for v in vectors], weights, density, majority_sign_method=how) for key in keys}


PEFT = {"trim": "tensor", "voters": "trimmed", "undecided": "positive"}
WEIGHTS = [[1.0] * 5, [0.5, 2.0, 1.0, 0.25, 3.0], [1.0, -0.5, 0.0, 2.0, 1.0]]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("elect", "frequency"), [("mass", "total"), ("count", "frequency")])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.77])
def test_peft(weights, elect, frequency, density):
    for seed in range(5):
        vectors = make(seed)
        expected = of_peft(vectors, weights, density, frequency)
        fused = ties(vectors, density, elect=elect, weights=weights, **PEFT)
        for key, tensor in expected.items():
            torch.testing.assert_close(fused[key], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("undecided", ["majority", "zero"])
@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.01, 0.2, 0.5, 0.9]))
def test_the_authors_code(how, undecided, seed, density):
    for vectors in (make(seed), whole(seed), [{k: t - 0.5 for k, t in v.items()} for v in whole(seed, 4, 1)]):
        fused = ties(vectors, density, combine=how, undecided=undecided)
        rows = torch.stack([flat(vector) for vector in vectors])
        expected = authors(rows, density, how, undecided == "majority")
        torch.testing.assert_close(flat(fused), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weights", [[1.0] * 4, [0.5, 2.0, 1.0, 0.25], [1.0, -1.0, 0.0, 1.0]])
@pytest.mark.parametrize("elect", ["mass", "count"])
@given(seed=st.integers(0, 10**6), normalize=st.booleans())
def test_mergekit(weights, elect, seed, normalize):
    vectors = whole(seed)
    combine = "weighted mean" if normalize else "sum"
    fused = ties(
        vectors, 0.5, trim="tensor", elect=elect, undecided="positive", combine=combine, weights=weights, scale=0.5
    )
    for key in ("a", "b", "c", "one"):
        rows = torch.stack([vector[key].reshape(-1) for vector in vectors])
        expected = 0.5 * mergekit(rows, weights, 0.5, elect, normalize)
        torch.testing.assert_close(fused[key].reshape(-1), expected, rtol=1e-6, atol=1e-7)


def test_the_majority_is_that_of_all_tensors_and_not_of_one():
    a = {"x": torch.tensor([1.0, -2.0]), "y": torch.tensor([1.0, 1.0, 1.0])}
    b = {"x": torch.tensor([-1.0, -2.0]), "y": torch.tensor([1.0, 1.0, 1.0])}
    fused = ties([a, b], 1.0, undecided="majority", trim="tensor")
    assert fused["x"].tolist() == [1.0, -2.0]
    assert ties([a, b], 1.0)["x"].tolist() == [0.0, -2.0]
    opposite = [{key: -tensor for key, tensor in vector.items()} for vector in (a, b)]
    assert ties(opposite, 1.0, undecided="majority")["x"].tolist() == [-1.0, 2.0]
    assert ties(opposite, 1.0, undecided="positive")["x"].tolist() == [1.0, 2.0]
    even = [{"x": torch.tensor([1.0, 2.0, -2.0])}, {"x": torch.tensor([-1.0, 2.0, -2.0])}]
    assert ties(even, 1.0, undecided="majority")["x"].tolist() == [0.0, 2.0, -2.0]


def test_weights_elect_or_do_not():
    vectors = [{"w": torch.tensor([3.0])}, {"w": torch.tensor([-2.0])}]
    weights = [1.0, 4.0]
    assert ties(vectors, 1.0, weights=weights)["w"].item() == -8
    assert ties(vectors, 1.0, weights=weights, voters="trimmed")["w"].item() == 3
    assert ties(vectors, 1.0, weights=weights, combine="weighted mean")["w"].item() == -2
    assert ties(vectors, 1.0, elect="count", undecided="positive")["w"].item() == 3
    assert ties(vectors, 1.0, elect="count")["w"].item() == 0


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.05, 0.3, 0.8]))
def test_weights_apply_after_trimming(seed, density):
    """One weight a vector: TIES of the weighted vectors; weights per layer do not change what is kept."""
    vectors, weights = make(seed), [0.5, 2.0, 1.0, 0.25, 4.0]
    by_hand = [{key: w * tensor for key, tensor in v.items()} for v, w in zip(vectors, weights, strict=True)]
    fused, expected = ties(vectors, density, weights=weights), ties(by_hand, density)
    for key in SHAPES:
        assert torch.equal(fused[key], expected[key])
    single = ties(vectors[:1], density, weights={"a": 1000.0})
    plain = ties(vectors[:1], density)
    assert torch.equal(single["a"], 1000 * plain["a"])
    assert torch.equal(single["b"], plain["b"])


@pytest.mark.parametrize("trim", ["global", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_how_much_is_kept(trim, dtype):
    vector = make(0, 1, dtype)[0]
    for density in (1e-9, 0.2, 0.29, 0.999, 1.0):
        fused = ties([vector], density, trim=trim)
        assert all(tensor.dtype == dtype for tensor in fused.values())
        groups = [sorted(SHAPES)] if trim == "global" else [[key] for key in SHAPES]
        for group in groups:
            values = torch.cat([vector[key].reshape(-1) for key in group])
            left = torch.cat([fused[key].reshape(-1) for key in group])
            if len(values):
                kept = max(1, int(density * len(values) + 1e-9))
                assert int((left != 0).sum()) == kept
                assert torch.equal(left[left != 0], values[left != 0])
                assert values[left == 0].abs().max() <= left[left != 0].abs().min() if kept < len(values) else True


def test_of_equal_magnitudes_the_first_are_kept_in_the_order_of_names(monkeypatch):
    monkeypatch.setattr(engine, "PIECE", 4)
    vector = {"b": torch.ones(10), "a": torch.tensor([2.0, -1.0, 1.0, 0.0])}
    fused = ties([vector], 7 / 14)
    assert fused["a"].tolist() == [2.0, -1.0, 1.0, 0.0]
    assert fused["b"].tolist() == [1.0] * 4 + [0.0] * 6
    fused = ties([dict(reversed(vector.items()))], 8 / 14)
    assert fused["b"].tolist() == [1.0] * 5 + [0.0] * 5


def test_tied_names_count_once():
    shared = torch.tensor([5.0, 4.0, 3.0, 2.0])
    vector = {"a": shared, "z": shared, "m": torch.ones(4)}
    fused = ties([vector], 3 / 8)
    assert fused["a"].tolist() == fused["z"].tolist() == [5.0, 4.0, 3.0, 0.0]
    assert not fused["m"].any()


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0001, 20, 100, float("nan")])
def test_a_density_is_a_share(density):
    with pytest.raises(InputError, match="density"):
        ties(make(0), density)


@pytest.mark.parametrize("option", ["trim", "combine", "elect", "voters", "undecided"])
def test_unknown_options(option):
    with pytest.raises(InputError, match=f"{option}: expected one of '.*', got 'nonsense'"):
        ties(make(0), **{option: "nonsense"})
    assert option in inspect.signature(ties).parameters


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("elect", ["mass", "count"])
@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
def test_non_finite_entries_are_never_trimmed_away(bad, elect, density):
    vectors = make(0)
    vectors[3]["b"][2, 7] = bad
    with pytest.raises(NonFiniteError, match=r"vectors\[3\]\['b'\] holds 1 non-finite"):
        ties(vectors, density, elect=elect)


def test_gradients_do_not_flow():
    vectors = [{key: tensor.requires_grad_() for key, tensor in vector.items()} for vector in make(0)]
    with pytest.raises(InputError, match="gradients"):
        ties(vectors)


@pytest.mark.gpu
@pytest.mark.parametrize("trim", ["global", "tensor"])
def test_on_the_device(trim):
    vectors = [{key: torch.randn(shape) for key, shape in (SHAPES | {"w": (700, 1000)}).items()} for _ in range(4)]
    there = [{key: tensor.cuda() for key, tensor in vector.items()} for vector in vectors]
    for options in ({}, {"combine": "sum", "undecided": "majority"}, {"elect": "count", "combine": "weighted mean"}):
        fused, expected = ties(there, trim=trim, **options), ties(vectors, trim=trim, **options)
        for key in expected:
            torch.testing.assert_close(fused[key].cpu(), expected[key], rtol=1e-6, atol=1e-7)
