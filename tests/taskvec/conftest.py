"""What tests of whole models share."""

import pytest

import rmtllmf.taskvec._engine as engine


@pytest.fixture
def small_pieces(monkeypatch):
    """Several pieces a tensor, and threads for small vectors too."""
    monkeypatch.setattr(engine, "PIECE", 8)
