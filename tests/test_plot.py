"""What the figures say: bars, lines, numbers and labels, not pixels."""

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb

from helpers.drawn import assert_drawn
from rmtllmf.errors import InputError
from rmtllmf.metrics import DisentanglementGrid, cosine_similarity
from rmtllmf.plot import disentanglement_map, fusion_chart, pareto_front, similarity_heatmap
from rmtllmf.taskvec import ParetoFront

METHODS = ("unprotected", "restored", "realigned", "both")
CONDITIONS = ("ideal", "strongest_user", "sum_rate")


def mean_of(condition, method):
    return 0.2 + 0.05 * CONDITIONS.index(condition) + 0.15 * METHODS.index(method)


def rows(seeds=1):
    spread = np.linspace(-0.02, 0.02, seeds) if seeds > 1 else np.zeros(1)
    table = [
        {"condition": c, "method": m, "mean": mean_of(c, m), "values": list(mean_of(c, m) + spread)}
        for c in CONDITIONS
        for m in METHODS
    ]
    lines = [("base", 0.62), ("clean", 0.86)]
    return table + [{"condition": "none", "method": name, "mean": mean, "values": [mean]} for name, mean in lines]


def bars_of(ax):
    """(condition, method) -> bar, by the place of the bar and the label of its container."""
    labels = dict(
        zip(("unprotected", "embeddings restored", "realigned", "restored and realigned"), METHODS, strict=True)
    )
    return {
        (CONDITIONS[round(bar.get_x() + bar.get_width() / 2)], labels[container.get_label()]): bar
        for container in ax.containers
        if container.get_label() in labels
        for bar in container
    }


def test_every_bar_has_its_height_and_its_place():
    ax = fusion_chart(rows())
    bars = bars_of(ax)
    assert set(bars) == {(c, m) for c in CONDITIONS for m in METHODS}
    for (condition, method), bar in bars.items():
        assert bar.get_height() == pytest.approx(100 * mean_of(condition, method))
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars.values())
    assert all(left[1] < right[0] + 1e-9 for left, right in pairwise(edges)), "bars overlap"
    assert len({to_hex(bar.get_facecolor()) for bar in bars.values()}) == 4
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [
        "ideal uplink",
        "strongest-user attack",
        "sum-rate attack",
    ]


def test_lines_legend_and_axis():
    ax = fusion_chart(rows())
    lines = {line.get_label(): set(line.get_ydata()) for line in ax.lines if not line.get_label().startswith("_")}
    assert lines == {"fusion without noise (86 %)": {86.0}, "base model (62 %)": {62.0}}
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {
        *lines,
        "unprotected",
        "embeddings restored",
        "realigned",
        "restored and realigned",
    }
    assert ax.get_ylabel() == "normalised accuracy (%)"
    assert ax.get_ylim() == (0, 100)
    ax.figure.canvas.draw()
    legend, box = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert legend.y0 >= box.y1 - 1, "the legend covers the bars"
    assert legend.y1 <= ax.figure.bbox.y1 + 1
    assert legend.x0 >= -1
    assert legend.x1 <= ax.figure.bbox.x1 + 1


@pytest.mark.parametrize("seeds", [1, 5])
def test_error_bars_only_with_more_than_one_seed(seeds):
    ax = fusion_chart(rows(seeds))
    bars = [container for container in ax.containers if hasattr(container, "errorbar") and container.errorbar]
    if seeds == 1:
        assert not bars
        return
    assert len(bars) == 4
    (segments,) = bars[0].errorbar.lines[2]
    deviation = 100 * np.std(np.linspace(-0.02, 0.02, seeds), ddof=1)
    for segment, condition in zip(segments.get_segments(), CONDITIONS, strict=True):
        middle = 100 * mean_of(condition, "unprotected")
        assert segment[:, 1] == pytest.approx([middle - deviation, middle + deviation])


def test_a_part_of_the_table_will_do_and_tall_bars_fit():
    some = [row for row in rows() if row["condition"] == "sum_rate" and row["method"] in ("restored", "both")]
    some[0] = {**some[0], "mean": 1.3}
    del some[0]["values"]
    ax = fusion_chart(some)
    assert sorted(bar.get_height() for bar in ax.patches) == pytest.approx([100 * some[1]["mean"], 130])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["sum-rate attack"]
    assert ax.get_ylim()[1] > 130
    assert len(fusion_chart(rows()[-2:]).lines) == 2


def luminance(colour):
    return float(np.dot([0.299, 0.587, 0.114], to_rgb(colour)))


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_the_numbers_of_the_heat_map_are_right_and_legible(low):
    values = np.array([[1.0, 0.37, low], [0.37, 1.0, 0.555], [low, 0.555, 1.0]])
    ax = similarity_heatmap(values, ["a", "b", "c"])
    (image,) = ax.images
    assert np.array_equal(image.get_array(), values)
    assert image.get_clim() == (low, 1.0)
    shown = {text.get_position(): text for text in ax.texts}
    for row in range(3):
        for column in range(3):
            text = shown[column, row]
            assert float(text.get_text()) == pytest.approx(values[row, column], abs=0.0051)
            cell = luminance(image.cmap(image.norm(values[row, column]))[:3])
            assert abs(cell - luminance(text.get_color())) > 0.45
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b", "c"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["a", "b", "c"]


def test_a_tensor_straight_from_the_metric():
    vectors = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, -1e-3])}]
    ax = similarity_heatmap(cosine_similarity(vectors))
    assert [text.get_text() for text in ax.texts] == ["1.00"] * 4
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1"]
    assert similarity_heatmap([[1.0, -1e-4], [-1e-4, 1.0]]).texts[1].get_text() == "0.00"


def grid(scales=(0.0, 0.5, 1.0), factor=1.0):
    first = factor * torch.linspace(0, 0.4, len(scales) ** 2, dtype=torch.float64).reshape(len(scales), -1)
    second = first.square()
    return DisentanglementGrid(scales, first + second, {"mnist": first, "svhn": second})


@pytest.mark.parametrize("task", [None, "mnist", "svhn"])
def test_the_map_shows_every_pair_of_scales_in_its_place(task):
    """The first task's scale to the right, the second's upwards."""
    shown = grid()
    ax = disentanglement_map(shown, task)
    (mesh,) = ax.collections
    values = shown.total if task is None else shown.per_task[task]
    assert np.array_equal(mesh.get_array(), values.T.numpy())
    corners = mesh.get_coordinates()
    for row, up in enumerate(shown.scales):
        for column, right in enumerate(shown.scales):
            assert corners[row : row + 2, column : column + 2].mean((0, 1)).tolist() == pytest.approx([right, up])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("scale of mnist", "scale of svhn")
    assert mesh.get_clim() == (0, 1)
    label = ax.figure.axes[1].get_ylabel()
    assert label == ("weight disentanglement error" if task is None else f"changed predictions on {task} (share)")


def test_the_map_of_large_errors_a_single_scale_and_bad_input():
    assert disentanglement_map(grid(factor=2.5)).collections[0].get_clim() == (0, 2)
    corners = disentanglement_map(grid(scales=(0.3,))).collections[0].get_coordinates()
    assert corners.mean((0, 1)).tolist() == pytest.approx([0.3, 0.3])
    edges = disentanglement_map(grid(scales=(0.0, 0.1, 1.0))).collections[0].get_coordinates()[0, :, 0]
    assert edges.tolist() == pytest.approx([-0.05, 0.05, 0.55, 1.45])
    with pytest.raises(InputError, match="task: expected one of 'mnist', 'svhn', got 'cars'"):
        disentanglement_map(grid(), "cars")
    with pytest.raises(TypeError, match="grid: expected a DisentanglementGrid, got ndarray"):
        disentanglement_map(np.eye(2))


def front(tasks=("a", "b"), offset=None):
    points = torch.tensor([[0.5, 0.8, 0.1], [0.7, 0.7, 0.2], [0.8, 0.4, 0.3]])[:, : len(tasks)]
    measured = None if offset is None else points + offset
    return ParetoFront(tasks, "accuracy", True, 3 * points, points, measured, 2 * points, points / 2, (), ())


def test_a_front_shows_prediction_measurement_and_samples():
    ax = pareto_front(front(offset=-0.1))
    (line,) = ax.lines
    expected = front().predicted
    assert line.get_xydata().tolist() == expected.tolist()
    assert line.get_linestyle() == "-"
    samples, measured = ax.collections
    assert samples.get_offsets().tolist() == (expected / 2).tolist()
    assert measured.get_offsets().tolist() == (expected - 0.1).tolist()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["samples", "predicted", "measured"]


def test_two_tasks_of_several_are_drawn_as_points():
    ax = pareto_front(front(("a", "b", "c")), ("c", "a"))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("accuracy of c", "accuracy of a")
    (line,) = ax.lines
    assert line.get_xydata().tolist() == front(("a", "b", "c")).predicted[:, [2, 0]].tolist()
    assert line.get_linestyle() == "None"
    assert len(ax.collections) == 1
    for tasks, message in ((("a", "z"), "'z'"), (("a", "a"), "two of"), (("a",), "two of")):
        with pytest.raises(InputError, match=message):
            pareto_front(front(), tasks)
    with pytest.raises(InputError, match="two of 'a'"):
        pareto_front(front(("a",)))
    with pytest.raises(TypeError, match="front: expected a ParetoFront, got list"):
        pareto_front([])


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: pareto_front(front(), ax=ax),
        lambda ax: fusion_chart(rows(), ax=ax),
        lambda ax: similarity_heatmap(np.eye(2), ax=ax),
        lambda ax: disentanglement_map(grid(), ax=ax),
    ],
)
def test_axes_are_returned_and_pyplot_is_left_alone(draw, tmp_path):
    assert_drawn(draw, tmp_path)
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ImportError, match=r"pip install 'rmtllmf\[plot\]'"):
        fusion_chart(rows())
