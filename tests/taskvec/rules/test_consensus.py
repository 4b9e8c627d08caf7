"""TALL masks and consensus merging: the definition, the boundary cases, and another vector in place of the sum."""

import pytest
import torch

import rmtllmf.taskvec._engine as engine
from helpers.robust_definitions import consensus as naive
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.taskvec import consensus, tall_masks, task_arithmetic, ties

SHAPES = {"m": (6, 5), "v": (70,), "s": (), "none": (0, 3)}


def make(seed, count, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return [
        {key: torch.randn(shape, generator=source).to(dtype) for key, shape in SHAPES.items()} for _ in range(count)
    ]


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.6, 1.0, 3.0])
@pytest.mark.parametrize("piece", [8, 1 << 17])
def test_masks_by_definition(monkeypatch, threshold, piece):
    monkeypatch.setattr(engine, "PIECE", piece)
    vectors = make(0, 5)
    for vector, mask in zip(vectors, tall_masks(vectors, threshold), strict=True):
        assert list(mask) == list(SHAPES)
        for key in SHAPES:
            total = torch.stack([other[key] for other in vectors]).sum(0)
            assert mask[key].dtype == torch.bool
            assert torch.equal(mask[key], vector[key].abs() >= threshold * (total - vector[key]).abs())


def test_a_threshold_for_each_task():
    vectors = make(1, 3)
    mixed = tall_masks(vectors, [0.2, 0.6, 0.4])
    for index, threshold in enumerate((0.2, 0.6, 0.4)):
        alone = tall_masks(vectors, threshold)[index]
        assert all(torch.equal(mixed[index][key], alone[key]) for key in SHAPES)
    assert all(
        mask.float().mean() <= tall_masks(vectors, 0.2)[1][key].float().mean()
        for key, mask in mixed[1].items()
        if mask.numel()
    )


@pytest.mark.parametrize("agreement", range(5))
def test_the_definition_and_its_boundary_cases(agreement):
    vectors = make(2, 4)
    masks = tall_masks(vectors)
    fused = consensus(vectors, agreement=agreement, scale=0.5)
    for key in SHAPES:
        total = torch.stack([vector[key] for vector in vectors]).sum(0)
        votes = sum(mask[key].int() for mask in masks)
        torch.testing.assert_close(fused[key], 0.5 * total * (votes >= agreement))
        expected = naive(torch.stack([vector[key] for vector in vectors]), agreement=agreement, scale=0.5)
        torch.testing.assert_close(fused[key], expected)
    if agreement == 0:
        plain = task_arithmetic(vectors, 0.5)
        assert all(torch.equal(fused[key], plain[key]) for key in SHAPES)


def test_catastrophic_selfish_and_universal_entries():
    """Three tasks: none, one, two or all of them elect an entry."""
    a, b, c = [1.0, 9.0, 2.0, 1.0, 0.0], [-1.0, 0.1, 2.0, 1.0, 0.0], [0.1, 0.1, 0.0, 1.0, 0.0]
    a[0], b[0], c[0] = 0.1, 0.1, -3.0
    vectors = [{"w": torch.tensor(row)} for row in (a, b, c)]
    votes = sum(mask["w"].int() for mask in tall_masks(vectors, 0.4)).tolist()
    assert votes == [1, 1, 2, 3, 3]
    kept = [consensus(vectors, agreement=k, scale=1.0)["w"].ne(0).tolist() for k in range(4)]
    assert kept == [
        [True, True, True, True, False],
        [True, True, True, True, False],
        [False, False, True, True, False],
        [False, False, False, True, False],
    ]
    catastrophic = [{"w": torch.tensor([value])} for value in (0.1, 0.1, 0.1, 0.1, 0.1)]
    assert not consensus(catastrophic, 0.4, 1, scale=1.0)["w"].any()


def test_the_default_scale_is_task_arithmetics():
    vectors = make(3, 3)
    fused, unscaled = consensus(vectors), consensus(vectors, scale=1.0)
    for key in SHAPES:
        torch.testing.assert_close(fused[key], 0.3 * unscaled[key])
    one = consensus(vectors[:1], agreement=1)
    assert all(torch.equal(one[key], vectors[0][key]) for key in SHAPES)


def test_another_merged_vector_takes_the_place_of_the_sum():
    vectors = make(4, 4)
    merged = ties(vectors, combine="sum")
    votes = dict.fromkeys(SHAPES, 0)
    for vector, mask in zip(vectors, tall_masks(vectors, 0.5, merged=merged), strict=True):
        for key in SHAPES:
            assert torch.equal(mask[key], vector[key].abs() >= 0.5 * (merged[key] - vector[key]).abs())
            votes[key] = votes[key] + mask[key].int()
    kept = {key: tensor.clone() for key, tensor in merged.items()}
    fused = consensus(vectors, 0.5, merged=merged, scale=2.0)
    for key in SHAPES:
        assert torch.equal(fused[key], 2.0 * merged[key] * (votes[key] >= 2))
        assert torch.equal(merged[key], kept[key])
    with pytest.raises(StateMismatchError, match="merged"):
        consensus(vectors, merged={"m": merged["m"]})


def test_what_is_not_fused_need_not_be_in_merged():
    vectors = [vector | {"steps": torch.tensor(3)} for vector in make(4, 3)]
    merged = ties(vectors, combine="sum", skip="v")
    assert "v" not in consensus(vectors, merged=merged, skip="v")
    assert tall_masks(vectors, merged=merged, skip="v")[0].keys() == merged.keys()
    for wrong, message in (
        (merged, "'v'"),
        ({**merged, "v": merged["m"]}, r"merged\['v'\] has shape"),
        ({**merged, "v": torch.zeros(vectors[0]["v"].shape, dtype=torch.int64)}, r"merged\['v'\] is torch.int64"),
        ({**merged, "v": vectors[0]["v"], "x": merged["m"]}, "'x'"),
    ):
        with pytest.raises(StateMismatchError, match=message):
            consensus(vectors, merged=wrong)


def test_names_that_are_tied_in_the_vectors_must_not_differ_in_merged():
    vectors = [{"x": tensor, "y": tensor} for tensor in (torch.ones(2), torch.arange(2.0))]
    merged = {"x": torch.ones(2), "y": torch.ones(2)}
    assert torch.equal(consensus(vectors, merged=merged)["y"], consensus(vectors, merged=merged)["x"])
    with pytest.raises(StateMismatchError, match="'x' and 'y' are one tensor in the vectors, but differ here"):
        consensus(vectors, merged={**merged, "y": torch.zeros(2)})


@pytest.mark.parametrize("key", ["m", "v"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_masked_is_not_hidden(key, bad):
    vectors = make(5, 4)
    merged = task_arithmetic(vectors, 1.0)
    vectors[1][key].view(-1)[3] = bad
    for call in (consensus, tall_masks):
        for options in ({}, {"merged": merged}):
            with pytest.raises(NonFiniteError, match=rf"vectors\[1\]\['{key}'\] holds 1 non-finite"):
                call(vectors, **options)
            with pytest.raises(NonFiniteError, match=rf"merged\['{key}'\]"):
                call(make(5, 4), merged=vectors[1])


def test_tied_names_skipped_names_and_weights():
    vectors = make(6, 3)
    for vector in vectors:
        vector["head"] = vector["m"]
    masks = tall_masks(vectors, weights=[1.0, 2.0, 0.5], skip="v")
    assert list(masks[0]) == ["m", "s", "none", "head"]
    assert masks[0]["head"] is masks[0]["m"]
    by_hand = [{key: w * vector[key] for key in masks[0]} for vector, w in zip(vectors, (1.0, 2.0, 0.5), strict=True)]
    for mask, expected in zip(masks, tall_masks(by_hand), strict=True):
        assert all(torch.equal(mask[key], expected[key]) for key in mask)


def test_half_precision_is_compared_in_float32():
    vectors = make(7, 4, torch.bfloat16)
    wide = [{key: tensor.float() for key, tensor in vector.items()} for vector in vectors]
    for mask, expected in zip(tall_masks(vectors), tall_masks(wide), strict=True):
        assert all(torch.equal(mask[key], expected[key]) for key in mask)


def test_wrong_thresholds_and_agreements():
    vectors = make(8, 3)
    with pytest.raises(InputError, match="agreement: 4 tasks cannot agree, there are 3"):
        consensus(vectors, agreement=4)
    with pytest.raises(InputError, match="agreement: 2 tasks cannot agree, there are 1"):
        consensus(vectors[:1])
    with pytest.raises(InputError, match="threshold: expected a number of at least 0"):
        tall_masks(vectors, -0.1)
    with pytest.raises(ShapeError, match="threshold: expected one number or 3"):
        consensus(vectors, [0.2, 0.3])
    with pytest.raises(TypeError, match="threshold"):
        consensus(vectors, "0.4")
