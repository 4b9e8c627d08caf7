"""Twin-Merging beside models that are written out for one sample after another, and the router."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.routed_models import MODELS, in_linear_layers, made, random_vectors, run, run_with
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.taskvec import task_arithmetic, train_router, twin_merging, weighted_average
from rmtllmf.taskvec.routed.twin_merging import TwinLinear


def truncated(matrix, rank):
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


def written_out(base, vectors, weights, rank, shared):
    """The parameters for one sample."""
    state, linear = {}, in_linear_layers(base)
    for key, value in base.state_dict().items():
        state[key] = value + shared[key]
        if key in linear:
            for weight, vector in zip(weights, vectors, strict=True):
                own = vector[key] - shared[key]
                if "in_proj_weight" in key:
                    own = torch.cat([truncated(part, rank) for part in own.chunk(3)])
                elif own.ndim == 2:
                    own = truncated(own, rank)
                state[key] = state[key] + weight * own
    return state


@pytest.mark.parametrize("rank", [2, 99])
@pytest.mark.parametrize("name", MODELS)
def test_every_sample_has_the_model_that_is_written_out_for_it(name, rank):
    base, inputs = made(name)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    vectors = random_vectors(base)
    shared = task_arithmetic(vectors, 0.3)
    twin = twin_merging(base, vectors, rank=rank)
    weights = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixed = run(lambda x: twin.mixed(weights, x), inputs)
        for index, row in enumerate(weights):
            expected = run_with(base, written_out(base, vectors, row, rank, shared), inputs[index : index + 1])
            torch.testing.assert_close(mixed[index : index + 1], expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@settings(deadline=None, max_examples=15)
@given(
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    count=st.integers(1, 4),
    rank=st.integers(1, 7),
    samples=st.integers(1, 5),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_one_layer(m, n, count, rank, samples, bias, seed):
    base = nn.Linear(n, m, bias, dtype=torch.float64)
    vectors = random_vectors(base, count, seed=seed)
    source = torch.Generator().manual_seed(seed)
    x, weights = (torch.randn(samples, size, generator=source, dtype=torch.float64) for size in (n, count))
    shared = weighted_average(vectors)
    mixed = twin_merging(base, vectors, rank=rank, shared=shared).mixed(weights, x)
    for index in range(samples):
        state = written_out(nn.ModuleDict({"l": base}), prefixed(vectors), weights[index], rank, prefixed([shared])[0])
        expected = torch.nn.functional.linear(x[index], state["l.weight"], state.get("l.bias"))
        torch.testing.assert_close(mixed[index], expected)


def prefixed(vectors):
    return [{f"l.{key}": value for key, value in vector.items()} for vector in vectors]


def test_a_task_alone_of_full_rank_is_its_model():
    """Nothing is lost by taking a task apart: shared and own part add up to it."""
    base, inputs = made("open_clip")
    linear = in_linear_layers(base)
    vectors = [vector.map(lambda k, v: v if k in linear else 0 * v) for vector in random_vectors(base)]
    twin = twin_merging(base, vectors, rank=99)
    with torch.no_grad():
        for index, vector in enumerate(vectors):
            alone = torch.nn.functional.one_hot(torch.tensor(index), 3).double()
            expected = run_with(base, vector.apply_to(base.state_dict()), inputs)
            torch.testing.assert_close(twin.mixed(alone, inputs), expected)


def test_without_weights_of_their_own_all_have_the_shared_model():
    base, inputs = made("timm")
    vectors = random_vectors(base)
    twin = twin_merging(base, vectors, rank=3)
    with torch.no_grad():
        expected = run_with(base, task_arithmetic(vectors).apply_to(base.state_dict()), inputs)
        torch.testing.assert_close(twin.embed(inputs), expected)
        torch.testing.assert_close(twin.mixed(torch.zeros(4, 3), inputs), expected)


class Plain(nn.Module):
    """A layer between two functions."""

    def __init__(self, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)
        self.before, self.after = before, after

    def forward(self, x):
        return self.after(self.layer(self.before(x)))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (lambda x: x.flatten(0, 1), lambda y: y.unflatten(0, (4, -1))),  # tokens, or windows
        (lambda x: x.unflatten(1, (3, 2)).flatten(0, 1), lambda y: y.unflatten(0, (4, 3)).flatten(1, 2)),
        (lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),
        (lambda x: x.unflatten(1, (3, 2)), lambda y: y.flatten(1, 2)),
    ],
)
def test_wherever_the_samples_are(before, after):
    base, x = Plain(before, after), torch.randn(4, 6, 3, dtype=torch.float64)
    vectors, weights = random_vectors(base), torch.rand(4, 3)
    twin = twin_merging(base, vectors, rank=1)
    one_by_one = [twin.mixed(weights[i : i + 1], x[i : i + 1].expand(4, -1, -1))[0] for i in range(4)]
    torch.testing.assert_close(twin.mixed(weights, x), torch.stack(one_by_one))


def test_samples_that_cannot_be_found():
    base = Plain(lambda x: x.reshape(-1, 8, 3))
    twin = twin_merging(base, random_vectors(base), rank=1)
    with pytest.raises(ShapeError, match=r"given \(3, 8, 3\) for a batch of 4"):
        twin.mixed(torch.ones(4, 3), torch.randn(4, 6, 3, dtype=torch.float64))
    base, _ = made("torch, sequence first")
    twin = twin_merging(base, random_vectors(base), rank=1)
    with pytest.raises(ShapeError, match="batch_first=False; split the batch"):
        twin.mixed(torch.ones(5, 3), torch.randn(5, 5, 8, dtype=torch.float64))
    twin.mixed(torch.ones(1, 3), torch.randn(5, 5, 8, dtype=torch.float64))


def test_threads_do_not_share_their_weights():
    base, inputs = made("open_clip")
    twin = twin_merging(base, random_vectors(base), rank=2)
    choices = [torch.rand(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    with torch.no_grad():
        expected = [twin.mixed(weights, inputs) for weights in choices]

        def work(weights):
            with torch.no_grad():
                return twin.mixed(weights, inputs)

        with ThreadPoolExecutor(4) as pool:
            for one, other in zip(expected, pool.map(work, choices), strict=True):
                torch.testing.assert_close(one, other)


def test_copies_have_weights_of_their_own():
    base, inputs = made("open_clip")
    twin = twin_merging(base, random_vectors(base), rank=2)
    other = copy.deepcopy(twin)
    mixtures = {id(module.mixture) for module in other.modules() if isinstance(module, TwinLinear)}
    assert mixtures == {id(other.mixture)}
    assert other.mixture is not twin.mixture
    with torch.no_grad():
        torch.testing.assert_close(other.mixed(torch.ones(3), inputs), twin.mixed(torch.ones(3), inputs))


def colours(count=24, seed=0):
    """Inputs of three tasks, which differ by a colour."""
    source = torch.Generator().manual_seed(seed)
    images = torch.randn(3, count, 3, 8, 8, generator=source)
    for task in range(3):
        images[task, :, task] += 3.0
    return images


def test_a_trained_router_finds_the_task():
    base, _ = made("open_clip")
    base, images, new = base.float(), colours(), colours(seed=1)
    vectors = random_vectors(base, scale=0.05)
    twin = twin_merging(base, vectors, rank=2)
    generator = torch.random.get_rng_state()
    tasks = {str(index): (nn.Identity(), [(part, None)]) for index, part in enumerate(images)}
    report = train_router(twin, tasks, seed=0)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert report.tasks == ("0", "1", "2")
    assert report.inputs == (24, 24, 24)
    assert len(report.losses) == 50
    assert report.losses[-1] < report.losses[0]
    assert report.accuracy > 95
    weights = twin.route(new.flatten(0, 1))
    torch.testing.assert_close(weights.sum(-1), torch.ones(72))
    assert (weights.argmax(-1) == torch.arange(3).repeat_interleave(24)).float().mean() > 0.9
    with torch.no_grad():
        mixed = twin.mixed(weights, new.flatten(0, 1))
        torch.testing.assert_close(twin(new.flatten(0, 1)), mixed)
    again = twin_merging(base, vectors, rank=2)
    assert train_router(again, tasks, seed=0) == report
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in again.state_dict().items())
    assert train_router(again, tasks, seed=1) != report


def test_embeddings_of_other_outputs():
    base, inputs = made("Hugging Face")
    twin = twin_merging(base, random_vectors(base), rank=1)
    torch.testing.assert_close(twin.embed(inputs), run(lambda x: twin.mixed(torch.zeros(3), x), inputs).mean(1))
    twin = twin_merging(base, random_vectors(base), rank=1, embed=lambda output: output.last_hidden_state[:, 0])
    report = train_router(twin, {str(i): [{"pixel_values": inputs + i}] for i in range(3)}, epochs=1, seed=0)
    assert report.inputs == (4, 4, 4)
    twin = twin_merging(base, random_vectors(base), rank=1, embed=lambda output: 3)
    with pytest.raises(ShapeError, match=r"embed: expected a tensor \(B, D\), got int"):
        twin.embed(inputs)


def test_there_is_no_router_yet():
    base = Plain()
    twin = twin_merging(base, random_vectors(base), rank=1)
    with pytest.raises(InputError, match="router: there is none yet"):
        twin(torch.ones(2, 3, dtype=torch.float64))
    twin.router = nn.Linear(2, 3, dtype=torch.float64)
    assert twin(torch.ones(2, 3, dtype=torch.float64)).shape == (2, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rank": 0}, InputError, "rank: expected a whole number of at least 1, got 0"),
        ({"vectors": []}, InputError, "vectors: expected at least one"),
        ({"vectors": [{"other": torch.ones(2)}]}, StateMismatchError, "model lacks 'other'"),
        ({"vectors": [{"weight": torch.full((2, 3), torch.nan)}]}, NonFiniteError, r"\['weight'\] holds 6 non-finite"),
        ({"model": dict}, TypeError, "model: expected a torch.nn.Module"),
        ({"shared": {}}, StateMismatchError, "shared lacks 'weight'"),
    ],
)
def test_bad_input(changes, error, message):
    good = {"model": nn.Linear(3, 2), "vectors": [{"weight": torch.ones(2, 3)}] * 2, "rank": 1}
    given = good | changes
    with pytest.raises(error, match=message):
        twin_merging(given.pop("model"), given.pop("vectors"), **given)


@pytest.mark.parametrize("weights", [torch.ones(2), torch.ones(4, 2), torch.ones(1, 1, 3), torch.ones(())])
def test_bad_weights(weights):
    twin = twin_merging(Plain(), random_vectors(Plain()), rank=1)
    with pytest.raises(ShapeError, match=r"weights: expected shape \(B, 3\)"):
        twin.mixed(weights, torch.ones(4, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"twin": nn.Linear(2, 2)}, TypeError, "twin: expected what twin_merging returns, got Linear"),
        ({"tasks": {"a": [torch.ones(2, 3)]}}, InputError, "tasks: expected 3, as many as there were vectors, got 1"),
        ({"tasks": [torch.ones(2, 3)]}, TypeError, "tasks: expected a mapping"),
        ({"epochs": 0}, InputError, "epochs"),
        ({"batch_size": 1}, InputError, "batch_size"),
        ({"lr": 0.0}, InputError, "lr"),
        ({"hidden": 0}, InputError, "hidden"),
    ],
)
def test_bad_training(changes, error, message):
    tasks = {name: [torch.ones(2, 3, dtype=torch.float64)] for name in "abc"}
    given = {"twin": twin_merging(Plain(), random_vectors(Plain()), rank=1), "tasks": tasks, "seed": 0} | changes
    with pytest.raises(error, match=message):
        train_router(given.pop("twin"), given.pop("tasks"), **given)


def test_embeddings_must_be_finite():
    twin = twin_merging(Plain(), random_vectors(Plain()), rank=1)
    tasks = {name: [torch.full((2, 3), torch.nan, dtype=torch.float64)] for name in "abc"}
    with pytest.raises(NonFiniteError, match=r"tasks\['a'\]: the embeddings of a bare tensor"):
        train_router(twin, tasks, seed=0)
