"""Shared sums and shared models give what fusing every subset on its own gives, to the last bit."""

import copy
import random
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from helpers.toy_world import Toy
from paper.fusion import Fuser, PartialSums
from paper.protocol import TESTBED, Protocol
from paper.sweep import Job, Sweep, jobs_of, key_of
from paper.uplink import received, reception
from rmtllmf.channel import transmit
from rmtllmf.metrics import accuracy
from rmtllmf.resilience import attention_keys, embedding_keys, few_shot, realign, resilient_fusion, restore
from rmtllmf.taskvec import heuristic_scale, task_arithmetic, ties, weighted_average

NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")
PROTOCOL = replace(TESTBED, tasks=NAMES, subsets=0, blocks=2, realignment_steps=2, realignment_batch=4, shots=2)


@pytest.fixture
def world(tmp_path):
    return Toy(PROTOCOL, tmp_path)


def brute_force(world, job):
    """Everything made anew for one job, by the library's own functions on whole state dicts."""
    protocol, base = world.protocol, world.base
    sent = world.vectors(job.seed)
    if job.condition == "clean":
        heard = sent
    else:
        rms = [vector.norm() / sum(t.numel() for t in vector.values()) ** 0.5 for vector in sent]
        channel = reception(protocol, job.condition, job.seed)
        heard = transmit(sent, channel, seed=job.seed, scale=float(protocol.reference) * sum(rms) / len(rms))
    heard = [heard[index] for index in job.subset]
    names = [protocol.tasks[index] for index in job.subset]
    model = copy.deepcopy(base)

    def shots():
        return {
            name: (
                world.load(name).head,
                DataLoader(
                    few_shot(world.load(name).train, job.shots, seed=job.seed),
                    batch_size=protocol.realignment_batch,
                    shuffle=True,
                    generator=torch.Generator().manual_seed(job.seed),
                ),
            )
            for name in names
        }

    options = {"steps": protocol.realignment_steps, "lr": protocol.realignment_lr}
    fused = task_arithmetic(heard, heuristic_scale(len(heard))).apply_to(base.state_dict())
    if job.protection == "both":
        resilient_fusion(model, base, heard, shots(), **options)
    elif job.protection == "attention":
        resilient_fusion(model, base, heard, shots(), trainable=attention_keys(model), **options)
    else:
        model.load_state_dict(restore(fused, base, embedding_keys(base)) if job.protection == "restored" else fused)
        if job.protection == "realigned":
            realign(model, shots(), **options)
    return model, {
        name: accuracy(model, DataLoader(world.load(name).test, 5), head=world.load(name).head) for name in names
    }


def same_bits(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    return all(torch.equal(left[key], right[key]) for key in left)


def test_twenty_random_subsets_have_the_bits_of_brute_force(world):
    jobs = random.Random(0).sample(
        [job for job in jobs_of(PROTOCOL) if job.condition in ("clean", "ideal", "sum_rate")], 20
    )
    jobs += [
        Job(0, "strongest_user", protection, 2, (1, 4, 6)) for protection in ("realigned", "attention", "restored")
    ]
    jobs = [job for job in jobs if job.protection != "uplink"]
    assert {len(job.subset) for job in jobs} >= {3, 4, 5}
    sweep = Sweep(PROTOCOL, world)
    for job in jobs:
        model, values = brute_force(world, job)
        assert same_bits(sweep.model(job), model), job
        assert sweep.run(job)["accuracy"] == values


def test_a_row_does_not_depend_on_what_ran_before(world):
    jobs = [
        Job(0, "ideal", "both", 2, (0, 3)),
        Job(1, "ideal", "both", 2, (0, 3)),
        Job(0, "clean", "unprotected", 0, (0, 3)),
    ]
    first = [Sweep(PROTOCOL, world).run(job) for job in jobs]
    sweep = Sweep(PROTOCOL, world)
    assert [sweep.run(job) for job in jobs[::-1]] == first[::-1]
    assert first[0]["accuracy"] != first[1]["accuracy"] or first[0]["accuracy"] != first[2]["accuracy"]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 6), min_size=1).map(lambda found: tuple(sorted(found))), min_size=1, max_size=20)
)
def test_partial_sums_in_any_order(subsets):
    source = torch.Generator().manual_seed(3)
    vectors = [torch.randn(50, generator=source) for _ in range(7)]
    kept = [vector.clone() for vector in vectors]
    sums = PartialSums(vectors)
    for subset in subsets:
        expected = vectors[subset[0]].clone()
        for index in subset[1:]:
            expected += vectors[index]
        assert torch.equal(sums.of(subset), expected)
    assert all(map(torch.equal, vectors, kept))


def test_all_subsets_cost_one_addition_each():
    sums = PartialSums([torch.zeros(1) for _ in range(8)])
    subsets = PROTOCOL.chosen_subsets()
    for subset in subsets:
        sums.of(subset)
    assert len(subsets) == 247
    assert sums.additions == 247
    assert sum(len(subset) - 1 for subset in subsets) > 3 * sums.additions


def test_another_rule_is_asked_for_every_subset(world):
    vectors = world.vectors(0)
    fuser = Fuser(world.base, vectors, partial(ties, density=0.5), 0.7)
    expected = ties([vectors[1], vectors[2]], 0.5, scale=0.7).apply_to(world.base.state_dict())
    found = fuser.fused((1, 2)).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_without_a_scale_another_rule_has_its_own(world):
    vectors = world.vectors(0)
    expected = weighted_average([vectors[1], vectors[2]]).apply_to(world.base.state_dict())
    found = Fuser(world.base, vectors, weighted_average, None).fused((1, 2)).state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("magic", "rmtllmf.taskvec has no rule 'magic'"),
        ("TaskVector", "'TaskVector' does not fuse task vectors"),
        ("heuristic_scale", "'heuristic_scale' does not fuse task vectors"),
        ("dare", "'dare' needs seed, which"),
        ("multi_krum", "'multi_krum' needs hostile, which"),
    ],
)
def test_rules_that_do_not_fit(rule, message, tmp_path):
    protocol = replace(PROTOCOL, rule=rule)
    with pytest.raises(ValueError, match=f"rule: {message}"):
        Sweep(protocol, Toy(protocol, tmp_path))


def test_what_is_of_no_more_use_is_gone_before_more_is_made(world, monkeypatch):
    """Of ViT-B/16 eight vectors are 2.8 GB: those of two uplinks, and the sums of both, are never held at once."""
    held, alive = [], []

    def hearing(*arguments):
        alive.append(sum(one() is not None for one in held))
        found = received(*arguments)
        held.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr("paper.sweep.received", hearing)
    sweep = Sweep(PROTOCOL, world)
    for seed, condition in ((0, "ideal"), (0, "sum_rate"), (1, "sum_rate")):
        sweep.run(Job(seed, condition, "uplink", 0, tuple(range(8))))
        sweep.run(Job(seed, condition, "unprotected", 0, (0, 1)))
    assert alive == [0, 0, 0]
    assert Fuser(world.base, world.vectors(0), task_arithmetic, None).received == []


def test_the_base_is_never_written_to(world):
    before = copy.deepcopy(world.base.state_dict())
    sweep = Sweep(PROTOCOL, world)
    for protection in ("unprotected", "both", "realigned", "restored", "attention"):
        sweep.run(Job(0, "sum_rate", protection, 2, (0, 1)))
    assert all(torch.equal(before[key], tensor) for key, tensor in world.base.state_dict().items())


def test_jobs_are_all_there_and_different(world):
    protocol = replace(PROTOCOL, seeds=(0, 1))
    jobs = jobs_of(protocol)
    keys = [job.key(NAMES) for job in jobs]
    assert len(set(keys)) == len(keys)
    for condition, protections in {"clean": 1, "ideal": 2, "strongest_user": 2, "sum_rate": 2}.items():
        swept = {
            (job.seed, job.protection, job.subset) for job in jobs if job.condition == condition and job.shots in (0, 2)
        }
        assert len([entry for entry in swept if len(entry[2]) < 8]) == 2 * 246 * protections
    assert {job.shots for job in jobs if job.protection == "realigned"} == {1, 2, 5, 20, 50}
    row = Sweep(protocol, world).run(Job(1, "ideal", "uplink", 0, tuple(range(8))))
    assert key_of(row) == "1/ideal/uplink"
    assert [len(row["uplink"][name]) for name in ("mse", "snr_db", "cosine")] == [8, 8, 8]


def test_few_subsets_of_every_size():
    few = replace(TESTBED, subsets=4)
    subsets = few.chosen_subsets()
    assert [sum(len(subset) == size for subset in subsets) for size in range(2, 9)] == [4, 4, 4, 4, 4, 4, 1]
    assert subsets == sorted(subsets) == few.chosen_subsets()
    assert set(subsets) <= set(replace(TESTBED, subsets=0).chosen_subsets())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("digits",)}, "tasks: expected at least two"),
        ({"tasks": ("digits", "digits")}, "names something twice"),
        ({"conditions": ("ideal", "rain")}, "conditions: expected ideal.*got 'rain'"),
        ({"shots": 0}, "shots: expected at least 1, got 0"),
        ({"jamming": float("nan")}, "jamming: expected at least 0, got nan"),
        ({"seeds": ()}, "seeds: expected at least one"),
        ({"seeds": (0, "1")}, "seeds: expected int, got '1'"),
        ({"knows_jammer": 1}, "knows_jammer: expected bool, got 1"),
        ({"reference": "loud"}, "reference: expected 'rms', 'peak' or a positive number, got 'loud'"),
        ({"reference": "-3"}, "reference: expected 'rms', 'peak' or a positive number, got '-3'"),
        ({"ablation_shots": (1, 0)}, "ablation_shots: expected at least 1, got 0"),
        ({"realignment_lr": 0.0}, "realignment_lr: expected a positive number, got 0.0"),
        ({"receiver": "lmmse", "order": "weakest_first"}, "order: a linear receiver decodes all users at once"),
    ],
)
def test_bad_protocols(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TESTBED, **change)


def test_the_identity_leaves_out_how_much_is_run():
    more = replace(TESTBED, seeds=(0, 1, 2), subsets=0, conditions=("sum_rate",))
    assert more.identity() == TESTBED.identity()
    assert replace(TESTBED, shots=5).identity() != TESTBED.identity()
    assert Protocol(tasks=("x", "y")).identity()["tasks"] == ["x", "y"]
