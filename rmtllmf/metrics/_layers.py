"""Which layer of a model a parameter belongs to, told by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["layer_of", "layers_of"]

# open_clip "resblocks.7.", timm "blocks.7.", Hugging Face "layers.7.", "layer.7.", "h.7.", T5 "block.7.layer.1.";
# stages and their blocks: Swin "layers.2.blocks.1.", ConvNeXt "stages.2.layers.1.", EfficientNet "blocks.2.1.",
# ResNet "layer2.1."; torchvision "encoder_layer_7."
_BLOCK = re.compile(
    r"""(?:^|\.)(?:
        (?:layers|stages)\.\d+\.(?:blocks|layers)\.\d+ | blocks\.\d+\.\d+ | layer\d+\.\d+ | encoder_layer_\d+
      | (?:resblocks|blocks?|layers?|h|stages)\.\d+
    )(?=\.)""",
    re.VERBOSE,
)


def layer_of(name: str) -> str:
    """The name up to and with the number of its block; outside blocks its first part."""
    found = _BLOCK.search(name)
    return name[: found.end()] if found else name.partition(".")[0]


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Layer -> its names, both in the order in which they come."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    return layers
