"""Fisher merging: its formula, what it is optimal for, and entries that nobody needs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import rmtllmf.taskvec._engine as engine
from helpers import statistics_definitions as definitions
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.taskvec import fisher, fisher_information, fuse, fuse_files, weighted_average

SHAPES = {"m": (6, 5), "v": (30,), "s": (), "none": (0, 3)}


def normal(seed, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=source).to(dtype) for key, shape in SHAPES.items()}


def information(seed, count, power=4):
    """Over many orders of magnitude."""
    return [{key: t.abs() ** power for key, t in normal(100 * seed + index).items()} for index in range(count)]


def double(states):
    return [{key: tensor.double() for key, tensor in state.items()} for state in states]


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 1000),
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=4).filter(any),
    normalize=st.booleans(),
    floor=st.sampled_from([1e-9, 1e-3, 1.0]),
    piece=st.sampled_from([7, 1 << 17]),
)
def test_the_definition(seed, weights, normalize, floor, piece):
    count = len(weights)
    vectors, needed = [normal(seed + index) for index in range(count)], information(seed, count)
    options = {"normalize": normalize, "floor": floor}
    expected = definitions.fisher(double(vectors), double(needed), weights, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "PIECE", piece)
        fused = fisher(vectors, needed, weights=weights, scale=0.5, **options)
    for key in SHAPES:
        torch.testing.assert_close(fused[key].double(), 0.5 * expected[key], rtol=2e-5, atol=1e-6)


def test_it_is_the_optimum_of_the_joint_posterior():
    """No other update has a smaller sum of squares, weighted by the information."""
    vectors, needed = [normal(seed) for seed in (1, 2, 3)], information(0, 3, power=1)
    fused = fisher(vectors, needed, normalize=False, floor=1e-12)

    def cost(update):
        return sum(
            float((f[key] * (update[key] - vector[key]) ** 2).sum())
            for vector, f in zip(vectors, needed, strict=True)
            for key in SHAPES
        )

    for seed in range(5):
        for size in (0.1, 1e-2):
            other = {key: fused[key] + size * tensor for key, tensor in normal(50 + seed).items()}
            assert cost(other) > cost(fused)


def test_special_cases():
    vectors = [normal(seed) for seed in (1, 2, 3)]
    mean = weighted_average(vectors)
    ones = [{key: torch.full(shape, 1.0 + index) for key, shape in SHAPES.items()} for index in range(3)]
    zeros = [{key: torch.zeros(shape) for key, shape in SHAPES.items()} for _ in range(3)]
    for needed in (ones, zeros):  # whatever the units; and nobody needs anything
        for key, tensor in fisher(vectors, needed).items():
            torch.testing.assert_close(tensor, mean[key])
    alone = fisher(vectors[:1], information(0, 1))
    assert all(torch.allclose(alone[key], vectors[0][key]) for key in SHAPES)
    only = [ones[0], zeros[0], zeros[0]]
    for key, tensor in fisher(vectors, only, floor=1e-9).items():
        torch.testing.assert_close(tensor, vectors[0][key])


def test_units_of_a_task_do_not_matter_if_normalised():
    vectors, needed = [normal(seed) for seed in (1, 2)], information(0, 2)
    fused = fisher(vectors, needed)
    other = [needed[0], {key: 2.0**20 * tensor for key, tensor in needed[1].items()}]
    assert all(torch.equal(fisher(vectors, other)[key], fused[key]) for key in SHAPES)
    both = [{key: 2.0**20 * tensor for key, tensor in each.items()} for each in needed]
    plain = fisher(vectors, needed, normalize=False)
    assert all(torch.equal(fisher(vectors, both, normalize=False)[key], plain[key]) for key in SHAPES)
    assert not torch.allclose(fisher(vectors, other, normalize=False)["m"], plain["m"])


def test_models_files_and_what_the_base_is(tmp_path):
    base, models, needed = normal(0), [normal(1), normal(2)], information(3, 2, power=1)
    fused = fuse(base, models, fisher, information=needed, normalize=False)
    expected = definitions.fisher(double(models), double(needed), normalize=False)  # the models' own average
    for key in SHAPES:
        torch.testing.assert_close(fused[key].double(), expected[key], rtol=1e-5, atol=1e-5)
    paths = [tmp_path / name for name in ("base.safetensors", "0.safetensors", "1.safetensors")]
    for path, state in zip(paths, [base, *models], strict=True):
        save_file(state, path)
    fuse_files(paths[0], paths[1:], tmp_path / "out.safetensors", fisher, information=needed, normalize=False)
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[key], fused[key]) for key in SHAPES)


def test_a_regression_of_two_tasks_on_different_inputs():
    """Each task sees one input: its column comes from its model, without loss."""
    source = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(2, 3, bias=False)
    vectors = [{"weight": torch.randn(3, 2, generator=source)} for _ in range(2)]
    inputs = [torch.randn(20, 2, generator=source) * torch.tensor(mask) for mask in ([1.0, 0.0], [0.0, 1.0])]
    needed = [
        fisher_information(model, [x], state={"weight": model.weight.detach() + vector["weight"]})
        for x, vector in zip(inputs, vectors, strict=True)
    ]
    fused = fisher(vectors, needed, floor=1e-9)["weight"]
    for index, vector in enumerate(vectors):
        torch.testing.assert_close(fused[:, index], vector["weight"][:, index])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"floor": 0}, InputError, "floor: expected a positive finite number"),
        (
            {"information": information(0, 1)},
            ShapeError,
            "information: expected 2 mappings, .* got 1",
        ),
        ({"information": [{}, {}]}, StateMismatchError, r"information\[0\] lacks 'm', 'none', 's', 'v'"),
        ({"weights": [1.0, -1.0]}, InputError, "weights: expected at least 0, and one above, for 'm', got"),
        ({"weights": {"v": 0.0}}, InputError, "weights: expected at least 0, and one above, for 'v'"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    given_arguments = {"information": information(0, 2)} | arguments
    with pytest.raises(error, match=message):
        fisher([normal(0), normal(1)], **given_arguments)


def test_a_negative_or_broken_information_is_named():
    for value, error in ((-1.0, InputError), (float("nan"), NonFiniteError), (float("inf"), NonFiniteError)):
        needed = information(0, 2)
        needed[1]["v"][4] = value
        with pytest.raises(error, match=r"information\[1\]\['v'\]"):
            fisher([normal(0), normal(1)], needed)
