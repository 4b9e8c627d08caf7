"""DELLA: the formula given the draws, their statistics, and other people's code."""

import math

import pytest
import torch

import rmtllmf.taskvec._engine as engine
import rmtllmf.taskvec.rules.della as module
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import della, task_arithmetic, ties
from rmtllmf.taskvec.rules._draws import CHUNK, Draws

SHAPES = {"w": (7, 30), "conv": (4, 3, 2, 2), "b": (50,), "s": (), "one": (5, 1), "none": (0, 3)}
LINEAR = {"rule": task_arithmetic, "scale": 1.0}


def make(seed=0, count=3, shapes=SHAPES):
    draw = torch.Generator().manual_seed(seed)
    return [{key: torch.randn(shape, generator=draw) for key, shape in shapes.items()} for _ in range(count)]


def numbers(seed, vector, name, size):
    """The uniform numbers behind a tensor."""
    parts = Draws(seed, "della", 0.5).over(vector, name, 0, size, torch.empty(0))
    return torch.cat([torch.empty(0), *(part.clone() for _, part in parts)])


def by_hand(tensor, drop, window, draws, by="row"):
    """MAGPRUNE row by row and entry by entry."""
    rows = tensor.reshape(1 if by == "tensor" or tensor.ndim < 2 else len(tensor), -1) if tensor.numel() else tensor
    result, position = torch.zeros(rows.shape, dtype=torch.float64), 0
    for i, row in enumerate(rows):
        ranks = {entry: rank for rank, entry in enumerate(row.abs().argsort(stable=True).tolist())}
        for j, value in enumerate(row.tolist()):
            shift = 0.5 - ranks[j] / (len(row) - 1) if len(row) > 1 else 0.0
            p = drop + window * shift
            if draws[position] < 1 - p:
                result[i, j] = value / (1 - p)
            position += 1
    return result.reshape(tensor.shape)


@pytest.mark.parametrize("by", ["row", "tensor"])
@pytest.mark.parametrize("longest", [1 << 16, 8])
def test_the_formula(by, longest, monkeypatch):
    """In pieces that cut through rows, and with rows too long for that."""
    monkeypatch.setattr(engine, "PIECE", 16)
    monkeypatch.setattr(module, "LONGEST", longest)
    monkeypatch.setattr(module, "BLOCK", 64)
    vectors = make()
    pruned = [
        {key: by_hand(t, 0.4, 0.3, numbers(5, index, key, t.numel()), by) for key, t in vector.items()}
        for index, vector in enumerate(vectors)
    ]
    for options in (LINEAR, {}, {"combine": "sum", "scale": 1.1}):
        fused = della(vectors, 0.4, 0.3, seed=5, by=by, **options)
        expected = task_arithmetic(pruned, 1.0) if options is LINEAR else ties(pruned, 1.0, **options)
        for key in SHAPES:
            torch.testing.assert_close(fused[key].double(), expected[key], rtol=1e-5, atol=1e-6)


def test_equal_magnitudes_and_zeros():
    tensor = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 2.0, 0.0]])
    fused = della([{"w": tensor}], 0.4, 0.6, seed=3, **LINEAR)["w"]
    torch.testing.assert_close(fused.double(), by_hand(tensor, 0.4, 0.6, numbers(3, 0, "w", 8)))


@pytest.mark.parametrize(("drop", "window"), [(0.3, 0.14), (0.5, 0.9), (0.9, 0.1), (0.1, 0.2)])
def test_how_often_small_and_large_entries_are_kept(drop, window):
    """Within five standard deviations of the binomial: of all, and of the smaller and the larger half of each row."""
    rows, n = 1000, 500
    tensor = torch.randn(rows, n, generator=torch.Generator().manual_seed(0))
    kept = della([{"w": tensor}], drop, window, seed=1, **LINEAR)["w"] != 0
    smaller = tensor.abs().argsort(dim=1)[:, : n // 2]
    few = torch.zeros(rows, n, dtype=torch.bool).scatter_(1, smaller, True)
    quarter = window * n / (4 * (n - 1))  # the mean over half of the ranks
    for part, p in ((kept, drop), (kept[few], drop + quarter), (kept[~few], drop - quarter)):
        error = 5 * math.sqrt(p * (1 - p) / part.numel())
        assert abs(float(part.double().mean()) - (1 - p)) <= error


def test_unbiased():
    """What the rescaling is for: the mean over many seeds is the vector, within five standard errors."""
    tau, draws = torch.randn(3, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 400
    mean = sum(della([{"w": tau}], 0.5, 0.6, seed=seed, **LINEAR)["w"] for seed in range(draws)) / draws
    assert ((mean - tau).abs() <= 5 * tau.abs() * math.sqrt(0.8 / 0.2 / draws)).all()


def test_draws_differ_between_vectors_names_chunks_and_seeds():
    chunks = [*numbers(0, 0, "a", 3 * CHUNK).split(CHUNK), numbers(0, 0, "b", CHUNK), numbers(0, 1, "a", CHUNK)]
    chunks += [numbers(1, 0, "a", CHUNK)]
    for i, left in enumerate(chunks):
        for right in chunks[:i]:
            assert abs(float(((left < 0.5) == (right < 0.5)).double().mean()) - 0.5) < 2.5 / math.sqrt(CHUNK)


def test_nothing_dropped_is_the_rule_itself():
    vectors = make()
    assert torch.equal(della(vectors, 0.0, 0.0, seed=0)["w"], ties(vectors, 1.0)["w"])
    assert torch.equal(della(vectors, 0.0, 0.0, seed=0, rule=task_arithmetic)["w"], task_arithmetic(vectors)["w"])


def test_tied_names_are_dropped_alike():
    shared = torch.ones(1000)
    fused = della([{"z": shared, "a": shared}], seed=0)
    assert fused["a"].data_ptr() == fused["z"].data_ptr()
    assert torch.equal(fused["a"], della([{"a": shared}], seed=0)["a"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    tensor = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    fused = della([{"w": tensor}], 0.4, 0.2, seed=7, **LINEAR)["w"]
    assert fused.dtype == dtype
    expected = by_hand(tensor.double(), 0.4, 0.2, numbers(7, 0, "w", 600))
    torch.testing.assert_close(fused.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("rescale", ["probability", "norm"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_named_even_if_it_is_dropped(value, rescale):
    for place in range(8):
        vector = {"w": torch.ones(8)}
        vector["w"][place] = value
        with pytest.raises(NonFiniteError, match=r"vectors\[0\]\['w'\] holds 1 non-finite"):
            della([vector], 0.5, 0.5, seed=0, rescale=rescale)


def test_norms_are_restored():
    vectors = make(4)
    vectors[1]["b"] = torch.zeros(50)
    for index, vector in enumerate(vectors):
        kept = della([vector], 0.4, 0.2, seed=2, rescale="norm", **LINEAR)
        for key, tensor in vector.items():
            if kept[key].any():
                torch.testing.assert_close(kept[key].abs().sum(), tensor.abs().sum())
                assert (kept[key][kept[key] != 0] / tensor[kept[key] != 0]).std(correction=0) < 1e-5, index


@pytest.mark.parametrize("linear", [True, False])
def test_beside_mergekit(linear, monkeypatch):
    """Its own pruning with our draws, and its own election."""
    peer = pytest.importorskip("mergekit.sparsify")
    elect = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic").get_mask
    vectors = make(6, shapes={"w": (40, 60), "b": (90,)})
    expected = {}
    for key in vectors[0]:
        deltas = []
        for index, vector in enumerate(vectors):
            draws = numbers(9, index, key, vector[key].numel()).view(vector[key].shape)
            monkeypatch.setattr(peer.torch, "bernoulli", lambda p, u=draws: (u < p.view(u.shape)).float().view(p.shape))
            deltas.append(peer.della_magprune(vector[key], 0.6, 0.15, peer.RescaleNorm.l1))
        stacked = torch.stack(deltas)
        if linear:
            expected[key] = stacked.sum(0)
        else:
            mask = elect(stacked, "sum")
            expected[key] = (stacked * mask).sum(0) / mask.sum(0).clamp(min=1)
    how = LINEAR if linear else {"undecided": "positive"}
    fused = della(vectors, 0.4, 0.3, seed=9, rescale="norm", **how)
    for key, tensor in expected.items():
        torch.testing.assert_close(fused[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drop": 0.95, "window": 0.1}, r"in \[0, 1\), got 0.95 and 0.1"),
        ({"drop": 0.05, "window": 0.2}, r"in \[0, 1\), got 0.05 and 0.2"),
        ({"window": -0.1}, "got 0.3 and -0.1"),
        ({"drop": float("nan")}, "drop: expected a finite number"),
        ({"by": "column"}, "by: expected one of 'row', 'tensor', got 'column'"),
        ({"rescale": "l1"}, "rescale: expected one of 'probability', 'norm', got 'l1'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(InputError, match=message):
        della([{"w": torch.ones(3)}], seed=0, **arguments)


def test_seed_is_needed_and_gradients_are_refused():
    with pytest.raises(TypeError, match="seed"):
        della([{"w": torch.ones(3)}])
    with pytest.raises(InputError, match="gradients do not flow"):
        della([{"w": torch.ones(3, requires_grad=True)}], seed=0)


@pytest.mark.gpu
def test_on_the_device():
    tensor = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).cuda()
    kept = della([{"w": tensor}], 0.4, 0.6, seed=0, **LINEAR)["w"]
    assert abs(float((kept != 0).double().mean()) - 0.6) < 0.02
    assert torch.equal(kept, della([{"w": tensor}], 0.4, 0.6, seed=0, **LINEAR)["w"])
    order = module._order(tensor)
    assert torch.equal(order.cpu(), module._order(tensor.cpu()))
