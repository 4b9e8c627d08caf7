"""The figures of the paper's experiment show the numbers of the rows."""

import itertools
import sys
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from helpers.paper_rows import PROTOCOL, TASKS, by_hand, make_rows
from paper.figures import NothingToDrawError, ablation_figure, accuracy_figure, cosine_figure, draw
from paper.table import tabulate


@pytest.fixture(scope="module")
def rows():
    return make_rows()


def lines_of(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_figure_2_shows_the_means_the_bands_and_the_seeds(rows):
    figure = accuracy_figure(rows)
    means, seeds = figure.axes
    lines = lines_of(means)
    names = ["ideal uplink", "strongest user attacked", "sum rate attacked"]
    assert list(lines) == [
        "no noise, unprotected (baseline)",
        *(f"{name}, protected" for name in names),
        *(f"{name}, unprotected" for name in names),
        "base model, untouched",
    ]
    line = lines["sum rate attacked, protected"]
    values = [[by_hand(rows, s, "sum_rate", "both", 10, size) for s in (0, 1, 2)] for size in range(2, 6)]
    assert line.get_xdata().tolist() == [2, 3, 4, 5]
    assert line.get_ydata() == pytest.approx([100 * np.mean(v) for v in values])
    band = means.collections[3].get_paths()[0].vertices
    spread = np.mean([v.var(ddof=1) for v in values[1]]) ** 0.5
    at_three = band[band[:, 0] == 3][:, 1]
    assert (at_three.min(), at_three.max()) == pytest.approx([100 * (np.mean(values[1]) + k * spread) for k in (-1, 1)])
    drawn = [tuple(line.get_ydata()) for line in seeds.get_lines()]
    for seed in range(3):
        expected = [100 * by_hand(rows, seed, "sum_rate", "both", 10, size).mean() for size in range(2, 6)]
        assert any(values == pytest.approx(expected) for values in drawn if len(values) == 4)
    assert means.get_xlabel() == "number of tasks"
    assert means.get_ylabel() == "normalised accuracy (%)"
    assert lines["base model, untouched"].get_ydata()[0] == pytest.approx(100 * tabulate(rows).cell("base").mean)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)


def test_curves_differ_in_grey_and_in_colour(rows):
    for figure in (accuracy_figure(rows), ablation_figure(rows)):
        lines = figure.axes[0].get_lines()
        looks = {(ln.get_linestyle(), ln.get_marker(), str(ln.get_markerfacecolor()) == "white") for ln in lines}
        assert len(looks) == len(lines)
        colours = [np.array(to_rgb(line.get_color())) for line in lines if line.get_linestyle() != "--"]
        assert min(np.abs(a - b).sum() for a, b in itertools.combinations(colours, 2)) > 0.3


def test_one_seed_has_one_panel_and_unfinished_curves_say_so():
    rows = make_rows((0,))
    (ax,) = accuracy_figure(rows, protocol=replace(PROTOCOL, seeds=(0,))).axes
    assert not any("unfinished" in label for label in lines_of(ax))
    part = [r for r in rows if (r["condition"], r.get("protection"), len(r.get("tasks", ()))) != ("ideal", "both", 4)]
    part.remove(next(r for r in part if r["condition"] == "clean" and len(r["tasks"]) == 3))
    lines = lines_of(accuracy_figure(part).axes[0])
    assert lines["ideal uplink, protected (unfinished)"].get_xdata().tolist() == [2, 3, 5]
    assert lines["no noise, unprotected (baseline, unfinished)"].get_xdata().tolist() == [2, 3, 4, 5]
    assert sum("unfinished" in label for label in lines) == 2


def test_figures_3_and_4_show_the_mean_matrices(rows):
    for condition in ("ideal", "sum_rate"):
        figure = cosine_figure(rows, condition)
        up = next(up for up in tabulate(rows).uplinks if up.condition == condition)
        panels = [ax for ax in figure.axes if ax.images]
        assert len(panels) == 3
        for ax, kind in zip(panels, ("cosine_sent", "cosine", "cosine_without_restored"), strict=True):
            assert np.asarray(ax.images[0].get_array()) == pytest.approx(np.array(up.cosines[kind]))
            assert [label.get_text() for label in ax.get_xticklabels()] == list(TASKS)
        assert "0.48 to 0.52" in panels[1].get_title() or condition == "ideal"


def test_figure_5_shows_every_part_against_the_shots(rows):
    figure = ablation_figure(rows)
    (ax,) = figure.axes
    lines = lines_of(ax)
    assert list(lines) == [
        "restored and realigned",
        "restored, only attention realigned",
        "realigned only",
        "restored only, no images",
    ]
    for label, part in zip(lines, ("both", "attention", "realigned"), strict=False):
        expected = [100 * np.mean([by_hand(rows, s, "ideal", part, k, 5) for s in (0, 1, 2)]) for k in (1, 10, 50)]
        assert lines[label].get_xdata().tolist() == [1, 10, 50]
        assert lines[label].get_ydata() == pytest.approx(expected)
    restored = 100 * np.mean([by_hand(rows, s, "ideal", "restored", 0, 5) for s in (0, 1, 2)])
    assert lines["restored only, no images"].get_ydata() == pytest.approx([restored] * 2)
    assert "images a class" in ax.get_xlabel()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "10", "50"]


def test_no_band_where_there_is_one_seed(rows):
    part = [row for row in rows if row["seed"] == 0 or row.get("shots") != 50]
    (ax,) = ablation_figure(part).axes
    assert ax.collections[0].get_paths()[0].vertices[:, 0].max() == 10
    assert ax.get_lines()[0].get_xdata().tolist() == [1, 10, 50]
    assert not ablation_figure(make_rows((0,))).axes[0].collections


def test_draw_writes_whole_files_and_leaves_pyplot_alone(rows, tmp_path, capsys):
    before = dict(mpl.rcParams)
    paths = draw(rows, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [
        "figure-2-number-of-tasks.png",
        "figure-3-cosines-ideal.png",
        "figure-3-cosines-strongest-user.png",
        "figure-4-cosines-sum-rate.png",
        "figure-5-shots.png",
    ]
    assert sorted(paths) == sorted((tmp_path / "new" / "folder").iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert capsys.readouterr().out == ""
    assert dict(mpl.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_failed_write_leaves_the_old_file(rows, tmp_path, monkeypatch):
    part = [row for row in rows if row["condition"] in ("individual", "clean")]
    (path,) = draw(part, tmp_path)
    old = path.read_bytes()

    def fail(self, part, **options):
        part.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw(part, tmp_path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_figures_without_their_rows_are_skipped_aloud(rows, tmp_path, capsys):
    part = [row for row in rows if "uplink" not in row and row["shots"] in (0, 10)]
    assert [path.name for path in draw(part, tmp_path)] == ["figure-2-number-of-tasks.png"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    assert all("skipped, there " in line for line in said)
    for make in (accuracy_figure, ablation_figure, lambda rows: cosine_figure(rows, "ideal")):
        with pytest.raises(NothingToDrawError):
            make([])


def test_every_beginning_of_a_file_gives_figures(tmp_path, capsys):
    rows = make_rows((0, 1))
    for stop in (0, 2, 30, 100, len(rows) - 1):
        files = draw(rows[:stop], tmp_path / str(stop), PROTOCOL)
        skipped = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
        assert len(files) + len(skipped) == 5
