"""FSDP2: task vectors and fusion of models that are spread over several processes.

``fully_shard`` turns parameters into DTensors, of which each process holds a part. Task vectors, ``apply_to`` and all
rules take them as they are; each process works on its own parts, and the result is, bit for bit, that of one process
that holds everything. Under ``torchrun --nproc-per-node 8``::

    model = shard(build_model(), model.layers, mesh)
    base = copy.deepcopy(model.state_dict())
    train(model, task)
    vector = TaskVector.between(base, model)

    fuse_into(model, base, over_the_air(vectors, reception, seed=0), rule=ties, density=0.2)
    save_whole(model, "fused.safetensors")

The channel sends whole vectors, in one order of their entries: `over_the_air` gathers them, which takes the memory of
the vectors in every process, and spreads what was heard as before.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from rmtllmf.channel import transmit
from rmtllmf.taskvec import TaskVector, fuse


def shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> nn.Module:
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh)
    return model


def over_the_air(vectors: Sequence[Mapping[str, Any]], reception: Any, seed: int) -> list[TaskVector]:
    sent = [{name: tensor.full_tensor() for name, tensor in vector.items()} for vector in vectors]
    heard = transmit(sent, reception, seed=seed)
    like = {name: (tensor.device_mesh, tensor.placements) for name, tensor in vectors[0].items()}
    return [TaskVector({name: distribute_tensor(vector[name], *like[name]) for name in like}) for vector in heard]


def fuse_into(model: nn.Module, base: Mapping[str, Tensor], vectors: Sequence[TaskVector], **options: Any) -> None:
    model.load_state_dict(fuse(base, vectors, **options))


def save_whole(model: nn.Module, path: str) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: dict[str, Any] = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        save_file(whole, path)
