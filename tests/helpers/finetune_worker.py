"""What the tests of fine-tuning share, and run as a script what needs processes of its own.

``killed FOLDER``: runs are killed at every n-th line of the checkpoint's code and at random moments, and go on.
``ranks FOLDER`` (under torchrun with two processes): the work is shared, runs stop and are resumed elsewhere.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from paper import _checkpoints
from paper.finetune import finetune
from rmtllmf.clip import ZeroShotHead
from rmtllmf.errors import InputError, NonFiniteError

KINDS = 3
QUICK = {"steps": 7, "batch_size": 12, "lr": 3e-3, "warmup": 2, "every": 2, "progress": False}


class Stopped(Exception):
    pass


class Pictures(Dataset):
    """Noisy pictures of three kinds; `wobble`: seen through random transforms; `left`: items until it fails."""

    def __init__(self, count=40, *, wobble=0.1, left=None):
        source = torch.Generator().manual_seed(5)
        self.labels = torch.arange(count) % KINDS
        centres = torch.randn(KINDS, 3, 8, 8, generator=source)
        self.images = centres[self.labels] + torch.randn(count, 3, 8, 8, generator=source)
        self.wobble, self.left, self.read = wobble, left, []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if self.left is not None and len(self.read) == self.left:
            raise Stopped
        self.read.append(index)
        drawn = torch.rand(()).item() + random.random() + float(np.random.rand())  # noqa: NPY002
        return self.images[index] + self.wobble * drawn, int(self.labels[index])


def new_encoder(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = VisionTransformer(8, 4, 16, 2, 2, 2.0, output_dim=8, **options)
    encoder.conv1.weight.requires_grad_(False)
    encoder.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
    return encoder


def new_head(seed=1):
    weight = torch.randn(8, KINDS, generator=torch.Generator().manual_seed(seed))
    return ZeroShotHead(nn.functional.normalize(weight, dim=0), logit_scale=10.0)


def same(left, right):
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def close(left, right, atol=1e-9):
    pairs = [(left[name].double(), right[name].double()) for name in left.keys() & right.keys()]
    return set(left) == set(right) and all(torch.allclose(*pair, rtol=0, atol=atol) for pair in pairs)


def forked(folder, line=0, name=0):
    """A run in a child that kills itself before the `line`-th line of `write`, or at the `name`-th naming of a file.

    ``name=3`` is just before the third checkpoint takes its name, ``name=-3`` just after.
    """
    child = os.fork()
    if child:
        return child
    left, names, rename = line, abs(name), os.replace

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code is not _checkpoints.write.__code__:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def killing(*arguments):
        nonlocal names
        names -= 1
        if name < 0 or names:
            rename(*arguments)
        if names == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if line:
        sys.settrace(trace)
    if name:
        os.replace = killing
    finetune(new_encoder(patch_dropout=0.5), new_head(), Pictures(), **QUICK, checkpoint=folder)
    os._exit(0)


def finished(child):
    """Whether the child came to its end; the alternative is that it was killed."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == 0


def check_killed(folder):
    began = time.monotonic()
    assert finished(forked(folder / "whole"))
    took = time.monotonic() - began
    expected = (folder / "whole" / _checkpoints.NAME).read_bytes()

    def go_on(name):
        assert finished(forked(folder / name))
        assert (folder / name / _checkpoints.NAME).read_bytes() == expected, name
        assert os.listdir(folder / name) == [_checkpoints.NAME]

    for number in (1, 2, 4):
        for name in (number, -number):
            assert not finished(forked(folder / f"name {name}", name=name))
            assert (folder / f"name {name}" / _checkpoints.NAME).exists() == (name != 1)
            go_on(f"name {name}")
    line = 0
    while True:
        line += 101
        if finished(forked(folder / f"line {line}", line)):
            break
        go_on(f"line {line}")
    assert line > 10 * 101
    source = random.Random(3)
    for name in ("early", "late"):
        for _ in range(8):
            child = forked(folder / name)
            time.sleep(source.uniform(0, 1 if name == "late" else 0.5) * took)
            os.kill(child, signal.SIGKILL)
            finished(child)
        go_on(name)
    print(f"killed at {line // 101 - 1} lines")


def check_ranks(folder):
    rank = int(os.environ["RANK"])
    encoder, head = new_encoder().double(), new_head().double()
    options = QUICK | {"max_norm": 0.5}

    def run(data, kind, **changed):
        return finetune(encoder, head, data, **(options | {"parallel": kind} | changed))

    data = DoublePictures()
    whole = run(data, None).state_dict()
    parts = folder / "one"
    with pytest.raises(Stopped):  # one process stops, two go on
        run(DoublePictures(left=5 * 12), None, checkpoint=parts / str(rank))
    for kind in ("ddp", "fsdp"):
        for accumulate in (1, 3):
            mine = DoublePictures()
            found = run(mine, kind, accumulate=accumulate).state_dict()
            assert close(found, whole), (kind, accumulate)
            assert len(mine.read) == QUICK["steps"] * 6
        with pytest.raises(Stopped):  # two processes stop; the test goes on with one
            run(DoublePictures(left=5 * 6), kind, checkpoint=folder / kind)
        torch.distributed.barrier()
        assert close(load_file(folder / kind / _checkpoints.NAME), load_file(parts / "0" / _checkpoints.NAME)), kind
        torch.distributed.barrier()
        (folder / f"from one, {kind}").mkdir(exist_ok=True)
        target = folder / f"from one, {kind}" / _checkpoints.NAME
        if rank == 0:
            target.write_bytes((parts / "0" / _checkpoints.NAME).read_bytes())
        torch.distributed.barrier()
        mine = DoublePictures()
        assert close(run(mine, kind, checkpoint=target.parent).state_dict(), whole), kind
        assert len(mine.read) == 3 * 6
        broken = DoublePictures()
        broken.images[...] = torch.nan if rank else broken.images
        with pytest.raises(NonFiniteError, match="loss is nan at step 0"):
            run(broken, kind)
        with pytest.raises(InputError, match="multiple of 10"):
            run(data, kind, accumulate=5)
        with pytest.raises(InputError, match="expected the same of each"):
            run(data, kind, seed=rank)
    for kind in ("ddp", "fsdp"):
        small = finetune(new_encoder(), new_head(), Pictures(), **options, parallel=kind, precision="bf16").state_dict()
        assert close(small, whole, 0.05), kind
    torch.distributed.barrier()
    print(f"process {rank}: all is well", flush=True)
    torch.distributed.destroy_process_group()


class DoublePictures(Pictures):
    def __init__(self, **options):
        super().__init__(**options)
        self.images = self.images.double()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"killed": check_killed, "ranks": check_ranks}[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # torch's own threads sometimes abort a process that is otherwise at its end
