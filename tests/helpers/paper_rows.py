"""Rows of results of the paper's experiment, whose statistics are known, and the same statistics by hand."""

import numpy as np

from paper.protocol import Protocol

TASKS = ("cars", "dtd", "mnist", "svhn", "gtsrb")
ALL = tuple(range(len(TASKS)))
PROTOCOL = Protocol(tasks=TASKS, seeds=(0, 1, 2), subsets=4, ablation_shots=(1, 50))
SHARES = {  # of all tasks, in the manner of the paper
    ("base", "unprotected"): 0.5,
    ("clean", "unprotected"): 0.91,
    ("ideal", "unprotected"): 0.36,
    ("ideal", "restored"): 0.47,
    ("ideal", "realigned"): 0.66,
    ("ideal", "both"): 0.89,
    ("ideal", "attention"): 0.8,
    ("strongest_user", "unprotected"): 0.05,
    ("strongest_user", "restored"): 0.07,
    ("strongest_user", "realigned"): 0.3,
    ("strongest_user", "both"): 0.55,
    ("strongest_user", "attention"): 0.4,
    ("sum_rate", "unprotected"): 0.05,
    ("sum_rate", "restored"): 0.06,
    ("sum_rate", "realigned"): 0.28,
    ("sum_rate", "both"): 0.53,
    ("sum_rate", "attention"): 0.39,
}
SLOPES = {("ideal", "both"): 0.03}  # of a task more; all others fall
OF_SHOTS = {1: -0.2, 5: -0.05, 10: 0.0, 50: 0.01}


def chosen(protocol):
    """(condition, protection, shots, subset) of every row of accuracies of one seed, written down anew."""
    subsets = protocol.chosen_subsets()
    found = [("base", "unprotected", 0, ALL), ("individual", "unprotected", 0, ALL)]
    found += [("clean", "unprotected", 0, subset) for subset in subsets]
    for condition in ("ideal", "strongest_user", "sum_rate"):
        for protection in ("unprotected", "both"):
            found += [(condition, protection, 10 * (protection == "both"), subset) for subset in subsets]
        found.append((condition, "restored", 0, ALL))
        found += [(condition, protection, 10, ALL) for protection in ("realigned", "attention")]
    found += [("ideal", p, shots, ALL) for p in ("realigned", "both", "attention") for shots in (1, 50)]
    return found


def make_rows(seeds=(0, 1, 2), shares=None, slopes=None, of_shots=None, wobble=0.02, cosines=None):
    """Rows in which share and slope are exactly those given if wobble is 0; else seeds, subsets and tasks differ."""
    shares, slopes, of_shots = SHARES | (shares or {}), SLOPES | (slopes or {}), OF_SHOTS | (of_shots or {})
    cosines = {"ideal": (0.0, 0.24), "sum_rate": (0.48, 0.52)} | (cosines or {})
    source = np.random.default_rng(0)
    rows = []
    for seed in seeds:
        individual = dict(zip(TASKS, source.uniform(0.6, 0.99, len(TASKS)).tolist(), strict=True))
        moved = wobble * source.normal()
        for condition, protection, shots, subset in chosen(PROTOCOL):
            names = [TASKS[index] for index in subset]
            values = {name: individual[name] for name in names}
            if condition != "individual":
                share = shares[condition, protection] + of_shots.get(shots, 0)
                share += slopes.get((condition, protection), -0.004) * (len(names) - len(TASKS))
                values = {n: v * (share + moved + wobble * source.uniform(-1, 1)) for n, v in values.items()}
            rows.append({"seed": seed, "condition": condition, "protection": protection, "shots": shots})
            rows[-1] |= {"tasks": names, "accuracy": {name: max(0.0, value) for name, value in values.items()}}
        for condition in ("ideal", "strongest_user", "sum_rate"):
            low, high = cosines.get(condition, (0.1, 0.3))
            facts = {"mse": source.uniform(0.1, 0.3, 5).tolist(), "snr_db": source.uniform(-30, -10, 5).tolist()}
            for kind in ("cosine_sent", "cosine", "cosine_without_restored"):
                matrix = np.triu(source.uniform(low, high, (5, 5)), 1)
                matrix[0, 1], matrix[0, 2] = low, high
                facts[kind] = (matrix + matrix.T + np.eye(5)).tolist()
            rows.append({"seed": seed, "condition": condition, "uplink": facts})
    return rows


def by_hand(rows, seed, condition, protection, shots, number):
    """Normalised accuracies of all subsets of this size."""
    (individual,) = (r["accuracy"] for r in rows if r["seed"] == seed and r["condition"] == "individual")
    wanted = (seed, condition, protection, shots, number)
    found = [
        r["accuracy"]
        for r in rows
        if "uplink" not in r and (r["seed"], r["condition"], r["protection"], r["shots"], len(r["tasks"])) == wanted
    ]
    return np.array([np.mean([value / individual[name] for name, value in values.items()]) for values in found])
