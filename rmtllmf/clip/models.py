"""open_clip models as image classifiers: an encoder, and a frozen zero-shot head made from the names of the classes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._classifier import ImageClassifier, ZeroShotHead
from .._state import whole_number
from .._tasks import Batches, device_of, mode
from ..errors import InputError
from ..metrics import accuracy

__all__ = ["ImageClassifier", "OpenClip", "ZeroShotHead", "evaluate", "image_classifier", "load", "zero_shot_head"]

Template: TypeAlias = str | Callable[[str], str]
Tokenizer: TypeAlias = Callable[[list[str]], Tensor]

_CLIP_VOCABULARY = 49408  # of open_clip's built-in tokenizer


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model with what belongs to it; see `load`.

    Attributes:
        name: the model's name, as given to `load`.
        model: the model with both towers; ``model.visual`` is the image encoder.
        train_transform: image -> tensor with random crops, for training.
        transform: image -> tensor, for evaluation.

    Example:
        >>> OpenClip("RN50", torch.nn.Identity(), train_transform=None, transform=None).name
        'RN50'
    """

    name: str
    model: nn.Module
    train_transform: Any
    transform: Any

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; those of Hugging Face text towers are fetched on first use."""
        tokenizer: Tokenizer = _open_clip().get_tokenizer(self.name)
        return tokenizer


def load(
    name: str,
    pretrained: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    image_size: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> OpenClip:
    """An open_clip model with its transforms and tokenizer.

    Args:
        name: one of ``open_clip.list_models()``, or open_clip's ``hf-hub:`` and ``local-dir:`` names.
        pretrained: a tag that open_clip knows for this model, or the path of a checkpoint (safetensors, or a state
            dict that ``torch.load(weights_only=True)`` accepts: nothing is unpickled); None: random weights.
        device, precision, image_size, cache_dir: as in ``open_clip.create_model_and_transforms``; None: its default.

    Raises:
        InputError: an unknown name, or a `pretrained` that is neither a tag of this model nor a file of its weights.
        ImportError: open_clip or torchvision cannot be imported, or open_clip is too old to load weights safely.

    Source: Ilharco et al., "OpenCLIP", 2021, https://doi.org/10.5281/zenodo.5143773.

    Example:
        >>> load("ViT-B")
        Traceback (most recent call last):
        ...
        rmtllmf.errors.InputError: name: open_clip has no model 'ViT-B'; did you mean 'ViT-B-16', ...
    """
    open_clip = _open_clip()
    weights = None if pretrained is None else os.fspath(pretrained)
    if not name.startswith(("hf-hub:", "local-dir:")):
        _check_name(open_clip, name, weights)
    elif weights is not None:
        raise InputError(f"pretrained: {name!r} brings its own weights; expected None, got {weights!r}")
    known = inspect.signature(open_clip.create_model_and_transforms).parameters
    options: dict[str, Any] = {key: True for key in ("weights_only", "load_weights_only") if key in known}
    if not options and (weights is not None or ":" in name):
        raise ImportError(
            f"rmtllmf.clip.load: open_clip {getattr(open_clip, '__version__', '')} would unpickle the weights; "
            "install a newer one: pip install -U open_clip_torch"
        )
    try:
        with _weights_only():
            model, train_transform, transform = open_clip.create_model_and_transforms(
                name,
                pretrained=weights,
                device=device,
                precision=precision,
                force_image_size=image_size,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                **options,
            )
    except Exception as error:  # whatever it, or torch, makes of what is in a file
        if weights is None or not Path(weights).is_file():
            raise
        raise InputError(
            f"pretrained: {weights!r} cannot be loaded as the weights of {name!r} ({type(error).__name__}: {error})"
        ) from error
    return OpenClip(name, model, train_transform, transform)


def zero_shot_head(
    model: nn.Module,
    class_names: Sequence[str],
    templates: Sequence[Template] = ("a photo of a {}.",),
    *,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 10,
) -> ZeroShotHead:
    r"""The zero-shot classifier of an open_clip model: text features of the classes, averaged over prompts.

    .. math:: w_k = \frac{\bar w_k}{\lVert \bar w_k \rVert}, \qquad
              \bar w_k = \frac{1}{T} \sum_{t=1}^{T} \frac{g_{tk}}{\lVert g_{tk} \rVert}, \qquad
              g_{tk} = g(\text{prompt } t \text{ with name } k)

    Args:
        model: an open_clip model with a text tower; in evaluation mode meanwhile.
        class_names: K names, in the order of the labels.
        templates: T prompts with ``{}`` for the name, or functions name -> prompt (as open_clip's own lists have).
        tokenizer: list of prompts -> tokens, as of ``open_clip.get_tokenizer(name)`` or `OpenClip.tokenizer`; None:
            CLIP's own, if the model's vocabulary is that.
        batch_size: classes that are encoded at a time, at least 1.

    Raises:
        InputError: no names, no templates, a template without ``{}``, no tokenizer for another vocabulary.
        TypeError: no text tower, or names that are no strings.
        ImportError: open_clip or torchvision cannot be imported.

    Source: Radford et al., 2021, section 3.1.4; ``open_clip.build_zero_shot_classifier``.

    Example:
        >>> from open_clip import CLIP
        >>> image = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8}
        >>> model = CLIP(embed_dim=8, vision_cfg=image, text_cfg={"width": 16, "heads": 2, "layers": 1})
        >>> zero_shot_head(model, ["cat", "dog", "horse"]).weight.shape
        torch.Size([8, 3])
    """
    names = [_class_name(name, index) for index, name in enumerate(_listed(class_names, "class_names"))]
    prompts = [_template(template, index) for index, template in enumerate(_listed(templates, "templates"))]
    batch_size = whole_number(batch_size, "batch_size", at_least=1)
    if not callable(getattr(model, "encode_text", None)) or not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected an open_clip model with a text tower (encode_text), got {type(model).__name__}; an image "
            "tower alone needs a head of its own"
        )
    open_clip = _open_clip()
    with torch.no_grad(), mode(False, model):
        weight = open_clip.build_zero_shot_classifier(
            model,
            tokenizer=_default_tokenizer(open_clip, model) if tokenizer is None else tokenizer,
            classnames=names,
            templates=prompts,
            num_classes_per_batch=batch_size,
            device=device_of(model),
        )
    scale, bias = getattr(model, "logit_scale", None), getattr(model, "logit_bias", None)
    return ZeroShotHead(
        weight,
        logit_scale=100.0 if scale is None else float(scale.detach().exp()),
        logit_bias=0.0 if bias is None else float(bias.detach()),
    )


def image_classifier(
    model: nn.Module,
    class_names: Sequence[str],
    templates: Sequence[Template] = ("a photo of a {}.",),
    *,
    tokenizer: Tokenizer | None = None,
    batch_size: int = 10,
) -> ImageClassifier:
    """An open_clip model as a classifier: its image tower, and a frozen `zero_shot_head`.

    Args:
        model: an open_clip model; its ``visual`` becomes the encoder (the same object, not a copy).
        class_names, templates, tokenizer, batch_size: as for `zero_shot_head`.

    Returns:
        An `ImageClassifier` with ``.encoder`` and ``.head``. Only the encoder has parameters.

    Raises:
        TypeError: `model` has no image tower; and all that `zero_shot_head` raises.

    Source: Radford et al., 2021, section 3.1.

    Example:
        >>> import torch
        >>> from open_clip import CLIP
        >>> image = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8}
        >>> model = CLIP(embed_dim=8, vision_cfg=image, text_cfg={"width": 16, "heads": 2, "layers": 1})
        >>> classifier = image_classifier(model, ["cat", "dog"], ["a photo of a {}.", "a drawing of a {}."])
        >>> classifier(torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 2])
    """
    visual = getattr(model, "visual", None)
    if not isinstance(visual, nn.Module):
        raise TypeError(f"model: expected an open_clip model with an image tower (visual), got {type(model).__name__}")
    head = zero_shot_head(model, class_names, templates, tokenizer=tokenizer, batch_size=batch_size)
    return ImageClassifier(visual, head)


def evaluate(classifier: nn.Module, loader: Batches) -> float:
    """The accuracy of a classifier on a loader of (images, labels): `rmtllmf.metrics.accuracy` by another name.

    Args:
        classifier: images -> logits, such as an `ImageClassifier`.
        loader: batches of (images, labels); labels are class indices in the order of the class names.

    Raises:
        InputError, ShapeError, NonFiniteError, TypeError: as `rmtllmf.metrics.accuracy`.

    Example:
        >>> import torch
        >>> evaluate(ZeroShotHead(torch.eye(2)), [(torch.eye(2), torch.tensor([0, 1]))])
        1.0
    """
    return accuracy(classifier, loader)


def _open_clip() -> ModuleType:
    try:
        import torchvision  # noqa: F401

        return import_module("open_clip")
    except Exception as error:  # a torchvision built for another torch raises RuntimeError
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImportError(
            f"rmtllmf.clip needs open_clip and a torchvision that fits torch {torch.__version__}, but importing them "
            f"failed ({reason}); install a matching set: pip install -U torch torchvision open_clip_torch"
        ) from error


@contextmanager
def _weights_only() -> Iterator[None]:
    """Meanwhile nothing is unpickled, whoever calls ``torch.load``.

    open_clip calls it once more, without asking for that, where a file makes the first call fail with a TypeError; and
    torch up to 2.5 unpickles unless it is asked not to.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _check_name(open_clip: ModuleType, name: str, weights: str | None) -> None:
    known = open_clip.list_models()
    if name not in known and name.replace("/", "-") not in known:
        near = [model for model in known if model.lower().startswith(name.lower()[:5])] or known
        near.sort(key=len)
        raise InputError(f"name: open_clip has no model {name!r}; did you mean {', '.join(map(repr, near[:4]))}, ...?")
    if weights is None or Path(weights).is_file():
        return
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights not in tags:
        raise InputError(f"pretrained: {weights!r} is no file and no tag of {name!r}, which has {', '.join(tags)}")


def _default_tokenizer(open_clip: ModuleType, model: nn.Module) -> Tokenizer:
    text = getattr(model, "text", model)
    size = getattr(text, "vocab_size", getattr(model, "vocab_size", None))
    if size != _CLIP_VOCABULARY:
        raise InputError(
            f"tokenizer: the text tower has a vocabulary of {size} words, not CLIP's {_CLIP_VOCABULARY}; pass the "
            "model's own, open_clip.get_tokenizer(name)"
        )
    length = getattr(text, "context_length", getattr(model, "context_length", None))
    tokenizer: Tokenizer = open_clip.SimpleTokenizer(**({} if length is None else {"context_length": int(length)}))
    return tokenizer


def _listed(values: Any, argument: str) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{argument}: expected a sequence of strings, got {type(values).__name__}")
    if len(values) == 0:
        raise InputError(f"{argument}: expected at least one, got an empty sequence")
    return list(values)


def _class_name(value: Any, index: int) -> str:
    if not isinstance(value, str):
        raise TypeError(f"class_names[{index}]: expected a string, got {type(value).__name__}")
    if not value.strip():
        raise InputError(f"class_names[{index}]: expected a name, got {value!r}")
    return value


def _template(value: Any, index: int) -> Callable[[str], str]:
    """The template as a function, after a try with a name that no template contains."""
    if not isinstance(value, str) and not callable(value):
        raise TypeError(f"templates[{index}]: expected a string or a function, got {type(value).__name__}")
    fill: Callable[[str], str] = value.format if isinstance(value, str) else value
    name = "zqx class zqx"
    try:
        prompt = fill(name)
    except (IndexError, KeyError, ValueError):
        prompt = ""
    if not isinstance(prompt, str) or name not in prompt:
        raise InputError(f"templates[{index}]: expected one {{}} for the class name, got {value!r}")
    return fill
