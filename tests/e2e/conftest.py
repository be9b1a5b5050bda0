"""Fixtures, and what must hold before any test starts."""

import os
import signal

import pytest

import harness
import victims


def pytest_configure(config):
    del config
    # A test that runs into ctest's time limit gets SIGTERM: clean up then, too.
    def stop(number, frame):
        del frame
        pytest.exit(f"signal {number}", returncode=3)
    signal.signal(signal.SIGTERM, stop)
    # Programs of the tests heed it, even under nohup.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def world():
    harness.need(os.geteuid() == 0, "root", "the tests attach to processes and mount file systems")
    created = harness.World()
    yield created
    created.end()


@pytest.fixture(scope="module")
def shared_world():
    """One for all tests of a file, for a guest that they share."""
    harness.need(os.geteuid() == 0, "root", "the tests attach to processes and mount file systems")
    created = harness.World()
    yield created
    created.end()


@pytest.fixture(scope="module", name="_guests")
def guests_of_this_file():
    return []


@pytest.fixture
def guest(shared_world, _guests):
    """A counting boot sector that the tests of a file share. One that a failed
    test left dead or paused is replaced, so that no other test fails for it."""
    if not _guests or not _guests[-1].is_well():
        if _guests:
            _guests[-1].kill()
        _guests.append(victims.OrderedGuest(shared_world))
    return _guests[-1]
