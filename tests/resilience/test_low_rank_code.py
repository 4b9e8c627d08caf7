"""Low-rank codes: Eckart and Young without noise, a closed form with noise, counts and ranks by brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from helpers.draws import double, rounded
from helpers.sent_codes import errors_after_transmission, numbers
from rmtllmf.channel import transmit
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.resilience.coding import repetitions
from rmtllmf.resilience.low_rank_code import low_rank_code, ranks_for
from rmtllmf.resilience.power_loading import power_loading
from rmtllmf.taskvec import TaskVector


def matrix(m, n, values, seed=0):
    """A float64 matrix with these singular values."""
    U, V = (torch.linalg.qr(double(size, len(values), seed=seed + i)).Q for i, size in enumerate((m, n)))
    return U * torch.tensor(values, dtype=torch.float64) @ V.T


def singular_values(tensor):
    return np.linalg.svd(tensor.double().flatten(1).numpy(), compute_uv=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (17, 17), (20, 4, 3, 3)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_without_noise_the_error_is_that_of_eckart_and_young(shape, rank, dtype):
    tensor = rounded(*shape, seed=1, dtype=dtype)
    code = low_rank_code({"w": tensor}, rank)
    m, n = tensor.flatten(1).shape
    assert {name: tuple(part.shape) for name, part in code.sent.items()} == {"w/A": (rank, n), "w/B": (m, rank)}
    decoded = code.decode(code.sent)["w"]
    assert decoded.shape == tensor.shape
    assert decoded.dtype == dtype
    lost, least = float((decoded - tensor).double().norm()), np.linalg.norm(singular_values(tensor)[rank:])
    assert lost == pytest.approx(least, rel=1e-5 if dtype == torch.float32 else 1e-9)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    rank=st.integers(1, 9),
)
def test_counts_are_those_of_the_factors_or_of_the_matrix(shapes, rank):
    vector = {f"w{i}": double(*shape, seed=i) for i, shape in enumerate(shapes)} | {"bias": double(5)}
    code = low_rank_code(vector, rank)
    assert numbers(code) == 5 + sum(min(min(rank, m, n) * (m + n), m * n) for m, n in shapes)
    for name, tensor in code.decode(code.sent).items():
        kept = np.linalg.norm(singular_values(vector[name])[rank:]) if tensor.ndim == 2 else 0.0
        whole = name == "bias" or rank * sum(tensor.shape) >= tensor.numel()
        assert float((tensor - vector[name]).norm()) == pytest.approx(0.0 if whole else kept, abs=1e-9)
    factored = sum(name.endswith("/A") for name in code.sent)
    assert code.bits == (32 * (len(vector) - factored) if factored else 0)


@settings(max_examples=30)
@given(values=st.lists(st.floats(0, 10), min_size=9, max_size=9), energy=st.floats(0.01, 1))
def test_energy_asks_for_the_least_rank_that_keeps_it(values, energy):
    tensor = matrix(20, 30, values)
    squares = singular_values(tensor) ** 2
    rank = ranks_for([{"w": tensor}], energy)["w"]
    kept = squares[:rank].sum()
    assert kept >= energy * squares.sum() * (1 - 1e-9)
    assert rank == 1 or squares[: rank - 1].sum() < energy * squares.sum() * (1 + 1e-9)
    assert low_rank_code({"w": tensor}, energy=energy).sent["w/A"].shape == (rank, 30)


def test_users_share_the_rank_that_the_neediest_needs():
    a = {"w": matrix(20, 20, [1, 0.1, 0.1]), "v": matrix(9, 30, [1, 1, 1])}
    b = {"w": matrix(20, 20, [1, 1, 0.1], seed=3), "v": matrix(9, 30, [5, 0.1], seed=3)}
    ranks = ranks_for([a, b], 0.9)
    assert ranks == {"w": 2, "v": 3}
    codes = [low_rank_code(vector, ranks) for vector in (a, b)]
    transmit([code.sent for code in codes], [0.1, 0.2], seed=0)  # same names, same shapes


@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.5, 0.9])
def test_ratio_is_a_bound_on_all_that_is_sent(ratio):
    vector = {"a": double(30, 40), "b": double(60, 20), "c": double(50, seed=2), "d": double(1, 30, seed=3)}
    total = 30 * 40 + 60 * 20 + 50 + 30
    code = low_rank_code(vector, ratio=ratio)
    assert numbers(code) <= ratio * total
    most = 0  # of all common shares of the full cost
    for share in np.linspace(0, 1, 20001):
        ranks = {"a": max(1, int(share * 1200 / 70)), "b": max(1, int(share * 1200 / 80))}
        cost = 80 + min(1200, ranks["a"] * 70) + min(1200, ranks["b"] * 80)
        most = max(most, cost if cost <= ratio * total else 0)
    assert numbers(code) == most


def test_ranks_by_name_leave_the_other_matrices_whole():
    vector = {"a": double(10, 10), "b": double(10, 10, seed=1)}
    code = low_rank_code(vector, {"a": 2})
    assert sorted(code.sent) == ["a/A", "a/B", "b"]
    torch.testing.assert_close(code.decode(code.sent)["b"], vector["b"])


def test_what_is_left_out_decodes_to_zero():
    shared = double(10, 10)
    vector = TaskVector({"a.w": shared, "tied": shared, "b.w": double(10, 10, seed=1), "b.bias": double(3)})
    code = low_rank_code(vector, 1, only=["tied", "b.bias"])  # a.w is the same memory
    assert sorted(code.sent) == ["a.w/A", "a.w/B", "b.bias"]
    decoded = code.decode(code.sent)
    assert not decoded["b.w"].any()
    assert decoded["tied"] is decoded["a.w"]
    assert decoded["a.w"].any()
    torch.testing.assert_close(decoded["b.bias"], vector["b.bias"])


def test_names_do_not_depend_on_the_order_of_the_vector():
    vector = {"b": double(10, 10), "a": double(10, 10, seed=1), "a.c": double(3)}
    code, turned = (low_rank_code(dict(items), 1) for items in (vector.items(), reversed(vector.items())))
    assert list(code.sent) == list(turned.sent)
    for name, tensor in code.sent.items():
        torch.testing.assert_close(tensor, turned.sent[name], rtol=0, atol=0)


def agrees(found, expected):
    assert abs(found.mean() - expected) < 5 * found.std() / len(found) ** 0.5, (found.mean(), expected)
    assert found.std() / len(found) ** 0.5 < 0.03 * expected  # and the test can tell


@pytest.mark.parametrize("mse", [0.02, 1.5])
@pytest.mark.parametrize(("m", "n"), [(12, 12), (8, 40), (40, 8)])
def test_the_error_after_transmission_is_the_closed_form(m, n, mse):
    values = [3.0, 2.0, 0.5]
    vector = {"w": matrix(m, n, values)}
    code = low_rank_code(vector, rank=3)
    r, spread = 3, sum(values) ** 2
    first = mse * (m**0.5 + n**0.5) ** 2 * spread / (r * (m + n))
    B, A = code.sent["w/B"], code.sent["w/A"]
    noise = mse * float(B.square().sum() + A.square().sum()) / (r * (m + n))
    exact = noise * float(n * B.square().sum() + m * A.square().sum()) / (m * n) ** 0.5
    assert exact == pytest.approx(first, rel=1e-9)
    agrees(errors_after_transmission(code, mse, 500), first + r * (m * n) ** 0.5 * noise**2)


def test_the_product_is_unbiased():
    vector = {"w": matrix(6, 6, [2.0])}
    code = low_rank_code(vector, rank=1)
    trials = 1000
    decoded = torch.stack([code.decode(transmit([code.sent], [0.5], seed=seed)[0])["w"] for seed in range(trials)])
    deviations = (decoded.mean(0) - vector["w"]) / (decoded.std(0) / trials**0.5)
    assert float(deviations.abs().max()) < 5


@pytest.mark.parametrize(("m", "n"), [(10, 10), (10, 90), (90, 10)])
def test_no_other_split_of_the_scale_does_better(m, n):
    """First-order error of c B, A / c at a given power, against a search over c."""
    code = low_rank_code({"w": matrix(m, n, [3.0, 1.0])}, rank=2)
    b, a = (float(code.sent[name].square().sum()) for name in ("w/B", "w/A"))

    def error(log_square):
        x = np.exp(log_square)
        return (n * b * x + m * a / x) * (b * x + a / x)

    found = minimize_scalar(error, bounds=(-5, 5), method="bounded")
    assert error(0.0) <= found.fun * (1 + 1e-9)
    if m != n:  # neither equal norms nor equal mean squares are as good
        assert error(np.log(a / b) / 2) > 1.05 * error(0.0)
        assert error(np.log(a * m / (b * n)) / 2) > 1.05 * error(0.0)


MIXED = {
    "a": 30 * matrix(10, 40, [2.0, 1.0]),
    "b": 0.1 * matrix(50, 30, [3.0, 1.0], seed=2),
    "bias": 1e-2 * double(25, seed=5),
    "norm": 1e-4 * double(10, seed=6),
}


@pytest.mark.parametrize("unit", [1.0, 1e-4])
def test_the_error_of_a_mixed_code_is_the_closed_form(unit):
    """Also of one so small that entries and their roots are of very different size."""
    vector = {name: unit * tensor for name, tensor in MIXED.items()}
    code = low_rank_code(vector, rank=2)
    parts = [3.0 * 30 * (10**0.5 + 40**0.5), 0.1 * 4.0 * (50**0.5 + 30**0.5)]
    parts += [MIXED[name].numel() ** 0.5 * float(MIXED[name].norm()) for name in ("bias", "norm")]
    expected = unit**2 * 1e-3 * sum(parts) ** 2 / numbers(code)
    agrees(errors_after_transmission(code, 1e-3, 400), expected)


def test_no_other_gains_do_better():
    """The best gains for the sensitivities of the product to what is sent are all the same."""
    code = low_rank_code(MIXED, rank=2)
    energy = {name: float(tensor.square().sum()) for name, tensor in code.sent.items()}
    weights = {name: float(MIXED[name].square().mean()) ** 0.5 for name in ("bias", "norm")}
    for name in ("a", "b"):
        m, n = MIXED[name].shape
        weights[f"{name}/B"] = energy[f"{name}/A"] / 2 / (m * n) ** 0.5
        weights[f"{name}/A"] = energy[f"{name}/B"] / 2 / (m * n) ** 0.5
    gains = power_loading(code, weights)
    np.testing.assert_allclose(list(gains.values()), 1.0, rtol=1e-6)
    tilted = {name: weight * (4 if name == "b/B" else 1) for name, weight in weights.items()}
    assert power_loading(code, tilted)["b/B"] > 1.1  # and it would say so


def test_a_code_pays_from_two_repetitions_on():
    """A square matrix with r equal singular values: mu / K per number, twice that in the product."""
    vector = {"w": matrix(48, 48, [1.0] * 4)}
    code = low_rank_code(vector, rank=4)
    K = repetitions(code, vector)
    assert K == 6
    coded = errors_after_transmission(code, 0.05 / K, 60)
    plain = 0.05 * float(vector["w"].square().sum())
    assert coded.mean() == pytest.approx(2 * plain / K, rel=0.05)


W = {"w": torch.ones(4, 4), "b": torch.ones(4)}
BAD = {
    "nothing asked for": (lambda: low_rank_code(W), InputError, "expected exactly one of them, got none"),
    "two things": (lambda: low_rank_code(W, 1, energy=0.5), InputError, "got rank and energy"),
    "rank 0": (lambda: low_rank_code(W, 0), InputError, "rank: expected a whole number of at least 1, got 0"),
    "half a rank": (lambda: low_rank_code(W, 1.5), TypeError, "rank: expected an int"),
    "energy": (lambda: low_rank_code(W, energy=1.5), InputError, "energy: expected a share in .0, 1], got 1.5"),
    "no energy": (lambda: ranks_for([W], 0), InputError, "energy: expected a share in .0, 1], got 0"),
    "ratio": (lambda: low_rank_code(W, ratio=1.0), InputError, "ratio: expected a share in .0, 1., got 1"),
    "too little": (lambda: low_rank_code(W, ratio=0.1), InputError, "ratio: 0.1 of 20 numbers is less than the 12"),
    "unknown rank": (lambda: low_rank_code(W, {"x": 1}), InputError, "rank: 'x' is no matrix that is sent: 'w'"),
    "no matrix": (lambda: low_rank_code(W, {"b": 1}), InputError, "rank: 'b' is no matrix"),
    "bad named rank": (lambda: low_rank_code(W, {"w": 0}), InputError, "rank.'w'.: expected a whole number"),
    "misspelt": (lambda: low_rank_code(W, 1, only="x*"), InputError, "only: 'x.' matches none"),
    "nothing": (lambda: low_rank_code(W, 1, only=()), InputError, "only: expected at least one"),
    "no mapping": (lambda: low_rank_code([1], 1), TypeError, "vector: expected a mapping"),
    "nan": (lambda: low_rank_code({"w": torch.full((2, 2), torch.nan)}, 1), NonFiniteError, "vector.'w'."),
    "too small": (
        lambda: low_rank_code({"w": W["w"].double(), "b": torch.full((4,), 1e-90, dtype=torch.float64)}, 1),
        InputError,
        "vector.'b'.: its gain does not fit into float32",
    ),
    "name taken": (lambda: low_rank_code({**W, "w/A": torch.ones(1)}, 1), InputError, "would be sent as 'w/A'"),
    "no vectors": (lambda: ranks_for([], 0.5), InputError, "vectors: expected at least one"),
    "other shapes": (lambda: ranks_for([W, {**W, "w": torch.ones(2, 2)}], 0.5), StateMismatchError, "shape"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
