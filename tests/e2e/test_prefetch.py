"""What a restore loads that the guest has not touched, and what it records of
what the guest touches."""

import json
import os
import pathlib
import signal
import struct

import pytest

import checks
import harness
import qemu
import victims

MIB = 1 << 20


@pytest.fixture(name="image")
def an_image(shared_world, guest):
    """One image for all tests here, without a record of a restore."""
    path = shared_world.folder / "shared.img"
    if not path.exists():
        shared_world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", path).expect("ok")
    record = path.with_name(path.name + ".working-set")
    record.unlink(missing_ok=True)
    return path


def recorded(path):
    """The page numbers of a recorded working set."""
    data = path.read_bytes()
    count = struct.unpack_from("<Q", data, 32)[0]
    assert len(data) == 64 + 8 * count
    return struct.unpack_from(f"<{count}Q", data, 64)


def restore_json(run_dir):
    return json.loads((pathlib.Path(run_dir) / "restore.json").read_text())


def start(world, image, run_dir, *options):
    """A restore in the foreground whose guest runs."""
    run = world.start_vmsnap("restore", image, "--run-dir", run_dir, "--json", *options)

    def running():
        assert run.process.poll() is None, f"ended: {run.wait()}"
        try:
            return restore_json(run_dir)["phase"] == "running"
        except (FileNotFoundError, ValueError):
            return False
    harness.wait_until(running, "the guest to run")
    return run, qemu.restored(run_dir)


def wait_for_memory(copy):
    """Until all that the guest counts in is there. A page that is missing cannot
    be asked for from outside."""
    def is_there():
        try:
            for start in range(victims.ORDERED_START, victims.ORDERED_END, MIB):
                copy.read_physical(start, MIB)
        except OSError:
            return False
        return True
    harness.wait_until(is_there, "the guest's memory to be there")


def check_live(world, copy):
    """When the guest has been at all of its pages, they are one instant."""
    wait_for_memory(copy)
    victims.check_ordered_live(world, copy)


@pytest.mark.parametrize("prefetch", ["none", "working-set"])
def test_serves_until_the_vm_ends(world, image, prefetch):
    """Its end is success: that is what was asked for."""
    run_dir = world.path("run")
    run, copy = start(world, image, run_dir, "--prefetch", prefetch)
    check_live(world, copy)
    assert run.process.poll() is None, "it ended while the VM lives"
    assert restore_json(run_dir)["prefetch"] == prefetch
    copy.qmp("quit")
    summary = run.wait().expect("ok").json
    assert summary["phase"] == "ended"
    assert summary["faults"] > 0
    if prefetch == "none":
        assert summary["pages"]["filled_by_background"] == 0


def test_ctrl_c_and_reattach_keep_the_choice(world, image):
    run_dir = world.path("run")
    run, copy = start(world, image, run_dir, "--prefetch", "none")
    run.signal(signal.SIGINT)
    run.wait().expect("interrupted")
    check_live(world, copy)
    server = restore_json(run_dir)["server_pid"]
    assert harness.is_running(server), "it went to the background, and serves on"
    os.kill(server, signal.SIGKILL)
    harness.wait_until(lambda: not world.vmsnap_processes(), "its death")
    world.vmsnap("restore", "--reattach", run_dir, "--detach").expect("ok")
    check_live(world, copy)
    assert restore_json(run_dir)["phase"] == "running"
    os.kill(restore_json(run_dir)["server_pid"], signal.SIGKILL)
    harness.wait_until(lambda: not world.vmsnap_processes(), "its death")
    # Another choice can be made there.
    world.vmsnap("restore", "--reattach", run_dir, "--prefetch", "all").expect("ok")
    check_live(world, copy)
    checks.assert_running(copy)


def test_a_recorded_working_set_is_loaded_next_time(world, image):
    record = image.with_name(image.name + ".working-set")
    run, copy = start(world, image, world.path("run"), "--record-working-set")
    check_live(world, copy)
    copy.qmp("quit")
    first = run.wait().expect("ok").json
    assert first["pages"]["filled_by_background"] == 0, "loading ahead hides faults"
    pages = recorded(record)
    assert len(pages) == len(set(pages)) == first["pages"]["filled_by_fault"]

    # A guest that does not run touches nothing: what it wants comes all the same.
    run, copy = start(world, image, world.path("run"), "--prefetch", "working-set",
                      "--start-paused")
    wait_for_memory(copy)
    copy.qmp("cont")
    victims.check_ordered_live(world, copy)
    copy.qmp("quit")
    second = run.wait().expect("ok").json
    assert second["faults"] < first["faults"] / 10


@pytest.mark.parametrize("detach", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("options", [["--prefetch", "none"], ["--prefetch", "working-set"],
                                     ["--record-working-set"]], ids=lambda words: words[-1])
def test_a_snapshot_asks_for_all_pages(world, image, options, detach):
    """Of a VM whose server would never load them by itself."""
    run_dir = world.path("run")
    if detach:
        world.vmsnap("restore", image, "--run-dir", run_dir, *options, "--detach").expect("ok")
        copy = qemu.restored(run_dir)
    else:
        run, copy = start(world, image, run_dir, *options)
    second = world.path("second.img")
    world.vmsnap("snapshot", "--qmp", copy.qmp_socket, "--output", second).expect("ok")
    victims.check_ordered_image(world, second)
    if detach:
        harness.wait_until(lambda: not world.vmsnap_processes(), "its end")
    else:
        run.wait().expect("ok")
    assert restore_json(run_dir)["phase"] == "complete"
    if options == ["--record-working-set"]:
        assert len(recorded(image.with_name(image.name + ".working-set"))) > 0
    victims.check_ordered_live(world, copy)
    checks.assert_running(copy)


@pytest.mark.parametrize("owner", [0, 65534], ids=["ours", "of-another"])
def test_a_server_in_the_background_has_no_privileges(world, image, owner):
    """And does all that it must: read the image, write beside it, let go of the VM."""
    folder = world.directory("images")
    moved = folder / "vm.img"
    image.rename(moved)
    for path in (folder, moved):
        os.chmod(path, 0o700 if path is folder else 0o600)
        os.chown(path, owner, -1)
    run_dir = world.path("run")
    world.vmsnap("restore", moved, "--run-dir", run_dir, "--record-working-set",
                 "--detach").expect("ok")
    copy = qemu.restored(run_dir)
    copy.wait_for_progress()
    server = restore_json(run_dir)["server_pid"]
    checks.assert_unprivileged(
        server, checks.CAP_DAC_OVERRIDE | checks.CAP_DAC_READ_SEARCH if owner else 0)
    os.kill(server, signal.SIGTERM)
    harness.wait_until(lambda: not world.vmsnap_processes(), "its end")
    assert len(recorded(folder / "vm.img.working-set")) > 0
    world.vmsnap("restore", "--reattach", run_dir, "--prefetch", "all", "--detach").expect("ok")
    harness.wait_until(lambda: restore_json(run_dir)["phase"] == "complete", "all of its memory")
    harness.wait_until(lambda: not world.vmsnap_processes(), "its end")
    checks.assert_running(copy)


def test_a_run_directory_below_that_of_another(world, image):
    """What became of the VM is written down there all the same."""
    above = world.directory("home")
    above.chmod(0o700)
    os.chown(above, 65534, -1)
    run_dir = above / "run"
    world.vmsnap("restore", image, "--run-dir", run_dir, "--detach").expect("ok")
    copy = qemu.restored(run_dir)
    harness.wait_until(lambda: not world.vmsnap_processes(), "its end")
    assert restore_json(run_dir)["phase"] == "complete"
    checks.assert_running(copy)


def test_a_killed_recorder_is_taken_over(world, image):
    """The pages before stay known, if not their order; SIGTERM writes."""
    record = image.with_name(image.name + ".working-set")
    run_dir = world.path("run")
    world.vmsnap("restore", image, "--run-dir", run_dir, "--record-working-set",
                 "--detach").expect("ok")
    copy = qemu.restored(run_dir)
    copy.wait_for_progress()
    killed = restore_json(run_dir)["server_pid"]
    os.kill(killed, signal.SIGKILL)
    harness.wait_until(lambda: not world.vmsnap_processes(), "its death")
    assert not record.exists()
    world.vmsnap("restore", "--reattach", run_dir, "--detach").expect("ok")
    copy.wait_for_progress()
    successor = restore_json(run_dir)["server_pid"]
    assert successor != killed
    os.kill(successor, signal.SIGTERM)
    harness.wait_until(lambda: not world.vmsnap_processes(), "its end")
    assert len(recorded(record)) > 0
    assert harness.is_running(copy.pid)


def test_a_damaged_record_is_only_a_warning(world, image):
    record = image.with_name(image.name + ".working-set")
    record.write_bytes(b"\x89VMWSET\n" + bytes(100))
    run_dir = world.path("run")
    result = world.vmsnap("restore", image, "--run-dir", run_dir).expect("ok")
    assert str(record) in result.err
    check_live(world, qemu.restored(run_dir))
