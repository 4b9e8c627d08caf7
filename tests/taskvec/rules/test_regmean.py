"""RegMean: its formula, what it minimises, inputs that nobody has, Gram matrices of all kinds, and precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import statistics_definitions as definitions
from rmtllmf.errors import InputError, NonFiniteError, NotPSDError, ShapeError, StateMismatchError
from rmtllmf.taskvec import fuse, fuse_files, input_grams, regmean, weighted_average

SHAPES = {"m": (6, 5), "wide": (2, 9), "v": (30,), "conv": (4, 3, 2, 2), "s": (), "none": (0, 3)}


def normal(seed, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=source).to(dtype) for key, shape in SHAPES.items()}


def gram(n, seed, rows=50):
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    return x.mT @ x / rows


def grams(seed, count, keys=("m", "conv"), rows=50):
    sizes = {"m": 5, "wide": 9, "conv": 12, "none": 3}
    return [{k: gram(sizes[k], 97 * seed + 7 * q + i, rows) for i, k in enumerate(keys)} for q in range(count)]


def double(states):
    return [{key: tensor.double() for key, tensor in state.items()} for state in states]


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 1000),
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=4).filter(any),
    alpha=st.sampled_from([0.0, 0.1, 0.9, 0.99, 1.0]),
    rows=st.sampled_from([3, 50]),
)
def test_the_definition(seed, weights, alpha, rows):
    count = len(weights)
    vectors, given_grams = [normal(seed + q) for q in range(count)], grams(seed, count, ("m", "conv", "none"), rows)
    expected = definitions.regmean(double(vectors), given_grams, alpha, weights)
    fused = regmean(vectors, given_grams, alpha, weights=weights, scale=0.5)
    exact = regmean(double(vectors), given_grams, alpha, weights=weights, scale=0.5)
    for key in SHAPES:
        peak = float(expected[key].abs().max()) if expected[key].numel() else 0.0
        torch.testing.assert_close(exact[key], 0.5 * expected[key], rtol=0, atol=1e-9 * peak)
        torch.testing.assert_close(fused[key].double(), 0.5 * expected[key], rtol=0, atol=1e-4 * peak)


def test_it_minimises_the_distance_of_the_outputs():
    source = torch.Generator().manual_seed(0)
    inputs = [torch.randn(40, 5, generator=source, dtype=torch.float64) for _ in range(3)]
    weights = [torch.randn(6, 5, generator=source, dtype=torch.float64) for _ in range(3)]
    found = [{"m": x.mT @ x / len(x)} for x in inputs]
    update = regmean([{"m": w} for w in weights], found, 1)["m"].clone().requires_grad_()
    cost = sum((x @ (update - w).mT).square().mean() for x, w in zip(inputs, weights, strict=True))
    cost.backward()
    assert float(update.grad.abs().max()) < 1e-10
    mean = weighted_average([{"m": w} for w in weights])["m"]
    assert cost < sum((x @ (mean - w).mT).square().mean() for x, w in zip(inputs, weights, strict=True))


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_what_no_task_has_as_an_input(alpha):
    """A feature that is always 0, and a direction."""
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x, torch.zeros(20, 1, dtype=torch.float64), x[:, :1]], 1)
    vectors, given_grams = [normal(1), normal(2)], [{"m": (c * x).mT @ (c * x) / 20} for c in (1, 2)]
    base = regmean(vectors, given_grams, alpha, unseen="base")["m"]
    mean = regmean(vectors, given_grams, alpha)["m"]
    average = weighted_average(vectors)["m"]
    torch.testing.assert_close(base[:, 3], torch.zeros(6))
    torch.testing.assert_close(mean[:, 3], average[:, 3])
    if alpha == 1:
        blind = torch.tensor([1.0, 0, 0, 0, -1.0])
        torch.testing.assert_close(base @ blind, torch.zeros(6), rtol=0, atol=1e-5)
        torch.testing.assert_close(mean @ blind, average @ blind, rtol=0, atol=1e-5)
        torch.testing.assert_close((mean - base) @ x.float().mT, torch.zeros(6, 20), rtol=0, atol=1e-5)
        ridge = [{"m": each["m"] + 1e-7 * torch.eye(5, dtype=torch.float64)} for each in given_grams]
        limit = regmean(double(vectors), ridge, alpha)["m"]
        torch.testing.assert_close(mean.double(), limit, rtol=0, atol=1e-4)


def test_special_cases():
    vectors = [normal(seed) for seed in (1, 2, 3)]
    same = grams(0, 1)[0]
    average = weighted_average(vectors)
    for key, tensor in regmean(vectors, [same] * 3).items():  # equal inputs: the average
        torch.testing.assert_close(tensor, average[key], rtol=1e-4, atol=1e-5)
    zeros = [{key: torch.zeros_like(tensor) for key, tensor in same.items()}] * 3
    for key, tensor in regmean(vectors, zeros).items():
        torch.testing.assert_close(tensor, average[key])
    assert not regmean(vectors, zeros, unseen="base")["m"].any()
    equal = regmean([vectors[0]] * 3, grams(0, 3))
    assert all(torch.allclose(equal[key], vectors[0][key], rtol=1e-5) for key in SHAPES)
    alone = regmean(vectors[:1], grams(0, 1), unseen="base")
    assert all(torch.allclose(alone[key], vectors[0][key], rtol=1e-3, atol=1e-4) for key in SHAPES)
    diagonal = regmean(vectors, grams(0, 3), 0)["m"]  # then it is an average by columns
    columns = torch.stack([each["m"].diagonal() for each in grams(0, 3)]).float()
    by_hand = sum(v["m"] * c for v, c in zip(vectors, columns, strict=True)) / columns.sum(0)
    torch.testing.assert_close(diagonal, by_hand)


def test_blocks_of_rows_are_fitted_apart():
    vectors = [normal(1), normal(2)]
    stacked = [{"m": torch.stack([gram(5, 10 * q + i) for i in range(3)])} for q in range(2)]
    fused = regmean(vectors, stacked)["m"]
    for index in range(3):
        rows = slice(2 * index, 2 * index + 2)
        part = regmean([{"m": v["m"][rows]} for v in vectors], [{"m": each["m"][index]} for each in stacked])["m"]
        torch.testing.assert_close(fused[rows], part)


def test_ties_skip_other_names_and_memory():
    vectors, given_grams = [dict(normal(seed)) for seed in (1, 2)], grams(0, 2)
    expected = regmean(vectors, given_grams)
    for vector in vectors:
        vector["a.head"] = vector["m"]
        vector["m"] = vector["m"]
    more = [{**each, "head.weight": torch.ones(2, 2)} for each in given_grams]
    fused = regmean(vectors, more, skip="conv")
    assert fused["a.head"].data_ptr() == fused["m"].data_ptr()
    assert "conv" not in fused
    assert torch.equal(fused["m"], expected["m"])
    single = [{key: tensor.float() for key, tensor in each.items()} for each in given_grams]
    torch.testing.assert_close(regmean(vectors, single)["m"], expected["m"], rtol=1e-4, atol=1e-5)
    out = {key: torch.empty_like(tensor) for key, tensor in expected.items()}
    found = regmean([normal(1), normal(2)], given_grams, out=out)
    assert all(torch.equal(found[key], expected[key]) and found[key] is not None for key in SHAPES)
    assert found["m"].data_ptr() == out["m"].data_ptr()


def test_models_files_and_the_models_own_fit(tmp_path):
    """In update form and in the form of the paper: the base cancels."""
    base, models, given_grams = normal(0), [normal(1), normal(2)], grams(3, 2)
    fused = fuse(base, models, regmean, grams=given_grams)
    whole = regmean(models, given_grams)
    for key in SHAPES:
        torch.testing.assert_close(fused[key], whole[key], rtol=1e-4, atol=1e-5)
    paths = [tmp_path / name for name in ("base.safetensors", "0.safetensors", "1.safetensors")]
    for path, state in zip(paths, [base, *models], strict=True):
        save_file(state, path)
    fuse_files(paths[0], paths[1:], tmp_path / "out.safetensors", regmean, grams=given_grams)
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[key], fused[key]) for key in SHAPES)


@pytest.mark.parametrize("decay", [1, 3])
@pytest.mark.parametrize("alpha", [0.9, 0.99])
def test_precision_where_inputs_are_far_from_round(decay, alpha):
    """Activations with a large mean, and a spectrum over several orders of magnitude."""
    found, n = [], 96
    for seed in range(3):
        source = torch.Generator().manual_seed(seed)
        U = torch.linalg.qr(torch.randn(n, n, generator=source, dtype=torch.float64)).Q
        x = torch.randn(400, n, generator=source, dtype=torch.float64) * torch.logspace(0, -decay, n) @ U.mT
        x = x * torch.randn(n, generator=source).exp() + torch.randn(n, generator=source)
        found.append({"w": (x.mT @ x / len(x)).float()})
    vectors = [{"w": torch.randn(64, n, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    expected = definitions.regmean(double(vectors), double(found), alpha)["w"]
    error = (regmean(vectors, found, alpha)["w"] - expected).norm() / expected.norm()
    assert error < 1e-4
    exact = regmean(vectors, found, alpha, compute_dtype=torch.float64, dtype=torch.float64)["w"]
    assert (exact - expected).norm() / expected.norm() < 1e-9


def test_a_linear_model_of_two_tasks_on_different_inputs_loses_nothing():
    source = torch.Generator().manual_seed(0)
    base = nn.Linear(4, 3)
    models = [nn.Linear(4, 3) for _ in range(2)]
    inputs = [torch.randn(30, 4, generator=source) * torch.tensor(mask) for mask in ([1.0, 1, 0, 0], [0.0, 0, 1, 1])]
    for model in models:
        model.bias = base.bias
    found = [input_grams(base, [x], state=model) for x, model in zip(inputs, models, strict=True)]
    fused = fuse(base, models, regmean, grams=found)
    for x, model in zip(inputs, models, strict=True):
        torch.testing.assert_close(x @ fused["weight"].mT + fused["bias"], model(x).detach())


BAD = [
    ({"alpha": 1.1}, InputError, r"alpha: expected a share in \[0, 1\]"),
    ({"unseen": "zero"}, InputError, "unseen: expected 'average' or 'base', got 'zero'"),
    ({"grams": grams(0, 1)}, ShapeError, "grams: expected 2 mappings, one for each vector, got 1"),
    ({"grams": [{}, {}]}, InputError, "grams: name nothing that is fused; they have , the vectors 'conv', 'm'"),
    ({"grams": [grams(0, 1)[0], {}]}, StateMismatchError, r"grams\[1\] lacks '.*', which others have"),
    ({"grams": [{"m": torch.eye(6)}] * 2}, StateMismatchError, r"has shape \(6, 6\); expected \(5, 5\) for a weight"),
    ({"grams": [{"v": torch.eye(30)}] * 2}, StateMismatchError, r"has shape \(30, 30\); expected"),
    ({"grams": [{"m": torch.ones(4, 5, 5)}] * 2}, StateMismatchError, "several equal blocks of rows"),
    ({"grams": [{"m": torch.eye(5)}, {"m": torch.ones(2, 5, 5)}]}, StateMismatchError, "different numbers of blocks"),
    ({"grams": [{"m": torch.eye(5, dtype=torch.int32)}] * 2}, TypeError, "expected a floating-point tensor"),
    ({"grams": [{"m": torch.eye(5) / 0}] * 2}, NonFiniteError, r"grams\[0\]\['m'\] holds non-finite"),
    ({"grams": [{"m": -torch.eye(5)}] * 2}, NotPSDError, r"grams\[0\]\['m'\] has negative entries on its diagonal"),
    ({"grams": [{"m": torch.ones(5, 5) - 9 * (1 - torch.eye(5))}] * 2}, NotPSDError, "not positive semi-definite"),
    ({"grams": [{"m": torch.ones(5, 5) - 9 * (1 - torch.eye(5))}] * 2, "alpha": 1}, NotPSDError, "not positive semi"),
    ({"weights": [-1.0, 1.0]}, InputError, "weights: expected at least 0, and one above"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_bad_input_is_named(changed, error, message):
    with pytest.raises(error, match=message):
        regmean([normal(0), normal(1)], **{"grams": grams(0, 2)} | changed)
