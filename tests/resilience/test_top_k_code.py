"""Top-k codes: what is kept and which of equals, what its positions cost, and its error after transmission."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmtllmf.channel import transmit
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.resilience.coding import channel_uses, repeated_mse, repetitions
from rmtllmf.resilience.top_k_code import position_bits, top_k_code


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept_by_sorting(entries, count):
    """The largest magnitudes, of equal ones the first; the others 0."""
    order = np.argsort(-np.abs(entries), kind="stable")[:count]
    kept = np.zeros_like(entries)
    kept[order] = entries[order]
    return kept


@given(
    entries=st.lists(st.integers(-3, 3), min_size=5, max_size=40),
    cut=st.integers(1, 4),
    density=st.floats(0.01, 1),
)
def test_the_largest_are_kept_exactly(entries, cut, density):
    """Over two tensors whose sorted names are not their order; few values, so that many are equal."""
    flat = np.array(entries, dtype=float)
    vector = {"z": torch.tensor(flat[cut:]), "a": torch.tensor(flat[:cut])}
    count = max(1, math.floor(density * len(flat) * (1 + 1e-15)))
    code = top_k_code(vector, density)
    decoded = code.decode(code.sent)
    assert code.sent["values"].shape == (count,)
    np.testing.assert_array_equal(np.concatenate([decoded["a"], decoded["z"]]), kept_by_sorting(flat, count))
    assert code.bits == math.ceil(math.log2(math.comb(len(flat), count)) - 1e-9)
    single = top_k_code(vector, density, per="tensor")
    for name, tensor in single.decode(single.sent).items():
        count = max(1, math.floor(density * len(tensor) * (1 + 1e-15)))
        np.testing.assert_array_equal(tensor, kept_by_sorting(vector[name].numpy(), count))


def test_shapes_come_back_and_strides_do_not_matter():
    vector = {"w": normal(6, 8).T, "s": torch.tensor(9.0, dtype=torch.float64), "none": torch.zeros(0, 3)}
    code = top_k_code(vector, 0.25)
    decoded = code.decode(code.sent)
    assert {name: tensor.shape for name, tensor in decoded.items()} == {n: t.shape for n, t in vector.items()}
    assert decoded["s"] == 9
    kept = decoded["w"] != 0
    assert torch.equal(decoded["w"][kept], vector["w"][kept])
    assert vector["w"][~kept].abs().max() < vector["w"][kept].abs().min()


def test_values_are_at_their_own_positions():
    """Each received value lands where its own entry was, not only on the right set."""
    vector = {"b": normal(30), "a": normal(20, seed=1)}
    code = top_k_code(vector, 0.2)
    marks = torch.arange(1.0, 11.0, dtype=torch.float64)
    decoded = code.decode({"values": marks})
    for value, mark in zip(code.sent["values"], marks, strict=True):
        (name,) = [name for name in vector if (decoded[name] == mark).any()]
        assert vector[name][decoded[name] == mark] == value


@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (2, 1), (6, 3), (4096, 1), (4096, 2048), (4097, 41), (86_000_000, 860_000)]
)
def test_positions_cost_the_logarithm_of_the_binomial_coefficient(n, k):
    mpmath.mp.dps = 40
    exact = mpmath.log(mpmath.binomial(n, k), 2)
    assert abs(position_bits(n, k) - mpmath.ceil(exact - mpmath.mpf("1e-20"))) <= (n > 4096)
    assert position_bits(n, k) >= exact - 1e-6


def test_positions_are_paid_for():
    vector = {"w": normal(100, 100)}
    code = top_k_code(vector, 0.01)
    assert code.bits == position_bits(10_000, 100) > 800  # 8 bits an entry
    assert channel_uses(code, bits_per_use=2.0) == 50 + math.ceil(code.bits / 2)
    assert repetitions(code, vector, bits_per_use=2.0) == (5000 - math.ceil(code.bits / 2)) // 50
    apart = top_k_code({"v": normal(100), "w": normal(200)}, 0.1, per="tensor")
    assert apart.bits == position_bits(100, 10) + position_bits(200, 20)
    assert top_k_code(vector, 1.0).bits == 0


def test_the_error_after_transmission_is_the_closed_form():
    """For one copy of every value, and the mean of several."""
    vector = {"w": normal(40, 50) ** 3}
    energy = float(vector["w"].square().sum())
    code = top_k_code(vector, 0.1)
    share = float(code.sent["values"].square().sum()) / energy
    for copies in (1, 6):
        trials, found = 100, []
        for seed in range(trials):
            sent = [transmit([code.sent], [0.8], seed=seed * 10 + k)[0]["values"] for k in range(copies)]
            decoded = code.decode({"values": sum(sent) / copies})
            found.append(float((decoded["w"] - vector["w"]).square().sum()) / energy)
        error = np.std(found) / trials**0.5
        assert abs(np.mean(found) - (1 - share + repeated_mse(0.8, copies) * share)) < 5 * error
        assert error < 0.02


def test_sparse_vectors_gain_at_equal_channel_uses():
    """Where 2 % of the entries are all there is; positions at 2 bits a channel use, the rate of an MSE of 1/4."""
    vector = {"w": normal(100, 100) * (torch.rand(100, 100, generator=torch.Generator().manual_seed(1)) < 0.02)}
    code = top_k_code(vector, 0.021)
    K = repetitions(code, vector, bits_per_use=2.0)
    assert K > 30
    (plain,) = transmit([vector], [0.25], seed=0)
    (received,) = transmit([code.sent], [float(repeated_mse(0.25, K))], seed=0)
    errors = [float((found["w"] - vector["w"]).norm()) for found in (code.decode(received), plain)]
    assert errors[0] < 0.3 * errors[1]


BAD = {
    "none": (lambda: top_k_code({"w": torch.ones(3)}, 0), InputError, "density: expected a share in .0, 1., where"),
    "percent": (lambda: top_k_code({"w": torch.ones(3)}, 20), InputError, "got 20"),
    "text": (lambda: top_k_code({"w": torch.ones(3)}, "1"), TypeError, "density: expected a real number"),
    "per row": (lambda: top_k_code({"w": torch.ones(3)}, 0.5, per="row"), InputError, "per: expected .* got 'row'"),
    "list": (lambda: top_k_code([torch.ones(3)], 0.5), TypeError, "vector: expected a mapping"),
    "empty": (lambda: top_k_code({"w": torch.ones(0)}, 0.5), InputError, "no floating-point entries"),
    "infinite": (lambda: top_k_code({"w": torch.tensor([torch.inf])}, 0.5), NonFiniteError, "vector.'w'."),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
