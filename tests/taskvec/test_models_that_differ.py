"""Models with another head, a longer vocabulary, missing names or another dtype than their base: what `skip` and
`mixed_dtypes` let through, the same in memory, from disk, and as a task vector."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmtllmf.channel import transmit
from rmtllmf.errors import InputError, StateMismatchError
from rmtllmf.taskvec import (
    TaskVector,
    aligned,
    coordinate_median,
    dare,
    fisher,
    fuse,
    fuse_files,
    task_arithmetic,
    ties,
    tsv,
    weighted_average,
)

RULES = [task_arithmetic, ties, tsv, coordinate_median, weighted_average, partial(dare, seed=0)]


def model(seed):
    source = torch.Generator().manual_seed(seed)
    shapes = {"embed": (5, 4), "layer.w": (4, 4), "layer.b": (4,), "head": (3, 4)}
    state = {key: torch.randn(shape, generator=source) for key, shape in shapes.items()}
    return state | {"steps": torch.tensor(seed)}


def extra_head(state):
    return state | {"score.w": torch.ones(2, 4)}


def longer(state):
    return state | {"embed": torch.cat([state["embed"], torch.ones(1, 4)])}


def without_head(state):
    return {key: tensor for key, tensor in state.items() if key != "head"}


def without_buffer(state):
    return {key: tensor for key, tensor in state.items() if key != "steps"}


def half_head(state):
    return state | {"head": state["head"].half()}


DIFFERENT = [
    (extra_head, "score.*"),
    (longer, "embed"),
    (without_head, "head"),
    (without_buffer, "steps"),
    (half_head, "h*"),
]


def from_disk(base, models, rule, folder, **options):
    paths = [folder / f"{index}.safetensors" for index in range(len(models) + 1)]
    for state, path in zip([base, *models], paths, strict=True):
        save_file(state, path)
    fuse_files(paths[0], paths[1:], folder / "out.safetensors", rule, **options)
    return load_file(folder / "out.safetensors")


def same(left, right):
    assert set(left) == set(right)
    for key in left:
        assert left[key].dtype == right[key].dtype
        assert torch.equal(left[key], right[key]), key


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: getattr(rule, "__name__", "dare"))
@pytest.mark.parametrize(("change", "skip"), DIFFERENT, ids=[change.__name__ for change, _ in DIFFERENT])
def test_what_is_skipped_need_not_agree(change, skip, rule, tmp_path):
    base, first, second = model(0), model(1), change(model(2))
    with pytest.raises(StateMismatchError):
        fuse(base, [first, second], rule)
    # as if they agreed, where a skipped name stays as in the base
    known = [skip] if change is not extra_head else []
    for models, alike in (([first, second], [first, model(2)]), ([second, first], [model(2), first])):
        expected = fuse(base, alike, rule, skip=known)
        same(fuse(base, models, rule, skip=skip), expected)
        same(from_disk(base, models, rule, tmp_path, skip=[skip]), expected)
    stays = {"embed": "embed", "head": "head", "h*": "head"}.get(skip, "steps")
    assert torch.equal(expected[stays], base[stays])


@pytest.mark.parametrize(("change", "skip"), DIFFERENT, ids=[change.__name__ for change, _ in DIFFERENT])
def test_a_task_vector_without_what_is_skipped(change, skip, tmp_path):
    base, tuned = model(0), change(model(1))
    with pytest.raises(StateMismatchError, match=r"skip|cast in silence"):
        TaskVector.between(base, tuned)
    expected = TaskVector.between(base, model(1))
    vector = TaskVector.between(base, tuned, skip=skip)
    left = {"embed": {"embed"}, "head": {"head"}, "h*": {"head"}}.get(skip, set())
    assert set(vector) == set(expected) - left
    assert all(torch.equal(vector[key], expected[key]) for key in vector)
    moved = vector.apply_to(base)
    assert all(torch.equal(moved[key], base[key]) for key in {"steps", *left})
    save_file(tuned, tmp_path / "tuned.safetensors")
    assert set(TaskVector.between(base, tmp_path / "tuned.safetensors", skip=skip)) == set(vector)
    # the other way round: the base has more
    assert set(TaskVector.between(tuned, base, skip=skip)) == set(vector)


def test_vectors_beside_models(tmp_path):
    base, tuned = model(0), extra_head(model(1))
    vector = TaskVector.between(base, model(2))
    more = TaskVector({**vector, "score.w": torch.ones(2, 4)})
    fewer = TaskVector({key: tensor for key, tensor in vector.items() if key != "head"})
    expected = fuse(base, [model(1), vector], skip="head")
    for given in (more, aligned([more])[0], TaskVector(more), fewer, aligned([fewer])[0]):
        same(fuse(base, [tuned, given], skip=["score.*", "head"]), expected)
    with pytest.raises(StateMismatchError, match=r"names 'score.w', which base lacks"):
        fuse(base, [more])


def test_a_function_of_ones_own_need_not_know_skip(tmp_path):
    base, models = model(0), [model(1), longer(model(2))]
    seen = []

    def mean(vectors):
        seen.append([set(vector) for vector in vectors])
        return weighted_average(vectors)

    expected = fuse(base, [model(1), model(2)], weighted_average, skip=["embed", "head"])
    same(fuse(base, models, mean, skip=["embed", "head"]), expected)
    same(from_disk(base, models, mean, tmp_path, skip=["embed", "head"]), expected)
    assert seen == [[{"layer.w", "layer.b"}] * 2] * 2
    with pytest.raises(StateMismatchError, match="the rule's result has the unexpected 'head'"):
        fuse(base, models, lambda vectors: {"head": torch.zeros(3, 4)}, skip=["embed", "head"])


def test_statistics_for_more_than_what_is_fused(tmp_path):
    base, models = model(0), [model(1), longer(model(2))]
    information = [{key: tensor.abs() for key, tensor in model(seed).items() if key != "steps"} for seed in (3, 4)]
    expected = fuse(base, [model(1), model(2)], fisher, information=information, skip="embed")
    same(fuse(base, models, fisher, information=information, skip="embed"), expected)


def test_patterns_that_match_nothing_and_everything(tmp_path):
    base, models = model(0), [model(1), longer(model(2))]
    for call in (
        lambda skip: fuse(base, models, skip=skip),
        lambda skip: from_disk(base, models, task_arithmetic, tmp_path, skip=skip),
        lambda skip: TaskVector.between(base, models[1], skip=skip),
    ):
        with pytest.raises(InputError, match="skip: 'embedd' matches none of the 5 names"):
            call(["embed", "embedd"])
        with pytest.raises(InputError, match="skip: leaves nothing"):
            call("*")
        with pytest.raises(InputError, match=r"skip: leaves nothing|no floating-point parameters"):
            call(["embed", "l*", "head"])
    different = {key: torch.ones(7) for key in base if key != "steps"} | {"steps": torch.tensor(1)}
    with pytest.raises(InputError, match="skip: leaves nothing to fuse"):
        fuse(base, [different], skip="*[!s]")


def test_the_noise_of_what_is_sent_does_not_depend_on_what_is_skipped(tmp_path):
    base, models = model(0), [model(1), model(2)]
    vectors = [TaskVector.between(base, each) for each in models]
    expected = task_arithmetic(transmit(vectors, 0.1, seed=3), 0.3, skip="embed").apply_to(base)
    same(from_disk(base, models, task_arithmetic, tmp_path, mse=0.1, seed=3, skip="embed"), expected)
    # what not all have cannot be sent
    cut = [TaskVector.between(base, each, skip="embed") for each in models]
    expected = task_arithmetic(transmit(cut, 0.1, seed=3), 0.3).apply_to(base)
    models[1] = longer(models[1])
    same(from_disk(base, models, task_arithmetic, tmp_path, mse=0.1, seed=3, skip="embed"), expected)


# dtypes

KINDS = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.bfloat16, torch.float64),
]


def cast(state, dtype):
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}


@pytest.mark.parametrize(("dtype", "trained_in"), KINDS, ids=str)
@pytest.mark.parametrize("rule", [task_arithmetic, ties, tsv])
def test_models_that_were_trained_in_another_dtype(rule, dtype, trained_in, tmp_path):
    base, models = cast(model(0), dtype), [cast(model(seed), trained_in) for seed in (1, 2)]
    for call in (
        lambda: fuse(base, models, rule),
        lambda: from_disk(base, models, rule, tmp_path),
        lambda: TaskVector.between(base, models[0]),
    ):
        with pytest.raises(StateMismatchError, match=r"mixed_dtypes=True: nothing is cast in silence"):
            call()
    wider = torch.promote_types(torch.promote_types(dtype, trained_in), torch.float32)
    by_hand = fuse(cast(base, wider), [cast(each, wider) for each in models], rule, dtype=dtype)
    same(fuse(base, models, rule, mixed_dtypes=True), by_hand)
    same(from_disk(base, models, rule, tmp_path, mixed_dtypes=True), by_hand)
    by_hand = fuse(cast(base, wider), [cast(each, wider) for each in models], rule, dtype=torch.float32)
    same(from_disk(base, models, rule, tmp_path, mixed_dtypes=True, dtype=torch.float32), by_hand)
    vector = TaskVector.between(base, models[0], mixed_dtypes=True)
    same(vector, TaskVector.between(cast(base, wider), cast(models[0], wider)))


def test_some_models_in_another_dtype(tmp_path):
    base, models = cast(model(0), torch.bfloat16), [cast(model(1), torch.bfloat16), model(2)]
    by_hand = fuse(cast(base, torch.float32), [cast(models[0], torch.float32), models[1]], dtype=torch.bfloat16)
    same(fuse(base, models, mixed_dtypes=True), by_hand)
    same(from_disk(base, models, task_arithmetic, tmp_path, mixed_dtypes=True), by_hand)


def test_whole_numbers_are_no_other_floating_dtype(tmp_path):
    base, tuned = model(0), model(1) | {"layer.b": torch.ones(4, dtype=torch.long)}
    for call in (
        lambda: fuse(base, [tuned], mixed_dtypes=True),
        lambda: from_disk(base, [tuned], task_arithmetic, tmp_path, mixed_dtypes=True),
        lambda: TaskVector.between(base, tuned, mixed_dtypes=True),
    ):
        with pytest.raises(StateMismatchError, match=r"\['layer.b'\] is torch.int64; base has torch.float32"):
            call()
    tuned = model(1) | {"steps": torch.tensor(1, dtype=torch.int32)}  # from the base whatever it is
    assert fuse(base, [tuned], mixed_dtypes=True)["steps"].dtype == torch.int64
