"""Breadcrumbs: what is removed, from plain numbers, equal numbers and broken ones; and other people's code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmtllmf.taskvec._engine as engine
import rmtllmf.taskvec.rules._selection as selection
from helpers import sparse_definitions as sparse
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import breadcrumbs, fuse, task_arithmetic, ties


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def alone(tensor, smallest, largest, **options):
    return breadcrumbs([{"w": tensor}], smallest, largest, scale=1.0, **options)["w"]


@pytest.mark.parametrize("direct", [True, False], ids=["collected", "sampled"])
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_whole_numbers_with_many_equal_ones(direct, data):
    """Exactly so many are removed, whatever is equal to the thresholds, in pieces shorter than the tensor."""
    patch = pytest.MonkeyPatch()
    try:
        patch.setattr(engine, "PIECE", 16)
        if not direct:
            patch.setattr(selection, "SAMPLE", 1)
        peak = data.draw(st.sampled_from([0, 1, 3, 100]))
        size = data.draw(st.sampled_from([1, 2, 7, 64, 500]))
        draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
        x = torch.randint(-peak, peak + 1, (3, size), generator=draw).float()
        smallest, largest = data.draw(
            st.sampled_from([(0.85, 0.007), (0.5, 0.4), (0.0, 0.1), (0.29, 0.0), (0.9, 0.05)])
        )
        vectors = [{"w": row} for row in x]
        expected = sparse.breadcrumbs(x.double(), smallest, largest, 1.0)
        assert torch.equal(breadcrumbs(vectors, smallest, largest, scale=1.0)["w"], expected.float())
        for row in x:
            if row.abs().unique().numel() == size:
                kept = size - int(smallest * size + 1e-9) - int(largest * size + 1e-9)
                assert int((alone(row, smallest, largest) != 0).sum()) in (kept, kept - 1)  # one of them may be 0
    finally:
        patch.undo()


def test_outliers_do_not_reach_the_model():
    """What the paper removes them for: one entry that went wild in training does not move the sum."""
    tensor = normal(40, 50)
    wild = tensor.clone()
    wild[3, 4] = 1e6
    assert alone(wild, 0.8, 0.01).abs().max() <= tensor.abs().max()
    assert alone(wild, 0.8, 0.0).abs().max() == 1e6


def test_a_single_number_and_short_tensors_are_left():
    vector = {"scalar": torch.tensor(3.0), "one": torch.tensor([2.0]), "none": torch.empty(0, 3), "two": normal(2)}
    fused = breadcrumbs([vector], 0.85, 0.1, scale=1.0)
    assert fused["scalar"] == 3
    assert fused["one"] == 2
    assert fused["none"].shape == (0, 3)
    assert fused["two"].count_nonzero() == 1


def test_the_rule_gets_what_remains():
    vectors = [{"w": normal(300, seed=seed), "b": normal(9, seed=seed + 10)} for seed in range(3)]
    remains = [dict(breadcrumbs([vector], 0.5, 0.1, scale=1.0)) for vector in vectors]
    fused = breadcrumbs(vectors, 0.5, 0.1, rule=ties, density=1.0, scale=0.5)
    expected = ties(remains, 1.0, scale=0.5)
    assert all(torch.equal(fused[key], expected[key]) for key in expected)
    weighted = breadcrumbs(vectors, 0.5, 0.1, weights=[1.0, 0.0, 2.0], scale=1.0)
    torch.testing.assert_close(weighted["w"], remains[0]["w"] + 2 * remains[2]["w"])


def test_nothing_removed_is_the_rule_itself():
    vectors = [{"w": normal(30, seed=seed)} for seed in range(3)]
    assert torch.equal(breadcrumbs(vectors, 0.0, 0.0)["w"], task_arithmetic(vectors)["w"])


def test_models_and_skipped_names():
    base = {"w": normal(64), "head": normal(4, seed=1)}
    models = [{key: tensor + normal(*tensor.shape, seed=seed) for key, tensor in base.items()} for seed in (2, 3)]
    vectors = [{"w": model["w"] - base["w"]} for model in models]
    fused = fuse(base, models, breadcrumbs, smallest=0.5, largest=0.1, skip="head")
    assert torch.equal(fused["head"], base["head"])
    torch.testing.assert_close(fused["w"], base["w"] + breadcrumbs(vectors, 0.5, 0.1)["w"])


def test_tied_names_are_one():
    shared = normal(50)
    fused = breadcrumbs([{"z": shared, "a": shared}], 0.5, 0.1)
    assert fused["a"].data_ptr() == fused["z"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    tensor = normal(500, dtype=dtype)
    expected = sparse.breadcrumbs(tensor.double()[None], 0.6, 0.05, 1.0).to(dtype)
    assert torch.equal(alone(tensor, 0.6, 0.05), expected)
    assert torch.equal(alone(tensor, 0.6, 0.05, compute_dtype=torch.float64), expected)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_named_though_it_is_the_largest(value):
    for place in (0, 5, 999):
        vector = {"w": normal(1000)}
        vector["w"][place] = value
        with pytest.raises(NonFiniteError, match=r"vectors\[0\]\['w'\] holds 1 non-finite"):
            breadcrumbs([vector], 0.5, 0.1)


@pytest.mark.parametrize(
    ("smallest", "largest", "message"),
    [
        (-0.1, 0.1, r"smallest: expected a share in \[0, 1\), got -0.1"),
        (0.5, 1.0, r"largest: expected a share in \[0, 1\), got 1"),
        (float("nan"), 0.1, "smallest: expected a finite number"),
        (0.6, 0.4, "leaves nothing"),
    ],
)
def test_shares(smallest, largest, message):
    with pytest.raises(InputError, match=message):
        breadcrumbs([{"w": torch.ones(3)}], smallest, largest)


def test_gradients_are_refused():
    with pytest.raises(InputError, match="gradients do not flow"):
        breadcrumbs([{"w": torch.ones(9, requires_grad=True)}])


def test_beside_mergekit():
    peer = pytest.importorskip("mergekit.sparsify")
    tensor = normal(50, 40)  # sizes of which both shares are whole numbers
    theirs = peer.magnitude_outliers(tensor, density=0.15, gamma=0.01)
    assert torch.equal(alone(tensor, 0.84, 0.01), theirs)


@pytest.mark.gpu
def test_on_the_device():
    tensor = normal(300, 200)
    assert torch.equal(alone(tensor.cuda(), 0.85, 0.01).cpu(), alone(tensor, 0.85, 0.01))
