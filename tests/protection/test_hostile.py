"""Liars lie as it says, the honest are measured, and the table says who was left out."""

from dataclasses import replace

import protection.__main__ as command
import protection.hostile as jobs
import pytest
import torch
from protection.defences import DEFENCES
from protection.hostile import ALONE, NOBODY, Hostile
from protection.hostile_table import formatted, over_the_honest
from protection.liars import ATTACKS, UPLINKS, heard_from, honest_of, liars_of, victim_of
from protection.stage import Stage

from helpers.toy_world import Toy
from paper.protocol import TESTBED
from rmtllmf.errors import NonFiniteError
from rmtllmf.taskvec import task_arithmetic

pytestmark = pytest.mark.usefixtures("one_thread")

PROTOCOL = replace(TESTBED, tasks=tuple("abcdefgh"), blocks=2, reference="30")


class Wider(Toy):
    width = 32


@pytest.fixture
def stage(tmp_path):
    return Stage(Wider(PROTOCOL, tmp_path), PROTOCOL, 0)


def flat(vector):
    return torch.cat([vector[name].reshape(-1) for name in sorted(vector)])


def test_liars_differ_from_seed_to_seed_and_victims_are_honest():
    assert [liars_of(seed, 1, 8) for seed in (0, 1, 8)] == [[0], [1], [0]]
    assert [liars_of(seed, 2, 8) for seed in (0, 5)] == [[0, 4], [1, 5]]
    assert victim_of(4, [0, 4], 8) == 5
    assert victim_of(7, [0, 7], 8) == 1
    assert honest_of([0, 4], 8) == [1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize("liars", [[2], [2, 6]])
def test_what_liars_send(stage, liars):
    heard = {attack: heard_from(stage, "noise-free", attack, liars).vectors for attack in (*ATTACKS, None)}
    own, norm = flat(stage.sent[2]), flat(stage.sent[2]).norm()
    for attack, vectors in heard.items():
        for user in honest_of(liars, 8) if attack else range(8):
            assert torch.equal(flat(vectors[user]), flat(stage.sent[user]))
    torch.testing.assert_close(flat(heard["10 times"][2]), 10 * own)
    assert torch.equal(flat(heard["flipped"][2]), -own)
    assert torch.equal(flat(heard["victim undone"][2]), -flat(stage.sent[3]))
    assert flat(heard["foreign"][2]).norm() == pytest.approx(float(norm), rel=1e-4)
    assert flat(heard["backdoor"][2]).norm() == pytest.approx(5**0.5 * float(norm), rel=0.05)
    assert flat(heard["NaN"][2]).isnan().sum() == 1
    nothing = task_arithmetic(heard["all undone"], 1.0)
    assert float(flat(nothing).abs().max()) < 1e-5


def test_the_jammed_uplink_bends_lies_too(stage):
    clean, jammed = (heard_from(stage, uplink, "flipped", [2]).vectors[2] for uplink in UPLINKS)
    assert not torch.equal(flat(clean), flat(jammed))
    assert torch.nn.functional.cosine_similarity(flat(clean), flat(jammed), dim=0) > 0.8


@pytest.mark.parametrize("name", DEFENCES)
def test_defences_agree_with_task_arithmetic_in_length_and_withstand_a_shout(stage, name):
    quiet = DEFENCES[name](stage, heard_from(stage, "noise-free", None, []))
    shouted = DEFENCES[name](stage, heard_from(stage, "noise-free", "10 times", [2]))
    base = stage.world.base.state_dict()
    moved = [
        sum(float((m[k] - base[k]).square().sum()) for k in base)
        for m in (quiet.model.state_dict(), shouted.model.state_dict())
    ]
    if name == "task arithmetic":
        assert moved[1] > 5 * moved[0]
    else:
        assert moved[1] < 3 * moved[0]
    if quiet.left_out is not None:
        assert (quiet.left_out, shouted.left_out) == ([], [2])


@pytest.mark.parametrize("name", DEFENCES)
def test_holes_are_refused_or_left_out(stage, name):
    heard = heard_from(stage, "noise-free", "NaN", [2])
    if name in ("suspects left out", "protect"):
        assert DEFENCES[name](stage, heard).left_out == [2]
    else:
        with pytest.raises(NonFiniteError):
            DEFENCES[name](stage, heard)


def row(seed, uplink, attack, count, fusion, liars=(), **more):
    found = {"seed": seed, "uplink": uplink, "attack": attack, "count": count, "fusion": fusion, "liars": list(liars)}
    return found | more


def test_only_the_honest_users_tasks_count_also_where_nobody_lies():
    tasks = ["a", "b"]
    rows = [
        row(1, "", "", 0, "individual", accuracy={"a": 0.8, "b": 0.5}),
        row(1, "jammed", NOBODY, 0, "protect", accuracy={"a": 0.4, "b": 0.1}),
        row(1, "jammed", "foreign", 1, "protect", [1], accuracy={"a": 0.2, "b": 0.5}),
        row(1, "jammed", "foreign", 2, "protect", [0, 1], accuracy={"a": 0.0, "b": 0.0}),
        row(1, "jammed", "NaN", 1, "median", [1], refused="NaN"),
    ]
    assert over_the_honest(rows, 1, tasks) == {
        ("jammed", NOBODY, 0, "protect"): {1: pytest.approx(50.0)},  # of a alone: user 1 will lie
        ("jammed", "foreign", 1, "protect"): {1: pytest.approx(25.0)},
    }


def test_the_table_tells_who_was_left_out_and_what_was_refused():
    tasks = tuple("abcdefgh")
    own = dict.fromkeys(tasks, 0.8)
    rows = [row(seed, "", "", 0, "individual", accuracy=own) for seed in (0, 1)]
    for seed, left_out in ((0, [0]), (1, [1, 5])):
        half = dict.fromkeys(tasks, 0.4)
        rows.append(row(seed, "jammed", "foreign", 1, "protect", [seed], accuracy=half, left_out=left_out))
        rows.append(row(seed, "jammed", "NaN", 1, "multi-Krum", [seed], refused="NaN"))
    text = formatted(rows, tasks)
    assert "50.0 ± 0.0" in text
    assert "1 + 0.5" in text
    assert text.count("refused") == 1
    assert max(map(len, text.splitlines())) <= 24 + 8 * 16


def test_one_command_for_all_of_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "TESTBED", PROTOCOL)
    monkeypatch.setattr(command, "Testbed", Wider)
    few = {name: ATTACKS[name] for name in ("foreign", "NaN")}
    monkeypatch.setattr(jobs, "ATTACKS", few)
    monkeypatch.setattr(jobs, "DEFENCES", {name: DEFENCES[name] for name in ("suspects left out", "multi-Krum")})
    path = tmp_path / "hostile.jsonl"
    options = ["--hostile", "--results", str(path), "--cache", str(tmp_path), "--quiet"]
    command.main(options)
    whole = path.read_bytes()
    assert len(whole.splitlines()) == 1 + 1 + 2 * (2 + 2 * (1 + 2 * 2))
    command.main(options)  # nothing is done twice
    assert path.read_bytes() == whole
    assert (tmp_path / "hostile" / "hostile.txt").read_text().strip() in capsys.readouterr().out
    assert ALONE in whole.decode()
    assert Hostile(Wider(PROTOCOL, tmp_path)).jobs([0])
