"""The comparison of protections: what is compared is what it says, and the table is right."""

import json
import math
from dataclasses import replace

import numpy as np
import protection.__main__ as command
import pytest
import torch
from protection.conditions import BLACK_BOX, KINDS, black_box, link
from protection.methods import BOUNDS, METHODS
from protection.stage import Stage
from protection.table import draw, formatted, interval, normalised

from helpers.toy_world import Toy
from paper.protocol import TESTBED
from paper.uplink import received, reception
from rmtllmf.channel import UplinkScenario, sic, strongest_user_covariance, worst_case_covariance
from rmtllmf.metrics import snr_db

pytestmark = pytest.mark.usefixtures("one_thread")

PROTOCOL = replace(
    TESTBED, tasks=tuple("abcdefgh"), blocks=2, realignment_steps=2, realignment_batch=4, shots=3, reference="30"
)


class Wider(Toy):
    """With matrices that low-rank codes are worth something for."""

    width = 32


@pytest.fixture
def stage(tmp_path):
    return Stage(Wider(PROTOCOL, tmp_path), PROTOCOL, 0)


@pytest.mark.parametrize("condition", BLACK_BOX)
def test_the_black_box_has_the_papers_signal_to_noise_ratio(stage, condition):
    heard = black_box(stage.sent, condition, 0)
    found = [snr_db(before, after) for before, after in zip(stage.sent, heard.vectors, strict=True)]
    size = sum(tensor.numel() for tensor in stage.sent[0].values())
    assert found == pytest.approx([BLACK_BOX[condition]] * 8, abs=5 * 10 / math.log(10) * math.sqrt(2 / size))


@pytest.mark.parametrize("condition", BLACK_BOX)
def test_the_link_is_that_of_the_papers_experiment(stage, condition):
    heard = link(PROTOCOL, stage.sent, condition, 0, scaled="peak", aware=False)
    expected = received(PROTOCOL, stage.sent, reception(PROTOCOL, condition, 0), 0)
    for ours, theirs in zip(heard.vectors, expected, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("condition", BLACK_BOX)
def test_eight_repetitions_are_better_and_if_the_receiver_knows_an_eighth_of_the_noise(condition, aware):
    protocol = replace(PROTOCOL, knows_jammer=aware)
    plain, often = (reception(protocol, condition, 0, times=times) for times in (1, 8))
    assert float(often.mse.mean()) < 0.7 * float(plain.mse.mean())
    if aware:
        up = UplinkScenario().draw(protocol.blocks, seed=0)
        power, thermal = protocol.jamming * up.noise, up.noise_covariance
        noise = {
            "ideal": thermal,
            "strongest_user": strongest_user_covariance(up.H, up.P, power) + thermal,
            "sum_rate": worst_case_covariance(up.H, up.P, power, noise=up.noise) + thermal,
        }[condition]
        quiet = sic(up.H, up.P, noise / 8, order=protocol.order)
        np.testing.assert_allclose(often.mse, quiet.mse, rtol=1e-6)
        np.testing.assert_allclose(plain.mse, sic(up.H, up.P, noise, order=protocol.order).mse, rtol=1e-9)


def test_all_that_realign_see_the_same_batches(stage):
    def rounds(shots, skip):
        seen = {}
        for name, (_, batches) in shots.items():
            for _ in range(skip):
                list(batches)
            seen[name] = torch.cat([images for images, _ in batches])
        return seen

    first, second = rounds(stage.shots(), 0), rounds(stage.shots(seen=False), 1)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_a_finite_model_and_leaves_the_base_alone(stage, name):
    before = {key: tensor.clone() for key, tensor in stage.world.base.state_dict().items()}
    method = METHODS[name]
    models = [method.make(stage, method.heard(stage, kind, "ideal")).state_dict() for kind in method.kinds]
    for model in models:
        assert all(bool(tensor.isfinite().all()) for tensor in model.values())
    changed = any(not torch.equal(model[key], before[key]) for model in models for key in before)
    assert changed == (name != "harmful restored")  # all of these white vectors is better restored
    assert all(torch.equal(tensor, before[key]) for key, tensor in stage.world.base.state_dict().items())


def row(seed, kind, condition, method, *accuracies):
    named = dict(zip("ab", accuracies, strict=True))
    return {"seed": seed, "kind": kind, "condition": condition, "method": method, "accuracy": named}


def test_normalised_accuracies_and_their_interval():
    rows = [
        row(0, "bound", "", "individual", 0.8, 0.5),
        row(1, "bound", "", "individual", 1.0, 0.5),
        row(0, "link", "ideal", "unprotected", 0.4, 0.5),
        row(1, "link", "ideal", "unprotected", 0.5, 0.1),
        row(2, "link", "ideal", "unprotected", 0.5, 0.1),  # nothing to compare with
    ]
    assert normalised(rows)["link", "ideal", "unprotected"] == pytest.approx({0: 75.0, 1: 35.0})
    mean, half = interval([75.0, 35.0])
    assert (mean, half) == pytest.approx((55.0, 12.7062 * 20.0), rel=1e-5)  # t(.975, 1) * sd / sqrt(2)
    assert interval([3.0]) == (3.0, math.inf)


def test_table_and_figure_hold_every_method(tmp_path):
    rows = [row(0, "bound", "", name, 0.9, 0.9) for name in ("individual", *BOUNDS)]
    for kind in KINDS:
        for name, method in METHODS.items():
            rows += [row(0, kind, c, name, 0.45, 0.9) for c in BLACK_BOX] if kind in method.kinds else []
    text = formatted(rows)
    assert all(name in text for name in (*BOUNDS, *METHODS))
    lines = [line for line in text.splitlines() if line.startswith("R-MTLLMF")]
    assert [line.split()[1:] for line in lines] == [["75.0"] * 3] * 2
    lines = [line for line in text.splitlines() if line.startswith("  protect, 10 shots - base realigned")]
    assert [line.split()[-3:] for line in lines] == [["-25.0"] * 3] * 2  # 75 less 100
    assert max(map(len, text.splitlines())) <= 50 + 3 * 16
    pictures = draw(rows, tmp_path)
    assert [path.name for path in pictures] == ["protection.png", "variants.png"]
    assert all(path.stat().st_size > 20_000 for path in pictures)


def test_means_over_fewer_seeds_than_the_tables_are_marked():
    rows = [row(seed, "bound", "", name, 0.9, 0.9) for seed in (0, 1) for name in ("individual", "clean")]
    rows += [row(0, "link", condition, "signs", 0.45, 0.45) for condition in BLACK_BOX]
    lines = formatted(rows).splitlines()
    assert [line.split()[1:] for line in lines if line.startswith("clean  ")] == [["100.0", "±", "0.0"]]
    assert [line.split()[3:] for line in lines if line.lstrip().startswith("signs (")] == [["50.0", "[1]"] * 3]


def test_a_run_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "TESTBED", PROTOCOL)
    monkeypatch.setattr(command, "Testbed", Wider)
    few = {name: METHODS[name] for name in ("unprotected", "protect", "low rank")}
    monkeypatch.setattr(command, "METHODS", few)
    path = tmp_path / "results.jsonl"
    command.main(["--results", str(path), "--cache", str(tmp_path), "--quiet"])
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 1 + 5 + 3 * 2 + 3 * 3  # header, bounds, black box, link
    path.write_bytes(b"".join(lines[:7]) + lines[7][:20])  # killed in the middle of a line
    command.main(["--results", str(path), "--cache", str(tmp_path), "--quiet"])
    assert path.read_bytes() == whole
    assert "normalised accuracy" in capsys.readouterr().out
    assert json.loads(lines[1])["method"] == "individual"


def test_some_methods_only(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "TESTBED", PROTOCOL)
    monkeypatch.setattr(command, "Testbed", Wider)
    path = tmp_path / "results.jsonl"
    given = ["--results", str(path), "--cache", str(tmp_path), "--quiet", "--methods"]
    command.main([*given, "base", "unprotected"])
    names = [json.loads(line)["method"] for line in path.read_text().splitlines()[1:]]
    assert names == ["individual", "base", *["unprotected"] * 6]  # the first is what accuracies are relative to
    text = capsys.readouterr().out
    assert "unprotected" in text
    assert "protect, 10 shots" not in text  # nothing is said of what was not run
    with pytest.raises(SystemExit):
        command.main([*given, "base", "majic"])
    assert "majic" in capsys.readouterr().err


def test_a_line_without_any_result_is_left_out():
    rows = [row(0, "bound", "", name, 0.9, 0.9) for name in ("individual", "clean")]
    text = formatted([*rows, row(0, "link", next(iter(BLACK_BOX)), "signs", 0.45, 0.45)])
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("signs (")]
    assert line.split()[3:] == ["50.0", "-", "-"]
    assert "power loading" not in text
