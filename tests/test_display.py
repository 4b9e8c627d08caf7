"""What objects look like: short, whatever they hold, and true."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from rmtllmf import _display
from rmtllmf.channel import Uplink, UplinkScenario, lmmse, sic, worst_case
from rmtllmf.metrics import DisentanglementGrid, DisturbanceTest
from rmtllmf.resilience import CrossValidation, Encoding, Protection, Realignment, ScaleSearch
from rmtllmf.taskvec import (
    ConcreteMask,
    DefenseAwareMask,
    HiddenLayer,
    LearnedWeights,
    Mergeability,
    ParetoFront,
    RouterTraining,
    TaskVector,
    emr,
    low_rank,
    reversible_merging,
    smile,
    twin_merging,
)

LOSSES = tuple(1 / (step + 1) for step in range(1000))
LINEAR = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "none"),
        (2.5, "2.5 W"),
        ([1.0, 1.0], "1 W"),
        (np.array([[3.0, -1.0]]), "-1 to 3 W"),
        (torch.tensor([0.013, 0.21], requires_grad=True), "0.013 to 0.21 W"),
    ],
)
def test_spread(values, expected):
    assert _display.spread(values, "W") == expected


def test_decibels_and_counts():
    assert _display.decibels([0.001, 10.0], "dBm") == "0 to 40 dBm"
    assert _display.decibels(0.0) == "-inf dB"
    assert [_display.counted(n, "entry") for n in (0, 1, 1234)] == ["0 entries", "1 entry", "1,234 entries"]
    assert _display.course(()) == "0 steps"


@pytest.mark.parametrize("numpy", [True, False])
def test_the_channel_in_dbm_and_db(numpy):
    H = np.eye(3, 2) + 0j
    up = Uplink(H if numpy else torch.from_numpy(H), np.array([1.0, 0.1]), 1e-3)
    assert repr(up) == "Uplink(2 users at 20 to 30 dBm, 3 antennas, noise 0 dBm)"
    found = worst_case(up.H, up.P, P_N=10.0, noise=up.noise)
    assert repr(found).startswith("WorstCase(3 antennas, jammer 40 dBm, sum rate ")
    rx = lmmse(up.H, up.P, up.noise_covariance)  # users are orthogonal: SINR p / noise
    assert "SINR 20 to 30 dB" in repr(rx)
    assert repr(rx).endswith("linear)")


def test_draws_are_counted_and_gradients_are_no_obstacle():
    up = UplinkScenario().draw(2, 5, seed=0)
    assert "8 users at -10 dBm, 16 antennas, draws (2, 5)" in repr(up)
    P = up.P.clone().requires_grad_(True)
    rx = sic(up.H, P, up.noise_covariance)
    assert "draws (2, 5)" in repr(rx)
    assert "<table" not in rx._repr_html_()  # of many draws


def test_a_notebook_shows_users_in_a_table():
    up = UplinkScenario(num_users=3).draw(seed=0)
    rx = sic(up.H, up.P, up.noise_covariance, order="strongest_first")
    page = rx._repr_html_()
    assert page.count("<tr>") == 4
    first = int(rx.order[0])
    rows = page.split("<tr>")[2:]
    assert rows[first].endswith('<td style="text-align:right">1</td></tr>' + ("</tbody></table>" if first == 2 else ""))


def test_names_are_escaped_in_a_notebook_and_long_vectors_cut():
    page = TaskVector({"<script>": torch.zeros(2, 3)})._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "2 x 3" in page
    long = TaskVector({f"layer{i}": torch.zeros(1) for i in range(500)})._repr_html_()
    assert "480 in between" in long
    assert long.count("<tr>") == 22


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (
            Realignment(LOSSES, ("w",) * 300, 1.5, validation=LOSSES, kept=7),
            ["1,000 steps", "loss 1 to 0.001", "step 7", "300 parameters"],
        ),
        (Realignment((), (), 0.0), ["0 steps"]),
        (CrossValidation(2, (0, 2), (0.7, 0.5), ((0.6, 0.4), (0.8, 0.6))), ["steps 2, loss 0.5", "2 folds"]),
        (ScaleSearch(0.5, {float(i): 1.0 for i in range(99)} | {0.5: 0.25}, 99), ["scale 0.5, loss 0.25", "0 to 98"]),
        (
            Encoding({"a": torch.zeros(1000), "b": torch.zeros(5, dtype=torch.int8)}, 1234567, lambda x: x),
            ["2 tensors", "1,000 numbers", "1,234,567 bits"],
        ),
        (LearnedWeights({str(i): (0.25, i / 100) for i in range(100)}, LOSSES), ["0.25; 0 to 0.99", "1,000 steps"]),
        (ConcreteMask({"w": torch.zeros(1000)}, LOSSES), ["1 tensor, 1,000 entries"]),
        (
            DefenseAwareMask({"w": torch.zeros(1000)}, {}, LOSSES, LOSSES),
            ["1 tensor, 1,000 entries", "loss 1 to 0.001"],
        ),
        (
            ParetoFront(
                ("a", "b"), "accuracy", True, torch.zeros(7, 2), torch.eye(2), None, torch.zeros(9, 2), *[()] * 3
            ),
            ["7 points from 9 samples", "predicted accuracy: a 0 to 1, b 0 to 1"],
        ),
        (
            Mergeability((HiddenLayer("MLP", ("up", "down"), 0.5, 1.25, 2.0, 0.75, False),), ("odd",)),
            [
                "1 hidden layer, 1 not mergeable, 1 name unchecked",
                "MLP of up, down: changed by 0.50, their product by 1.25",
            ],
        ),
        (emr([{"w": torch.ones(1000)}] * 2).masks[0], ["Masks(1 tensor, 1,000 entries)"]),
        (reversible_merging([low_rank({"w": torch.eye(3)}, 1)] * 2), ["2 tasks, 1 matrices, largest error 0"]),
        (
            smile(nn.Linear(3, 2), [LINEAR] * 2, rank=1, gate_rank=1),
            ["in_features=3, out_features=2, experts=2, rank=1, gate_rank=1, top_k=1"],
        ),
        (twin_merging(nn.Linear(3, 2), [LINEAR] * 2, rank=1).model, ["in_features=3, out_features=2, tasks=2, rank=1"]),
        (
            Protection((0,), {1: "copies 0"}, None, {}, 0.5, TaskVector(LINEAR), Realignment((0.5, 0.25), (), 0.0)),
            ["user 1 left out: copies 0", "the update times 0.5", "realigned in 2 steps, loss 0.5 to 0.25"],
        ),
        (RouterTraining(("a", "b"), (10, 10), LOSSES, 95.0), ["a, b", "20 inputs", "1,000 epochs", "95.0 %"]),
        (RouterTraining(("a", "b"), (10, 10), (), 50.0), ["0 epochs"]),
        (
            DisentanglementGrid((0.0, 1.0), torch.eye(2), {"a": torch.eye(2), "b": torch.eye(2)}),
            ["a and b, 2 x 2 scales 0 to 1: total 0 to 1"],
        ),
        (
            DisturbanceTest(*[torch.ones(4, 2)] * 4, torch.arange(8).view(4, 2) < 2, torch.zeros(4), 0.05),
            ["4 inputs, 2 logits, alpha 0.05", "25.0 % rejected"],
        ),
        (
            DisturbanceTest(*[torch.ones(0, 2)] * 4, torch.ones(0, 2) > 0, torch.zeros(0), 0.05, 4),
            ["4 degrees of freedom", f"{math.nan} %"],
        ),
    ],
)
def test_results_in_a_line(value, parts):
    shown = repr(value)
    assert len(shown) < 250
    for part in parts:
        assert part in shown
