"""Polar factors and singular triplets of matrices of which a side is empty."""

import pytest
import torch
from torch import nn

from rmtllmf.taskvec import iso_c, low_rank, smile, tsv, twin_merging
from rmtllmf.taskvec.rules import _spectral

SHAPES = [(3, 0), (0, 3), (0, 0)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("quick", [False, True])
def test_leading_triplets(shape, dtype, quick):
    X = torch.zeros(shape, dtype=dtype)
    U, s, V = _spectral.leading(X, 2, 0.0, dtype, quick=quick)
    assert (U.shape, s.shape, V.shape) == ((shape[0], 0), (0,), (shape[1], 0))
    assert U.dtype == s.dtype == V.dtype == torch.float64
    assert torch.equal(U * s @ V.mT, X.double())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polar_factors(shape, dtype):
    Q, s = _spectral.polar(torch.zeros(shape, dtype=dtype), 0.0, dtype)
    assert Q.whole().shape == shape
    assert Q.times(torch.ones(shape[1], 4, dtype=dtype)).tolist() == torch.zeros(shape[0], 4).tolist()
    assert s.shape == (0,)
    assert _spectral.rounding_level([torch.zeros(shape, dtype=dtype)] * 2) == 0


@pytest.mark.parametrize("rule", [iso_c, tsv])
@pytest.mark.parametrize("shape", SHAPES)
def test_rules(rule, shape):
    vectors = [{"none": torch.zeros(shape), "w": torch.randn(3, 4)} for _ in range(2)]
    assert rule(vectors)["none"].shape == shape
    assert low_rank({"none": torch.zeros(shape)}, 1).rest["none"].shape == shape


@pytest.mark.parametrize("make", [lambda *a: smile(*a, rank=1, gate_rank=1), lambda *a: twin_merging(*a, rank=1)])
def test_a_layer_without_inputs_has_no_experts(make):
    """Only its bias can have changed: that is part of the rest."""
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(0, 3))
    vectors = [
        {"0.weight": seed * torch.eye(2), "1.bias": torch.ones(3), "1.weight": torch.zeros(3, 0)} for seed in (1, 2)
    ]
    routed = make(model, vectors)
    experts = {key.rpartition(".")[0] for key in routed.state_dict() if key.endswith(".right")}
    assert {name[-1] for name in experts} == {"0"}
