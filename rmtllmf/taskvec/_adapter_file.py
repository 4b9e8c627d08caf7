"""LoRA adapters on disk, as PEFT writes them: from configuration and factors to the parts of a task vector."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._state import quoted
from .._untrusted import brief, read_json
from ..errors import InputError, ShapeError, StateMismatchError
from ._adapter_parts import AdapterVector, BaseModel, Part, StoredFile, combined, reader
from ._adapter_patterns import Patterns
from ._sources import Spec
from ._steady import steady

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$).+?))??(?:\.(?P<last>weight|bias))?$",
    re.DOTALL,  # else a line break at the end has every beginning tried in vain
)
COPY = re.compile(r"\.(modules_to_save|original_module)(?=\.)")  # of a module that is trained as a whole
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # that leave the base as it was
NOT_ADDITIVE = (  # options of LoRA under which the update is more than a product of two factors, and what they are
    ("alora_invocation_tokens", "acts on some tokens only"),
    ("arrow_config", "routes every token on its own"),
    ("layer_replication", "changes the base"),
    ("monteclora_config", "draws its weights at random"),
    ("target_parameters", "adapts parameters whose layout is in the model only"),
    ("trainable_token_indices", "replaces rows of the embedding"),
    ("use_bdlora", "has block-diagonal factors"),
    ("use_qalora", "pools its inputs"),
)
ELSE = "load it with PEFT and pass the PeftModel, or merge it there and use TaskVector.between(base, merged)"


def from_file(path: str, prefix: str, adapter_name: str | None, base: BaseModel | None) -> AdapterVector:
    """What `adapter_vector` returns for a path."""
    label = f"adapter {path!r}"
    config, weights = _read(path, adapter_name, label)
    factors, replaced = _sorted_out(weights, prefix, adapter_name, label)
    if config.get("modules_to_save"):  # with bias="all" PEFT also writes the biases of the copy and of the original
        again = {key for key in replaced if (own := COPY.sub("", key)) != key and own in replaced}
        replaced = {key: name for key, name in replaced.items() if key not in again}
    if not factors and not replaced:
        raise InputError(f"{label}: {WEIGHTS} holds no tensors")
    ranks, alphas = (
        Patterns(config.get(option) or {}, factors, f"{label}: {option} in {CONFIG}")
        for option in ("rank_pattern", "alpha_pattern")
    )
    parts: dict[str, list[Part]] = {}
    for module, found in factors.items():
        rank, alpha = ranks.value(module, config.get("r")), alphas.value(module, config.get("lora_alpha"))
        scale = _scale(module, rank, alpha, config, label)
        for key, part in _module_parts(module, found, weights, rank, scale, config, base, label):
            parts.setdefault(key, []).append(part)
    return combined(parts, {key: (weights.specs[k], reader(weights, k)) for key, k in replaced.items()}, base, label)


def check_config(config: Mapping[str, Any], label: str) -> None:
    """Raise for a start that changes the base model: what is trained is then no difference from it."""
    start = config.get("init_lora_weights")
    if start not in HARMLESS_STARTS or config.get("kasa_config"):
        what = "kasa_config" if config.get("kasa_config") else f"init_lora_weights={brief(start)}"
        raise InputError(
            f"{label}: {what} changes the base model, so that the factors are no difference from "
            "it; save it with path_initial_model_for_weight_conversion (PEFT converts it to plain LoRA), or merge it "
            "with PEFT and use TaskVector.between(base, merged)"
        )


def _folder(folder: str, adapter_name: str | None) -> str:
    """That of the adapter: the one given, or the one in it that has the adapter's name."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"adapter: there is no folder {folder!r}; expected one that PeftModel.save_pretrained wrote"
        )
    if adapter_name is not None and os.path.basename(adapter_name) == adapter_name:
        own = os.path.join(folder, adapter_name)  # PEFT gives all that are not called "default" a folder in it
        folder = own if os.path.isfile(os.path.join(own, CONFIG)) else folder
    if not os.path.isfile(os.path.join(folder, CONFIG)):
        named = [name for name in sorted(os.listdir(folder)) if os.path.isfile(os.path.join(folder, name, CONFIG))]
        hint = f"; choose one with adapter_name=: {quoted(named)}" if named else ""
        raise FileNotFoundError(f"adapter: {folder!r} holds no {CONFIG}{hint}")
    return folder


def _read(path: str, adapter_name: str | None, label: str) -> tuple[dict[str, Any], StoredFile]:
    """The configuration and the weights, both of one adapter: its folder may be replaced meanwhile."""
    outer = os.path.dirname(path) or "." if os.path.basename(path) == WEIGHTS else path

    def read() -> tuple[dict[str, Any], StoredFile]:
        folder = _folder(outer, adapter_name)

        def both() -> tuple[dict[str, Any], StoredFile]:
            return _config(folder, label), StoredFile(os.path.join(folder, WEIGHTS), label, inside=folder)

        return both() if folder == outer else steady(folder, both, label)

    return steady(outer, read, label) if os.path.isdir(outer) else read()


def _config(folder: str, label: str) -> dict[str, Any]:
    """The configuration, of a LoRA adapter whose update is the product of its factors (DoRA: and the base)."""
    config = read_json(os.path.join(folder, CONFIG), label, inside=folder)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise InputError(
            f"{label}: peft_type is {brief(kind)}; from a file only 'LORA' gives a task vector. If this kind changes "
            f"weights (prompt tuning does not), {ELSE}"
        )
    if not os.path.isfile(os.path.join(folder, WEIGHTS)):
        if os.path.isfile(os.path.join(folder, PICKLED)):
            raise InputError(
                f"{label}: {PICKLED} is pickled, and nothing is unpickled here; write it again with "
                "PeftModel.from_pretrained(base, folder).save_pretrained(folder, safe_serialization=True)"
            )
        raise FileNotFoundError(f"adapter: {folder!r} holds no {WEIGHTS}")
    for option, why in NOT_ADDITIVE:
        if config.get(option):
            raise InputError(f"{label}: {option} is set, which {why}; {ELSE}")
    check_config(config, label)
    return config


def _sorted_out(
    weights: StoredFile, prefix: str, adapter_name: str | None, label: str
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Module -> kind of factor -> name in the file; and name in the base -> name in the file for whole tensors."""
    factors: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    adapters: set[str] = set()
    adapted = {match["module"] for key in weights if (match := FACTOR.fullmatch(key))}
    for key in weights:
        if not key.startswith(prefix):
            raise InputError(f"{label}: {key!r} does not start with {prefix!r}; say what to take off with prefix=")
        outer, wrapped, inner = key.partition(".base_layer.")
        name = (f"{outer}.{inner}" if wrapped and outer in adapted else key).removeprefix(prefix)
        match = FACTOR.fullmatch(name)
        if match is None:
            replaced[name] = key
            continue
        if match["adapter"]:
            adapters.add(match["adapter"])
            if adapter_name is not None and match["adapter"] != adapter_name:
                continue
        if wrapped and outer in adapted:
            raise InputError(
                f"{label}: adapts {name.partition('.lora_')[0]!r} inside another adapted layer (multi-head attention), "
                f"which PEFT merges in a way of its own; {ELSE}"
            )
        kind = match["kind"] + (".bias" if match["last"] == "bias" else "")
        factors.setdefault(match["module"], {})[kind] = key
    if adapter_name is None and len(adapters) > 1:
        raise InputError(f"{label}: holds several adapters; choose one with adapter_name=: {quoted(adapters)}")
    if adapters and not factors:
        raise InputError(f"adapter_name: there is no adapter {adapter_name!r}; expected one of {quoted(adapters)}")
    folder = os.path.basename(os.path.dirname(os.path.abspath(weights.path)))
    if not adapters and adapter_name not in (None, "default", folder):
        raise InputError(f"adapter_name: there is no adapter {adapter_name!r}; the only one has no name; leave it out")
    return factors, replaced


def _scale(module: str, rank: object, alpha: Any, config: Mapping[str, Any], label: str) -> float:
    """What the product of the factors is multiplied by."""
    if type(rank) is not int or rank < 1:
        raise InputError(
            f"{label}: the rank (r) of {module!r} is {brief(rank)} in {CONFIG}; expected an int of at least 1"
        )
    if type(alpha) not in (int, float) or not abs(alpha) <= torch.finfo(torch.float32).max:
        raise InputError(
            f"{label}: the lora_alpha of {module!r} is {brief(alpha)} in {CONFIG}; expected a finite number"
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _module_parts(
    module: str,
    found: Mapping[str, str],
    weights: StoredFile,
    rank: int,
    scale: float,
    config: Mapping[str, Any],
    base: BaseModel | None,
    label: str,
) -> list[tuple[str, Part]]:
    embedding = "lora_embedding_A" in found
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    for name in names:
        if name not in found:
            raise InputError(f"{label}: {module!r} lacks {name}")
    for name, key in found.items():
        if name not in (*names, "lora_magnitude_vector", "lora_B.bias"):
            raise InputError(f"{label}: {module!r} has both {names[0]} and {name}, which LoRA does not have together")
        if not weights.specs[key].dtype.is_floating_point:
            raise InputError(f"{label}: {name} of {module!r} is {weights.specs[key].dtype}; expected floating point")
    file_A, file_B = found[names[0]], found[names[1]]
    A, B = weights.specs[file_A], weights.specs[file_B]
    if len(A.shape) < 2 or len(B.shape) < 2 or A.shape[0] != rank or B.shape[1] != rank:
        raise ShapeError(
            f"{label}: {module!r} has factors A {A.shape} and B {B.shape}; expected the rank {rank} of {CONFIG} "
            "(of several patterns that match, PEFT takes the first; convolutions in groups have no mergeable update)"
        )
    if len(B.shape) != len(A.shape) or any(width != 1 for width in B.shape[2:]):
        want = (B.shape[0], rank, *(1 for _ in A.shape[2:]))
        raise ShapeError(f"{label}: {module!r} has factors A {A.shape} and B {B.shape}; expected B {want}")
    shape = (B.shape[0], *A.shape[1:])
    key = f"{module}.weight"
    transposed = embedding or (len(shape) == 2 and _transposed(module, key, shape, config, base))
    shape = shape[::-1] if transposed else shape
    if base is not None:
        if key not in base:
            raise StateMismatchError(f"base lacks {key!r}, which {label} changes")
        if base.spec(key).shape != shape:
            raise StateMismatchError(f"base[{key!r}] has shape {base.spec(key).shape}; {label} has {shape}")
    magnitude = found.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        problem = "is set, but {!r} lacks" if magnitude is None else "is not set, but {!r} has"
        raise InputError(f"{label}: use_dora {problem.format(module)} lora_magnitude_vector")
    if magnitude is not None and weights.specs[magnitude].size != B.shape[0]:
        raise ShapeError(
            f"{label}: {module!r} has a lora_magnitude_vector {weights.specs[magnitude].shape}; expected {B.shape[0]} "
            "magnitudes, one for each row of B"
        )
    if magnitude is not None and base is None:
        raise InputError(
            f"{label}: use_dora is set, so that the update of {module!r} depends on the base model; pass base="
        )

    def make(dtype: torch.dtype) -> Tensor:
        delta = (weights[file_B].to(dtype).flatten(1) @ weights[file_A].to(dtype).flatten(1)).mul_(scale)
        if magnitude is not None and base is not None:
            before = base.read(key, dtype).cpu()
            before = before.T if transposed else before.flatten(1)
            moved = before + delta
            length = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
            delta = moved * (weights[magnitude].to(dtype).reshape(-1, 1) / length) - before
        return (delta.T if transposed else delta).reshape(shape)

    spec = Spec(shape, torch.float64 if torch.float64 in (A.dtype, B.dtype) else torch.float32, A.device)
    parts = [(key, Part(spec, make))]
    if bias := found.get("lora_B.bias"):
        if weights.specs[bias].shape != B.shape[:1]:
            raise ShapeError(
                f"{label}: {module!r} has a lora_B.bias {weights.specs[bias].shape}; expected {B.shape[:1]}"
            )
        if base is not None and f"{module}.bias" not in base:
            raise StateMismatchError(f"base lacks '{module}.bias', which {label} changes")
        parts.append((f"{module}.bias", Part(weights.specs[bias], lambda dtype: weights[bias].to(dtype) * scale)))
    return parts


def _transposed(
    module: str, key: str, shape: tuple[int, ...], config: Mapping[str, Any], base: BaseModel | None
) -> bool:
    """Whether the layer stores (in, out): as the base model has it, where it tells, else as the configuration says."""
    if base is not None:
        layer = base.modules.get(module)
        if layer is not None:
            return type(layer).__name__ == "Conv1D"
        if key in base and shape[0] != shape[1]:
            return base.spec(key).shape == shape[::-1]
    return bool(config.get("fan_in_fan_out"))
