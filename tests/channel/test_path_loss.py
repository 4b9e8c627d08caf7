"""Path loss against values worked out by hand from TR 38.901, and against what its formulas must satisfy."""

import itertools
import math

import numpy as np
import pytest
import torch

from rmtllmf.channel import UplinkScenario, free_space, log_distance, los_probability, rma, uma, umi
from rmtllmf.channel.path_loss_3gpp import model_shadowing

MODELS = {"uma": uma, "umi": umi, "rma": rma}


def db(gain):
    return -10 * np.log10(np.asarray(gain))


def ground(d3, height):
    """The ground distance that makes antennas `height` apart in altitude `d3` apart."""
    return math.sqrt(d3**2 - height**2)


def test_free_space_by_hand():
    """32.45 dB at 1 km and 1 MHz, and 20 dB per decade of either: the rule of every textbook."""
    assert db(free_space(1000.0, 1e6)) == pytest.approx(32.45, abs=0.005)
    assert db(free_space(1e4, 1e8)) == pytest.approx(32.45 + 20 + 40, abs=0.005)
    np.testing.assert_allclose(log_distance([1.0, 10.0], 1e9, 2.0), free_space([1.0, 10.0], 1e9))
    far = log_distance([10.0, 1000.0], 1e9, 3.7, reference=10.0)
    assert db(far[0]) == pytest.approx(db(free_space(10.0, 1e9)))
    assert db(far[1]) - db(far[0]) == pytest.approx(74.0)


# Heights and distances that leave nothing to the calculator but powers of ten; 3.0e8 m/s as in the standard
BY_HAND = {
    # 28 + 22 log10(100) + 20 log10(1)
    "uma near": (lambda: uma(ground(100.0, 23.5), 1e9, los=True), 28 + 44),
    "uma near, 10 GHz": (lambda: uma(ground(100.0, 23.5), 1e10, los=True), 28 + 44 + 20),
    # breakpoint 4 * 24 * .5 * 1e9/3e8 = 160 m: 28 + 40 * 3 - 9 log10(160^2 + 23.5^2)
    "uma far": (lambda: uma(ground(1000.0, 23.5), 1e9, los=True), 28 + 120 - 9 * math.log10(25600 + 552.25)),
    # 13.54 + 39.08 log10(1000), user at 1.5 m, and 0.6 dB less per metre
    "uma blocked": (lambda: uma(ground(1000.0, 23.5), 1e9, los=False), 13.54 + 117.24),
    "uma blocked, high user": (lambda: uma(ground(1000.0, 13.5), 1e9, los=False, user_height=11.5), 13.54 + 117.24 - 6),
    # environment of 12 m: breakpoint 4 * 13 * 8 * 1e9/3e8 m
    "uma environment": (
        lambda: uma(ground(1e3, 5.0), 1e9, los=True, user_height=20.0, environment_height=12.0),
        28 + 66,
    ),
    "umi near": (lambda: umi(ground(30.0, 8.5), 1e9, los=True), 32.4 + 21 * math.log10(30)),
    # breakpoint 4 * 9 * .5 * 1e9/3e8 = 60 m: 32.4 + 40 * 2 - 9.5 log10(60^2 + 8.5^2)
    "umi far": (lambda: umi(ground(100.0, 8.5), 1e9, los=True), 32.4 + 80 - 9.5 * math.log10(3600 + 72.25)),
    "umi blocked": (lambda: umi(ground(1000.0, 8.5), 1e9, los=False), 22.4 + 105.9),
    "umi blocked, 10 GHz": (lambda: umi(ground(1000.0, 8.5), 1e10, los=False), 22.4 + 105.9 + 21.3),
    # h = 5 m: .03 * 5^1.72 = .477913, .044 * 5^1.72 = .700939, .002 log10(5) = .00139794
    "rma near": (
        lambda: rma(ground(1000.0, 33.5), 3e9, los=True),
        20 * math.log10(40 * math.pi * 1000) + 3 * 0.477913 - 0.700939 + 1.39794,
    ),
    # breakpoint 2 pi 35 * 1.5 * 10/3 * .5/1 m = 549.78 m
    "rma far": (
        lambda: rma(ground(5497.787144, 33.5), 5e8, los=True),
        20 * math.log10(40 * math.pi * 549.7787144 / 6)
        + 0.477913 * math.log10(549.7787144)
        - 0.700939
        + 0.00139794 * 549.7787144
        + 40,
    ),
    # 161.04 - 7.1 * 1.30103 + 7.5 * .69897 - (24.37 - 3.7/49) * 1.544068 + 0 + 0 - (3.2 * 1.246129^2 - 4.97)
    "rma blocked": (
        lambda: rma(ground(1000.0, 33.5), 1e9, los=False),
        161.04 - 9.237313 + 5.242275 - 37.512345 - (4.969080 - 4.97),
    ),
}


@pytest.mark.parametrize(("gain", "loss"), BY_HAND.values(), ids=BY_HAND)
def test_the_tables_of_the_standard_by_hand(gain, loss):
    assert db(gain()) == pytest.approx(loss, abs=2e-5)


BREAKPOINTS = {"uma": 4 * 24 * 0.5 / 3e8, "umi": 4 * 9 * 0.5 / 3e8, "rma": 2 * math.pi * 35 * 1.5 / 3e8}  # m per Hz


@pytest.mark.parametrize(
    ("model", "carrier"), [*itertools.product(("uma", "umi"), (7e8, 3.5e9, 2e10)), ("rma", 7e8), ("rma", 3.5e9)]
)
def test_no_jump_at_the_breakpoint_and_40_db_per_decade_behind(model, carrier):
    edge = BREAKPOINTS[model] * carrier
    below, above = db(MODELS[model](np.array([edge * (1 - 1e-12), edge * (1 + 1e-12)]), carrier, los=True))
    if model == "rma":  # the standard takes the ground distance of the breakpoint for one between antennas
        d3 = math.hypot(edge, 33.5)
        jump = (20 - 0.477913) * math.log10(d3 / edge) - 0.00139794 * (d3 - edge)
        assert above - below == pytest.approx(jump, abs=1e-6)
        assert above - below < 0.02
    else:
        assert above == pytest.approx(below, abs=1e-9)
    height = {"uma": 23.5, "umi": 8.5, "rma": 33.5}[model]
    first = edge * 1.1
    second = ground(2 * math.hypot(first, height), height)
    if second <= 5000:
        near, far = db(MODELS[model](np.array([first, second]), carrier, los=True))
        assert far - near == pytest.approx(40 * math.log10(2), abs=1e-9)


@pytest.mark.parametrize("model", MODELS)
def test_blocked_is_never_louder_and_farther_never_louder(model):
    d = np.geomspace(10, 5000, 400)
    clear, blocked = (MODELS[model](d, 2e9, los=state) for state in (True, False))
    assert (blocked <= clear).all()
    for gains in (clear, blocked):
        assert (np.diff(gains) <= gains[:-1] * 1e-3).all()
    mixed = np.arange(400) % 2 == 0
    np.testing.assert_array_equal(MODELS[model](d, 2e9, los=mixed), np.where(mixed, clear, blocked))
    # about free space near by, and never better than a few dB above it
    assert (db(clear) > db(free_space(d, 2e9)) - 4).all()


def test_los_probability_by_hand():
    e = math.exp
    assert los_probability([5.0, 18.0], "umi").tolist() == [1.0, 1.0]
    assert los_probability(36.0, "umi") == pytest.approx(0.5 + 0.5 * e(-1))
    assert los_probability(180.0, "uma") == pytest.approx(0.1 + 0.9 * e(-180 / 63))
    assert los_probability(300.0, "uma", user_height=23.0) == pytest.approx(
        (0.06 + 0.94 * e(-300 / 63)) * (1 + 1.25 * 27 * e(-2))
    )
    assert los_probability([3.0, 10.0, 1010.0], "rma").tolist() == pytest.approx([1, 1, e(-1)])
    for model in MODELS:
        p = los_probability(np.geomspace(1, 5000, 500), model, user_height=20.0)
        assert ((p > 0) & (p <= 1)).all()


def test_the_kind_and_the_gradient_of_the_distance_are_kept():
    d = torch.tensor([100.0, 900.0], dtype=torch.float64, requires_grad=True)
    for function in (
        lambda x: free_space(x, 1e9),
        lambda x: uma(x, 1e9, los=True),
        lambda x: umi(x, 1e9, los=False),
        lambda x: rma(x, 1e9, los=torch.tensor([True, False])),
        lambda x: los_probability(x, "umi"),
    ):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x).log(), d)
        assert function(torch.tensor([100.0, 900.0])).dtype == torch.float32
        assert isinstance(function(np.array([100.0, 900.0])), np.ndarray)
    assert umi(np.array([[100.0], [200.0]]), 1e9, los=np.array([True, False, True])).shape == (2, 3)


def test_a_scenario_takes_them_by_name():
    at = torch.tensor([100.0, 500.0], dtype=torch.float64)
    for model, function in MODELS.items():
        scenario = UplinkScenario(path_loss=model, num_users=2, placement=[100.0, 500.0])
        los = torch.tensor([True, False])
        assert torch.equal(scenario.gain(at, los=los), function(at, 2.4e9, los=los))
        p = los_probability(at, model)
        mean = p * function(at, 2.4e9, los=True) + (1 - p) * function(at, 2.4e9, los=False)
        torch.testing.assert_close(scenario.gain(at), mean, rtol=1e-12, atol=0)
        # drawn: the mean power of both states, by their probabilities
        h = scenario.draw(20000, seed=0).H
        np.testing.assert_allclose(h.abs().square().mean((0, 1)), mean, rtol=0.06)
    by_function = UplinkScenario(path_loss=lambda d: umi(d, 2.4e9, los=True), num_users=2, placement=[100.0, 500.0])
    assert torch.equal(by_function.gain(at), umi(at, 2.4e9, los=True))


def test_the_shadowing_of_the_standard():
    at, los = torch.tensor([100.0, 100.0, 2000.0]), torch.tensor([True, False, True])
    for model, expected in {"uma": [4, 6, 4], "umi": [4, 7.82, 4], "rma": [4, 8, 6]}.items():
        assert model_shadowing(model, at, 7e8, los).tolist() == pytest.approx(expected)
