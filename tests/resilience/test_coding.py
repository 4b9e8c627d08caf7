"""What codes cost in channel uses, how often they fit, and that repetition is the channel's own law."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from rmtllmf.channel import UplinkScenario, lmmse, repeat_block, sic, stack_blocks, transmit
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.resilience.coding import Encoding, channel_uses, reliable_bits, repeated_mse, repetitions
from rmtllmf.resilience.low_rank_code import low_rank_code
from rmtllmf.resilience.power_loading import loaded
from rmtllmf.resilience.sign_code import sign_code
from rmtllmf.resilience.top_k_code import top_k_code
from rmtllmf.taskvec import TaskVector


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


VECTOR = {"a": normal(20, 30, seed=1), "b": normal(7, seed=2)}
CODES = {
    "low rank": lambda vector: low_rank_code(vector, rank=2),
    "top k": lambda vector: top_k_code(vector, 0.3),
    "top k of tensors": lambda vector: top_k_code(vector, 0.3, per="tensor"),
    "signs": sign_code,
    "signs of rows": lambda vector: sign_code(vector, per="row"),
    "loaded": lambda vector: loaded(vector, {"a": 2.0, "b": 0.5}),
    "loaded signs": lambda vector: loaded(sign_code(vector), {"a": 2.0, "b": 0.5}),
}


def with_power(channel):
    H, C = channel
    return H, 1.0, C


def code_by_hand(numbers, bits=0):
    return Encoding({"x": torch.zeros(numbers)}, bits, dict)


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_the_channel_sends_as_many_symbols_as_are_counted(code):
    """A reception with one block for each symbol is the longest that `transmit` accepts."""
    encoding = code(VECTOR)
    symbols = channel_uses(Encoding(encoding.sent, 0, encoding.decoder))
    transmit([encoding.sent], [[0.1]] * symbols, seed=0)
    with pytest.raises(InputError, match=f"the {symbols} symbols"):
        transmit([encoding.sent], [[0.1]] * (symbols + 1), seed=0)


def test_a_plain_vector_counts_what_is_sent():
    shared = torch.ones(3, 3)
    vector = {"a": shared, "tied": shared, "n": torch.tensor(5), "bn.running_mean": torch.ones(50), "b": torch.ones(4)}
    assert channel_uses(vector) == 7  # (9 + 4) / 2, rounded up
    transmit([vector], [[0.1]] * 7, seed=0)
    assert channel_uses(TaskVector({"a": shared, "tied": shared})) == 5


def test_bits_are_paid_at_what_a_channel_use_carries():
    code = code_by_hand(10, bits=101)
    assert channel_uses(code, bits_per_use=2.0) == 5 + 51
    assert channel_uses(code, bits_per_use=0.5) == 5 + 202
    assert channel_uses(code_by_hand(10)) == 5  # no bits, no price to name
    with pytest.raises(InputError, match="bits_per_use: expected what a reliable code carries"):
        channel_uses(code)
    with pytest.raises(InputError, match="bits_per_use"):
        repetitions(code, 100)


def test_repetitions_are_the_most_that_fit():
    for numbers, bits in ((10, 0), (11, 7), (1, 300)):
        code = code_by_hand(numbers, bits)
        for budget in (1, 5, 6, 100, 1234):
            K = repetitions(code, budget, bits_per_use=3.0)
            once, side = -(-numbers // 2), -(-bits // 3)
            assert max((k for k in range(2000) if k * once + side <= budget), default=0) == K
    assert repetitions(low_rank_code({"w": torch.ones(100, 100)}, 5), {"w": torch.ones(100, 100)}) == 10
    assert repetitions(code_by_hand(10), code_by_hand(100)) == 10


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_forms_ties_and_passengers_survive(code):
    shared = VECTOR["a"]
    vector = {"tied": shared, "b": VECTOR["b"].to(torch.bfloat16), "n": torch.tensor(5), "a": shared}
    encoding = code(vector)
    assert all(tensor.dtype == torch.float32 for tensor in encoding.sent.values())
    decoded = encoding.decode(encoding.sent)
    assert type(decoded) is dict
    assert list(decoded) == list(vector)
    assert decoded["tied"] is decoded["a"]
    assert decoded["b"].dtype == torch.bfloat16
    assert decoded["n"].item() == 5
    assert decoded["n"] is not vector["n"]
    assert type(code(TaskVector(VECTOR)).decode(code(VECTOR).sent)) is TaskVector
    double = code({name: tensor.double() for name, tensor in VECTOR.items()})
    assert {tensor.dtype for tensor in double.decode(double.sent).values()} == {torch.float64}


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_the_base_station_needs_nothing_of_the_vector_but_its_form(code):
    """What decodes holds no value of the vector: overwritten, it decodes to the same."""
    vector = {name: tensor.clone() for name, tensor in VECTOR.items()}
    encoding = code(vector)
    sent = {name: tensor.clone() for name, tensor in encoding.sent.items()}
    before = encoding.decode(sent)
    for tensor in vector.values():
        tensor.fill_(77.0)
    for other in (encoding, copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):  # noqa: S301
        for name, tensor in other.decode(sent).items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", CODES)
def test_what_decodes_is_small(name):
    """No vector travels along: of 40,000 entries (160 kB) only the positions, where there are some."""
    encoding = CODES[name]({"a": normal(200, 200), "b": normal(9, seed=1)})
    positions = sum(tensor.numel() for tensor in encoding.sent.values()) if name.startswith("top k") else 0
    assert len(pickle.dumps(encoding.decoder)) < 8 * positions + 10_000


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_received_mappings_are_checked(code):
    encoding = code(VECTOR)
    name, first = next(iter(encoding.sent.items()))
    for received, error, message in (
        (3, TypeError, "received: expected a mapping"),
        ({}, StateMismatchError, "received lacks"),
        ({**encoding.sent, "more": first}, StateMismatchError, "received has the unexpected 'more'"),
        ({**encoding.sent, name: first[:-1]}, StateMismatchError, "what was sent has"),
        ({**encoding.sent, name: first.long()}, TypeError, "expected a floating-point tensor, got torch.int64"),
        ({**encoding.sent, name: first * math.nan}, NonFiniteError, "non-finite"),
    ):
        with pytest.raises(error, match=message):
            encoding.decode(received)


def test_a_result_that_overflows_is_an_error():
    code = low_rank_code({"w": torch.ones(8, 8, dtype=torch.float16)}, rank=1)
    with pytest.raises(NonFiniteError, match=r"overflow torch\.float16"):
        code.decode({name: 1e4 * tensor for name, tensor in code.sent.items()})


def test_reliable_bits_are_those_of_the_worst_rate():
    up = UplinkScenario().draw(3, seed=0)
    rx = sic(up.H, up.P, up.noise_covariance)
    assert reliable_bits(rx) == pytest.approx(float(rx.sinr.log1p().min()) / math.log(2), rel=1e-12)
    assert reliable_bits(rx.mse) == pytest.approx(reliable_bits(rx), rel=1e-9)  # matched: -log2 mse
    assert reliable_bits([1.0, 0.1]) == 0.0
    assert reliable_bits(0.0) == math.inf
    unaware = sic(up.H, up.P, 500 * up.noise_covariance, designed_for=up.noise_covariance)
    assert unaware.mse.max() > 1 / (1 + unaware.sinr).min()
    assert reliable_bits(unaware) == pytest.approx(float(unaware.sinr.log1p().min()) / math.log(2), rel=1e-12)


def test_the_mean_of_copies_has_the_repeated_mse():
    n, K, mse = 40_000, 5, np.array([0.3, 1.7])
    sent = [{"w": normal(n, seed=1, dtype=torch.float64)}, {"w": normal(n, seed=2, dtype=torch.float64)}]
    copies = [transmit(sent, mse, seed=k) for k in range(K)]
    expected = repeated_mse(mse, K)
    for q in range(2):
        mean = sum(copy[q]["w"] for copy in copies) / K
        found = float((mean - sent[q]["w"]).square().mean() / sent[q]["w"].square().mean())
        assert found == pytest.approx(expected[q], rel=5 * math.sqrt(2 / n))  # 5 standard errors


def test_a_matched_receiver_repeats_as_it_is_said():
    """Without interference mu / (K - (K - 1) mu): more than mu / K, as the text of `repeated_mse` says."""
    H, C = np.array([[0.7 + 0.2j], [0.1j]]), np.array([[1.0, 0.2], [0.2, 0.5]])
    once = float(lmmse(H, 1.0, C).mse[0])
    for K in (2, 7):
        found = float(lmmse(*with_power(repeat_block(H, C, K))).mse[0])
        assert found == pytest.approx(once / (K - (K - 1) * once), rel=1e-9)
        assert found > repeated_mse(once, K)


@pytest.mark.parametrize("blocks", ["same", "independent"])
def test_low_rank_beats_the_plain_vector_at_equal_channel_uses(blocks):
    """The whole way over a jammed uplink, where the vectors truly are of low rank; energy and uses are the same."""
    users, m, n = 4, 40, 60
    vectors = [{"w": normal(m, 2, seed=q) @ normal(2, n, seed=9 + q)} for q in range(users)]
    codes = [low_rank_code(vector, rank=2) for vector in vectors]
    K = repetitions(codes[0], vectors[0])
    assert K == 12
    scenario = UplinkScenario(num_users=users)
    up = scenario.draw(K, seed=3)
    noise = 30 * up.noise_covariance
    B = up.H * up.P[:, None].sqrt()
    plain_rx = sic(B[0], 1.0, noise)
    rx = sic(*with_power(repeat_block(B[0], noise, K) if blocks == "same" else stack_blocks(B, noise)))
    plain = transmit(vectors, plain_rx, seed=5)
    received = transmit([code.sent for code in codes], rx, seed=5)
    for q in range(users):
        truth = vectors[q]["w"]
        error = float((codes[q].decode(received[q])["w"] - truth).norm() / truth.norm())
        assert error < 0.75 * float((plain[q]["w"] - truth).norm() / truth.norm())


def test_uses_are_equal_where_they_are_compared():
    vector = {"w": normal(40, 2) @ normal(2, 60, seed=1)}
    code = low_rank_code(vector, rank=2)
    assert repetitions(code, vector) * channel_uses(code) <= channel_uses(vector)


BAD = {
    "no code": (lambda: repetitions({"w": torch.ones(2)}, 5), TypeError, "code: expected an Encoding, got dict"),
    "no budget": (lambda: repetitions(code_by_hand(2), 0), InputError, "budget: expected a whole number of at least 1"),
    "half a budget": (lambda: repetitions(code_by_hand(2), 2.5), TypeError, "budget: expected an int"),
    "a list": (lambda: channel_uses([torch.ones(2)]), TypeError, "vector: expected a mapping"),
    "no floats": (lambda: channel_uses({"n": torch.tensor(1)}), InputError, "no floating-point entries"),
    "complex": (lambda: channel_uses({"n": torch.ones(2) + 0j}), TypeError, "complex"),
    "no bits a use": (lambda: channel_uses(code_by_hand(2, 1), bits_per_use=0), InputError, "positive finite"),
    "text": (lambda: channel_uses(code_by_hand(2, 1), bits_per_use="2"), TypeError, "bits_per_use: expected a real"),
    "mse above 1": (lambda: reliable_bits([0.5, 1.5]), InputError, "between 0 and 1, got 0.5 to 1.5"),
    "no mse": (lambda: reliable_bits([]), InputError, "mse: expected at least one number"),
    "nan": (lambda: reliable_bits([math.nan]), NonFiniteError, "mse"),
    "no copies": (lambda: repeated_mse(0.1, 0), InputError, "K: expected a whole number of at least 1"),
    "half a copy": (lambda: repeated_mse(0.1, 1.5), TypeError, "K: expected an int"),
    "negative mse": (lambda: repeated_mse([-0.1], 2), InputError, "mse: expected numbers >= 0"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
