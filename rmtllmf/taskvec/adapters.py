"""Adapters as task vectors: LoRA and its relatives, fused as what they do to the weights."""

from __future__ import annotations

import os

from torch import nn

from .._state import StateLike
from ._adapter_file import from_file
from ._adapter_live import from_model
from ._adapter_parts import BaseModel
from ._sources import Source

__all__ = ["adapter_vector"]


def adapter_vector(
    adapter: str | os.PathLike[str] | nn.Module,
    *,
    base: StateLike | None = None,
    prefix: str | None = None,
    adapter_name: str | None = None,
) -> Source:
    r"""The task vector of an adapter: what merging it adds to the base model.

    .. math:: \Delta W = \frac{\alpha}{r} B A \qquad (\text{rsLoRA: } \frac{\alpha}{\sqrt r} B A)

    A fusion rule needs this product. Factors are never fused separately, because the sum of products is not the
    product of sums: :math:`B_1 A_1 + B_2 A_2 \ne (B_1 + B_2)(A_1 + A_2)`, and :math:`(B R, R^{-1} A)` is the same
    adapter for every invertible R.

    Args:
        adapter: the folder (or the adapter_model.safetensors in it) that ``PeftModel.save_pretrained`` wrote for a LoRA
            adapter: linear, embedding and convolution layers; or a model with adapters in memory, of PEFT or with its
            layers: any kind that can be merged (LoRA, DoRA, LoHa, LoKr, AdaLoRA, VeRA, IA3, ...). It is not changed. It
            is read whenever the vector is, so that a model trained on gives what it has become.
        base: the base model: a module, a state dict or the path of a checkpoint. Needed from a file where the
            update depends on it: DoRA, and what is saved as a whole (``modules_to_save``, trained biases, embeddings,
            which PEFT adds to the file when they are adapted), given as its difference from the base; and from memory
            for trained biases. Where given, names and shapes are checked against it, ties among its tensors are kept,
            and it says which layers store (in, out) like GPT-2's, which the configuration tells for all or none.
        prefix: what the adapter's names have before the base model's own, which is taken off; None:
            ``"base_model.model."``.
        adapter_name: which adapter, where there are several; None: the only one, or the only active one.

    Returns:
        A mapping of the base model's names -> :math:`\Delta W` of the base's shapes, in float32 (float64 for float64
        factors; half precision is for storage), for every fusion rule, for `TaskVector` and for ``transmit``. It holds
        no matrix: each is made when it is read, one a thread. Integer and boolean buffers and running statistics
        are left out, as in `TaskVector.between`. Names that other adapters have and this one lacks: see `aligned`.

    Raises:
        InputError: a file that is no LoRA adapter, is pickled, contradicts its configuration or needs `base` (the
            tensors are named); a start that
            changes the base (PiSSA, OLoRA, CorDA, LoftQ); routing, or acting on some tokens only; adapters on both
            names of a tied tensor; several adapters and no `adapter_name`; a layer that PEFT cannot merge.
        StateMismatchError: `base` lacks a name or has another shape. ShapeError: factors that do not have the
            configured rank, or do not fit each other. FileNotFoundError: no such folder, or no adapter in it.
        TypeError: neither a path nor a module.

    Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2022, eq. 3; Kalajdzievski, "A rank
    stabilization scaling factor for fine-tuning with LoRA", 2023; PEFT, ``merge_and_unload``.

    Example:
        >>> import json, pathlib, tempfile, torch
        >>> from safetensors.torch import save_file
        >>> factors = {"lora_A": torch.tensor([[1.0, 0.0]]), "lora_B": torch.tensor([[2.0], [3.0]])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}
        ...     _ = pathlib.Path(folder, "adapter_config.json").write_text(json.dumps(config))
        ...     names = {f"base_model.model.fc.{kind}.weight": factor for kind, factor in factors.items()}
        ...     save_file(names, f"{folder}/adapter_model.safetensors")
        ...     dict(adapter_vector(folder))
        {'fc.weight': tensor([[4., 0.],
                [6., 0.]])}
    """
    for argument, text in (("prefix", prefix), ("adapter_name", adapter_name)):
        if not isinstance(text, str | None):
            raise TypeError(f"{argument}: expected a str or None, got {type(text).__name__}")
    model = None if base is None else BaseModel(base)
    taken_off = "base_model.model." if prefix is None else prefix
    if isinstance(adapter, nn.Module):
        return from_model(adapter, taken_off, adapter_name, model)
    if not isinstance(adapter, str | os.PathLike):
        raise TypeError(
            f"adapter: expected the folder of an adapter or a module with adapters, got {type(adapter).__name__}"
        )
    return from_file(os.fspath(adapter), taken_off, adapter_name, model)
