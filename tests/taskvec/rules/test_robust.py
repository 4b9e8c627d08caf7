"""What the robust rules promise: bounded harm by hostile vectors, and the symmetries of an average."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import (
    coordinate_median,
    geometric_median,
    krum_scores,
    multi_krum,
    norm_clipping,
    task_arithmetic,
    trimmed_mean,
    weighted_average,
)

SHAPES = {"m": (6, 5), "v": (7,), "s": (), "none": (0, 3)}
RULES = {
    "median": coordinate_median,
    "trimmed mean": partial(trimmed_mean, trim=2),
    "geometric median": geometric_median,
    "norm clipping": norm_clipping,
    "multi-Krum": partial(multi_krum, hostile=2),
    "Krum": partial(multi_krum, hostile=2, keep=1),
}
robust_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def make(seed, count, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    common = {key: torch.randn(shape, generator=source) for key, shape in SHAPES.items()}
    return [
        {k: (t + torch.randn(t.shape, generator=source)).to(dtype) for k, t in common.items()} for _ in range(count)
    ]


def flat(vector):
    return torch.cat([vector[key].double().reshape(-1) for key in SHAPES])


def distance(left, right):
    return float((flat(left) - flat(right)).norm())


@robust_rule
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), sign=st.sampled_from([-1.0, 1.0]), places=st.permutations(range(9)))
def test_two_hostile_vectors_of_nine_do_bounded_harm(rule, seed, sign, places):
    honest = make(seed, 9)
    reach = max(distance(vector, weighted_average(honest)) for vector in honest)
    mean_harm, harm = [], []
    for size in (1e3, 1e6):
        vectors = list(honest)
        for place in places[:2]:
            vectors[place] = {key: sign * size * tensor for key, tensor in honest[places[0]].items()}
        mean_harm.append(distance(weighted_average(vectors), weighted_average(honest)))
        harm.append(distance(rule(vectors), weighted_average(honest)))
    assert mean_harm[1] > 900 * mean_harm[0] > 1e4
    assert max(harm) < 2 * reach


@robust_rule
def test_a_flipped_vector_counts_less_than_in_the_mean_or_not_more_than_one_vector_may(rule):
    honest = make(0, 9)
    vectors = [{key: -50 * tensor for key, tensor in honest[0].items()}, *honest[1:]]
    center = weighted_average(honest[1:])
    assert distance(rule(vectors), center) < 0.3 * distance(weighted_average(vectors), center)


@pytest.mark.parametrize("rule", [coordinate_median, partial(trimmed_mean, trim=4), geometric_median])
def test_four_of_nine_are_no_majority(rule):
    honest = make(1, 9)
    reach = max(distance(vector, weighted_average(honest)) for vector in honest)
    vectors = [{k: 1e6 * t for k, t in vector.items()} if q < 4 else vector for q, vector in enumerate(honest)]
    assert distance(rule(vectors), weighted_average(honest)) < 6 * reach


@robust_rule
@pytest.mark.parametrize("count", [7, 8])
def test_moving_all_vectors_moves_the_result(rule, count):
    if rule is norm_clipping:
        pytest.skip("norms have an origin")
    vectors = make(2, count, torch.float64)
    moved = [{key: tensor + 100.0 for key, tensor in vector.items()} for vector in vectors]
    expected = rule(vectors)
    for key, tensor in rule(moved).items():
        torch.testing.assert_close(tensor, expected[key] + 100.0, rtol=1e-12, atol=1e-10)


@robust_rule
@pytest.mark.parametrize("count", [7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identical_vectors_are_returned(rule, count, dtype):
    vector = make(3, 1, dtype)[0]
    fused = rule([vector] * count)
    for key in SHAPES:
        assert fused[key].dtype == dtype
        torch.testing.assert_close(fused[key], vector[key], rtol=1e-6 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("rule", [coordinate_median, trimmed_mean, geometric_median])
def test_one_vector_and_two(rule):
    a, b = make(4, 2)
    for key, tensor in rule([a]).items():
        torch.testing.assert_close(tensor, a[key])
    for key, tensor in rule([a, b], scale=3.0).items():
        torch.testing.assert_close(tensor, 1.5 * (a[key] + b[key]))


@robust_rule
def test_infinity_names_its_vector(rule):
    vectors = make(5, 7)
    vectors[4]["v"][2] = -float("inf")
    with pytest.raises(NonFiniteError, match=r"vectors\[4\]\['v'\] holds 1 non-finite"):
        rule(vectors)


@robust_rule
def test_gradients_are_refused(rule):
    vectors = make(6, 7)
    vectors[0]["v"].requires_grad_()
    with pytest.raises(InputError, match="gradients"):
        rule(vectors)
    with torch.no_grad():
        rule(vectors)


@robust_rule
def test_only_empty_tensors(rule):
    assert rule([{"none": torch.empty(0, 2)}] * 7)["none"].shape == (0, 2)


@pytest.mark.gpu
@robust_rule
def test_on_the_device(rule):
    vectors = make(7, 9)
    there = rule([{key: tensor.cuda() for key, tensor in vector.items()} for vector in vectors])
    for key, tensor in rule(vectors).items():
        assert there[key].is_cuda
        torch.testing.assert_close(there[key].cpu(), tensor, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(0, 4))
def test_krum_scores_by_definition(seed, hostile, more):
    vectors = make(seed, 2 * hostile + 3 + more)
    rows = torch.stack([flat(vector) for vector in vectors])
    near = len(rows) - hostile - 2
    expected = [sum(sorted((row - other).square().sum().item() for other in rows)[1 : near + 1]) for row in rows]
    torch.testing.assert_close(krum_scores(vectors, hostile), torch.tensor(expected, dtype=torch.float64))


def test_multi_krum_leaves_the_hostile_ones_out():
    honest = make(8, 7)
    vectors = [
        *honest[:3],
        {k: -20 * t for k, t in honest[0].items()},
        *honest[3:],
        {k: 1e6 * t for k, t in honest[1].items()},
    ]
    scores = krum_scores(vectors, 2)
    assert set(scores.argsort(descending=True)[:2].tolist()) == {3, 8}
    expected = weighted_average(honest)
    for key, tensor in multi_krum(vectors, 2).items():
        torch.testing.assert_close(tensor, expected[key])
    best = int(scores.argmin())
    assert all(torch.equal(tensor, vectors[best][key]) for key, tensor in multi_krum(vectors, 2, keep=1).items())


def test_of_equal_scores_the_first_are_taken():
    vectors = [{"w": torch.tensor([value])} for value in (1.0, 3.0, 1.0, 3.0, 100.0, 2.0)]
    scores = krum_scores(vectors, 0).tolist()
    assert scores[0] == scores[2]
    assert scores[1] == scores[3]
    assert multi_krum(vectors, 0, keep=2)["w"].item() == np.mean(
        [vectors[q]["w"] for q in np.argsort(scores, kind="stable")[:2]]
    )


def test_multi_krum_needs_enough_vectors():
    vectors = make(9, 6)
    with pytest.raises(InputError, match=r"hostile: 2 hostile vectors .* among 7 or more, got 6"):
        multi_krum(vectors, 2)
    with pytest.raises(InputError, match="keep: expected at most 6"):
        multi_krum(vectors, 1, keep=7)
    with pytest.raises(InputError, match="keep"):
        multi_krum(vectors, 1, keep=0)
    with pytest.raises(InputError, match="hostile"):
        krum_scores(vectors, -1)


def test_scores_follow_weights_and_skipped_names():
    vectors = make(10, 5)
    rest = [{"m": 2 * vector["m"], "s": vector["s"]} for vector in vectors]
    torch.testing.assert_close(krum_scores(vectors, 1, weights={"m": 2.0}, skip=["v", "none"]), krum_scores(rest, 1))


def test_norm_clipping_bounds_what_one_vector_does():
    vectors = make(11, 5)
    norms = [flat(vector).norm().item() for vector in vectors]
    free = norm_clipping(vectors, 1.01 * max(norms), scale=0.3 * 5)
    for key, tensor in task_arithmetic(vectors).items():
        torch.testing.assert_close(free[key], tensor)
    short = norm_clipping(vectors, 0.5 * min(norms))
    expected = sum(flat(vector) / norm for vector, norm in zip(vectors, norms, strict=True)) * 0.5 * min(norms) / 5
    torch.testing.assert_close(flat(short), expected, rtol=1e-5, atol=1e-6)
    for size in (1e3, 1e9):
        vectors[0] = {key: size * tensor for key, tensor in vectors[0].items()}
        with_it = flat(norm_clipping(vectors, 1.0))
        without = flat(norm_clipping(vectors[1:], 1.0))
        torch.testing.assert_close((5 * with_it - 4 * without).norm().item(), 1.0, rtol=1e-5, atol=0)


def test_silent_vectors_have_no_length_to_clip():
    silent, loud = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(norm_clipping([silent, loud, loud])["w"], torch.full((3,), 2 / 3))
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="max_norm"):
            norm_clipping([silent, loud], wrong)
