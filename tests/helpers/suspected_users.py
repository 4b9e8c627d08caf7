"""Vectors with given cosines, task vectors like those of a small transformer, and what is received when a user lies."""

import math

import torch

from rmtllmf.channel import transmit
from rmtllmf.resilience.attacks import backdoor, foreign, scaled, sign_flipped, with_nan


def mse_of(snr_db, users=8):
    return [10 ** (-snr_db / 10)] * users


def with_cosines(cosines, n=2000, seed=0):
    """Vectors of unit mean square that have exactly these cosines, in float64."""
    cosines = torch.as_tensor(cosines, dtype=torch.float64)
    X = torch.randn(n, len(cosines), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = torch.linalg.cholesky(cosines) @ torch.linalg.qr(X).Q.T * math.sqrt(n)
    return [{"w": row.clone()} for row in rows]


def matrix(users, **pairs):
    cosines = torch.eye(users, dtype=torch.float64)
    for pair, value in pairs.items():
        a, b = int(pair[1]), int(pair[2])
        cosines[a, b] = cosines[b, a] = value
    return cosines


def shapes(width=32, blocks=3):
    sizes = {"embed": (256, width), "ln.weight": (width,), "head": (width, 64)}
    for i in range(blocks):
        sizes |= {f"{i}.ln.weight": (width,), f"{i}.ln.bias": (width,)}
        sizes |= {f"{i}.qkv": (3 * width, width), f"{i}.out": (width, width)}
        sizes |= {f"{i}.up": (4 * width, width), f"{i}.down": (width, 4 * width)}
    return sizes


def task_vectors(users=8, common=0.1, seed=0, scatter=0.15):
    """Like those of a small transformer: energies that differ from tensor to tensor by a factor of a hundred, alike in
    all tasks but for a scatter; norms within a factor of two; cosines near `common`."""
    source = torch.Generator().manual_seed(seed)
    level = {key: 0.01 * math.exp(float(torch.randn((), generator=source))) for key in shapes()}
    shared = {key: torch.randn(size, generator=source) for key, size in shapes().items()}
    vectors = []
    for q in range(users):
        size_of = 2 ** (q / max(1, users - 1) - 0.5)
        vector = {}
        for key, size in shapes().items():
            own = math.sqrt(1 - common) * torch.randn(size, generator=source) + math.sqrt(common) * shared[key]
            vector[key] = size_of * level[key] * math.exp(scatter * float(torch.randn((), generator=source))) * own
        vectors.append(vector)
    return vectors


def attacked(attack, snr_db, common=0.1, seed=0):
    """User 2 of eight lies."""
    sent = task_vectors(common=common)
    lies = {
        "scaled": lambda: scaled(sent[2], 100.0),
        "shrunk": lambda: scaled(sent[2], 0.01),
        "flipped": lambda: sign_flipped(sent[2]),
        "flipped twin": lambda: sign_flipped(backdoor(sent[5], sent[2], 0.5)),
        "against all": lambda: {key: -sum(v[key] for q, v in enumerate(sent) if q != 2) / 3 for key in sent[2]},
        "foreign": lambda: foreign(sent[2], 9),
        "foreign as a whole": lambda: foreign(sent[2], 9, per_tensor=False),
        "backdoor": lambda: backdoor(sent[2], foreign(sent[2], 8), 10.0),
        "weak backdoor": lambda: backdoor(sent[2], foreign(sent[2], 8), 1.0),
        "copy": lambda: scaled(sent[5], 1.1),
        "nan": lambda: sent[2],
    }
    sent[2] = lies[attack]()
    mse = mse_of(snr_db)
    if attack == "copy":
        mse[2] *= 1.2
    received = transmit(sent, mse, seed=seed)
    if attack == "nan":
        received[2] = with_nan(received[2], seed)
    return sent, received, mse
