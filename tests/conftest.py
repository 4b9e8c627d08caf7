"""Settings of the whole suite: reproducible hypothesis runs, and GPU tests only where there is a GPU."""

import os

import pytest
from hypothesis import settings

# The same examples on every machine and in every run, however slow the machine is.
settings.register_profile("reproducible", derandomize=True, deadline=None, print_blob=True)
# To look for new examples: python -m pytest --hypothesis-profile=explore
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("reproducible")


# Under pytest-xdist (-n) the workers share the cores: more threads than cores would spin against each other, which
# makes small models ten times slower. Read by torch when it starts, here and in the interpreters that tests start.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


# a script that a test starts, and that looks for its imports itself
collect_ignore = ["fuzz/harness.py"]


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


def _threads(count):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """For models so small that threads cost more than they save, most of all where others want the processors."""
    yield from _threads(1)


@pytest.fixture
def two_threads():
    yield from _threads(2)
