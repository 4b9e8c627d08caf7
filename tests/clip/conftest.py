"""Data sets and models that several files read."""

import importlib

import pytest

from helpers.dataset_folders import MAKERS
from helpers.published_tower import tower


@pytest.fixture
def any_checksum(monkeypatch):
    """SVHN's files are checked against the real ones' MD5."""
    svhn = importlib.import_module("torchvision.datasets.svhn")
    monkeypatch.setattr(svhn, "check_integrity", lambda path, md5: True)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """All data sets in one folder, which no test writes to."""
    folder = tmp_path_factory.mktemp("data")
    for make in MAKERS.values():
        make(folder)
    return folder


@pytest.fixture
def base():
    """The image tower that published checkpoints are made from."""
    return tower()
