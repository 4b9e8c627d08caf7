"""Adapters inside a model in memory: the parts of a task vector, as the layers themselves merge them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .._state import is_bendable, quoted
from ..errors import InputError
from ._adapter_file import ELSE, check_config
from ._adapter_parts import AdapterVector, BaseModel, Part, combined, reader
from ._sources import Spec

ADDITIVE = {  # first parameter of the kinds of layers whose update does not depend on the base
    "c3a_kernel", "fourierft_spectrum", "hada_w1_a", "lokr_w1", "lora_A", "randlora_lambda", "shira_weight",
    "vblora_logits_A", "vera_lambda_b", "waveft_spectrum",
}  # fmt: skip


def from_model(model: nn.Module, prefix: str, adapter_name: str | None, base: BaseModel | None) -> AdapterVector:
    """What `adapter_vector` returns for a module."""
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if _is_tuner(module)}
    saved = {name: module for name, module in modules.items() if _is_saved(module)}
    label = f"adapter of {type(model).__name__}"
    if not layers and not saved:
        raise InputError(
            f"adapter: {type(model).__name__} holds no PEFT layers; expected a model with LoRA, LoHa, ... layers "
            "(prompt and prefix tuning change no weights, and have no task vector)"
        )
    chosen = _chosen(adapter_name, layers, saved)
    label += f" ({chosen!r})"
    configs = getattr(model, "peft_config", None)
    found = configs.get(chosen) if isinstance(configs, Mapping) else None
    config = found if isinstance(found, dict) else vars(found) if found is not None else {}
    check_config(config, label)
    added: dict[str, list[Part]] = {}
    tried: set[type] = set()
    for name, layer in layers.items():
        inside_attention = any(name.startswith(f"{n}.base_layer.") and _is_attention(m) for n, m in layers.items())
        if chosen in _adapters_of(layer) and not inside_attention:
            for last, part in _layer_parts(layer, chosen, f"{label}, layer {name!r}"):
                if type(layer) not in tried:  # what cannot be merged says so here
                    tried.add(type(layer))
                    part.make(torch.float32)
                added.setdefault(_plain(f"{name}.{last}", modules, prefix), []).append(part)
    for name, wrapper in saved.items():
        if chosen in wrapper.modules_to_save:
            for key, part in _saved_parts(wrapper, chosen):
                added.setdefault(_plain(f"{name}.{key}", modules, prefix), []).append(part)
    biases: dict[str, Tensor] = {}
    if (bias := config.get("bias") or "none") != "none":  # trained in the base model itself
        owners = [name for name, layer in layers.items() if bias == "all" or chosen in _adapters_of(layer)]
        for key, tensor in model.named_parameters():
            inside = [name for name in owners if key.startswith(f"{name}.base_layer.")]
            outside = not any(key.startswith(f"{name}.") for name in (*layers, *saved))
            if key.endswith("bias") and (inside or (bias == "all" and outside)):
                biases[_plain(key, modules, prefix)] = tensor.detach()
    if not added and not biases:
        raise InputError(f"{label}: changes nothing")
    return combined(added, {key: (_spec(value), reader(biases, key)) for key, value in biases.items()}, base, label)


def _is_tuner(module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "base_layer", None), nn.Module)
        and bool(getattr(module, "adapter_layer_names", ()))
        and callable(getattr(module, "merge", None))
    )


def _is_attention(layer: Any) -> bool:
    """Whether it wraps a torch.nn.MultiheadAttention, and so another tuner layer in it."""
    return isinstance(layer.base_layer, nn.MultiheadAttention)


def _is_saved(module: nn.Module) -> bool:
    """Whether it holds a whole copy of a module for every adapter, beside the original one."""
    copies = getattr(module, "modules_to_save", None)
    return isinstance(copies, nn.ModuleDict) and isinstance(getattr(module, "original_module", None), nn.Module)


def _adapters_of(layer: Any) -> set[str]:
    names: set[str] = set()
    for attribute in layer.adapter_layer_names:
        container = getattr(layer, attribute, None)
        if isinstance(container, nn.ModuleDict | nn.ParameterDict | Mapping):
            names |= set(container.keys())
    return names


def _chosen(wanted: str | None, layers: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    known = {name for layer in layers.values() for name in _adapters_of(layer)}
    known |= {name for wrapper in saved.values() for name in wrapper.modules_to_save}
    if wanted is not None:
        if wanted not in known:
            raise InputError(f"adapter_name: there is no adapter {wanted!r}; expected one of {quoted(known)}")
        return wanted
    active: set[str] = set()
    for layer in (*layers.values(), *saved.values()):
        active |= set(getattr(layer, "active_adapters", ()))
    candidates = known if len(known) == 1 else known & active
    if len(candidates) != 1:
        raise InputError(f"adapter: holds several adapters; choose one with adapter_name=: {quoted(known)}")
    return candidates.pop()


def _plain(name: str, modules: Mapping[str, nn.Module], prefix: str) -> str:
    """The name without the steps that wrappers put into it."""
    path, kept = "", []
    for step in name.removeprefix(prefix).split("."):
        parent = modules.get((prefix + path).rstrip(".") if name.startswith(prefix) else path.rstrip("."))
        wrapped = parent is not None and (_is_tuner(parent) or hasattr(parent, "token_adapter"))
        if not (wrapped and step in ("base_layer", "token_adapter")):
            kept.append(step)
        path += f"{step}."
    return ".".join(kept)


def _spec(tensor: Tensor) -> Spec:
    return Spec(tuple(tensor.shape), tensor.dtype, tensor.device)


def _layer_parts(layer: Any, chosen: str, label: str) -> Iterator[tuple[str, Part]]:
    plain = layer.adapter_layer_names[0] in ADDITIVE and chosen not in getattr(layer, "lora_variant", {})
    if not plain or _is_attention(layer):  # PEFT adds the update of an attention's output projection twice
        yield from _merged_parts(layer, chosen, label)
        return
    if getattr(getattr(layer, "base_layer", None), "groups", 1) > 1:
        raise InputError(f"{label}: a convolution in groups has no mergeable update")
    base = layer
    while _is_tuner(base):
        base = base.base_layer
    last = getattr(layer, "parameter_name", None) or "weight"
    weight = getattr(base, last)
    factors = [parameter for parameter in _own(layer) if parameter.is_floating_point()]
    dtype = factors[0].dtype if factors else torch.float32

    def make(wanted: torch.dtype) -> Tensor:
        delta = _own_copy(layer, wanted).get_delta_weight(chosen).detach()
        return (delta.to_dense() if delta.is_sparse else delta).to(wanted)  # SHiRA's is sparse

    shape = weight.shape if weight.is_floating_point() else make(torch.float32).shape  # packed, if quantised
    yield last, Part(Spec(tuple(shape), dtype, weight.device), make)
    if getattr(layer, "lora_bias", {}).get(chosen):
        bias, scale = layer.lora_B[chosen].bias, layer.scaling[chosen]
        yield "bias", Part(_spec(bias), lambda wanted: bias.detach().to(wanted) * scale)


def _merged_parts(layer: Any, chosen: str, label: str) -> Iterator[tuple[str, Part]]:
    """What merging does to the base layer's own parameters: for layers whose update depends on them."""
    if getattr(layer, "merged", False):
        raise InputError(f"{label}: is merged, so that the base weights are gone; call unmerge_adapter() first")
    base = layer.get_base_layer()
    before = dict(base.named_parameters(recurse=False))
    if _is_attention(layer):
        before = {key: attrgetter(key)(base) for key in ("in_proj_weight", "out_proj.base_layer.weight")}
    for last, old in before.items():
        if not old.is_floating_point():
            raise InputError(f"{label}: the base is quantised, and the update depends on it; {ELSE}")

        def make(wanted: torch.dtype, last: str = last, old: Tensor = old) -> Tensor:
            twin = copy.deepcopy(layer).eval().to(wanted)
            try:
                twin.merge(adapter_names=[chosen])
            except (NotImplementedError, RuntimeError, ValueError) as error:
                raise InputError(f"{label}: cannot be merged ({error})") from error
            return attrgetter(last)(twin.get_base_layer()).detach() - old.detach().to(wanted)

        yield f"base_layer.{last}", Part(_spec(old), make)


def _saved_parts(wrapper: Any, chosen: str) -> Iterator[tuple[str, Part]]:
    """The adapter's copy of a module minus the original."""
    before, after = wrapper.original_module.state_dict(), wrapper.modules_to_save[chosen].state_dict()
    for key, new in after.items():
        if is_bendable(key, new.dtype):

            def make(wanted: torch.dtype, new: Tensor = new, old: Tensor = before[key]) -> Tensor:
                return new.detach().to(wanted) - old.detach().to(wanted)

            yield key, Part(_spec(new), make)


def _own(layer: Any) -> Iterator[Tensor]:
    """Parameters and buffers of the layer but those of what it wraps."""
    theirs = {id(tensor) for tensor in (*layer.base_layer.parameters(), *layer.base_layer.buffers())}
    for tensor in (*layer.parameters(), *layer.buffers()):
        if id(tensor) not in theirs:
            yield tensor


def _own_copy(layer: Any, dtype: torch.dtype) -> Any:
    """The layer with factors of its own in `dtype`, around the same base: other threads may use the original."""
    base = layer.base_layer
    twin = copy.deepcopy(layer, {id(base): base})
    twin.training = False  # some kinds draw at random while they train
    for tensor in _own(twin):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return twin
