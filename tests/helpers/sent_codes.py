"""What a code sends, and how far off it decodes after a transmission."""

from __future__ import annotations

import numpy as np

from rmtllmf.channel import transmit


def numbers(code):
    return sum(tensor.numel() for tensor in code.sent.values())


def errors_after_transmission(code, mse, trials):
    """Squared errors of the decoded vector against what decodes without noise, one for each trial."""
    clean = code.decode(code.sent)
    found = []
    for seed in range(trials):
        (received,) = transmit([code.sent], [mse], seed=seed)
        decoded = code.decode(received)
        found.append(sum(float((decoded[name] - clean[name]).square().sum()) for name in clean))
    return np.array(found)
