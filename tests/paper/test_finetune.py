"""Fine-tuning: the protocol itself, runs that stop and go on, and what is refused."""

import copy
import json
import math
import os
import random
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from helpers.finetune_worker import KINDS, QUICK, Pictures, Stopped, close, new_encoder, new_head, same
from helpers.scripts import printed_by
from paper import _checkpoints
from paper.finetune import finetune
from rmtllmf.errors import InputError, NonFiniteError


def run(data=None, encoder=None, head=None, **options):
    return finetune(encoder or new_encoder(), head or new_head(), data or Pictures(), **(QUICK | options))


def stopped(folder, left, **options):
    with pytest.raises(Stopped):
        run(Pictures(left=left), checkpoint=folder, **options)


@torch.no_grad()
def right(encoder, data):
    return (new_head()(encoder(data.images)).argmax(1) == data.labels).double().mean()


def test_learns_and_leaves_the_callers_models_alone():
    encoder, data = new_encoder(), Pictures(120)
    head = torch.nn.Sequential(new_head(), torch.nn.Linear(KINDS, KINDS))
    before = copy.deepcopy([encoder.state_dict(), head.state_dict()])
    assert run(data, encoder, head) is not encoder
    tuned = finetune(encoder, new_head(), data, **QUICK | {"steps": 60, "batch_size": 30})
    assert same(encoder.state_dict(), before[0])
    assert same(head.state_dict(), before[1])
    assert all(parameter.grad is None for module in (encoder, head, tuned) for parameter in module.parameters())
    assert encoder.training
    assert head.training
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert not any(module.training for module in tuned.modules())
    flags = {name: parameter.requires_grad for name, parameter in encoder.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in tuned.named_parameters()} == flags
    moved = {name for name, value in tuned.state_dict().items() if not torch.equal(value, before[0][name])}
    assert moved == {name for name, flag in flags.items() if flag}
    assert right(encoder, data) < 0.6
    assert right(tuned, data) > 0.95


@pytest.mark.parametrize("max_norm", [None, 0.3])
def test_is_the_protocol(max_norm):
    """The same, written down as in the authors' code."""
    data = Pictures(12, wobble=0)  # every batch is the whole data set
    expected, head = new_encoder().double(), new_head().double()
    data.images = data.images.double()
    start = copy.deepcopy(expected)
    parameters = [parameter for parameter in expected.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.4)
    for step in range(7):
        rate = 3e-3 * (step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 5)) * 3e-3
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(head(expected(data.images)), data.labels).backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
    for accumulate in (1, 4):
        found = run(data, start, head, max_norm=max_norm, weight_decay=0.4, accumulate=accumulate)
        assert close(found.state_dict(), expected.state_dict())


def test_every_image_comes_once_before_any_comes_again():
    data = Pictures(15)
    run(data, steps=20, every=100)
    assert len(data.read) == 20 * 12
    epochs = [tuple(data.read[start : start + 15]) for start in range(0, 240, 15)]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)
    other = Pictures(15)
    run(other, steps=20, every=100, seed=1)
    assert other.read[:15] != data.read[:15]


@pytest.mark.parametrize("done", [0, 1, 2, 5, 6])
def test_a_run_that_stopped_ends_with_the_same_bits(tmp_path, done):
    """The encoder draws random numbers, too: half of the patches are dropped."""
    encoder = new_encoder(patch_dropout=0.5)
    whole = run(encoder=encoder).state_dict()
    stopped(tmp_path, done * 12 + 5, encoder=encoder)
    torch.rand(3)
    data = Pictures()
    assert same(run(data, encoder, checkpoint=tmp_path).state_dict(), whole)
    assert len(data.read) == (7 - done // 2 * 2) * 12
    data = Pictures(left=0)
    assert same(run(data, encoder, checkpoint=tmp_path, every=1, accumulate=2).state_dict(), whole)
    assert os.listdir(tmp_path) == [_checkpoints.NAME]


def test_running_statistics_go_on(tmp_path):
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 8), torch.nn.BatchNorm1d(8))
    stopped(tmp_path, 50, encoder=encoder)
    found = run(encoder=encoder, checkpoint=tmp_path).state_dict()
    assert found["2.num_batches_tracked"] == 7
    assert same(found, run(encoder=encoder).state_dict())
    assert same(found, run(encoder=encoder, checkpoint=tmp_path).state_dict())


def test_the_checkpoint_is_plain_tensors(tmp_path):
    stopped(tmp_path / "new" / "folder", 30)
    path = tmp_path / "new" / "folder" / _checkpoints.NAME
    with safe_open(path, "pt") as file:
        note = json.loads(file.metadata()["finetune"])
    assert note["steps"] == 2
    assert note["run"]["lr"] == QUICK["lr"]
    tensors = load_file(path)
    assert tensors["adamw.step.proj"] == 2
    assert {name for name in tensors if name.endswith("conv1.weight")} == {"model.conv1.weight"}
    run(checkpoint=path.parent)
    assert all(name.startswith("model.") for name in load_file(path))


def states():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002


def test_the_global_random_state_is_neither_read_nor_changed():
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = states()
        results.append(run(encoder=new_encoder(patch_dropout=0.5)).state_dict())
        assert states() == before
    assert same(*results)
    assert not same(results[0], run(Pictures(wobble=0), new_encoder(patch_dropout=0.5)).state_dict())


@pytest.mark.filterwarnings("ignore:.*is multi-threaded:DeprecationWarning")
def test_the_same_bits_with_processes_that_load_images():
    assert same(run(workers=2).state_dict(), run().state_dict())


def test_bfloat16_is_near():
    found, expected = run(precision="bf16"), run()
    assert found.proj.dtype == torch.float32
    assert not same(found.state_dict(), expected.state_dict())
    assert close(found.state_dict(), expected.state_dict(), 0.05)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"lr": 1e-3}, "lr was 0.003, now 0.001; pass"),
        ({"steps": 9}, "steps was 7, now 9; pass"),
        ({"batch_size": 6, "seed": 1}, "batch_size was 12, now 6; seed was 0, now 1; pass"),
        ({"warmup": 1}, "warmup was 2, now 1; pass"),
        ({"weight_decay": 0.0}, "weight_decay was 0.1, now 0.0; pass"),
        ({"max_norm": None}, "max_norm was 1.0, now None; pass"),
        ({"precision": "bf16"}, "precision was None, now 'bf16'; pass"),
        ({"data": Pictures(41)}, "samples was 40, now 41; pass"),
        ({"encoder": new_encoder(1)}, "encoder was '.{32}', now '.{32}'; pass"),
        ({"encoder": new_encoder().requires_grad_()}, "encoder was '.{32}', now '.{32}'; pass"),
        ({"head": new_head(2)}, "head was '.{32}', now '.{32}'; pass"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path, changed, named):
    stopped(tmp_path, 50)
    before = (tmp_path / _checkpoints.NAME).read_bytes()
    with pytest.raises(InputError, match=f"is of another run: {named}"):
        run(checkpoint=tmp_path, **changed)
    assert (tmp_path / _checkpoints.NAME).read_bytes() == before


def test_what_is_no_checkpoint_is_refused_and_kept(tmp_path, monkeypatch):
    path = tmp_path / _checkpoints.NAME
    stopped(tmp_path, 50)
    with monkeypatch.context() as patch:
        patch.setattr(_checkpoints, "_VERSION", 2)
        with pytest.raises(InputError, match="was not written by this function"):
            run(checkpoint=tmp_path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(InputError, match="was not written by this function"):
        run(checkpoint=tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="is damaged"):
        run(checkpoint=tmp_path)
    assert path.exists()
    with pytest.raises(InputError, match="expected a folder"):
        run(checkpoint=path)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_two_runs_in_one_folder_are_refused(tmp_path):
    class Nested(Pictures):
        def __getitem__(self, index):
            run(checkpoint=tmp_path)

    with pytest.raises(InputError, match="another run is writing"):
        run(Nested(), checkpoint=tmp_path)
    run(checkpoint=tmp_path)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path):
    class Broken(Pictures):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image * (math.nan if len(self.read) > 60 else 1), label

    stopped(tmp_path / "before", 60, every=1)
    with pytest.raises(NonFiniteError, match="loss is nan at step 5, which was not taken"):
        run(Broken(), checkpoint=tmp_path / "broken", every=1)
    files = [load_file(tmp_path / name / _checkpoints.NAME) for name in ("before", "broken")]
    assert same(*files)

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(context, features):
            return features.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * math.inf

    class SteepHead(torch.nn.Module):
        def forward(self, features):
            return Steep.apply(features)

    with pytest.raises(NonFiniteError, match=r"length of the gradient is (nan|inf) at step 0"):
        run(head=SteepHead())


def test_a_full_disk_leaves_the_checkpoint_as_it_was(tmp_path):
    resource = pytest.importorskip("resource")

    class Filling(Pictures):
        """The disk is full when the fourth step begins: no file may grow beyond a few bytes."""

        def __getitem__(self, index):
            if len(self.read) == 36:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
            return super().__getitem__(index)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="File too large"):
            run(Filling(), checkpoint=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == [_checkpoints.NAME]
    data = Pictures()
    assert same(run(data, checkpoint=tmp_path).state_dict(), run().state_dict())
    assert len(data.read) == 5 * 12


class Bare(Pictures):
    def __getitem__(self, index):
        return self.images[index]


class Soft(Pictures):
    def __getitem__(self, index):
        return self.images[index], 0.5


class Far(Pictures):
    def __getitem__(self, index):
        return self.images[index], KINDS - 1 if index else -100


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"steps": 0}, InputError, "steps: expected at least 1, got 0"),
        ({"every": 0}, InputError, "every: expected at least 1, got 0"),
        ({"accumulate": 0}, InputError, "accumulate: expected at least 1, got 0"),
        ({"accumulate": 5}, InputError, r"batch_size: expected a multiple of 5 \(1 processes times accumulate=5\)"),
        ({"batch_size": 41}, InputError, "train: expected at least batch_size=41 images, got 40"),
        ({"warmup": 7}, InputError, "warmup: expected 0 to 6, fewer than steps=7, got 7"),
        ({"warmup": -1}, InputError, "warmup: expected 0 to 6"),
        ({"lr": 0.0}, InputError, "lr: expected a positive finite number, got 0.0"),
        ({"lr": math.nan}, InputError, "lr: expected a positive finite number, got nan"),
        ({"weight_decay": -0.1}, InputError, "weight_decay: expected"),
        ({"max_norm": 0}, InputError, "max_norm: expected"),
        ({"parallel": "dp"}, InputError, "parallel: expected None or 'ddp' or 'fsdp', got 'dp'"),
        ({"parallel": "ddp"}, InputError, "parallel: 'ddp' needs several processes: start the program with torchrun"),
        ({"precision": "fp16"}, InputError, "precision: expected None or 'bf16', got 'fp16'"),
        ({"encoder": new_encoder().requires_grad_(False)}, InputError, "encoder: expected parameters to train"),
        ({"encoder": new_encoder().half()}, InputError, "encoder: expected float32 weights, '.*' is torch.float16"),
        ({"encoder": new_encoder().double(), "precision": "bf16"}, InputError, "is torch.float64"),
        ({"data": iter([])}, TypeError, "train: expected a data set with a length and items"),
        ({"data": Bare()}, TypeError, r"train: expected items \(image, label\)"),
        ({"data": Soft()}, TypeError, "train: expected one whole number as label, got torch.float64"),
        ({"data": Far()}, InputError, "train: the head has classes 0 to 2, got label -100"),
        ({"head": torch.nn.Linear(8, 2)}, InputError, "train: the head has classes 0 to 1, got label 2"),
    ],
)
def test_bad_arguments_are_named(monkeypatch, changed, error, message):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(error, match=message):
        run(**changed)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path):
    assert "killed at" in printed_by("finetune_worker.py", "killed", tmp_path, timeout=600)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_share_the_work(tmp_path):
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    assert printed_by("finetune_worker.py", "ranks", tmp_path, launch=launch, timeout=600).count("all is well") == 2
    encoder, head, data = new_encoder().double(), new_head().double(), Pictures()
    data.images = data.images.double()
    whole = run(data, encoder, head, max_norm=0.5).state_dict()
    for kind in ("ddp", "fsdp"):
        data.read.clear()
        assert close(run(data, encoder, head, max_norm=0.5, checkpoint=tmp_path / kind).state_dict(), whole), kind
        assert len(data.read) == 3 * 12
