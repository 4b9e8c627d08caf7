"""OBIM: its definition, that no entry is shared, that saliency is the layer's error, and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmtllmf.taskvec._engine as engine
from helpers.mask_definitions import taken_in_turn
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.taskvec import optimal_brain_merging, ties

SHAPES = {"m": (6, 5), "square": (4, 4), "v": (70,), "s": (), "none": (0, 3)}


def make(seed, count, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return [{k: torch.randn(s, generator=source).to(dtype) for k, s in SHAPES.items()} for _ in range(count)]


def moments(seed, count):
    """Of inputs for one matrix, of entries for the other; none for the rest."""
    source = torch.Generator().manual_seed(seed + 10**7)
    return [
        {"m": torch.rand(5, generator=source), "square": torch.rand(4, 4, generator=source).square()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("within", ["tensor", "model"])
@pytest.mark.parametrize("piece", [8, 1 << 17])
@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 10**6), densities=st.lists(st.sampled_from([0.01, 0.1, 0.3, 0.7, 1.0]), min_size=1, max_size=4)
)
def test_the_definition(within, piece, seed, densities):
    count = len(densities)
    vectors, curvature = make(seed, count), moments(seed, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "PIECE", piece)
        update = optimal_brain_merging(vectors, curvature, densities, within=within, scale=0.5)
    expected = taken_in_turn(vectors, curvature, densities, by_model=within == "model")
    for key in SHAPES:
        torch.testing.assert_close(update[key].double(), 0.5 * expected[key], rtol=1e-6, atol=0)


def test_every_entry_is_one_tasks_own_and_each_has_its_share():
    vectors, curvature = make(0, 5), moments(0, 5)
    update = optimal_brain_merging(vectors, curvature, 0.2)
    for key, tensor in update.items():
        own = torch.stack([(vector[key] == tensor) & (tensor != 0) for vector in vectors])
        assert (own.sum(0) == (tensor != 0)).all()
        if tensor.numel() >= 5:
            assert (own.flatten(1).sum(1) == int(0.2 * tensor.numel() + 1e-9)).all()


def test_saliency_is_what_the_layer_loses():
    """Without cross terms of the inputs: their covariance is diagonal here."""
    source = torch.Generator().manual_seed(1)
    inputs = torch.randn(4000, 6, generator=source)
    inputs = torch.linalg.qr(inputs).Q * torch.tensor([10.0, 5.0, 2.0, 1.0, 0.5, 0.1])
    vector = {"w": torch.randn(8, 6, generator=source)}
    curvature = [{"w": inputs.square().mean(0)}]

    def lost(update):
        return float(((update["w"] - vector["w"]) @ inputs.mT).square().mean())

    kept = optimal_brain_merging([vector], curvature, 0.3)
    assert lost(kept) < lost(ties([vector], 0.3, trim="tensor"))
    errors = []
    for index in range(vector["w"].numel()):
        without = vector["w"].clone()
        without.view(-1)[index] = 0
        errors.append(lost({"w": without}))
    worst = torch.tensor(errors).argsort(descending=True)[: int(0.3 * 48)]
    assert kept["w"].view(-1)[worst].ne(0).all()


def test_the_first_takes_what_it_would_take_alone():
    vectors, curvature = make(2, 3), moments(2, 3)
    alone = optimal_brain_merging(vectors[:1], curvature[:1], 0.3)
    update = optimal_brain_merging(vectors, curvature, 0.3)
    for key, tensor in alone.items():
        assert torch.equal(update[key][tensor != 0], tensor[tensor != 0])


def test_the_last_are_left_with_the_rest():
    vectors = [{"w": torch.tensor([5.0, 4.0, 3.0, 2.0])}, {"w": torch.tensor([9.0, 8.0, 7.0, 6.0])}]
    assert optimal_brain_merging(vectors, [{}, {}], 0.75)["w"].tolist() == [5, 4, 3, 6]
    assert optimal_brain_merging(vectors, [{}, {}], 1.0)["w"].tolist() == [5, 4, 3, 2]
    assert optimal_brain_merging(vectors, [{}, {}], [0.25, 0.5])["w"].tolist() == [5, 8, 7, 0]


def test_entries_that_do_not_matter_are_never_taken():
    vectors = [{"w": torch.tensor([[1.0, 2.0]])}, {"w": torch.tensor([[0.0, 3.0]])}]
    curvature = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 0.0])}]
    assert optimal_brain_merging(vectors, curvature, 1.0)["w"].tolist() == [[1.0, 0.0]]


def test_tied_names_need_one_curvature():
    vectors, curvature = make(3, 2), moments(3, 2)
    expected = optimal_brain_merging(vectors, curvature)
    for vector in vectors:
        vector["head"] = vector["m"]
    for name in ("m", "head"):
        given = [{"square": h["square"], name: h["m"]} for h in curvature]
        update = optimal_brain_merging(vectors, given)
        assert torch.equal(update["m"], expected["m"])
        assert update["head"].data_ptr() == update["m"].data_ptr()


def test_inputs_are_not_written_to():
    for dtype in (torch.float32, torch.float64):
        vectors, curvature = make(4, 2, dtype), [{k: t.to(dtype) for k, t in h.items()} for h in moments(4, 2)]
        states = [*vectors, *curvature]
        kept = [{key: tensor.clone() for key, tensor in state.items()} for state in states]
        optimal_brain_merging(vectors, curvature, 0.3)
        for state, copy in zip(states, kept, strict=True):
            assert all(torch.equal(state[key], copy[key]) for key in state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_taken_is_not_hidden(bad):
    vectors = make(5, 4)
    vectors[0]["v"][7] = 1e6  # taken before
    vectors[2]["v"][7] = bad
    with pytest.raises(NonFiniteError, match=r"vectors\[2\]\['v'\] holds 1 non-finite"):
        optimal_brain_merging(vectors, moments(5, 4), 0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0.0}, InputError, r"density: expected shares in \(0, 1\]"),
        ({"density": [0.1, 0.2, 0.3]}, ShapeError, "density: expected one number or 2"),
        ({"within": "layer"}, InputError, "within: expected 'tensor' or 'model', got 'layer'"),
        ({"scale": float("inf")}, InputError, "scale"),
        ({"curvature": [{}]}, ShapeError, "curvature: expected 2 mappings"),
        ({"curvature": [{}, {"x": torch.ones(2)}]}, StateMismatchError, r"curvature\[1\] has the unexpected 'x'"),
        ({"curvature": [{}, {"m": torch.ones(6)}]}, StateMismatchError, r"curvature\[1\]\['m'\] has shape \(6,\)"),
        ({"curvature": [{}, {"v": torch.ones(7)}]}, StateMismatchError, r"curvature\[1\]\['v'\] has shape \(7,\)"),
        ({"curvature": [{}, {"m": -torch.ones(5)}]}, InputError, "expected entries of at least 0"),
        ({"curvature": [{}, {"m": torch.ones(5) / 0}]}, NonFiniteError, r"curvature\[1\]\['m'\]"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        optimal_brain_merging(make(6, 2), **{"curvature": moments(6, 2), **options})
