"""Settings of the whole suite: reproducible hypothesis runs, and GPU tests only where there is a GPU."""

import pytest
from hypothesis import settings

# The same examples on every machine and in every run, however slow the machine is.
settings.register_profile("reproducible", derandomize=True, deadline=None, print_blob=True)
# To look for new examples: python -m pytest --hypothesis-profile=explore
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("reproducible")


def pytest_ignore_collect(collection_path, config):
    """Benchmarks run only when they are asked for: python -m pytest tests/benchmarks."""
    if collection_path.name == "benchmarks" and not any("benchmarks" in arg for arg in config.args):
        return True
    return None


def pytest_collection_modifyitems(items):
    """Skip the tests marked `gpu` on machines without CUDA."""
    needing = [item for item in items if "gpu" in item.keywords]
    if needing:
        import torch

        if not torch.cuda.is_available():
            for item in needing:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
