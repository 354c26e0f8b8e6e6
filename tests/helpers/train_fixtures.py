"""Fixtures of the tests that run train.py."""

import pytest
from tiny_editor import write_tiny_editor


@pytest.fixture(scope="module")
def quick_runs():
    """Runs validate on 8 samples, and draw no loss.png, which takes longer than a short run. Yields the
    function that draws it."""
    import train
    from nanoip2p.training import run_folder as runs
    plot_log = runs.plot_log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "VALIDATION_SAMPLES", 8)
        patch.setattr(runs, "plot_log", lambda run: True)
        yield plot_log


@pytest.fixture(scope="session")
def launch():
    """launch(job, ...) runs train.py, see train_jobs.Server. All tests share the server: it starts slowly."""
    from train_jobs import Server
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The editor from which runs begin."""
    return write_tiny_editor(tmp_path_factory.mktemp("start"))
