"""In a linear model the link between MSE and interference is known in closed form; the testbed's runs end to end."""

import copy
import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from paper.interference import Interference, crossing, main, measure, read_json, rejection_rate, write_json
from paper.protocol import TESTBED
from rmtllmf.channel import transmit
from rmtllmf.metrics import disturbance_test, weight_disentanglement_error
from rmtllmf.taskvec import TaskVector, heuristic_scale, task_arithmetic

USERS, CLASSES, SIZE = 3, 4, 30
REFERENCE, TOLERATED, DRAWS = 0.2, 0.06, 6


class Whole(nn.Module):
    """z = W x, or something that is not linear at all."""

    def __init__(self, bent):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(CLASSES, SIZE))
        self.bent = bent

    def forward(self, inputs):
        logits = inputs @ self.weight.T
        return torch.sin(20 * logits) if self.bent else logits


@pytest.fixture(scope="module")
def world():
    """Three tasks of one-hot inputs, so that the logits of different inputs have independent noise."""
    source = torch.Generator().manual_seed(3)
    base = Whole(bent=False)
    with torch.no_grad():
        base.weight.normal_(generator=source)
    vectors = [TaskVector({"weight": torch.randn(CLASSES, SIZE, generator=source)}) for _ in range(USERS)]
    tasks = {}
    for name, vector in zip("abc", vectors, strict=True):
        inputs = torch.eye(SIZE)
        tasks[name] = (nn.Identity(), [(inputs, vector.apply_to(copy.deepcopy(base))(inputs).argmax(-1))])
    return base, vectors, tasks


def measured(world, sum_mse, **options):
    options = {"reference": REFERENCE, "tolerated": TOLERATED, "inputs": SIZE, "draws": DRAWS, "seed": 1} | options
    return measure(*world, sum_mse, **options)


def test_without_noise_it_is_the_clean_fusion(world):
    base, vectors, tasks = world
    found = measured(world, [0.0, 0.01])
    clean = weight_disentanglement_error(base, base, vectors, tasks)
    assert found.clean_error == clean.total > 0
    assert (found.received[0] == clean.total).all()
    assert (found.sent[0] == clean.total).all()
    assert (found.accuracy[0] == found.clean_accuracy).all()
    assert (found.rejection[0] == 0).all()
    assert found.theory[0] == 0
    assert (found.to_linear[0] == 1).all()
    assert (found.residual[0] == 0).all()
    # the limit of the luck of the draws
    np.testing.assert_allclose(found.to_predicted[0], found.to_predicted[1], rtol=1e-4)


def test_first_order_is_exact_in_a_linear_model(world):
    found = measured(world, [1e-4, 0.01, 1.0, 30.0])
    np.testing.assert_allclose(found.to_linear, 1, rtol=2e-4)
    assert (found.residual < 2e-4).all()
    assert {name: found.limits()[name] for name in found.limits() if "first order" in name or "residual" in name} == {
        "first order off by 10 %": None,
        "first order off by a factor of 2": None,
        "residual 10 % of the linear part": None,
        "residual as large as the linear part": None,
    }
    # The three tasks have the same inputs: CLASSES * SIZE independent normal numbers of variance 1 in every draw. The
    # mean of n of their squares has standard deviation sqrt(2 / n); five of them are exceeded once in two million.
    count = CLASSES * SIZE * DRAWS
    square = np.square(found.to_predicted).mean(1)
    assert (abs(square - 1) < 5 * math.sqrt(2 / count)).all()


def test_the_predicted_deviation_is_that_of_the_noise(world):
    """One-hot inputs: the logit differences are the differences of the weights."""
    _, vectors, _ = world
    found = measured(world, [0.3])
    scale = heuristic_scale(USERS)
    for draw in range(DRAWS):
        heard = transmit(vectors, [0.1] * USERS, seed=1000 + draw, scale=REFERENCE)
        noise = (task_arithmetic(heard, scale) - task_arithmetic(vectors, scale))["weight"].double()
        expected = float(noise.square().mean().sqrt()) / (scale * REFERENCE * math.sqrt(0.3))
        assert found.to_predicted[0, draw] == pytest.approx(expected, rel=1e-4)


def test_rejections_follow_the_theory_of_the_linear_model(world):
    ratios = np.array([0.3, 1.0, 3.0, 10.0, 100.0])
    found = measured(world, TOLERATED * ratios)
    rate = found.theory
    np.testing.assert_allclose(rate, rejection_rate(ratios, 0.05))
    assert rate[1] == pytest.approx(0.05)
    assert rate[3] == pytest.approx(math.erfc(1.959964 / math.sqrt(10) / math.sqrt(2)), abs=1e-6)
    # as many independent decisions as above
    bound = 5 * np.sqrt(rate * (1 - rate) / (CLASSES * SIZE * DRAWS))
    assert (abs(found.rejection.mean(1) - rate) < bound).all()


@pytest.mark.parametrize("bent", [False, True])
def test_the_library_says_the_same(world, bent):
    """What is shared between the points gives what the library's functions give for each of them."""
    base, vectors, tasks = world
    other = Whole(bent)
    other.load_state_dict(base.state_dict())
    found = measured((other, vectors, tasks), [0.02, 0.5], draws=2, alpha=0.1, inputs=7)
    scale = heuristic_scale(USERS)
    clean = task_arithmetic(vectors).apply_to(other.state_dict())
    for point, level in enumerate([0.02, 0.5]):
        for draw in range(2):
            heard = transmit(vectors, [level / USERS] * USERS, seed=1000 + draw, scale=REFERENCE)
            fused = task_arithmetic(heard).apply_to(other.state_dict())
            variance = scale**2 * TOLERATED * REFERENCE**2
            test = disturbance_test(other, clean, fused, variance, torch.eye(SIZE)[:7], alpha=0.1)
            assert found.rejection[point, draw] == pytest.approx(float(test.rejected.double().mean()))
            error = weight_disentanglement_error(other, other, heard, tasks)
            assert found.received[point, draw] == error.total
            differ = 0.0
            for vector, (_, [(inputs, _)]) in zip(vectors, tasks.values(), strict=True):
                alone = copy.deepcopy(other)
                vector.apply_to(alone, scale)
                joint = copy.deepcopy(other)
                joint.load_state_dict(fused)
                differ += float((alone(inputs).argmax(-1) != joint(inputs).argmax(-1)).double().mean())
            assert found.sent[point, draw] == pytest.approx(differ)


def test_first_order_stops_where_the_model_bends(world):
    """sin(20 W x): logits are bounded by 1, so the linear differences exceed the real ones when they are large."""
    base, vectors, tasks = world
    bent = Whole(bent=True)
    bent.load_state_dict(base.state_dict())
    levels = np.logspace(-6, 2, 17)
    found = measured((bent, vectors, tasks), levels)
    np.testing.assert_allclose(found.to_linear[0], 1, rtol=0.01)
    assert (found.residual[0] < 0.02).all()
    limits = found.limits()
    ten, two = limits["first order off by 10 %"], limits["first order off by a factor of 2"]
    assert 0 < limits["residual 10 % of the linear part"] < ten < two
    # For a uniform phase p and a normal change u of variance v, the mean square of sin(p + u) - sin(p) is
    # 1 - exp(-v/2), that of the linear change v/2. Their ratio is 1/1.1^2 at v = 0.79, and 1/4 at v = 7.84.
    variance = levels * (20 * heuristic_scale(USERS) * REFERENCE) ** 2
    expected = np.sqrt(-np.expm1(-variance / 2) / (variance / 2))
    np.testing.assert_allclose(found.to_linear.mean(1), expected, rtol=0.1)
    assert ten * variance[0] / levels[0] == pytest.approx(0.79, rel=0.4)
    assert two * variance[0] / levels[0] == pytest.approx(7.84, rel=0.4)


def test_nothing_is_changed_and_the_same_seed_gives_the_same_bits(world):
    base, vectors, _ = world
    before = base.weight.detach().clone(), [vector["weight"].clone() for vector in vectors]
    first, second = measured(world, [0.1, 1.0]), measured(world, [0.1, 1.0])
    other = measured(world, [0.1, 1.0], seed=2)
    for part in fields(Interference):
        np.testing.assert_array_equal(getattr(first, part.name), getattr(second, part.name), err_msg=part.name)
    assert not np.array_equal(first.to_predicted, other.to_predicted)
    assert torch.equal(base.weight, before[0])
    assert all(torch.equal(vector["weight"], kept) for vector, kept in zip(vectors, before[1], strict=True))


def test_crossing_is_a_straight_line_over_the_logarithm():
    x = np.array([1e-4, 1e-2, 1.0])
    assert crossing(x, np.array([0.0, 1.0, 3.0]), 0.5) == pytest.approx(1e-3)
    assert crossing(x, np.array([0.0, 1.0, 3.0]), 2.0) == pytest.approx(0.1)
    assert crossing(x, np.array([1.0, 1.0, 0.0]), 1.0) == 0
    assert crossing(x, np.array([0.0, 1.0, 0.0]), 2.0) is None
    assert crossing(np.array([0.0, 1e-2, 1.0]), np.array([9.0, 0.0, 1.0]), 0.5) == pytest.approx(0.1)
    assert crossing(np.array([0.0]), np.array([1.0]), 0.5) is None


def test_json_round_trip_and_a_failed_write(world, tmp_path, monkeypatch):
    found = replace(measured(world, [0.1, 1.0]), marks={"ideal": [0.1, 0.1], "sum_rate": [1.6, 2.5]})
    path = tmp_path / "found.json"
    write_json(path, [found, found])
    (again, _) = read_json(path)
    for part in fields(Interference):
        np.testing.assert_array_equal(getattr(again, part.name), getattr(found, part.name), err_msg=part.name)
        assert type(getattr(again, part.name)) is type(getattr(found, part.name))
    (row, _) = json.loads(path.read_text())
    assert row["limits"]["first order off by 10 %"] is None
    assert row["limits"]["half of the logits rejected"] == again.limits()["half of the logits rejected"]
    assert list(tmp_path.iterdir()) == [path]
    text = path.read_text()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, [replace(found, base_accuracy=math.nan)])
    assert path.read_text() == text


def test_command_line(tmp_path, capsys):
    """Two of the testbed's tasks, hardly fine-tuned: figure and numbers are written, and the same from the cache."""
    protocol = replace(TESTBED, tasks=("gratings", "automata"), images=80, finetuning_steps=2, blocks=2)
    extent = ["--points", "3", "--inputs", "2", "--images", "20", "--draws", "2", "--cache", f"{tmp_path}/cache"]
    files = ["--json", f"{tmp_path}/found.json", "--figure", f"{tmp_path}/out/figure.png"]
    threads = torch.get_num_threads()
    (found,) = main([*extent, *files], protocol)
    assert torch.get_num_threads() == threads
    assert "first order off by 10 %" in capsys.readouterr().out
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    np.testing.assert_allclose(found.sum_mse, [2e-6, 2e-3, 2.0])
    np.testing.assert_allclose(found.to_linear[0], 1, rtol=0.05)  # of two pictures and draws
    sums = [pair[0] for pair in found.marks.values()]
    assert found.tolerated == sums[0] < min(sums[1:])
    assert found.marks["ideal"][1] == pytest.approx(sums[0])  # independent errors
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2
    (again,) = main([*extent, *files], protocol)
    (read,) = read_json(tmp_path / "found.json")
    for part in fields(Interference):
        np.testing.assert_array_equal(getattr(again, part.name), getattr(found, part.name), err_msg=part.name)
        np.testing.assert_array_equal(getattr(read, part.name), getattr(found, part.name), err_msg=part.name)


@pytest.mark.parametrize("option", ["seeds", "points", "inputs", "images", "draws"])
def test_bad_options_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        main([f"--{option}", "0"])
    assert f"--{option}: expected at least 1, got 0" in capsys.readouterr().err


def test_more_inputs_than_images_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--inputs", "30", "--images", "20"])
    assert "--inputs: expected at most the 20 images, got 30" in capsys.readouterr().err
