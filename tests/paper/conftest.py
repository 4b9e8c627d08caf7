"""What tests of the file of results share."""

import os

import pytest


@pytest.fixture
def unsynced(monkeypatch):
    """What processes write is in the system's cache, and no test pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
