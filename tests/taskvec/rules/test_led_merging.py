"""LED-Merging: masks by definition and their properties, equal scores and scores of 0, models, files and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import rmtllmf.taskvec._engine as engine
from helpers import statistics_definitions as definitions
from rmtllmf.channel import transmit
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.taskvec import TaskVector, aligned, fuse, fuse_files, led_masks, led_merging

SHAPES = {"m": (6, 5), "v": (30,), "conv": (4, 3, 2, 2), "s": (), "none": (0, 3)}


def normal(seed, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=source).to(dtype) for key, shape in SHAPES.items()}


def scores(seed, count, dtype=torch.float32, levels=None):
    """At least 0; with few `levels` many are equal, or 0."""
    made = [{key: t.abs() for key, t in normal(100 * seed + index).items()} for index in range(count)]
    if levels:
        made = [{key: (t * levels / 3).floor().clamp_max(levels) for key, t in each.items()} for each in made]
    return [{key: t.to(dtype) for key, t in each.items()} for each in made]


def same(left, right):
    assert len(left) == len(right)
    for mine, theirs in zip(left, right, strict=True):
        assert list(mine) == list(theirs)
        for key in mine:
            assert mine[key].dtype == torch.bool
            assert torch.equal(mine[key], theirs[key]), key


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 1000),
    ratios=st.lists(st.sampled_from([0.01, 0.2, 0.29, 0.5, 0.9, 1.0]), min_size=1, max_size=4),
    levels=st.sampled_from([None, 2, 5]),
    unit=st.sampled_from(["entry", "neuron"]),
    piece=st.sampled_from([7, 1 << 17]),
)
def test_the_definition(seed, ratios, levels, unit, piece):
    base, tuned = scores(seed, len(ratios), levels=levels), scores(seed + 1, len(ratios), levels=levels)
    wide = [[{key: t.double() for key, t in each.items()} for each in some] for some in (base, tuned)]
    expected = definitions.led_masks(*wide, ratios, neurons=unit == "neuron")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "PIECE", piece)
        masks = led_masks(base, tuned, ratios, unit=unit)
        same(masks, expected)
        vectors = [normal(7 * seed + index) for index in range(len(ratios))]
        fused = led_merging(vectors, base, tuned, ratios, unit=unit, scale=0.5)
    for key in SHAPES:
        total = sum(0.5 * vector[key] * mask[key] for vector, mask in zip(vectors, masks, strict=True))
        torch.testing.assert_close(fused[key], total)


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 1000),
    ratio=st.floats(0.05, 1.0),
    less=st.floats(0.05, 1.0),
    levels=st.sampled_from([None, 3]),
    unit=st.sampled_from(["entry", "neuron"]),
    within=st.sampled_from(["tensor", "model"]),
)
def test_disjoint_and_monotone(seed, ratio, less, levels, unit, within):
    base, tuned = scores(seed, 3, levels=levels), scores(seed + 1, 3, levels=levels)
    small, large = sorted([ratio, less])
    options = {"unit": unit, "within": within}
    masks = led_masks(base, tuned, large, **options)
    elected = led_masks(base, tuned, large, disjoint=False, **options)
    fewer = led_masks(base, tuned, small, disjoint=False, **options)
    for key in SHAPES:
        assert sum(mask[key].int() for mask in masks).le(1).all()  # nothing belongs to two tasks
        several = sum(mask[key].int() for mask in elected) > 1
        for mine, all_of_mine, before in zip(masks, elected, fewer, strict=True):
            assert torch.equal(mine[key], all_of_mine[key] & ~several)  # what several elect is nobody's
            assert not (before[key] & ~all_of_mine[key]).any()  # a larger ratio never loses an entry
    alone = led_masks(base, tuned, [large, small, small], **options)  # others that elect less take less away
    for key in SHAPES:
        assert not (masks[0][key] & ~alone[0][key]).any()


@pytest.mark.parametrize("within", ["tensor", "model"])
def test_the_order_of_the_tasks_does_not_matter(within):
    base, tuned, ratios, order = scores(0, 4), scores(1, 4), [0.1, 0.3, 0.5, 0.8], [2, 0, 3, 1]
    masks = led_masks(base, tuned, ratios, within=within)
    turned = led_masks([base[i] for i in order], [tuned[i] for i in order], [ratios[i] for i in order], within=within)
    same(turned, [masks[i] for i in order])


def test_what_a_task_elects_alone_is_its_fine_tuned_model_and_the_rest_is_the_base():
    base, models = normal(0), [normal(seed) for seed in (1, 2, 3)]
    before, after = scores(2, 3), scores(3, 3)
    fused = fuse(base, models, led_merging, base_scores=before, finetuned_scores=after, ratios=[0.3, 0.6, 0.4])
    masks = led_masks(before, after, [0.3, 0.6, 0.4])
    for key in SHAPES:
        nobody = torch.ones(SHAPES[key], dtype=torch.bool)
        for model, mask in zip(models, masks, strict=True):
            torch.testing.assert_close(fused[key][mask[key]], model[key][mask[key]])
            nobody &= ~mask[key]
        assert torch.equal(fused[key][nobody], base[key][nobody])
        assert SHAPES[key] == () or not nobody.numel() or (nobody.any() and not nobody.all())


@pytest.mark.parametrize("unit", ["entry", "neuron"])
@pytest.mark.parametrize("within", ["tensor", "model"])
def test_one_task_with_a_ratio_of_1_gives_its_vector(unit, within):
    zeros = [{key: torch.zeros(shape) for key, shape in SHAPES.items()}]
    vector = normal(5)
    for given_scores in (scores(0, 1), zeros):
        fused = led_merging([vector], given_scores, zeros, 1, unit=unit, within=within)
        assert all(torch.equal(fused[key], vector[key]) for key in SHAPES)
    nothing = led_merging([vector], scores(0, 1), zeros, 0.9, unit=unit, within=within)
    assert not any(tensor.any() for tensor in nothing.values())  # the fine-tuned model depends on nothing


def test_as_the_authors_code_where_no_scores_are_equal():
    """Thresholds ``score >= sorted[int(ratio * n) - 1]`` of each tensor, products of masks, and 1 - any of others."""
    ratios, base, tuned = [0.1, 0.4, 0.5], scores(0, 3), scores(1, 3)
    keys = ["m", "v", "conv"]

    def located(score, ratio):
        return score >= score.flatten().sort(descending=True).values[int(ratio * score.numel()) - 1]

    for key in keys:
        both = [located(b[key], r) & located(t[key], r) for b, t, r in zip(base, tuned, ratios, strict=True)]
        for task, mask in enumerate(led_masks(base, tuned, ratios, skip=["s", "none"])):
            conflict = torch.any(torch.stack([other for index, other in enumerate(both) if index != task]), 0)
            assert torch.equal(mask[key], both[task] & ~conflict)


def test_one_threshold_for_the_whole_model():
    base = [{"big": torch.tensor([9.0, 8.0, 7.0]), "small": torch.tensor([0.3, 0.2, 0.1])}]
    assert led_masks(base, base, 0.5, within="model")[0]["big"].all()
    assert not led_masks(base, base, 0.5, within="model")[0]["small"].any()
    assert led_masks(base, base, 0.5)[0]["small"].tolist() == [True, False, False]


def test_one_threshold_over_several_precisions():
    third = torch.tensor([1 / 3, 1 / 3], dtype=torch.float64)
    base = [{"double": third, "single": torch.tensor([1 / 3, 1.0, 0.3])}]  # 1/3 in float32 is larger than in float64
    mask = led_masks(base, base, 0.6, within="model")[0]
    assert mask["single"].tolist() == [True, True, False]
    assert mask["double"].tolist() == [True, False]


def test_rows_are_scored_by_their_sums():
    score = [{"w": torch.tensor([[3.0, 0.0, 0.0], [2.0, 2.0, 0.0], [1.0, 1.0, 0.5], [0.0, 0.0, 0.1]])}]
    assert led_masks(score, score, 0.5, unit="neuron")[0]["w"].all(1).tolist() == [True, True, False, False]
    assert led_masks(score, score, 0.25, unit="neuron")[0]["w"].sum().item() == 3


@pytest.mark.parametrize("unit", ["entry", "neuron"])
def test_scores_in_any_memory(unit):
    vectors, base, tuned = [normal(seed) for seed in (1, 2)], scores(0, 2), scores(1, 2)
    expected = led_merging(vectors, base, tuned, 0.5, unit=unit)
    turned = [{k: t.mT.contiguous().mT if t.ndim == 2 else t for k, t in each.items()} for each in base]
    learnt = [{k: t.clone().requires_grad_() for k, t in each.items()} for each in tuned]
    more = [{**each, "head.weight": torch.ones(2)} for each in turned]
    found = led_merging(vectors, more, learnt, 0.5, unit=unit)
    assert all(torch.equal(found[key], expected[key]) for key in SHAPES)
    assert not any(tensor.requires_grad for tensor in found.values())
    half = led_merging(vectors, scores(0, 2, torch.bfloat16), scores(1, 2, torch.bfloat16), 0.5, unit=unit)
    wide = [[{k: t.bfloat16().double() for k, t in each.items()} for each in some] for some in (base, tuned)]
    again = led_merging(vectors, *wide, 0.5, unit=unit)
    assert all(torch.equal(half[key], again[key]) for key in SHAPES)


def test_tied_entries_need_one_score():
    vectors = [dict(normal(seed)) for seed in (1, 2)]
    for vector in vectors:
        vector["a.head"] = vector["m"]
    base, tuned = scores(0, 2), scores(1, 2)
    fused = led_merging(vectors, base, tuned, 0.5)
    assert fused["a.head"].data_ptr() == fused["m"].data_ptr()
    expected = led_merging([normal(1), normal(2)], base, tuned, 0.5)
    assert torch.equal(fused["m"], expected["m"])
    shared = torch.rand(6, 5)  # and scores that share memory are no trouble
    for each in base:
        each["m"] = shared
        each["n"] = shared
    assert led_masks(base, base, 0.5)[0]["n"].dtype == torch.bool


def test_weights_and_skip():
    vectors, base, tuned = [normal(seed) for seed in (1, 2)], scores(0, 2), scores(1, 2)
    plain = led_merging(vectors, base, tuned, 0.5)
    fused = led_merging(vectors, base, tuned, 0.5, weights=[2.0, 0.0], skip="v")
    mask = led_masks(base, tuned, 0.5, skip="v")
    assert set(mask[0]) == set(fused) == set(SHAPES) - {"v"}
    for key in fused:
        torch.testing.assert_close(fused[key], torch.where(mask[0][key], 2 * plain[key], torch.zeros(SHAPES[key])))


def test_received_vectors_and_files(tmp_path):
    base, models = normal(0), [normal(seed) for seed in (1, 2)]
    before, after = scores(2, 2), scores(3, 2)
    given_scores = {"base_scores": before, "finetuned_scores": after, "ratios": 0.6}
    save_file(base, tmp_path / "base.safetensors")
    for index, model in enumerate(models):
        save_file(model, tmp_path / f"{index}.safetensors")
    paths = [tmp_path / f"{index}.safetensors" for index in range(2)]
    fuse_files(tmp_path / "base.safetensors", paths, tmp_path / "out.safetensors", led_merging, **given_scores)
    expected = fuse(base, models, led_merging, **given_scores)
    fused = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(fused[key], expected[key]) for key in SHAPES)
    vectors = [TaskVector.between(base, model) for model in models]
    made = led_merging(aligned(vectors), **given_scores)
    assert all(torch.equal(made[key], led_merging(vectors, **given_scores)[key]) for key in SHAPES)
    heard = transmit(vectors, [0.1, 0.2], seed=0)
    masks = led_masks(before, after, 0.6)
    noisy = led_merging(heard, **given_scores)
    for key in SHAPES:
        assert not noisy[key][~(masks[0][key] | masks[1][key])].any()  # no noise where nobody elects


def test_the_same_bits_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(engine, "PIECE", 8)
    vectors, base, tuned = [normal(seed) for seed in (1, 2, 3)], scores(0, 3, levels=3), scores(1, 3, levels=3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = led_merging(vectors, base, tuned, 0.5)
        torch.set_num_threads(3)
        found = led_merging(vectors, base, tuned, 0.5)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[key], expected[key]) for key in SHAPES)


BAD = [
    ({"ratios": 0.0}, InputError, r"ratios: expected shares in \(0, 1\], where 1 is all, got 0"),
    ({"ratios": 1.5}, InputError, "ratios: expected shares"),
    ({"ratios": [0.5]}, ShapeError, "ratios: expected one number or 2, one for each vector, got 1"),
    ({"ratios": "half"}, TypeError, "ratios: expected a real number"),
    ({"unit": "row"}, InputError, "unit: expected 'entry' or 'neuron', got 'row'"),
    ({"within": "layer"}, InputError, "within: expected 'tensor' or 'model', got 'layer'"),
    ({"base_scores": scores(0, 1)}, ShapeError, "base_scores: expected 2 mappings, one for each vector, got 1"),
    ({"base_scores": scores(0, 1)[0]}, TypeError, "base_scores: expected a sequence of mappings"),
    ({"finetuned_scores": [{}, {}]}, StateMismatchError, r"finetuned_scores\[0\] lacks 'conv', .* give all, or skip"),
    ({"finetuned_scores": [1, 2]}, TypeError, r"finetuned_scores\[0\]: expected a mapping"),
    (
        {"finetuned_scores": "m"},
        StateMismatchError,
        r"finetuned_scores\[1\]\['m'\] has shape \(5, 6\); expected \(6, 5",
    ),
    ({"finetuned_scores": "v"}, InputError, r"finetuned_scores\[1\]\['v'\]: expected entries of at least 0, got -1"),
    ({"finetuned_scores": "s"}, NonFiniteError, r"finetuned_scores\[1\]\['s'\] holds non-finite entries"),
    ({"finetuned_scores": "conv"}, TypeError, r"finetuned_scores\[1\]\['conv'\]: expected a floating-point tensor"),
    ({"scale": float("nan")}, InputError, "scale: expected a finite number"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_bad_input_is_named(changed, error, message):
    arguments = {"base_scores": scores(0, 2), "finetuned_scores": scores(1, 2), "ratios": 0.5} | changed
    if isinstance(arguments["finetuned_scores"], str):
        key, broken = arguments["finetuned_scores"], scores(1, 2)
        broken[1][key] = {
            "m": torch.ones(5, 6),
            "v": -torch.ones(30),
            "s": torch.tensor(float("nan")),
            "conv": torch.ones(4, 3, 2, 2, dtype=torch.int64),
        }[key]
        arguments["finetuned_scores"] = broken
    with pytest.raises(error, match=message):
        led_merging([normal(0), normal(1)], **arguments)


def test_bad_input_of_masks_alone():
    with pytest.raises(InputError, match="base_scores: expected at least one mapping"):
        led_masks([], [], 0.5)
    with pytest.raises(InputError, match="skip: leaves nothing to elect"):
        led_masks(scores(0, 1), scores(1, 1), 0.5, skip="*")
    with pytest.raises(StateMismatchError, match=r"finetuned_scores\[0\] has the unexpected 'x'"):
        led_masks(scores(0, 1), [{**scores(1, 1)[0], "x": torch.ones(1)}], 0.5)


def test_a_vector_that_is_masked_is_blamed_all_the_same():
    vectors = [normal(0), normal(1)]
    zeros = [{key: torch.zeros(shape) for key, shape in SHAPES.items()} for _ in range(2)]
    vectors[1]["v"][3] = float("inf")
    with pytest.raises(NonFiniteError, match=r"vectors\[1\]\['v'\] holds 1 non-finite"):
        led_merging(vectors, zeros, zeros, 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_on_a_gpu(where):
    vectors, base, tuned = [normal(seed) for seed in (1, 2)], scores(0, 2, levels=4), scores(1, 2, levels=4)
    expected = led_merging(vectors, base, tuned, 0.5)
    there = [{key: tensor.cuda() for key, tensor in vector.items()} for vector in vectors]
    given_scores = [[{key: t.to(where) for key, t in each.items()} for each in some] for some in (base, tuned)]
    found = led_merging(there, *given_scores, 0.5)
    assert all(found[key].is_cuda and torch.equal(found[key].cpu(), expected[key]) for key in SHAPES)
