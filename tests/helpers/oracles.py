"""Independent ways to the same numbers: slow, plain, and written from the definitions."""

from __future__ import annotations

import numpy as np


def complex_normal(rng, *shape):
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / np.sqrt(2)


def random_covariance(rng, size, rank=None):
    """A random positive semidefinite matrix of unit trace."""
    factor = complex_normal(rng, size, size if rank is None else rank)
    C = factor @ factor.conj().T
    return C / np.trace(C).real


def log_det_rate(H, P, C):
    """log det(I + H P H^H C^-1), from the definition."""
    A = (H * P) @ H.conj().T
    _, value = np.linalg.slogdet(np.eye(len(C)) + A @ np.linalg.inv(C))
    return value


def worst_case_by_cvxpy(H, P, P_N, noise):
    """min over C of log det(I + B^H (C + noise I)^-1 B) as a semidefinite programme, in the real embedding.

    With M <= I - B^H (C_n + B B^H)^-1 B = (I + B^H C_n^-1 B)^-1 the objective is -log det M; the Schur complement
    makes the bound linear. The embedding [[Re, -Im], [Im, Re]] doubles every eigenvalue, and so the log det.
    """
    import cvxpy as cp

    B = H * np.sqrt(P)
    embedded = np.block([[B.real, -B.imag], [B.imag, B.real]])
    antennas, users = embedded.shape
    C = cp.Variable((antennas, antennas), symmetric=True)
    M = cp.Variable((users, users), symmetric=True)
    total = C + noise * np.eye(antennas) + embedded @ embedded.T
    schur = cp.bmat([[np.eye(users) - M, embedded.T], [embedded, total]])
    problem = cp.Problem(cp.Maximize(cp.log_det(M)), [C >> 0, schur >> 0, cp.trace(C) <= 2 * P_N])
    problem.solve(solver=cp.CLARABEL)
    return -problem.value / 2


def receive(H, P, C, C_design, order=None):
    """E, N and the gains of a receiver, user by user with explicit filters; `order` None: linear."""
    B = H * np.sqrt(P)
    antennas, users = B.shape
    W = np.zeros((antennas, users), complex)
    G = np.zeros((users, users), complex)
    for step, q in enumerate(range(users) if order is None else order):
        present = list(range(users)) if order is None else list(order[step:])
        X = B[:, present] @ B[:, present].conj().T + C_design
        W[:, q] = np.linalg.pinv(X, rcond=1e-12, hermitian=True) @ B[:, q]
        G[q, present] = W[:, q].conj() @ B[:, present]
    heard = W.conj().T @ C @ W
    off = G - np.diag(np.diag(G))
    missed = G - np.eye(users)
    return missed @ missed.conj().T + heard, off @ off.conj().T + heard, np.diag(G).real


def simulate(rng, H, P, C, C_design, order, symbols):
    """Estimates and sent symbols of `symbols` uses of y = H P^1/2 s + z with genie cancellation."""
    B = H * np.sqrt(P)
    antennas, users = B.shape
    values, vectors = np.linalg.eigh(C)
    s = complex_normal(rng, users, symbols)
    z = vectors @ (np.sqrt(np.clip(values, 0, None))[:, None] * complex_normal(rng, antennas, symbols))
    y = B @ s + z
    estimate = np.empty_like(s)
    if order is None:
        W = np.linalg.pinv(B @ B.conj().T + C_design, rcond=1e-12, hermitian=True) @ B
        return W.conj().T @ y, s
    rest = y.copy()
    present = list(order)
    for q in order:
        X = B[:, present] @ B[:, present].conj().T + C_design
        w = np.linalg.pinv(X, rcond=1e-12, hermitian=True) @ B[:, q]
        estimate[q] = w.conj() @ rest
        rest = rest - np.outer(B[:, q], s[q])
        present.remove(q)
    return estimate, s


def assert_covariance(samples_a, samples_b, expected, z=5.0):
    """The mean of a * conj(b) over samples against `expected`, entry by entry, within z standard errors."""
    products = samples_a[:, None, :] * samples_b[None, :, :].conj()
    mean = products.mean(-1)
    error = np.sqrt((np.abs(products) ** 2).mean(-1) / products.shape[-1])
    worst = np.max(np.abs(mean - expected) - z * error)
    assert worst <= 1e-12, f"off by {worst:.2e} more than {z} standard errors"


def min_max_rate_by_cvxpy(H, P, P_N, noise, order):
    """min over C of the largest SIC rate: b^H X^-1 b <= u is a Schur complement, in the real embedding."""
    import cvxpy as cp

    B = H * np.sqrt(P)
    antennas = len(B)

    def embed(matrix):
        return np.block([[matrix.real, -matrix.imag], [matrix.imag, matrix.real]])

    C, u = cp.Variable((2 * antennas, 2 * antennas), symmetric=True), cp.Variable()
    constraints = [C >> 0, cp.trace(C) <= 2 * P_N]
    for step, q in enumerate(order):
        later = [embed(B[:, [j]]) for j in order[step + 1 :]]
        X = C + noise * np.eye(2 * antennas) + sum(column @ column.T for column in later)
        b = embed(B[:, [q]])
        constraints.append(cp.bmat([[X, b], [b.T, u * np.eye(2)]]) >> 0)
    cp.Problem(cp.Minimize(u), constraints).solve(solver=cp.CLARABEL)
    return np.log1p(u.value)
