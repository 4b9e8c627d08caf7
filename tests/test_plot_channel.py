"""What the figures of the channel say: bars, curves, markers and labels, not pixels."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from helpers.drawn import assert_drawn
from rmtllmf.channel import Constellation, UplinkScenario, worst_case
from rmtllmf.errors import InputError, NonFiniteError, ShapeError
from rmtllmf.plot import constellation_plot, countermeasure_chart, mse_distribution, water_filling

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def up():
    return UplinkScenario(max_distance=10_000.0).draw(seed=0)


def tops(container):
    return np.array([bar.get_y() + bar.get_height() for bar in container])


def bottoms(container):
    return np.array([bar.get_y() for bar in container])


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("floored", [True, False])
def test_water_filling_shows_eigenvalues_floor_and_jammer(up, floored, kind):
    noise, P_N = float(up.noise) * floored, 4 * float(up.noise)
    H, P = (up.H, up.P) if kind == "torch" else (up.H.numpy(), up.P.numpy())
    ax = water_filling(H, P, P_N, noise=noise)
    bars = {container.get_label(): container for container in ax.containers}
    assert set(bars) == {"signal", "jammer"} | ({"thermal floor"} if floored else set())
    unit = noise if floored else P_N
    v = torch.linalg.eigvalsh(up.H * up.P @ up.H.mH)[-8:].flip(0).numpy()
    np.testing.assert_allclose(tops(bars["signal"]), 10 * np.log10(v / unit), atol=1e-6)

    # the jammer's bars add up to P_N, and end at the level of their mode where the jammer is there at all
    found = worst_case(up.H, up.P, P_N, noise=noise)
    level = float(found.level)
    sigma = v / 2 * (np.sqrt(1 + 4 / (v * level)) - 1)
    heights = tops(bars["jammer"]) - bottoms(bars["jammer"])
    jammed = heights > 0
    power = unit * 10 ** (tops(bars["jammer"]) / 10) - noise
    assert power[jammed].sum() == pytest.approx(P_N, rel=1e-6)
    np.testing.assert_array_equal(jammed, sigma > noise)
    assert jammed.all() == (not floored)
    if floored:
        np.testing.assert_allclose(tops(bars["thermal floor"]), 0, atol=1e-9)
        np.testing.assert_allclose(bottoms(bars["jammer"]), 0, atol=1e-9)
    dashes = {lines.get_label(): lines for lines in ax.collections}[r"$\sigma(v, \nu)$"].get_segments()
    np.testing.assert_allclose([dash[0, 1] for dash in dashes], 10 * np.log10(sigma / unit), atol=1e-6)
    (limit,) = (line for line in ax.lines if line.get_label() == r"$1/\nu$")
    assert limit.get_ydata()[0] == pytest.approx(10 * np.log10(1 / level / unit))
    assert ax.get_xlabel() == "signal mode, strongest first"
    assert ax.get_ylabel() == f"power (dB relative to the {'thermal noise' if floored else 'jammer'})"
    low, high = ax.get_ylim()
    assert low == pytest.approx(bottoms(bars["signal"])[0])
    assert high > tops(bars["signal"]).max()


def test_water_filling_leaves_out_modes_without_a_signal():
    H = np.ones((3, 2)) + 0j  # one mode
    ax = water_filling(H, 1.0, 1.0, noise=0.1)
    assert [len(container) for container in ax.containers] == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "pattern"),
    [
        ((np.ones((5, 3, 2)) + 0j, 1.0, 1.0), ShapeError, "one channel"),
        ((np.ones((3, 2)) + 0j, 0.0, 1.0), InputError, "a power is 0"),
        ((np.ones((3, 2)) + 0j, 1.0, 0.0), InputError, "a power is 0"),
        ((np.ones((3, 2)), 1.0, 1.0), TypeError, "complex"),
        ((np.ones((3, 2)) + 0j, 1.0, [1.0, 2.0]), ShapeError, r"P_N: expected one number.*\(2,\)"),
        ((np.ones((3, 2)) + 0j, 1.0, -80.0), InputError, "P_N: .*from_dbm"),
    ],
)
def test_water_filling_refuses(arguments, error, pattern):
    with pytest.raises(error, match=pattern):
        water_filling(*arguments)


def test_water_filling_takes_one_noise():
    with pytest.raises(ShapeError, match=r"noise: expected one number, got an array of shape \(1,\)"):
        water_filling(np.eye(2) + 0j, 1.0, 1.0, noise=np.array([0.1]))


def test_distributions_are_empirical_ones():
    rng = np.random.default_rng(0)
    errors = {"one": rng.random((10, 8)), "two": torch.tensor([0.5, 0.25], dtype=torch.float64), "none": [0.0, 1e-5]}
    ax = mse_distribution(errors)
    curves = {line.get_label(): line for line in ax.lines if " (mean " in line.get_label()}
    assert list(curves) == [
        f"one (mean {errors['one'].mean():.3f})".replace("0.", "."),
        "two (mean .375)",
        "none (mean 5.0e-06)",
    ]
    for line, values in zip(curves.values(), errors.values(), strict=True):
        values = np.sort(np.asarray(values), axis=None)
        np.testing.assert_array_equal(line.get_xdata(), values)
        np.testing.assert_allclose(line.get_ydata(), 100 * np.arange(1, values.size + 1) / values.size)
        assert line.get_drawstyle() == "steps-post"
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [float(dot.get_xdata()[0]) for dot in dots] == pytest.approx(
        [float(np.asarray(values).mean()) for values in errors.values()]
    )
    assert [float(dot.get_ydata()[0]) for dot in dots][1:] == [50.0, 50.0]
    assert len({line.get_color() for line in curves.values()}) == 3
    assert ax.get_xscale() == "log"
    assert "mean squared error" in ax.get_xlabel()
    assert ax.get_ylabel().endswith("(%)")


@pytest.mark.parametrize(
    ("errors", "error", "pattern"),
    [
        ([0.1], TypeError, "expected a mapping"),
        ({}, InputError, "at least one label"),
        ({"a": []}, InputError, r"\['a'\]: expected at least one number"),
        ({"a": [-1.0]}, InputError, ">= 0"),
        ({"a": [np.nan]}, NonFiniteError, "NaN"),
        ({"a": [1j]}, TypeError, "real numbers"),
    ],
)
def test_distributions_refuse(errors, error, pattern):
    with pytest.raises(error, match=pattern):
        mse_distribution(errors)


def measure(name="unaware", uses=1, SU=0.14, SR=0.21):
    return {"name": name, "uses": uses, "mean": {"SU": SU, "SR": SR}, "error": {"SU": 0.01 * SU, "SR": 0.02 * SR}}


def test_countermeasures_have_their_means_and_standard_errors():
    rows = [measure(), measure("known", 1, 0.04, 0.16), measure("HARQ", 4, 0.007, 0.04)]
    ax = countermeasure_chart(rows)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["unaware", "known", "HARQ (4 uses)"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["strongest-user attack", "sum-rate attack"]
    for container, jammer, share in zip(ax.containers, ("SU", "SR"), (0.01, 0.02), strict=True):
        markers, _, (segments,) = container.lines
        means = [row["mean"][jammer] for row in rows]
        np.testing.assert_array_equal(markers.get_xdata(), means)
        np.testing.assert_array_equal(markers.get_ydata(), [0, 1, 2])
        for segment, mean in zip(segments.get_segments(), means, strict=True):
            assert segment[:, 0] == pytest.approx([mean * (1 - share), mean * (1 + share)])
    lines = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in lines] == [0.14, 0.21]
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "the first row is on top"


def test_one_jammer_will_do():
    row = measure()
    del row["mean"]["SR"], row["error"]["SR"]
    ax = countermeasure_chart([row])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["strongest-user attack"]


@pytest.mark.parametrize(
    ("rows", "error", "pattern"),
    [
        ([], InputError, "at least one row"),
        ({}, TypeError, "sequence of mappings"),
        ([1], TypeError, r"rows\[0\]"),
        ([{"name": "a"}], InputError, "lacks uses, mean, error"),
        ([{**measure(), "mean": 0.1}], TypeError, "mappings by jammer"),
        ([{**measure(), "mean": {"SX": 0.1}}], InputError, "expected mean and error of the same jammers"),
        ([{**measure(), "mean": {"SU": 0.1}}], InputError, "expected mean and error of the same jammers"),
        ([measure(SU=0.0)], InputError, "mean"),
        ([{**measure(), "error": {"SU": -1.0, "SR": 0.1}}], InputError, "at least 0"),
    ],
)
def test_countermeasures_refuse(rows, error, pattern):
    with pytest.raises(error, match=pattern):
        countermeasure_chart(rows)


@pytest.mark.parametrize("order", [4, 64])
def test_constellations_tell_right_from_wrong(order):
    source = torch.Generator().manual_seed(0)
    grid = Constellation(order)
    sent = grid.modulate(torch.randint(0, 2, (30, 20, grid.bits), generator=source))
    noisy = sent + 0.5 * grid.unit * torch.randn(sent.shape, dtype=sent.dtype, generator=source) * 2
    wrong = ((grid.nearest(noisy) - sent).abs() > 1e-3).flatten()
    ax = constellation_plot(noisy, sent, modulation=order)
    right, bad, points = ax.collections
    share = 100 * float(wrong.double().mean())
    assert 5 < share < 80
    assert [part.get_label() for part in ax.collections] == [
        f"decided rightly ({100 - share:.0f} %)",
        f"decided wrongly ({share:.0f} %)",
        "constellation",
    ]
    for part, chosen in ((right, ~wrong), (bad, wrong)):
        expected = noisy.flatten()[chosen].numpy()
        np.testing.assert_allclose(part.get_offsets(), np.c_[expected.real, expected.imag], atol=1e-6)
    assert len(points.get_offsets()) == order
    assert (np.asarray(points.get_offsets()) ** 2).sum(1).mean() == pytest.approx(1)
    edges = sorted({float(line.get_xdata()[0]) for line in ax.lines if len(set(line.get_xdata())) == 1})
    side = round(order**0.5)
    np.testing.assert_allclose(edges, 2 * grid.unit * (np.arange(1, side) - side / 2), atol=1e-12)
    assert len(ax.lines) == 2 * (side - 1)
    assert ax.get_aspect() == 1


def test_constellations_without_the_truth_have_one_colour():
    ax = constellation_plot(np.array([0.1 + 5j]), modulation=4)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["received", "constellation"]
    assert ax.get_ylim()[1] > 5


@pytest.mark.parametrize(
    ("arguments", "order", "error", "pattern"),
    [
        (([1.0],), 4, TypeError, "received: expected complex"),
        (([],), 4, TypeError, "complex"),
        ((np.zeros(0, complex),), 4, ShapeError, "at least one symbol"),
        (([1j, 0], [1j]), 4, ShapeError, "sent: expected the shape"),
        (([1j], [1.0]), 4, TypeError, "sent: expected complex"),
        (([complex(np.nan, 0)],), 4, NonFiniteError, "NaN"),
        (([1j],), 8, InputError, "modulation: expected 4, 16, 64, 256, got 8"),
        (([1j],), "analog", InputError, "modulation: expected 4, 16, 64, 256, got 'analog'"),
        ((np.ma.masked_array([1j]),), 4, TypeError, "received: .*masked"),
    ],
)
def test_constellations_refuse(arguments, order, error, pattern):
    with pytest.raises(error, match=pattern):
        constellation_plot(*arguments, modulation=order)


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: water_filling(np.eye(2) + 0j, 1.0, 1.0, noise=0.1, ax=ax),
        lambda ax: mse_distribution({"a": [0.1, 0.2]}, ax=ax),
        lambda ax: countermeasure_chart([measure()], ax=ax),
        lambda ax: constellation_plot([1j], modulation=4, ax=ax),
    ],
    ids=["water_filling", "mse_distribution", "countermeasure_chart", "constellation_plot"],
)
def test_axes_are_returned_and_pyplot_is_left_alone(draw, tmp_path):
    assert_drawn(draw, tmp_path)
    with pytest.raises(TypeError, match="ax: expected a matplotlib Axes"):
        draw(Figure())


def test_the_documentations_figures_can_be_made_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, options in (("figures", ["--draws", "2"]), ("chain", [])):
        spec = importlib.util.spec_from_file_location(f"documentation_{name}", ROOT / "docs" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(["--out", str(tmp_path), *options])
    shipped = {picture.name for picture in (ROOT / "docs" / "_static").glob("*.png")} - {"quickstart.png"}
    assert {picture.name for picture in tmp_path.iterdir()} == shipped
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:6]] == [
        "none (ideal)",
        "barrage",
        "strongest user",
        "min-max",
        "sum rate",
    ]
