"""Every wrong input raises at the door, naming the argument, what it was and what was expected."""

from importlib import import_module

import numpy as np
import pytest

from rmtllmf.channel import barrage_covariance, strongest_user_covariance, worst_case

PARTS = (
    "channel",
    "clip",
    "fusion",
    "metrics",
    "plot",
    "protection",
    "resilience",
    "scenario",
    "symbols",
    "transmit",
    "vectors",
)
CASES = [case for part in PARTS for case in import_module(f"helpers.bad_input_{part}").CASES]


@pytest.mark.parametrize(("call", "error", "pattern"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()


def test_no_jamming_power_is_no_error():
    H = np.eye(2) + 0j
    assert not worst_case(H, 1.0, 0.0).covariance.any()
    assert not strongest_user_covariance(H, 1.0, 0).any()
    assert not barrage_covariance(H, 0.0).any()
