"""The comparison of rules: all rules are given the same, and the table says what the rows do."""

import json
from dataclasses import replace

import pytest
import rules.__main__ as command
import torch
from rules.candidates import CANDIDATES, Candidate
from rules.comparison import Comparison, key_of
from rules.held import Held
from rules.table import formatted, normalised

from helpers.toy_world import Toy
from paper.protocol import TESTBED
from paper.results import Results, run
from paper.uplink import received, reception
from rmtllmf.metrics import accuracy, snr_db
from rmtllmf.taskvec import TaskVector, task_arithmetic, ties

pytestmark = pytest.mark.usefixtures("one_thread")

PROTOCOL = replace(TESTBED, tasks=tuple("abcdefgh"), blocks=2, shots=3, reference="30")


class Deeper(Toy):
    """With a list of blocks, as RegMean++ needs it."""

    layers = 2


@pytest.fixture
def world(tmp_path):
    return Deeper(PROTOCOL, tmp_path)


def test_what_is_received_is_that_of_the_papers_experiment(world):
    held = Held(world, PROTOCOL, 0)
    for uplink in ("ideal", "strongest_user", "sum_rate"):
        expected = received(PROTOCOL, held.stage.sent, reception(PROTOCOL, uplink, 0), 0)
        for ours, theirs in zip(held.vectors(uplink, False), expected, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_estimates_are_nearer_to_what_was_sent(world):
    held = Held(world, PROTOCOL, 0)
    for sent, heard, better in zip(
        held.stage.sent, held.vectors("sum_rate", False), held.vectors("sum_rate", True), strict=True
    ):
        assert snr_db(sent, better) > max(snr_db(sent, heard), -0.5)


def test_a_row_against_the_same_by_hand(world):
    row = {"seed": 0, "rule": "TIES", "uplink": "ideal", "shrunk": False}
    found = Comparison(world).run(row)
    held = Held(world, PROTOCOL, 0)
    heard, sent = held.vectors("ideal", False), held.stage.sent
    update = ties(heard)
    for scale, which in ((1.0, "accuracy"), (found["scale"], "searched")):
        model = held.model(TaskVector(update) * scale)
        for task in PROTOCOL.tasks:
            arena = world.arena(task)
            every = [tuple(map(torch.stack, zip(*[(x, torch.as_tensor(y)) for x, y in arena.test], strict=True)))]
            assert found[which][task] == accuracy(model, every, head=arena.head)
    assert found["snr"] == pytest.approx(snr_db(ties(sent), update))


@pytest.mark.slow
def test_every_rule_runs_and_leaves_the_base_model_alone(world):
    before = {name: tensor.clone() for name, tensor in world.base.state_dict().items()}
    comparison = Comparison(world)
    for rule in CANDIDATES:
        row = comparison.run({"seed": 0, "rule": rule, "uplink": "ideal", "shrunk": False})
        assert set(row["accuracy"]) == set(PROTOCOL.tasks), rule
        json.dumps(row, allow_nan=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in world.base.state_dict().items())


def test_models_of_their_own_are_tested_on_their_own_tasks(world, monkeypatch):
    """The individual models, as a rule that needs no fusion."""
    monkeypatch.setitem(CANDIDATES, "own", Candidate(lambda held, vectors: vectors))
    comparison = Comparison(world)
    own = comparison.run({"seed": 0, "rule": "own", "uplink": "clean", "shrunk": False})
    individual = comparison.run({"seed": 0, "rule": "individual", "uplink": "", "shrunk": False})
    assert own["accuracy"] == individual["accuracy"]


def test_the_jobs_are_all_different_and_shared_by_key(world):
    keys = [key for key, _ in Comparison(world).jobs([0, 1])]
    assert len(set(keys)) == len(keys) == 2 * (2 + 7 * len(CANDIDATES))
    row = {"seed": 1, "rule": "TIES", "uplink": "ideal", "shrunk": True}
    assert key_of(row) in keys


def test_the_table(tmp_path, world):
    results = Results(tmp_path / "rules.jsonl", PROTOCOL.identity(), key=key_of)
    jobs = Comparison(world).jobs([0, 1], ["task arithmetic"])
    run(jobs, results, progress=False)
    rows = list(results.rows())
    own = {row["seed"]: row["accuracy"] for row in rows if row["rule"] == "individual"}
    clean = {row["seed"]: row["accuracy"] for row in rows if row["uplink"] == "clean"}
    expected = [100 * sum(clean[s][t] / own[s][t] for t in own[s]) / len(own[s]) for s in (0, 1)]
    assert sorted(normalised(rows, "accuracy")["task arithmetic", "clean", False]) == pytest.approx(sorted(expected))
    text = formatted(rows)
    (line,) = [line for line in text.splitlines() if line.startswith("task arithmetic") and "inf" not in line][:1]
    assert float(line.split()[2]) == pytest.approx(sum(expected) / 2, abs=0.051)
    assert "TIES" not in text  # no rows of it


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "TESTBED", PROTOCOL)
    monkeypatch.setattr(command, "Testbed", Deeper)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    arguments = ["--rules", "task arithmetic", "--quiet", "--results", str(tmp_path / "rules.jsonl")]
    command.main(arguments)
    first = capsys.readouterr().out
    command.main(arguments)  # nothing is left to do
    assert capsys.readouterr().out == first == (tmp_path / "rules.txt").read_text()


def test_a_scaled_update_is_what_task_arithmetic_scales(world):
    """The search multiplies the update, so a rule's own scale does not matter to it."""
    held = Held(world, PROTOCOL, 0)
    update = task_arithmetic(held.stage.sent, 0.3)
    twice = task_arithmetic(held.stage.sent, 0.6)
    for name in update:
        torch.testing.assert_close(2 * update[name], twice[name])
