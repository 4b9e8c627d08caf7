"""Where cosines of one half between all received task vectors could come from.

    python -m paper.cosines                in the folder examples; a minute, after the vectors have been fine-tuned

Independent noise makes vectors less alike. Errors that users share make them more alike, or less, by the phases with
which the users are received: so the numbers printed are magnitudes, beside the smallest and the largest cosine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rmtllmf.metrics import cosine_similarity

from .protocol import TESTBED
from .uplink import received, reception
from .world import world_of

CASES: dict[str, dict[str, Any]] = {
    "50 blocks, unaware of the jammer": {},
    "1 block, unaware of the jammer": {"blocks": 1},
    "1 block, unaware, linear receiver": {"blocks": 1, "receiver": "lmmse"},
    "1 block, knows the jammer": {"blocks": 1, "knows_jammer": True},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print, for every receiver and uplink, the mean magnitude of the cosines between received vectors."""
    parser = argparse.ArgumentParser(
        prog="python -m paper.cosines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=3, help="of the uplink and its noise (default: 3)")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parents[1] / ".cache" / "paper")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sent = world_of(TESTBED, options.cache, options.cache).vectors(0)
    apart = ~torch.eye(len(sent), dtype=torch.bool)
    print(f"{'as sent':34s}{'':16s}{_said(cosine_similarity(sent)[apart])}")
    for case, changes in CASES.items():
        protocol = replace(TESTBED, **changes)
        for condition in protocol.conditions:
            heard = [received(protocol, sent, reception(protocol, condition, s), s) for s in range(options.draws)]
            cosines = torch.cat([cosine_similarity(vectors)[apart] for vectors in heard])
            print(f"{case:34s}{condition:16s}{_said(cosines)}")


def _said(cosines: torch.Tensor) -> str:
    return f"mean magnitude {float(cosines.abs().mean()):.2f}, from {float(cosines.min()):5.2f} to {cosines.max():5.2f}"


if __name__ == "__main__":
    main()
