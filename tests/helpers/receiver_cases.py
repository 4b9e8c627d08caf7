"""Covariances of every rank, and one way to call both receivers."""

import numpy as np

from helpers.oracles import random_covariance
from rmtllmf.channel import lmmse, sic

ANTENNAS, USERS = 4, 3


def covariance(kind, rng, antennas=ANTENNAS):
    """A regular covariance, or a singular one of the given rank."""
    if kind == "regular":
        return random_covariance(rng, antennas) + 0.05 * np.eye(antennas)
    if kind == "none":
        return np.zeros((antennas, antennas), complex)
    return random_covariance(rng, antennas, rank=kind)


KINDS = ["regular", 3, 2, 1, "none"]


def call(receiver, H, P, C, design=None, order=None):
    if receiver == "lmmse":
        return lmmse(H, P, C, designed_for=design)
    return sic(H, P, C, designed_for=design, order=order)
