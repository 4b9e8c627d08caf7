"""The symbol link against closed forms, wherever these are exact, and against what its parts promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.oracles import complex_normal, random_covariance
from rmtllmf.channel import Constellation, lmmse, sic, symbol_error_rate, transmit, transmit_symbols
from rmtllmf.channel.quantiser import QUANTISERS, Quantiser, lloyd_max
from rmtllmf.metrics import snr_db
from rmtllmf.taskvec import TaskVector

USERS = 3


def gaussian(count, *, users=USERS, dtype=torch.float32, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [{"w": (q + 1) * torch.randn(count, generator=source, dtype=dtype)} for q in range(users)]


@pytest.fixture(scope="module")
def channel():
    rng = np.random.default_rng(1)
    return complex_normal(rng, 4, USERS), 0.5, 0.3 * random_covariance(rng, 4, 2) + 0.1 * np.eye(4)


def symbol_errors(sent, received):
    """(Q, n) complex errors in units of the symbols, by the rms of each vector."""
    parts = []
    for vector, got in zip(sent, received, strict=True):
        rms = vector["w"].double().square().mean().sqrt()
        parts.append(torch.view_as_complex(((got["w"] - vector["w"]).double() / rms / math.sqrt(2)).view(-1, 2)))
    return torch.stack(parts).numpy()


@pytest.mark.parametrize("design", [None, 0.1 * np.eye(4)], ids=["matched", "unaware"])
@pytest.mark.parametrize("receiver", ["sic", "lmmse"])
def test_the_analog_link_has_the_receptions_error_covariance(channel, receiver, design):
    """Exact for a linear receiver and for genie cancellation: 500,000 symbols, 5 standard errors."""
    H, P, C = channel
    options = {"designed_for": design, **({"order": [2, 0, 1]} if receiver == "sic" else {})}
    sent = gaussian(1_000_000)
    received = transmit_symbols(sent, H, P, C, seed=0, modulation="analog", receiver=receiver, **options)
    rx = (lmmse if receiver == "lmmse" else sic)(H, P, C, **options)
    expected = rx.noise_covariance / np.outer(rx.gain, rx.gain)
    errors = symbol_errors(sent, received)
    products = errors[:, None] * errors[None].conj()
    bound = 5 * np.sqrt((np.abs(products) ** 2).mean(-1) / products.shape[-1])
    assert np.all(np.abs(products.mean(-1) - expected) < bound)
    assert np.abs(expected - np.diag(np.diag(expected))).max() > 0.005
    # and is what the Gaussian model of the link adds
    modelled = symbol_errors(sent, transmit(sent, rx, seed=0, estimator="unbiased"))
    np.testing.assert_allclose(np.cov(modelled), np.cov(errors), atol=2 * bound.max())


@pytest.mark.parametrize("order", [4, 16, 64, 256])
def test_symbol_error_rates_are_the_textbooks(order):
    """One user, one antenna, white noise; with one coefficient a real dimension its error rate is that of PAM."""
    half = Constellation(order).bits // 2
    source = torch.Generator().manual_seed(order)
    levels = torch.linspace(-1, 1, 1 << half)
    sent = [{"w": levels[torch.randint(0, 1 << half, (400_000,), generator=source)]}]
    for target in (0.3, 0.02):
        snr = np.geomspace(0.1, 1e4, 4001)
        snr = snr[np.argmin(np.abs(symbol_error_rate(order, snr) - target))]
        (got,) = transmit_symbols(
            sent, np.ones((1, 1)) + 0j, snr, np.eye(1), seed=1, modulation=order, bits=half, receiver="lmmse"
        )
        wrong = ((got["w"] - sent[0]["w"]).abs() > 1e-3).view(-1, 2).any(-1).double().mean().item()
        p = float(symbol_error_rate(order, snr))
        assert wrong == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 200_000))
        # Gray labels: a wrong symbol is nearly always a neighbour, which differs in one bit
        if target < 0.1:
            quantiser = Quantiser(levels)
            flipped = quantiser.encode(got["w"]) ^ quantiser.encode(sent[0]["w"])
            count = sum((flipped >> bit) & 1 for bit in range(half))
            assert (count > 1).sum() <= 0.01 * (count > 0).sum()


@pytest.mark.parametrize("order", [4, 16, 64, 256])
def test_constellations(order):
    constellation = Constellation(order)
    bits = torch.tensor([[(k >> i) & 1 for i in reversed(range(constellation.bits))] for k in range(order)])
    points = constellation.modulate(bits)
    assert points.abs().square().mean() == pytest.approx(1, abs=1e-6)
    assert len({(round(p.real, 4), round(p.imag, 4)) for p in points.tolist()}) == order
    assert torch.equal(constellation.decide(points), bits.to(torch.uint8))
    distance = (points[:, None] - points[None]).abs()
    smallest = distance[distance > 1e-6].min()
    assert smallest == pytest.approx(2 * constellation.unit, rel=1e-5)
    neighbours = (distance - smallest).abs() < 1e-4
    assert ((bits[:, None] != bits[None]).sum(-1)[neighbours] == 1).all()
    # posteriors: by Bayes over all points
    noisy = points[:5] + 0.1 * (1 - 2j)
    weights = torch.softmax(-(noisy[:, None] - points[None]).abs().square() / 0.3, dim=-1)
    torch.testing.assert_close(constellation.bit_probabilities(noisy, 0.3), weights @ bits.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(constellation.posterior_mean(noisy, 0.3), weights.to(points.dtype) @ points)


@given(st.integers(0, 10**6), st.sampled_from(QUANTISERS), st.integers(1, 8), st.sampled_from([4, 16, 64, 256]))
def test_without_noise_only_the_quantiser_is_left(seed, kind, bits, order):
    """Odd lengths, several tensors, any number of bits a symbol: every coefficient comes back as its nearest level."""
    source = torch.Generator().manual_seed(seed)
    sent = [
        {"b": torch.randn(37, generator=source), "a": torch.randn(5, 3, generator=source), "steps": torch.tensor(q)}
        for q in range(2)
    ]
    got = transmit_symbols(
        sent, np.eye(2) + 0j, 1.0, 1e-9 * np.eye(2), seed=0, modulation=order, bits=bits, quantiser=kind
    )
    for q in range(2):
        whole = torch.cat([sent[q]["a"].flatten(), sent[q]["b"]]).double()
        fitted = Quantiser.fit(
            kind, bits, low=whole.min(), high=whole.max(), rms=float(whole.square().mean().sqrt())
        ).levels
        nearest = fitted[(whole[:, None] - fitted[None]).abs().argmin(-1)]
        torch.testing.assert_close(torch.cat([got[q]["a"].flatten(), got[q]["b"]]).double(), nearest)
        assert int(got[q]["steps"]) == q


def test_lloyd_max_is_the_published_table_and_satisfies_its_conditions():
    """SNRs of Jayant and Noll, 1984, table 4.3; each level the mean of its cell."""
    for bits, snr in ((1, 4.40), (2, 9.30), (3, 14.62), (4, 20.22), (5, 26.01)):
        levels = lloyd_max(bits)
        torch.testing.assert_close(levels, -levels.flip(0))
        x = torch.linspace(-9, 9, 2_000_001, dtype=torch.float64)
        density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
        cells = Quantiser(levels).encode(x)
        assert -10 * math.log10((density * (x - levels[cells]).square()).sum()) == pytest.approx(snr, abs=0.006)
        mass, moment = torch.zeros_like(levels), torch.zeros_like(levels)
        mass.index_add_(0, cells, density)
        moment.index_add_(0, cells, density * x)
        torch.testing.assert_close(moment / mass, levels, atol=1e-4, rtol=0)


def test_the_quantisers_rank_as_they_should_on_gaussian_numbers(channel):
    H, P, _ = channel
    sent = gaussian(200_000)
    snr = {}
    for kind in QUANTISERS:
        got = transmit_symbols(sent, H, P, 1e-9 * np.eye(4), seed=0, modulation=4, bits=4, quantiser=kind)
        snr[kind] = snr_db(sent[0], got[0])
    assert snr["lloyd_max"] == pytest.approx(-10 * math.log10(0.009497), abs=0.05)
    assert snr["lloyd_max"] > max(snr["uniform"], snr["companded"]) + 1


def test_real_cancellation_passes_errors_on_and_genie_does_not():
    rng = np.random.default_rng(5)
    H = complex_normal(rng, 3, 3)
    sent = gaussian(60_000)

    def snr(noise, **options):
        got = transmit_symbols(sent, H, 1.0, noise * np.eye(3), seed=0, order=[0, 1, 2], **options)
        return np.array([snr_db(v, g) for v, g in zip(sent, got, strict=True)])

    clean = snr(1e-7, modulation=16, cancellation="real")
    np.testing.assert_array_equal(clean, snr(1e-7, modulation=16, cancellation="genie"))
    for modulation in (16, 64, "analog"):
        genie, real = (snr(0.05, modulation=modulation, cancellation=kind) for kind in ("genie", "real"))
        assert genie[0] == real[0]  # decoded first: nothing to pass on
        assert np.all(genie[1:] > real[1:] + 0.5)


def test_soft_decisions_are_posterior_means():
    """4-QAM, one bit a dimension and equally likely words: the soft estimate is the MMSE estimate, in closed form."""
    source = torch.Generator().manual_seed(0)
    sent = [{"w": torch.tensor([-1.0, 1.0])[torch.randint(0, 2, (400_000,), generator=source)]}]
    snr = 1.5
    options = {"seed": 0, "modulation": 4, "bits": 1, "receiver": "lmmse"}
    hard, soft = (
        transmit_symbols(sent, np.ones((1, 1)) + 0j, snr, np.eye(1), decisions=kind, **options)[0]["w"]
        for kind in ("hard", "soft")
    )
    # E tanh-estimate error of a BPSK symbol of amplitude a in noise of variance v: 1 - E tanh^2 at a^2/v = snr
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    weight = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    mmse = float((weight * (1 - torch.tanh(snr + math.sqrt(snr) * x))).sum())
    assert float((soft - sent[0]["w"]).square().mean()) == pytest.approx(mmse, rel=0.02)
    flip = 0.5 * math.erfc(math.sqrt(snr / 2))
    assert float((hard - sent[0]["w"]).square().mean()) == pytest.approx(4 * flip, rel=0.02)


def test_block_fading_over_consecutive_parts():
    """Two blocks, the second nearly silent: the first half arrives, the second does not."""
    H = np.stack([np.eye(2), 1e-3 * np.eye(2)]) + 0j
    sent = gaussian(100_000, users=2)
    for modulation in (16, "analog"):
        got = transmit_symbols(sent, H, 1.0, 1e-4 * np.eye(2), seed=0, modulation=modulation)
        first, second = got[0]["w"].split(50_000)
        half = {"w": sent[0]["w"][:50_000]}, {"w": sent[0]["w"][50_000:]}
        assert snr_db(half[0], {"w": first}) > 30
        assert snr_db(half[1], {"w": second}) < 0


def test_the_same_bits_for_any_key_order_and_number_of_threads():
    source = torch.Generator().manual_seed(2)
    sent = [
        TaskVector({"b": torch.randn(50_001, generator=source), "a": torch.randn(3, 5, generator=source)})
        for _ in range(2)
    ]
    H = complex_normal(np.random.default_rng(3), 4, 2)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            vectors = sent if count == 1 else [{"a": v["a"], "b": v["b"]} for v in sent]
            results.append(transmit_symbols(vectors, H, 1.0, np.eye(4), seed=3))
    finally:
        torch.set_num_threads(threads)
    assert isinstance(results[0][0], TaskVector)
    assert isinstance(results[1][0], dict)
    for q in range(2):
        for key in ("a", "b"):
            assert torch.equal(results[0][q][key], results[1][q][key])


def test_per_tensor_ranges_serve_small_tensors():
    sent = [{"large": torch.linspace(-100, 100, 1000), "small": torch.linspace(-0.01, 0.01, 1000)}]
    whole, own = (
        transmit_symbols(sent, np.eye(1) + 0j, 1.0, 1e-9 * np.eye(1), seed=0, per_tensor=flag)[0]["small"]
        for flag in (False, True)
    )
    assert snr_db({"w": sent[0]["small"]}, {"w": whole}) < 0  # all of it falls between two levels
    assert snr_db({"w": sent[0]["small"]}, {"w": own}) > 40


def test_saturation_bounds_the_error_where_the_gaussian_model_does_not():
    """The documented difference: a digital error never leaves the range, whatever the noise."""
    sent = gaussian(50_000, users=1)
    (got,) = transmit_symbols(sent, np.eye(1) + 0j, 1.0, 1e4 * np.eye(1), seed=0, modulation=64)
    assert got["w"].min() >= sent[0]["w"].min()
    assert got["w"].max() <= sent[0]["w"].max()
    (modelled,) = transmit(sent, sic(np.eye(1) + 0j, 1.0, 1e4 * np.eye(1)), seed=0, estimator="unbiased")
    assert modelled["w"].abs().max() > 10 * sent[0]["w"].abs().max()


def test_double_precision_and_progress(capsys):
    sent = gaussian(2000, users=1, dtype=torch.float64)
    (got,) = transmit_symbols(sent, np.eye(1) + 0j, 1.0, 1e-26 * np.eye(1), seed=0, modulation="analog", progress=True)
    assert got["w"].dtype == torch.float64
    assert snr_db(sent[0], got) > 250
    assert "2.00k/2.00k" in capsys.readouterr().err


@pytest.mark.parametrize("receiver", ["sic", "lmmse"])
def test_a_jammer_that_changes_from_block_to_block(receiver):
    """Only C has blocks; the receiver, unaware of it, stays the same."""
    H = complex_normal(np.random.default_rng(7), 4, 2)
    C = np.stack([0.01 * np.eye(4), 1.0 * np.eye(4)]) + 0j
    sent = gaussian(40_000, users=2)
    got = transmit_symbols(sent, H, 1.0, C, seed=0, modulation="analog", receiver=receiver, designed_for=C[0])
    rx = (sic if receiver == "sic" else lmmse)(H, 1.0, C, designed_for=C[0])
    expected = np.einsum("bqq->bq", rx.noise_covariance).real / rx.gain**2
    for q in range(2):
        error = (got[q]["w"] - sent[q]["w"]).double().numpy() / float(sent[q]["w"].square().mean().sqrt())
        for block, part in enumerate(np.split(error, 2)):
            assert np.mean(part**2) == pytest.approx(expected[block, q], rel=5 * math.sqrt(2 / 20_000))


def test_parameters_carry_no_graph_through_the_link():
    sent = [{"w": torch.nn.Parameter(torch.ones(8))}]
    (got,) = transmit_symbols(sent, np.eye(1) + 0j, 1.0, np.eye(1), seed=0, modulation="analog")
    assert not got["w"].requires_grad


@pytest.mark.parametrize("order", [4, 16, 64, 256])
def test_constellations_of_arrays(order):
    """The numbers of tensors, in arrays, whatever their layout."""
    rng = np.random.default_rng(0)
    grid = Constellation(order)
    bits = np.broadcast_to(rng.integers(0, 2, (50, grid.bits), dtype=np.uint8), (2, 50, grid.bits))
    sent = grid.modulate(bits)
    noise = np.linspace(0.1, 0.5, 50)
    noise.setflags(write=False)
    heard = (sent + 0.1 * complex_normal(rng, 2, 50))[:, ::-1]
    tensors = torch.from_numpy(bits.copy()), torch.from_numpy(heard.copy())
    pairs = [
        (sent, grid.modulate(tensors[0])),
        (grid.decide(heard), grid.decide(tensors[1])),
        (grid.nearest(heard), grid.nearest(tensors[1])),
        (grid.posterior_mean(heard, 0.1), grid.posterior_mean(tensors[1], 0.1)),
        (grid.bit_probabilities(heard, noise), grid.bit_probabilities(tensors[1], torch.from_numpy(noise.copy()))),
    ]
    for array, tensor in pairs:
        assert type(array) is np.ndarray
        assert array.dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(array, tensor.numpy())
    assert np.array_equal(grid.decide(sent), bits)
