"""The fine-tuned models that are published for the paper's encoder and tasks, and loading them and others like them.

With them, the paper's experiment starts without fine-tuning::

    base = load("ViT-B-16-quickgelu", "openai").model.visual
    vectors = {task: TaskVector.between(base, load_finetuned(model.name, base)) for task, model in PUBLISHED.items()}
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from math import isqrt
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .._state import StateLike, Tensors, as_state, check_finite, check_keys, check_shapes, quoted, select_names
from .._untrusted import brief, read_json
from ..errors import InputError, StateMismatchError, warn
from ..taskvec._checkpoint import Checkpoint
from .hugging_face import checked_tower, converted, copied

__all__ = ["PUBLISHED", "PublishedModel", "load_finetuned"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FAR = 0.5  # of the base's norm; fine-tuning stays far below, two trainings from scratch share nothing


@dataclass(frozen=True)
class PublishedModel:
    """A fine-tuned CLIP ViT-B/16 image tower on the Hugging Face hub, and the accuracies published with it.

    Attributes:
        name: its name on the hub, for `load_finetuned`.
        zero_shot: test accuracy of OpenAI's model before fine-tuning, as a fraction.
        finetuned: test accuracy after fine-tuning on this task, as a fraction.

    Source: FusionBench's model pool, https://github.com/tanganke/fusion_bench (percentages with one digit).

    Example:
        >>> PUBLISHED["eurosat"]
        PublishedModel(name='tanganke/clip-vit-base-patch16_eurosat', zero_shot=0.541, finetuned=0.99)
    """

    name: str
    zero_shot: float
    finetuned: float


def _published(task: str, zero_shot: float, finetuned: float) -> PublishedModel:
    return PublishedModel(f"tanganke/clip-vit-base-patch16_{task}", zero_shot, finetuned)


PUBLISHED: Mapping[str, PublishedModel] = MappingProxyType(
    {
        "cars": _published("stanford-cars", 0.647, 0.859),
        "dtd": _published("dtd", 0.450, 0.823),
        "eurosat": _published("eurosat", 0.541, 0.990),
        "gtsrb": _published("gtsrb", 0.435, 0.990),
        "mnist": _published("mnist", 0.517, 0.997),
        "resisc45": _published("resisc45", 0.664, 0.966),
        "sun397": _published("sun397", 0.655, 0.789),
        "svhn": _published("svhn", 0.520, 0.976),
    }
)
"""The published models of the paper's eight tasks, all fine-tuned from ``load("ViT-B-16-quickgelu", "openai")``."""


def load_finetuned(
    where: str | os.PathLike[str],
    base: StateLike,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    frozen: str | Iterable[str] = (),
    drop_text_tower: bool = False,
) -> dict[str, Tensor]:
    r"""A fine-tuned image tower :math:`\theta_q` from a Hugging Face checkpoint, in the names of an open_clip base.

    Args:
        where: a folder with ``model.safetensors`` or an index of shards, one of these files, or a name ``owner/name``
            on the hub, of which only safetensors files and ``config.json`` are fetched. A folder of that name goes
            first. Nothing is ever unpickled: weights that exist as ``.bin`` only are an error.
        base: the image tower that was fine-tuned, ``model.visual`` or its state dict. Only a module shows its
            activation, number of heads and epsilon, which are then compared with the ``config.json`` of a folder.
        cache_dir, revision: as in ``huggingface_hub.snapshot_download``; `revision` is for names on the hub only.
        frozen: names (of open_clip, or globs) that fine-tuning left alone: they must be the base's, bit by bit.
            With the same base, that holds for a whole set of checkpoints.
        drop_text_tower: as for `from_hugging_face`.

    Returns:
        A state dict with the names, shapes, dtypes and devices of `base`: what ``TaskVector.between(base, ...)``
        expects. A ``CLIPVisionModel`` has no projection; ``proj`` is then a copy of the base's, which was frozen, and
        0 in the task vector.

    Raises:
        StateMismatchError: other names, shapes or dtypes than the base has, a ``config.json`` that disagrees with it,
            or frozen entries that changed.
        InputError: unreadable files, another kind of model, a text tower.
        FileNotFoundError: nothing there, no safetensors file, or a hub that cannot be reached.
        ImportError: a name on the hub without the package huggingface_hub.
        NonFiniteError: NaN or infinity in the checkpoint.

    Warns:
        RmtllmfWarning: the weights differ from the base's by more than half of their norm: another base.

    Source: FusionBench's model pool, https://github.com/tanganke/fusion_bench; the names are in `PUBLISHED`.

    Example:
        >>> import tempfile
        >>> from open_clip.transformer import VisionTransformer
        >>> from rmtllmf.clip import to_hugging_face
        >>> from safetensors.torch import save_file
        >>> base = VisionTransformer(8, 4, width=16, layers=1, heads=2, mlp_ratio=2.0, output_dim=8)
        >>> theirs = to_hugging_face(base)
        >>> del theirs["visual_projection.weight"]  # as in a CLIPVisionModel
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(theirs, f"{folder}/model.safetensors")
        ...     tuned = load_finetuned(folder, base)
        >>> bool((tuned["proj"] == base.proj).all())
        True
    """
    expected = {name: tensor.detach() for name, tensor in as_state(base, "base").items()}
    if any(name.startswith("visual.") for name in expected):
        raise InputError("base: expected the image tower alone, got a model with 'visual.'; pass model.visual")
    expected = checked_tower(expected, "base", "")
    path = _found(where, cache_dir, revision)
    label = repr(os.fspath(where))
    if (path / "config.json").is_file():
        _check_config(path / "config.json", expected, base if isinstance(base, nn.Module) else None, label)
    checkpoint = Checkpoint(path, label)
    try:
        for name, spec in checkpoint.specs.items():
            if not spec.dtype.is_floating_point and not name.endswith("embeddings.position_ids"):
                raise StateMismatchError(f"{label}[{name!r}] is {spec.dtype}; expected a floating-point tensor")
        theirs = dict(checkpoint.items())
        checkpoint.check_unchanged()
    finally:
        checkpoint.close()
    tuned = converted(theirs, label, drop_text_tower)
    if "proj" in expected:
        tuned.setdefault("proj", copied(expected["proj"]))
    check_keys(tuned, expected, label, "the base")
    check_shapes(tuned, expected, label, "the base")
    for name, tensor in tuned.items():
        if tensor.dtype != expected[name].dtype:
            raise StateMismatchError(
                f"{label}[{name!r}] is {tensor.dtype}; the base has {expected[name].dtype}. Nothing is cast in "
                f"silence: convert the base, as in model.visual.to({tensor.dtype}), or the checkpoint"
            )
    check_finite(tuned, label)
    tuned = {name: tuned[name].to(tensor.device) for name, tensor in expected.items()}
    for name in select_names(expected, frozen, "frozen"):
        if not torch.equal(tuned[name], expected[name]):
            raise StateMismatchError(f"{label}[{name!r}] should be frozen and is not the base's: another base model?")
    _warn_if_far(tuned, expected, label)
    return tuned


def _found(where: object, cache_dir: str | os.PathLike[str] | None, revision: str | None) -> Path:
    """The file or folder, fetched if need be."""
    if not isinstance(where, str | os.PathLike) or not isinstance(os.fspath(where), str):
        raise TypeError(f"where: expected a path or a name owner/name on the hub, got {type(where).__name__}")
    text = os.fspath(where)
    path = Path(text)
    if not text or "\0" in text:
        raise InputError(f"where: expected a path or a name owner/name on the hub, got {text!r}")
    if path.exists():
        if revision is not None:
            raise InputError(f"revision: {text!r} is a local path, which has no revisions; expected None")
        missing = "has no .safetensors file"
    elif isinstance(where, str) and _HUB_NAME.fullmatch(text) and not text.endswith((".safetensors", ".json")):
        path = _downloaded(text, cache_dir, revision)
        missing = "has no .safetensors file on the hub (or, without a connection, none in the cache)"
    else:
        raise FileNotFoundError(f"where: there is no file or folder {text!r}, nor is it a name owner/name on the hub")
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        others = [file.name for file in path.iterdir() if file.suffix in _PICKLES]
        raise FileNotFoundError(
            f"where: {text!r} {missing}{f', only {quoted(others)}' if others else ''}. Other formats are not read, "
            "because they could hold code; convert it once with transformers: from_pretrained, then save_pretrained"
        )
    return path


def _downloaded(name: str, cache_dir: str | os.PathLike[str] | None, revision: str | None) -> Path:
    try:
        hub: Any = import_module("huggingface_hub")
        errors: Any = import_module("huggingface_hub.utils")
    except ImportError as error:
        raise ImportError(
            f"where: there is no folder {name!r}, and fetching it from the Hugging Face hub needs the package "
            "huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        folder = hub.snapshot_download(
            name,
            revision=revision,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            allow_patterns=["*.safetensors", "*.safetensors.index.json", "config.json"],
            ignore_patterns=["*/*"],
        )
    except errors.HFValidationError as error:
        raise InputError(f"where: {name!r} is neither a local path nor a name on the hub: {error}") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        of = "" if revision is None else f" with the revision {revision!r}"
        raise FileNotFoundError(f"where: neither a local path nor a model on the hub: {name!r}{of}") from error
    except (errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"where: {name!r} is no local path and not in the cache, and the Hugging Face hub cannot be reached; fetch "
            f"it elsewhere (hf download {name}) and pass its folder, or pass the cache_dir that has it"
        ) from error
    return Path(folder)


def _check_config(path: Path, base: Tensors, tower: nn.Module | None, label: str) -> None:
    """Raise if a ``config.json`` says something that the base is not."""
    config = read_json(path, label, inside=path.parent)
    kind = config.get("model_type") if isinstance(config, dict) else None
    vision = config.get("vision_config") if kind == "clip" else config
    if not isinstance(vision, dict):
        raise InputError(f"{label}: its config.json is no configuration of a model")
    if kind not in ("clip", "clip_vision_model"):
        raise InputError(f"{label}: its model_type is {brief(kind)}; expected 'clip_vision_model' or 'clip'")
    vision = {name: _single(value) for name, value in vision.items()}
    patch, grid = base["conv1.weight"].shape[-1], isqrt(max(base["positional_embedding"].shape[0] - 1, 0))
    if isinstance(size := vision.get("image_size"), int) and patch and size // patch == grid:
        vision["image_size"] = grid * patch  # a rest at the edge is cut off
    has: dict[str, Any] = {
        "hidden_size": base["class_embedding"].shape[0],
        "intermediate_size": base["transformer.resblocks.0.mlp.c_fc.bias"].shape[0],
        "num_hidden_layers": sum(name.endswith(".attn.in_proj_bias") for name in base),
        "num_channels": base["conv1.weight"].shape[1],
        "patch_size": patch,
        "image_size": grid * patch,
    }
    if tower is not None:
        # what no weight shows: here a config that is silent means the defaults of transformers
        vision = {"hidden_act": "quick_gelu", "num_attention_heads": 12, "layer_norm_eps": 1e-5} | vision
        has |= _hidden(tower)
    for name, value in has.items():
        if name in vision and vision[name] != value:
            raise StateMismatchError(
                f"{label}: its config.json has {name} {brief(vision[name])}; the base has {value!r}"
                + ("; load the base as 'ViT-B-16-quickgelu', for example" * (vision[name] == "quick_gelu"))
            )


def _single(value: Any) -> Any:
    """One number for a pair of equal ones."""
    return value[0] if isinstance(value, list) and value and all(each == value[0] for each in value) else value


def _hidden(tower: nn.Module) -> dict[str, Any]:
    """What the modules of an image tower show and its weights do not; nothing where they are built differently."""
    parts = dict(tower.named_modules())
    activation = type(parts.get("transformer.resblocks.0.mlp.gelu")).__name__
    found = {
        "hidden_act": {"QuickGELU": "quick_gelu", "GELU": "gelu"}.get(activation),
        "num_attention_heads": getattr(parts.get("transformer.resblocks.0.attn"), "num_heads", None),
        "layer_norm_eps": getattr(parts.get("ln_pre"), "eps", None),
    }
    return {name: value for name, value in found.items() if value is not None}


def _warn_if_far(tuned: Tensors, base: Tensors, label: str) -> None:
    matrices = [name for name, tensor in base.items() if tensor.ndim > 1]  # gains and biases are alike in all models
    size = sum(float(base[name].float().norm()) ** 2 for name in matrices) ** 0.5
    change = sum(float((tuned[name].float() - base[name].float()).norm()) ** 2 for name in matrices) ** 0.5
    if change > _FAR * size:
        warn(
            f"{label} differs from the base by {change / max(size, 1e-30):.0%} of the base's norm, more than "
            "fine-tuning does: it probably started from another base model"
        )
