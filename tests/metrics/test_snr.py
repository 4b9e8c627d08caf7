"""Parameter-domain SNR against its formula, and against the channel's MSE."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmtllmf.channel import transmit
from rmtllmf.metrics import snr_db
from rmtllmf.taskvec import TaskVector


@given(gain=st.floats(1e-6, 1e6), amplitude=st.sampled_from([1e-30, 1.0, 1e18]), seed=st.integers(0, 50))
def test_the_formula(gain, amplitude, seed):
    generator = torch.Generator().manual_seed(seed)
    sent = {name: amplitude * torch.randn(4, generator=generator, dtype=torch.float64) for name in "ab"}
    error = {name: gain * amplitude * torch.randn(4, generator=generator, dtype=torch.float64) for name in "ab"}
    received = {name: sent[name] + error[name] for name in "ba"}
    signal = sum(float((tensor / amplitude).square().sum()) for tensor in sent.values())
    noise = sum(float(((received[name] - sent[name]) / amplitude).square().sum()) for name in "ab")
    assert snr_db(sent, received) == pytest.approx(10 * math.log10(signal / noise), abs=1e-9)


def test_equal_is_infinite_and_known_values():
    sent = {"w": torch.tensor([3.0, 4.0])}
    assert snr_db(sent, sent) == math.inf
    assert snr_db(sent, {"w": torch.zeros(2)}) == 0
    assert snr_db(sent, {"w": torch.tensor([3.0, 4.5])}) == 20


def test_only_what_is_sent_counts():
    sent = {"w": torch.tensor([1.0]), "n": torch.tensor(5), "bn.running_mean": torch.tensor([1e9])}
    received = {"w": torch.tensor([1.1]), "n": torch.tensor(7), "bn.running_mean": torch.tensor([0.0])}
    assert snr_db(sent, received) == pytest.approx(20, abs=1e-4)


def test_the_channel_at_scale_rms_has_the_snr_of_its_mse():
    """1/mse, up to the spread of an average of 20,000 squared errors: 0.043 dB; six of those."""
    sent = TaskVector({"w": torch.randn(100, 200, generator=torch.Generator().manual_seed(0))})
    (received,) = transmit([sent], [0.01], seed=0)
    assert snr_db(sent, received) == pytest.approx(20, abs=0.26)
