"""Fast Fisher grafting: its definition with curvature of each task's own, what it keeps, and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmtllmf.taskvec._engine as engine
from helpers.mask_definitions import grafted
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.taskvec import fisher_grafting, task_arithmetic, ties

SHAPES = {"m": (6, 5), "v": (70,), "s": (), "none": (0, 3)}


def make(seed, count, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return [{k: torch.randn(s, generator=source).to(dtype) for k, s in SHAPES.items()} for _ in range(count)]


def curvatures(seed, count):
    return [{k: t.pow(4) for k, t in vector.items()} for vector in make(seed + 10**7, count)]


@pytest.mark.parametrize("within", ["model", "tensor"])
@pytest.mark.parametrize("combine", ["curvature", "mean", "sum"])
@pytest.mark.parametrize("piece", [8, 1 << 17])
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4), density=st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_the_definition(within, combine, piece, seed, count, density):
    vectors, curvature = make(seed, count), curvatures(seed, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "PIECE", piece)
        update = fisher_grafting(vectors, curvature, density, within=within, combine=combine, scale=0.5)
    expected = grafted(vectors, curvature, density, by_tensor=within == "tensor", combine=combine)
    for key in SHAPES:
        torch.testing.assert_close(update[key].double(), 0.5 * expected[key], rtol=1e-5, atol=1e-6)


def test_a_graft_keeps_what_lowers_a_quadratic_loss_most():
    """Of all masks with as many entries, none leaves less of the loss: it is a sum over entries."""
    vector, curvature = make(0, 1), curvatures(0, 1)
    density, entries = 0.2, 101

    def loss(update):
        return float(sum((curvature[0][k] * (update[k] - vector[0][k]).square()).sum() / 2 for k in SHAPES))

    graft = fisher_grafting(vector, curvature, density)
    kept = sum(int(tensor.ne(0).sum()) for tensor in graft.values())
    assert kept == int(density * entries)
    magnitude = ties(vector, density)
    assert sum(int(tensor.ne(0).sum()) for tensor in magnitude.values()) == kept
    assert loss(graft) < loss(magnitude)
    saliency = torch.cat([(curvature[0][k] * vector[0][k].square()).reshape(-1) for k in SHAPES])
    assert loss(graft) == pytest.approx(float(saliency.sort().values[:-kept].sum()) / 2, rel=1e-5)


def test_with_equal_curvature_the_largest_magnitudes_are_kept():
    vectors = make(1, 3)
    ones = [{key: torch.full(shape, 7.0) for key, shape in SHAPES.items()}] * 3
    for within, trim in (("model", "global"), ("tensor", "tensor")):
        one = fisher_grafting(vectors[:1], ones[:1], 0.3, within=within)
        expected = ties(vectors[:1], 0.3, trim=trim)
        for key in SHAPES:
            torch.testing.assert_close(one[key], expected[key])
    whole = fisher_grafting(vectors, ones, 1.0, combine="sum")
    for key, tensor in task_arithmetic(vectors, 1.0).items():
        torch.testing.assert_close(whole[key], tensor)


def test_curvature_as_small_as_adams():
    vectors, curvature = make(2, 3), curvatures(2, 3)
    tiny = [{key: 1e-19 * tensor for key, tensor in each.items()} for each in curvature]
    update, expected = fisher_grafting(vectors, tiny, 0.3), fisher_grafting(vectors, curvature, 0.3)
    for key in SHAPES:
        torch.testing.assert_close(update[key], expected[key])


def test_no_curvature_no_change():
    vectors = make(3, 2)
    zero = [{key: torch.zeros(shape) for key, shape in SHAPES.items()}] * 2
    for combine in ("curvature", "mean", "sum"):
        assert not any(t.any() for t in fisher_grafting(vectors, zero, 0.5, combine=combine).values())
    assert not any(t.any() for t in fisher_grafting(vectors, zero, 1.0).values())


def test_equal_saliencies_the_first_are_kept():
    vectors = [{"a": torch.ones(3), "b": torch.ones(5)}]
    update = fisher_grafting(vectors, vectors, 0.5)
    assert update["a"].tolist() == [1, 1, 1]
    assert update["b"].tolist() == [1, 0, 0, 0, 0]


def test_ties_need_one_curvature_and_half_precision_is_read():
    vectors = make(4, 2, torch.bfloat16)
    for vector in vectors:
        vector["head"] = vector["m"]
    curvature = [{key: tensor.bfloat16() for key, tensor in each.items()} for each in curvatures(4, 2)]
    update = fisher_grafting(vectors, curvature, 0.3)
    assert update["head"].data_ptr() == update["m"].data_ptr()
    assert update["m"].dtype == torch.bfloat16


def test_inputs_are_not_written_to():
    for dtype in (torch.float32, torch.float64):
        vectors, curvature = make(5, 2, dtype), [{k: t.to(dtype) for k, t in h.items()} for h in curvatures(5, 2)]
        kept = [{key: tensor.clone() for key, tensor in state.items()} for state in (*vectors, *curvature)]
        fisher_grafting(vectors, curvature, 0.3)
        for state, copy in zip((*vectors, *curvature), kept, strict=True):
            assert all(torch.equal(state[key], copy[key]) for key in SHAPES)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("combine", ["curvature", "sum"])
def test_the_culprit_is_named(bad, combine):
    vectors, curvature = make(6, 4), curvatures(6, 4)
    curvature[2]["v"][7] = 0  # which would hide it
    vectors[2]["v"][7] = bad
    with pytest.raises(NonFiniteError, match=r"vectors\[2\]\['v'\] holds 1 non-finite"):
        fisher_grafting(vectors, curvature, 0.1, combine=combine)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0.0}, InputError, r"density: expected a share in \(0, 1\]"),
        ({"density": 1.5}, InputError, "density"),
        ({"within": "layer"}, InputError, "within: expected one of 'model', 'tensor', got 'layer'"),
        ({"combine": "ties"}, InputError, "combine: expected one of 'curvature', 'mean', 'sum', got 'ties'"),
        ({"scale": float("nan")}, InputError, "scale"),
        ({"curvature": curvatures(7, 1)}, ShapeError, "curvature: expected 2 mappings"),
        ({"curvature": curvatures(7, 1)[0]}, TypeError, "curvature: expected a sequence of mappings"),
        ({"curvature": [{"m": torch.ones(6, 5)}] * 2}, StateMismatchError, r"curvature\[0\] lacks 'none', 's', 'v'"),
        ({"curvature": make(7, 2)}, InputError, r"curvature\[0\]\['m'\]: expected entries of at least 0"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        fisher_grafting(make(7, 2), **{"curvature": curvatures(7, 2), **options})
