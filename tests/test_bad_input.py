"""Every wrong input raises at the door, naming the argument, what it was and what was expected."""

import numpy as np
import pytest

from helpers import (
    bad_input_channel,
    bad_input_clip,
    bad_input_fusion,
    bad_input_metrics,
    bad_input_plot,
    bad_input_protection,
    bad_input_resilience,
    bad_input_scenario,
    bad_input_symbols,
    bad_input_transmit,
    bad_input_vectors,
)
from rmtllmf.channel import barrage_covariance, strongest_user_covariance, worst_case

TABLES = (
    bad_input_channel,
    bad_input_clip,
    bad_input_fusion,
    bad_input_metrics,
    bad_input_plot,
    bad_input_protection,
    bad_input_resilience,
    bad_input_scenario,
    bad_input_symbols,
    bad_input_transmit,
    bad_input_vectors,
)
CASES = [case for table in TABLES for case in table.CASES]


@pytest.mark.parametrize(("call", "error", "pattern"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()


def test_no_jamming_power_is_no_error():
    H = np.eye(2) + 0j
    assert not worst_case(H, 1.0, 0.0).covariance.any()
    assert not strongest_user_covariance(H, 1.0, 0).any()
    assert not barrage_covariance(H, 0.0).any()
