"""What is called over and over where the library is in use, on models small enough to do so a thousand times."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from helpers.fusion_rules import ROWS
from rmtllmf.channel import UplinkScenario, sic, transmit, transmit_sum, worst_case_covariance
from rmtllmf.metrics import accuracy, snr_db
from rmtllmf.resilience import (
    harmful_keys,
    joint_shrink,
    low_rank_code,
    measured_sensitivity,
    protect,
    realign,
    realign_heads,
    realign_lora,
    resilient_fusion,
    search_scale,
    shrink,
    sign_code,
    spectral_shrink,
    suspects,
    top_k_code,
)
from rmtllmf.taskvec import (
    MaskedVectors,
    TaskVector,
    adamerging,
    adapter_vector,
    emr,
    expert_merging,
    fisher_information,
    fuse,
    fuse_files,
    input_grams,
    low_rank,
    regmean_plus_plus,
    reversible_merging,
    smile,
    tall_compression,
    train_router,
    twin_merging,
)


class World:
    """A model, three users' vectors, what arrives of them, and a few samples of two tasks; the same at every call."""

    def __init__(self, folder, width=16):
        torch.manual_seed(0)
        self.folder = folder
        self.model = nn.Sequential(
            nn.Linear(4, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 8)
        )
        self.base = copy.deepcopy(self.model.state_dict())
        self.vectors = [
            TaskVector({key: 0.1 * torch.randn_like(tensor) for key, tensor in self.base.items()}) for _ in range(3)
        ]
        self.models = [vector.apply_to(self.base) for vector in self.vectors]
        self.mse = torch.full((3,), 0.1)
        self.heard = transmit(self.vectors, self.mse, seed=0)
        self.tasks = {}
        for name in "ab":
            x = torch.randn(12, 4)
            self.tasks[name] = (nn.Linear(8, 3), [(x, torch.randint(3, (12,)))])
        for seed, state in enumerate([self.base, *self.models]):
            save_file(state, folder / f"{seed}.safetensors")
        low_rank(self.vectors[0].select("*.weight"), 2).save_adapter(folder / "adapter")

    def three(self):
        """As many tasks as there are vectors."""
        return self.tasks | {"c": self.tasks["a"]}

    def fresh(self):
        self.model.load_state_dict(self.base)
        return self.model

    def uplink(self):
        up = UplinkScenario(num_users=3).draw(seed=0)
        C = worst_case_covariance(up.H, up.P, P_N=10 * up.noise, noise=up.noise)
        return transmit(self.vectors, sic(up.H, up.P, C + up.noise_covariance), seed=0)

    def saved(self):
        path = self.folder / "saved.safetensors"
        self.vectors[0].save(path)
        return TaskVector.load(path)

    def masked(self):
        path = self.folder / "masked.safetensors"
        emr(self.vectors).save(path)
        return MaskedVectors.load(path).task_vector(1)

    def files(self):
        paths = [self.folder / f"{seed}.safetensors" for seed in range(4)]
        fuse_files(paths[0], paths[1:], self.folder / "out.safetensors")

    def decoded(self, code, **options):
        encoded = code(self.vectors[0], **options)
        return encoded.decode(encoded.sent)


def calls(world: World) -> dict[str, Callable[[], Any]]:
    """Name -> call."""
    result: dict[str, Callable[[], Any]] = {
        f"fuse: {row.name}": partial(fuse, world.base, world.models, row.rule) for row in ROWS
    }
    return result | {
        "the uplink": world.uplink,
        "transmit": lambda: transmit(world.vectors, world.mse, seed=0),
        "transmit_sum": lambda: transmit_sum(world.vectors, 0.1, seed=0),
        "shrink": lambda: shrink(world.heard, world.mse),
        "joint_shrink": lambda: joint_shrink(world.heard, world.mse),
        "spectral_shrink": lambda: spectral_shrink(world.heard, world.mse),
        "suspects": lambda: suspects(world.heard, world.mse),
        "protect, nothing to tune with": lambda: protect(world.fresh(), world.base, world.heard, world.mse, seed=0),
        "protect": lambda: protect(world.fresh(), world.base, world.heard, world.mse, world.tasks, seed=0, steps=2),
        "resilient_fusion": lambda: resilient_fusion(
            world.fresh(), world.base, world.heard, world.tasks, frozen=(), steps=2
        ),
        "realign": lambda: realign(world.fresh(), world.tasks, steps=2),
        "realign_heads": lambda: realign_heads(world.fresh(), world.tasks, steps=2),
        "realign_lora": lambda: realign_lora(world.fresh(), world.tasks, rank=2, steps=2, seed=0),
        "search_scale": lambda: search_scale(world.fresh(), world.base, world.vectors[0], world.tasks),
        "harmful_keys": lambda: harmful_keys(world.heard, world.mse),
        "measured_sensitivity": lambda: measured_sensitivity(
            world.fresh(), world.heard, world.mse, [torch.ones(4, 4)], seed=0
        ),
        "low_rank_code": lambda: world.decoded(low_rank_code, rank=2),
        "top_k_code": lambda: world.decoded(top_k_code, density=0.1),
        "sign_code": lambda: world.decoded(sign_code),
        "arithmetic": lambda: (0.5 * (world.vectors[0] + world.vectors[1])).apply_to(world.base),
        "between": lambda: TaskVector.between(world.folder / "0.safetensors", world.folder / "1.safetensors"),
        "save and load": world.saved,
        "masks on disk": world.masked,
        "tall_compression": lambda: tall_compression(world.vectors).task_vector(0),
        "fuse_files": world.files,
        "adapter_vector": lambda: dict(adapter_vector(world.folder / "adapter")),
        "low_rank": lambda: low_rank(world.vectors[0], 2).dense(),
        "reversible_merging": lambda: reversible_merging([low_rank(v, 2) for v in world.vectors]).task_vector(0),
        "smile": lambda: smile(world.model, world.vectors, rank=1, gate_rank=1)(torch.ones(2, 4)),
        "twin_merging": lambda: twin_merging(world.model, world.vectors, rank=1).mixed(torch.ones(3), torch.ones(2, 4)),
        "train_router": lambda: train_router(
            twin_merging(world.model, world.vectors, rank=1),
            {name: [torch.full((4, 4), float(place))] for place, name in enumerate("abc")},
            epochs=1,
            seed=0,
        ),
        "input_grams": lambda: input_grams(world.fresh(), [torch.ones(4, 4)]),
        "fisher_information": lambda: fisher_information(world.fresh(), world.tasks),
        "regmean_plus_plus": lambda: regmean_plus_plus(world.vectors, world.fresh(), world.three(), layers=["2"]),
        "expert_merging": lambda: expert_merging(world.vectors, world.fresh(), world.three(), steps=2),
        "adamerging": lambda: adamerging(world.vectors, world.fresh(), world.three(), steps=2),
        "accuracy": lambda: accuracy(world.model, world.tasks["a"][1], head=world.tasks["a"][0]),
        "snr_db": lambda: snr_db(world.vectors[0], world.heard[0]),
    }
