"""How deep in the model a parameter is, told by its name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

# open_clip "resblocks.7.", timm and Hugging Face "blocks.7.", "layers.7.", "layer.7.", "h.7."; T5 "block.7.layer.1."
_BLOCK = re.compile(r"(?:^|(?<=\.))(?:resblocks|blocks?|layers?|h)\.(\d+)(?=\.)")
# Swin "layers.2.blocks.1.", HF ConvNeXt "stages.2.layers.1.", EfficientNet "blocks.2.1.", ResNet "layer2.1."
_STAGE = re.compile(
    r"""(?:^|(?<=\.))(?:
        (?:layers|stages)\.(\d+)\.(?:blocks|layers)\.(\d+) | blocks\.(\d+)\.(\d+) | layer(\d+)\.(\d+) | stages\.(\d+)
    )(?=\.)""",
    re.VERBOSE,
)
_TORCHVISION = re.compile(r"(?:^|(?<=\.))encoder_layer_(\d+)(?=\.)")
_OUTSIDE = re.compile(
    r"""embed|token|position|conv1\b|conv_proj|stem|shared\.weight$|\b(?:wte|wpe)\b             # before the blocks
      | norm|\bln(?:_|\b)|\bbn\d\b|proj|head|\bfc\b|classifier|pooler|logit|score|predictions  # after them, mostly
    """,
    re.VERBOSE,
)


def relative_depths(names: Iterable[str]) -> dict[str, float | None]:
    """Name -> 0 for the first block up to 1 for the last; None outside blocks. A name that cannot be told is missing.

    Blocks with a common prefix make up a stack (a tower); its length is told by its largest number. Stages of blocks
    are counted through; what stands beside the blocks of a stage counts with the first of them.
    """
    depths: dict[str, float | None] = {}
    stacks: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name in names:
        if place := _place(name):
            stacks[place[0]][name] = place[1]
        elif _OUTSIDE.search(name):
            depths[name] = None
    for stack in stacks.values():
        if all(len(number) == 1 for number in stack.values()):
            order = {number: number[0] for number in stack.values()}
        else:
            whole = sorted({number if len(number) == 2 else (*number, 0) for number in stack.values()})
            order = {number: index for index, number in enumerate(whole)}
            order |= {number: order[*number, 0] for number in stack.values() if len(number) == 1}
        last = max(order.values())
        if last > 0:  # a single block is neither the first nor the last
            depths |= {name: order[number] / last for name, number in stack.items()}
    return depths


def _place(name: str) -> tuple[str, tuple[int, ...]] | None:
    """Prefix of the stack, and the number of the block (after that of its stage)."""
    found = _STAGE.search(name) or _BLOCK.search(name) or _TORCHVISION.search(name)
    if found is None:
        return None
    return name[: found.start()], tuple(int(number) for number in found.groups() if number is not None)
