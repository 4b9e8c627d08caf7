"""Names and shapes of the visual tower of ViT-B/16, as far as the time of a fusion depends on them."""

from __future__ import annotations


def shapes(blocks):
    """The matrices of so many of its twelve blocks, a bias in each, and what there is once."""
    found = {"conv1": (768, 3, 16, 16), "positions": (197, 768), "proj": (768, 512)}
    for block in range(blocks):
        found |= {f"{block}.in": (2304, 768), f"{block}.out": (768, 768)}
        found |= {f"{block}.fc": (3072, 768), f"{block}.proj": (768, 3072), f"{block}.bias": (3072,)}
    return found
