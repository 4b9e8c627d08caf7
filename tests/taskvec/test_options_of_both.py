"""Options that a rule and `fuse_files` (or the channel) call alike: whose they are, and what is said about it."""

import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmtllmf.channel import transmit
from rmtllmf.errors import RmtllmfWarning
from rmtllmf.taskvec import TaskVector, dare, fuse, fuse_files, task_arithmetic, ties


@pytest.fixture
def models(tmp_path):
    source = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(300, generator=source), "v": torch.zeros(200)}
    tuned = [{k: t + 1e-3 * torch.randn(t.shape, generator=source) for k, t in base.items()} for _ in range(2)]
    paths = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for path, state in zip(paths, [base, *tuned], strict=True):
        save_file(state, path)
    return paths


def fused(models, *arguments, **options):
    out = models[0].parent / "out.safetensors"
    fuse_files(models[0], models[1:], out, *arguments, **options)
    return load_file(out)


def test_a_rules_scale_that_the_channel_takes_is_warned_of(models):
    with pytest.warns(
        RmtllmfWarning, match=r"scale: 0\.4 is \d+ times the rms of finetuned\[0\].*partial\(rule, sc"
    ) as w:
        found = fused(models, scale=0.4, mse=0.1, seed=0)
    assert len(w) == 1
    assert w[0].filename == __file__
    vectors = [TaskVector.between(models[0], path) for path in models[1:]]
    expected = task_arithmetic(transmit(vectors, 0.1, seed=0, scale=0.4)).apply_to(load_file(models[0]))
    assert all(torch.equal(found[key], expected[key]) for key in found)  # the contract's meaning all the same
    for options in ({"scale": 0.09}, {"scale": "peak"}, {"scale": 0.06}, {"rule": partial(task_arithmetic, scale=0.4)}):
        fused(models, **options, mse=0.1, seed=0)  # warnings are errors in the tests
    fused(models, scale=0.4)


def test_the_rms_is_that_of_each_whole_vector(models):
    base = load_file(models[0])
    zeros = {**base, "w": base["w"] + 1e-3}  # rms 1e-3 * sqrt(300 / 500) = 7.7e-4
    save_file(zeros, models[2])
    fused(models, scale=0.077, mse=0.1, seed=0)
    with pytest.warns(RmtllmfWarning, match=r"rms of finetuned\[1\] - base"):
        fused(models, scale=0.078, mse=0.1, seed=0)


def test_a_model_that_is_the_base_is_not_warned_of(models):
    save_file(load_file(models[0]), models[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(models, scale=0.01, mse=0.1, seed=0)


def test_a_rule_in_a_rule_is_bound(models):
    expected = fused(models, partial(dare, rule=ties), seed=0)
    for call in (
        lambda: fused(models, dare, seed=0, rule=ties),
        lambda: fuse(models[0], models[1:], dare, seed=0, rule=ties),
        lambda: fuse(models[0], models[1:], partial(dare, drop=0.3), seed=0, rule=ties),
    ):
        with pytest.raises(TypeError, match=r"rule: given twice.*functools\.partial\(dare, rule=ties\)"):
            call()
    again = fuse(models[0], models[1:], rule=partial(dare, rule=ties), seed=0)
    assert all(torch.equal(again[key], expected[key]) for key in again)


def test_a_seed_for_rule_and_channel(models):
    with pytest.raises(TypeError, match=r"seed: with mse it is the channel's, and dare.*partial\(dare, seed=\.\.\.\)"):
        fused(models, dare, mse=0.1, seed=0)
    assert fused(models, partial(dare, seed=1), mse=0.1, seed=0)
    with pytest.raises(TypeError, match="seed"):
        fused(models, dare)
