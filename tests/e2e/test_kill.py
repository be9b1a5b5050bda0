"""vmsnap killed at every named point of formats/test_point.h: the VM runs on with
its memory intact, and nothing of us is left in it or on disk."""

import os
import re
import signal

import pytest

import checks
import harness
import qemu
import victims

POINTS = re.findall(r'std::string_view\("([\w.]+)"\)',
                    (harness.SOURCE / "formats/test_point.h").read_text())
# Those of a store are walked in test_store_kill.py, those of parking in test_park_kill.py.
SNAPSHOT_POINTS = [point for point in POINTS
                   if not point.startswith(("restore.", "store.", "prune.", "repack.", "repair.",
                                            "park.", "unpark.", "background."))]
RESTORE_POINTS = [point for point in POINTS if point.startswith("restore.")]

# From here on a dead page server leaves a guest that waits, and that can be
# taken over; before, the restore as a whole has failed.
SERVING_POINTS = ("restore.running", "restore.half", "restore.filled")

# A process has no monitor and no device state: it may not pass these.
ONLY_OF_A_VM = {"pause.state_saved"}


def test_list_of_points():
    """The list in the header was understood, and no point is out of use."""
    assert len(SNAPSHOT_POINTS) >= 10 and len(RESTORE_POINTS) >= 5, POINTS
    text = "".join(path.read_text() for folder in ("snap", "restore", "formats")
                   for path in (harness.SOURCE / folder).rglob("*.cpp"))
    used = set(re.findall(r'VMSNAP_TEST_POINT\("([\w.]+)"\)', text))
    assert used == set(POINTS), f"in the list or in the code alone: {used ^ set(POINTS)}"


def assert_file_is_whole_or_absent(world, image):
    if image.exists():
        harness.verify(world, image)


def assert_next_run_cleans_up(world, folder, *target):
    """The next snapshot to the same file works and removes what was left."""
    image = folder / "x.img"
    world.vmsnap("snapshot", *target, "--output", image, "--force").expect("ok")
    checks.assert_only(folder, "x.img")
    harness.verify(world, image)


def assert_helpers_end(world):
    harness.wait_until(lambda: not world.vmsnap_processes(),
                       lambda: f"helper processes to end: {world.processes()}", limit=30)


@pytest.mark.parametrize("point", SNAPSHOT_POINTS)
def test_kill_snapshot_of_a_vm(shared_world, guest, point):
    folder = shared_world.directory("out")
    result = shared_world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", folder / "x.img",
                                 *harness.until_written(point), env={"VMSNAP_KILL_AT": point})
    assert result.code == -signal.SIGKILL, f"never got to {point}: {result}"
    checks.assert_running(guest)
    assert_helpers_end(shared_world)
    assert_file_is_whole_or_absent(shared_world, folder / "x.img")
    assert_next_run_cleans_up(shared_world, folder, "--qmp", guest.qmp_socket)
    checks.assert_running(guest)
    victims.check_ordered_live(shared_world, guest)


@pytest.mark.parametrize("memory", ["anon", "memfd"])
def test_kill_snapshot_of_a_process(world, memory):
    """All points in turn on one process, which checks its own memory after each."""
    victim = victims.Writers(world, memory=memory, mib=16)
    target = ["--pid", victim.pid, *victim.range_arguments()]
    for point in SNAPSHOT_POINTS:
        folder = world.directory("out")
        result = world.vmsnap("snapshot", *target, "--output", folder / "x.img",
                              *harness.until_written(point), env={"VMSNAP_KILL_AT": point})
        assert result.code == -signal.SIGKILL or point in ONLY_OF_A_VM, (
            f"never got to {point}: {result}")
        harness.wait_until(lambda: harness.process_state(victim.pid) != "T",
                           f"the process to run again after a death at {point}", limit=30)
        victim.assert_live()
        checks.assert_unharmed(victim.pid)
        assert_helpers_end(world)
        assert_file_is_whole_or_absent(world, folder / "x.img")
        assert_next_run_cleans_up(world, folder, *target)
        victim.assert_live()


INSIDE = ["attach.detached", "pause.stopped", "pause.half_armed", "pause.armed", "copy.fault",
          "copy.half"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGSEGV],
                         ids=lambda number: number.name)
@pytest.mark.parametrize("point", INSIDE)
def test_signal_during_a_snapshot(shared_world, guest, point, number):
    """A polite signal is obeyed and answered with the exit status for it."""
    folder = shared_world.directory("out")
    run = shared_world.start_vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output",
                                    folder / "x.img", *harness.PATIENT, *harness.until_written(point),
                                    env={"VMSNAP_STOP_AT": point})
    run.wait_stopped()
    run.signal(number)
    run.signal(signal.SIGCONT)
    result = run.wait()
    if number == signal.SIGSEGV:
        assert result.code == -number, str(result)
    elif number == signal.SIGHUP:
        assert result.code in (harness.EXIT["interrupted"], -number), str(result)
    else:
        result.expect("interrupted")
        checks.assert_only(folder)
    assert not (folder / "x.img").exists()
    checks.assert_running(guest)
    assert_helpers_end(shared_world)
    assert_next_run_cleans_up(shared_world, folder, "--qmp", guest.qmp_socket)


@pytest.mark.parametrize("point", ["pause.stopped", "pause.half_armed", "pause.resumed",
                                   "copy.half"])
def test_stopped_for_good(shared_world, guest, point):
    """SIGSTOP, and nobody continues it: the VM gets rid of us by itself."""
    folder = shared_world.directory("out")
    run = shared_world.start_vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output",
                                    folder / "x.img", "--stall-limit", "0.5",
                                    env={"VMSNAP_STOP_AT": point})
    run.wait_stopped()
    checks.assert_running(guest)
    assert run.wait().code != 0
    assert not (folder / "x.img").exists()
    assert_helpers_end(shared_world)
    assert_next_run_cleans_up(shared_world, folder, "--qmp", guest.qmp_socket)


@pytest.mark.parametrize("point", ["attach.seized", "attach.created"])
def test_stopped_while_it_has_a_thread_of_the_vm(shared_world, guest, point):
    """The thread is let go. We, continued, take nothing that is another's by then, but
    try another way."""
    folder = shared_world.directory("out")
    run = shared_world.start_vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output",
                                    folder / "x.img", env={"VMSNAP_STOP_AT": point})
    run.wait_stopped()
    harness.wait_until(lambda: not checks.traced_threads(guest.pid), "the thread to be let go", limit=30)
    run.signal(signal.SIGCONT)  # it has the monitor until then
    run.wait().expect("ok")
    shared_world.vmsnap("verify", folder / "x.img").expect("ok")
    checks.assert_running(guest)
    (folder / "x.img").unlink()
    assert_helpers_end(shared_world)
    assert_next_run_cleans_up(shared_world, folder, "--qmp", guest.qmp_socket)


@pytest.fixture(name="image")
def an_image(shared_world, guest):
    """One image for all tests here."""
    path = shared_world.folder / "shared.img"
    if not path.exists():
        shared_world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", path).expect("ok")
    return path


def restored_or_none(run_dir):
    """The restored machine, if there is a living QEMU."""
    try:
        machine = qemu.restored(run_dir)
    except (FileNotFoundError, ValueError):
        return None
    return machine if harness.is_running(machine.pid) else None


@pytest.mark.parametrize("detach", [False, True], ids=["foreground", "detached"])
@pytest.mark.parametrize("point", RESTORE_POINTS)
def test_kill_restore(world, guest, image, point, detach):
    run_dir = world.path("run")
    arguments = ["restore", image, "--run-dir", run_dir, *(["--detach"] if detach else [])]
    result = world.vmsnap(*arguments, env={"VMSNAP_KILL_AT": point})
    if not detach:
        assert result.code == -signal.SIGKILL, f"never got to {point}: {result}"
    # With --detach another process may be the one that dies.
    harness.wait_until(lambda: not world.vmsnap_processes(), f"the death at {point}")
    checks.assert_running(guest)  # the original has nothing to do with it

    again = world.vmsnap("restore", "--reattach", run_dir)
    if point in SERVING_POINTS:
        again.expect("ok")
    if again.code == 0:
        copy = qemu.restored(run_dir)
        checks.assert_running(copy)
        victims.check_ordered_live(world, copy)
        assert not world.vmsnap_processes(), "all pages are there, the server ends"
    else:
        # It says why; the half-made VM does not run on with memory that is not there.
        assert again.err.strip() and again.code > 0, str(again)
        copy = restored_or_none(run_dir)
        if copy:
            assert copy.status() != "running", "runs without a page server"
            os.kill(copy.pid, signal.SIGKILL)
    fresh = world.path("run")
    world.vmsnap("restore", image, "--run-dir", fresh).expect("ok")
    checks.assert_running(qemu.restored(fresh))


def test_a_server_that_dies_as_it_begins(world, image):
    """The command does not say that all is well, and what it names mends it."""
    run_dir = world.path("run")
    result = world.vmsnap("restore", image, "--run-dir", run_dir, "--detach",
                          env={"VMSNAP_KILL_AT": "background.start"}).expect("io")
    assert f"vmsnap restore --reattach {run_dir}" in result.err, str(result)
    again = world.vmsnap("restore", "--reattach", run_dir, "--detach")
    again.expect("ok")
    copy = qemu.restored(run_dir)
    # At its end it has a thread of the VM close our userfaultfd, for a moment.
    harness.wait_until(lambda: not world.vmsnap_processes(), "the page server to end")
    checks.assert_running(copy)
    victims.check_ordered_live(world, copy)


def test_guest_waits_for_a_dead_server(world, image):
    """It stalls at the first missing page, for as long as it takes; and is right
    afterwards. Killed again and again on the way."""
    run_dir = world.path("run")
    world.vmsnap("restore", image, "--run-dir", run_dir, env={"VMSNAP_KILL_AT": "restore.running"})
    copy = qemu.restored(run_dir)
    for _ in range(2):
        # The boot sector goes through all pages in order: it must come to a halt.
        stalled = harness.wait_until(lambda: checks.uses_no_processor(copy.pid), "the guest to stall")
        assert stalled
        assert harness.is_running(copy.pid)
        world.vmsnap("restore", "--reattach", run_dir, env={"VMSNAP_KILL_AT": "restore.half"})
    world.vmsnap("restore", "--reattach", run_dir).expect("ok")
    checks.assert_running(copy)
    victims.check_ordered_live(world, copy)


def test_page_server_stands_still(world, guest, image):
    """SIGSTOP is no death: the guest waits, and goes on after SIGCONT."""
    run_dir = world.path("run")
    run = world.start_vmsnap("restore", image, "--run-dir", run_dir,
                             env={"VMSNAP_STOP_AT": "restore.half"})
    run.wait_stopped()
    copy = qemu.restored(run_dir)
    harness.wait_until(lambda: checks.uses_no_processor(copy.pid), "the guest to wait")
    checks.assert_running(guest)
    run.signal(signal.SIGCONT)
    run.wait().expect("ok")
    checks.assert_running(copy)
    victims.check_ordered_live(world, copy)


def test_two_servers_are_one_too_many(world, image):
    """While a page server lives, --reattach refuses."""
    run_dir = world.path("run")
    run = world.start_vmsnap("restore", image, "--run-dir", run_dir,
                             env={"VMSNAP_STOP_AT": "restore.half"})
    run.wait_stopped()
    second = world.vmsnap("restore", "--reattach", run_dir)
    assert second.code not in (0, -signal.SIGKILL), str(second)
    run.signal(signal.SIGCONT)
    run.wait().expect("ok")
    copy = qemu.restored(run_dir)
    checks.assert_running(copy)
    victims.check_ordered_live(world, copy)


def test_run_dir_in_use(world, image):
    """A second restore into the directory of a VM that runs changes nothing there."""
    run_dir = world.path("run")
    world.vmsnap("restore", image, "--run-dir", run_dir).expect("ok")
    copy = qemu.restored(run_dir)
    before = (run_dir / "qemu.pid").read_text()
    second = world.vmsnap("restore", image, "--run-dir", run_dir)
    assert second.code > 0, str(second)
    assert (run_dir / "qemu.pid").read_text() == before
    checks.assert_running(copy)
