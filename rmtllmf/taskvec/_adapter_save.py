"""Writing factors as a LoRA adapter: PEFT's two files, a folder that appears as a whole or not at all."""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._safetensors import write
from .._state import Tensors, quoted, select_names
from .._untrusted import naming
from ..errors import InputError, StateMismatchError
from ._adapter_file import CONFIG, WEIGHTS

EMBEDDING = re.compile(r"(^|\.)(wte|wpe|shared|[^.]*embed[^.]*)$", re.IGNORECASE)
TASK_TYPES = ("CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")  # PEFT's, of models without a head of their own
IN_OUT = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")


def save_adapter(
    A: Tensors,
    B: Tensors,
    rest: Tensors,
    shapes: Mapping[str, tuple[int, ...]],
    folder: str | os.PathLike[str],
    base_model_name: str | None,
    *,
    model: nn.Module | None,
    embeddings: str | Iterable[str] | None,
    fan_in_fan_out: bool | None,
    rest_is: str,
    overwrite: bool,
    task_type: str | None = None,
) -> None:
    """What `LowRank.save_adapter` does; everything is checked before anything is written."""
    if rest_is not in ("error", "drop"):
        raise InputError(f"rest: expected 'error' or 'drop', got {rest_is!r}")
    if task_type is not None and task_type not in TASK_TYPES:
        raise InputError(
            f"task_type: expected one of {quoted(TASK_TYPES)} or None, got {task_type!r}; for those that have a head "
            "(SEQ_CLS, TOKEN_CLS, QUESTION_ANS) PEFT looks for it in the adapter, which holds factors only: leave it "
            "out, and load with PeftModel.from_pretrained(model, folder)"
        )
    target = os.path.abspath(os.fspath(folder))
    _check_target(target, overwrite)
    tables, turned = _layouts(shapes, list(A), model, embeddings, fan_in_fan_out)
    held, left = _fitting(A, shapes, dict(model.named_modules()) if model is not None else {})
    if rest_is == "error":
        lost = [key for key, tensor in rest.items() if bool((tensor != 0).any())]
        lost += [key for key in left if bool((A[key] != 0).any())]
        if lost:
            raise InputError(
                f"rest: an adapter cannot hold {quoted(lost)}, which are not zero; rest='drop' leaves them out, and "
                "dense().save(...) keeps everything"
            )
    if not held:
        raise InputError("no factored tensor is the weight of a layer, so that there is nothing to write")
    if model is not None:
        _check_model(held, shapes, model)
    tensors: dict[str, Tensor] = {}
    for key in held:
        name = f"base_model.model.{key.removesuffix('.weight')}"
        down, up = A[key].detach(), B[key].detach()
        if key in tables:  # the table is the transposed product, as in layers that store (in, out)
            tensors[f"{name}.lora_embedding_A"], tensors[f"{name}.lora_embedding_B"] = up.T, down.T
            continue
        if key in turned:
            down, up = up.T, down.T
        kernel = shapes[key][2:]
        tensors[f"{name}.lora_A.weight"] = down.reshape(len(down), *shapes[key][1:]) if kernel else down
        tensors[f"{name}.lora_B.weight"] = up.reshape(*up.shape, *(1 for _ in kernel))
    tensors = {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    ranks = {key.removesuffix(".weight"): len(A[key]) for key in held}
    _write(target, _config(ranks, base_model_name, bool(turned), task_type), tensors)


def _layouts(
    shapes: Mapping[str, tuple[int, ...]],
    keys: list[str],
    model: nn.Module | None,
    embeddings: str | Iterable[str] | None,
    fan_in_fan_out: bool | None,
) -> tuple[set[str], set[str]]:
    """Which tensors are embedding tables, and which are stored (in, out)."""
    if model is not None:
        modules = dict(model.named_modules())
        kinds = {key: modules.get(key.rpartition(".")[0]) for key in keys}
        tables = {key for key, module in kinds.items() if isinstance(module, nn.Embedding)}
        turned = {key for key, module in kinds.items() if type(module).__name__ == "Conv1D"}  # transformers'
        return tables, turned
    layers = [key for key in keys if key.endswith(".weight") and len(shapes[key]) == 2]
    if embeddings is None and (suspects := [key for key in layers if EMBEDDING.search(key.removesuffix(".weight"))]):
        raise InputError(
            f"embeddings: {quoted(suspects)} may be embedding tables, which an adapter stores in another way; pass "
            "model=, or their names as embeddings= (() if they are none)"
        )
    tables = set(select_names(keys, embeddings or (), "embeddings"))
    others = [key for key in layers if key not in tables]
    if fan_in_fan_out is None and (suspects := [key for key in others if IN_OUT.search(key.removesuffix(".weight"))]):
        raise InputError(
            f"fan_in_fan_out: {quoted(suspects)} may be stored (in, out), as GPT-2's layers are; pass model=, or "
            "fan_in_fan_out=True or False"
        )
    return tables, set(others) if fan_in_fan_out else set()


def _fitting(
    A: Tensors, shapes: Mapping[str, tuple[int, ...]], modules: Mapping[str, nn.Module]
) -> tuple[list[str], list[str]]:
    """What an adapter can hold, and what not: no weight of a layer, in groups, or one tensor under two names."""
    uses = Counter(id(factor) for factor in A.values())
    held: list[str] = []
    left: list[str] = []
    for key in A:
        layer = key.endswith(".weight") and len(shapes[key]) in (2, 3, 4, 5)
        layer = layer and getattr(modules.get(key.removesuffix(".weight")), "groups", 1) == 1
        (held if layer and uses[id(A[key])] == 1 else left).append(key)
    return held, left


def _check_model(held: list[str], shapes: Mapping[str, tuple[int, ...]], model: nn.Module) -> None:
    state = model.state_dict()
    for key in held:
        if key not in state:
            raise StateMismatchError(f"model lacks {key!r}, which the update changes")
        if tuple(state[key].shape) != shapes[key]:
            raise StateMismatchError(
                f"model[{key!r}] has shape {tuple(state[key].shape)}; the update has {shapes[key]}"
            )


def _config(
    ranks: Mapping[str, int], base_model_name: str | None, turned: bool, task_type: str | None
) -> dict[str, object]:
    """PEFT's configuration: scale alpha / r = 1 for every layer."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # anchored, and with dots as dots: a name also matches layers whose name ends with it
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    return {
        "alpha_pattern": others,
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": turned,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": others,
        "target_modules": sorted(ranks),
        "task_type": next((name for name in TASK_TYPES if name == task_type), None),  # PEFT's own are an enumeration
        "use_dora": False,
        "use_rslora": False,
    }


def _check_target(target: str, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise FileExistsError(f"folder: {target!r} exists; choose another, or overwrite=True")
    others = set(os.listdir(target)) - {CONFIG, WEIGHTS} if os.path.isdir(target) else {os.path.basename(target)}
    if others or os.path.islink(target):
        raise FileExistsError(f"folder: {target!r} holds more than an adapter: {quoted(others)}; delete that yourself")


def _write(target: str, config: Mapping[str, object], tensors: dict[str, Tensor]) -> None:
    """Into a new folder beside the target, which is then renamed."""
    parent, name = os.path.split(target)
    os.makedirs(parent, exist_ok=True)
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    new, old = os.path.join(parent, f".{name}.{mark}.part"), os.path.join(parent, f".{name}.{mark}.old")
    os.mkdir(new)
    try:
        write(os.path.join(new, WEIGHTS), tensors, {"format": "pt"})
        path = os.path.join(new, CONFIG)
        with naming(path), open(path, "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        if not os.path.lexists(target):
            os.rename(new, target)
        elif _exchanged(new, target):
            shutil.rmtree(new)
        else:
            os.rename(target, old)
            try:
                os.rename(new, target)
            except BaseException:
                os.rename(old, target)
                raise
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _exchanged(one: str, other: str) -> bool:
    """Exchange two names at once, so that there is no moment without either; False where the system cannot."""
    try:
        rename: Any = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
