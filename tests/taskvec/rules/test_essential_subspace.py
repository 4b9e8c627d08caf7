"""Essential subspace merging: the authors' program, what it keeps of a task, and layers without Gram matrices."""

import pytest
import torch

from helpers.subspace_definitions import essential
from rmtllmf.errors import InputError, StateMismatchError
from rmtllmf.taskvec import essential_subspace, input_grams, tsv


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def moments(X):
    return X.mT @ X / len(X)


def error(actual, expected):
    return float(torch.linalg.norm(actual.double() - expected) / torch.linalg.norm(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 12), (18, 8), (8, 18)])
@pytest.mark.parametrize("samples", [4, 40])
@pytest.mark.parametrize(("power", "weighting"), [(0.0, 0.0), (2.0, 0.0), (2.0, 0.15)])
def test_the_definition(shape, samples, power, weighting, dtype):
    x = torch.stack([normal(*shape, seed=q, dtype=dtype) for q in range(3)])
    inputs = [normal(samples, shape[1], seed=50 + q) for q in range(3)]
    options = {"power": power, "weighting": weighting}
    update = essential_subspace([{"w": t} for t in x], [{"w": moments(X)} for X in inputs], **options)["w"]
    assert update.dtype == dtype
    assert error(update, essential(x.double(), inputs, **options)) < (1e-4 if dtype == torch.float32 else 1e-6)


def test_directions_that_the_inputs_feel_are_kept_whatever_their_weight():
    """The paper's claim: SVD keeps what is large in the weights, though no input ever sees it."""
    U, V = torch.linalg.qr(normal(8, 8)).Q, torch.linalg.qr(normal(8, 8, seed=1)).Q
    s = torch.tensor([9.0, 8, 7, 6, 1, 1, 1, 1]).double()
    task, X = (U * s) @ V.mT, normal(30, 4, seed=2) @ V[:, 4:].mT  # inputs in the weak directions only
    grams = [{"w": moments(X)}, {"w": moments(X)}]
    vectors = [{"w": task}, {"w": torch.zeros(8, 8).double()}]
    ours, other = essential_subspace(vectors, grams, power=0.0)["w"], tsv(vectors)["w"]
    best = X @ task.mT

    def heard(update):
        out = X @ update.mT
        return float((out * best).sum() / out.norm().clamp_min(1e-12) / best.norm())

    assert heard(ours) > 0.99
    assert heard(other) < 0.01


def test_layers_of_one_kind_are_scaled_by_their_norms():
    vectors = [{"blocks.0.w": normal(6, 6, seed=q), "blocks.1.w": 3 * normal(6, 6, seed=q)} for q in range(2)]
    grams = [{key: torch.eye(6) for key in vectors[0]} for _ in range(2)]
    update = essential_subspace(vectors, grams)
    torch.testing.assert_close(update["blocks.1.w"], 27 * update["blocks.0.w"])  # 3, and (1.5 / 0.5)^2


def test_other_tensors():
    vectors = [{"w": normal(6, 4, seed=q), "free": normal(6, 4, seed=9 + q), "b": normal(3, seed=q)} for q in range(2)]
    update = essential_subspace(vectors, [{"w": torch.eye(4)}] * 2, scale=2.0)
    expected = tsv(vectors, scale=2.0)
    torch.testing.assert_close(update["free"], expected["free"])
    torch.testing.assert_close(update["b"], expected["b"])


def test_blocks_of_rows_are_merged_apart():
    x = [normal(6, 4, seed=q) for q in range(2)]
    G = [torch.stack([moments(normal(9, 4, seed=10 * q + b)) for b in range(2)]) for q in range(2)]
    update = essential_subspace([{"w": t} for t in x], [{"w": g} for g in G])["w"]
    for b in range(2):
        rows = slice(3 * b, 3 * b + 3)
        apart = essential_subspace([{"w": t[rows]} for t in x], [{"w": g[b]} for g in G])["w"]
        assert error(update[rows] / update[rows].norm(), apart / apart.norm()) < 1e-9


def test_with_a_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    grams = [input_grams(model, [torch.randn(32, 5)]) for _ in range(2)]
    vectors = [{key: torch.randn_like(p) for key, p in model.state_dict().items()} for _ in range(2)]
    update = essential_subspace(vectors, grams)
    assert all(torch.isfinite(update[key]).all() and update[key].any() for key in vectors[0])


def test_no_inputs_and_no_update():
    zeros = {"w": torch.zeros(4, 3)}
    assert not essential_subspace([zeros, zeros], [{"w": torch.eye(3)}] * 2)["w"].any()
    some = {"w": torch.ones(4, 3)}
    assert not essential_subspace([some, some], [{"w": torch.zeros(3, 3)}] * 2)["w"].any()


def test_bad_input_is_named():
    vectors, grams = [{"w": torch.ones(2, 3)}], [{"w": torch.eye(3)}]
    with pytest.raises(InputError, match="power: expected a number that is not negative, got -1"):
        essential_subspace(vectors, grams, power=-1.0)
    with pytest.raises(InputError, match="weighting: expected a number that is not negative"):
        essential_subspace(vectors, grams, weighting=-1.0)
    with pytest.raises(StateMismatchError, match=r"grams\[0\]\['w'\] has shape"):
        essential_subspace(vectors, [{"w": torch.eye(2)}])
