"""Decibels: landmarks, the way back, kinds, gradients and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rmtllmf.channel import UplinkScenario, db, dbm, from_db, from_dbm
from rmtllmf.errors import InputError, NonFiniteError

LANDMARKS = [(1.0, 0.0), (2.0, 3.0103), (10.0, 10.0), (1e-3, -30.0), (0.0, -math.inf), (math.inf, math.inf)]
FLOATS = st.floats(-300, 300)


@pytest.mark.parametrize(("ratio", "expected"), LANDMARKS)
def test_landmarks(ratio, expected):
    assert db(ratio) == pytest.approx(expected, abs=1e-4)
    assert dbm(ratio) == pytest.approx(expected + 30, abs=1e-4)
    assert from_db(expected) == pytest.approx(ratio, rel=1e-4)
    assert from_dbm(expected + 30) == pytest.approx(ratio, rel=1e-4)


def test_the_papers_users_send_a_tenth_of_a_milliwatt():
    assert dbm(UplinkScenario().power) == pytest.approx(-10)


@given(FLOATS)
def test_there_and_back(x):
    assert db(from_db(x)) == pytest.approx(x, abs=1e-9)
    assert dbm(from_dbm(x)) == pytest.approx(x, abs=1e-9)


@given(FLOATS, FLOATS)
def test_products_are_sums(x, y):
    assert db(from_db(x) * from_db(y)) == pytest.approx(x + y, abs=1e-9)


@pytest.mark.parametrize("function", [db, dbm, from_db, from_dbm])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_what_was_given_comes_back(function, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    found = function(array)
    kept = dtype if dtype.startswith("float") else "float64"
    assert isinstance(found, np.ndarray)
    assert (found.shape, found.dtype) == ((2, 3), kept)
    tensor = function(torch.from_numpy(array))
    assert isinstance(tensor, torch.Tensor)
    assert (tuple(tensor.shape), str(tensor.dtype)) == ((2, 3), f"torch.{kept}")
    np.testing.assert_allclose(tensor.numpy(), found, rtol=1e-6)
    assert isinstance(function(3), float)


@pytest.mark.parametrize("function", [db, dbm, from_db, from_dbm])
def test_gradients(function):
    assert torch.autograd.gradcheck(function, torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("function", [db, dbm, from_db, from_dbm])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("3 dB", TypeError, "expected real numbers, got '3 dB'"),
        (None, TypeError, "expected real numbers, got None"),
        (True, TypeError, "expected real numbers, got True"),
        (1 + 2j, TypeError, "expected real numbers"),
        (torch.tensor(1j), TypeError, "expected real numbers, got torch.complex64"),
        (torch.tensor([True]), TypeError, "got torch.bool"),
        (math.nan, NonFiniteError, "holds NaN"),
        (torch.tensor([1.0, math.nan]), NonFiniteError, "holds NaN"),
    ],
)
def test_bad_input(function, value, error, message):
    with pytest.raises(error, match=message):
        function(value)


@pytest.mark.parametrize(("function", "name"), [(db, "ratio"), (dbm, "power")])
def test_negative_powers(function, name):
    with pytest.raises(InputError, match=rf"{name}: expected numbers >= 0, got -2"):
        function(np.array([1.0, -2.0]))
