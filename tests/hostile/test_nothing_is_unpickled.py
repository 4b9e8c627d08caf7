"""Nothing is unpickled, neither here nor by a package that is asked to read something."""

import pytest

from helpers.scripts import printed_by


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--as-before-torch-2.6"]])
def test_pickles_under_every_name(options, tmp_path):
    printed = printed_by("unpickling_worker.py", tmp_path, *options)
    *before, last = printed.splitlines()
    assert last == "done"
    # the watcher's line of the one load that was meant to unpickle, and what the pickle printed
    assert len([line for line in before if "UNPICKLED" in line]) == 2, printed
