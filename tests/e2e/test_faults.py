"""Disks that are full, monitors that lie, VMs that die: the snapshot fails with a
reason and no file, and whoever is still alive runs on."""

import concurrent.futures
import resource
import signal

import pytest

import checks
import harness
import qemu
import system
import victims
from parked import record, wait_for_end
from qmp_proxy import Proxy
from test_kill import SNAPSHOT_POINTS


@pytest.mark.parametrize("kib", [64, 1024, 12288])
def test_disk_full(world, guest, kib):
    disk = system.mount_small_disk(world, kib)
    files = checks.open_files(guest.pid)
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output",
                 disk / "vm.img").expect("no_space")
    checks.assert_only(disk)
    checks.assert_running(guest, files)


def test_existing_file_survives_a_full_disk(world, guest):
    """--force replaces a file by a whole one, or not at all."""
    disk = system.mount_small_disk(world, 4096)
    (disk / "vm.img").write_text("yesterday's")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", disk / "vm.img",
                 "--force").expect("no_space")
    assert (disk / "vm.img").read_text() == "yesterday's"
    checks.assert_only(disk, "vm.img")
    checks.assert_running(guest)


@pytest.mark.parametrize("limit", [4096, 3 << 20])
def test_file_size_limit(world, guest, limit):
    folder = world.directory("out")
    out = world.path("vmsnap.out")
    with open(out, "w", encoding="utf-8") as log:
        process = world.start([harness.VMSNAP, "snapshot", "--qmp", guest.qmp_socket, "--output",
                               folder / "vm.img"], stdout=log, stderr=log,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE,
                                                                    (limit, limit)))
        code = process.wait(harness.LIMIT)
    assert code == harness.EXIT["no_space"], f"{code}: {out.read_text()}"
    checks.assert_only(folder)
    checks.assert_running(guest)


def test_disk_full_at_export(world, guest):
    image = world.path("vm.img")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    disk = system.mount_small_disk(world, 1024)
    world.vmsnap("export", image, "--raw", disk / "ram.raw").expect("no_space")


def commands_of_a_snapshot(world, machine):
    """What vmsnap says to QEMU, in order, without repetitions."""
    proxy = Proxy(machine)
    world.vmsnap("snapshot", "--qmp", machine.qmp_socket, "--output",
                 world.path("vm.img")).expect("ok")
    proxy.close()
    seen = list(dict.fromkeys(proxy.commands))
    assert {"stop", "cont"} <= set(seen), f"the proxy saw only {seen}"
    return seen


def test_bad_answers(world):
    """To each command in turn, one bad answer. The snapshot may do without the
    answer (then the image is exact); else it fails. The VM runs in any case. All
    kinds at the same time, a guest each, because it is mostly waiting."""
    kinds = ["garbage", "error", "close", "types", "odd", "deep"]
    guests = [victims.OrderedGuest(world) for _ in kinds]
    commands = commands_of_a_snapshot(world, guests[0])

    def one_kind(guest, how):
        for command in commands:
            bad_answer(world, guest, command, how)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in pool.map(one_kind, guests, kinds):
            assert done is None


def test_no_answer(world):
    """A monitor that says nothing more, or that another client has (libvirt, say),
    is given up on. All at the same time, because it is all waiting."""
    commands = ["qmp_capabilities", "stop", "cont"]
    guests = [victims.OrderedGuest(world) for _ in range(len(commands) + 1)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        never_greets = pool.submit(monitor_that_never_greets, world, guests[-1])
        for done in pool.map(lambda guest, command: bad_answer(world, guest, command, "stall"),
                             guests, commands):
            assert done is None
        never_greets.result()


def bad_answer(world, guest, command, how):
    proxy = Proxy(guest, command, how)
    folder = world.directory("out")
    run = world.start_vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", folder / "vm.img")
    try:
        result = run.wait()
    finally:
        proxy.close()
    where = f"{how} at {command}: {result}"
    assert proxy.took_effect, where
    assert result.code >= 0, where
    if result.code == 0:
        assert how != "garbage" or command != "stop", where
        victims.check_ordered_image(world, folder / "vm.img")
        (folder / "vm.img").unlink()
    else:
        assert result.err.strip(), where
        checks.assert_only(folder)
    try:
        checks.assert_running(guest)
    except AssertionError as error:
        raise AssertionError(f"{error}\nafter {where}") from None


def monitor_that_never_greets(world, guest):
    folder = world.directory("out")
    with qemu.Qmp(guest.qmp_socket):
        result = world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", folder / "vm.img")
    result.expect("vm")
    assert result.err.strip()
    checks.assert_only(folder)
    checks.assert_running(guest)


@pytest.mark.parametrize("point", SNAPSHOT_POINTS)
def test_vm_dies(world, point):
    """Killed at each phase: an image only if all of it had been copied."""
    guest = victims.OrderedGuest(world)
    folder = world.directory("out")
    run = world.start_vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", folder / "vm.img",
                             *harness.PATIENT, *harness.until_written(point),
                             env={"VMSNAP_STOP_AT": point})
    run.wait_stopped()
    guest.kill()
    run.signal(signal.SIGCONT)
    result = run.wait()
    if result.code == 0:
        assert point.startswith(("copy.done", "commit.")), f"an image of a dead VM: {result}"
        victims.check_ordered_image(world, folder / "vm.img")
        checks.assert_only(folder, "vm.img")
    else:
        result.expect("vm")
        assert not point.startswith("commit."), str(result)
        checks.assert_only(folder)
    harness.wait_until(lambda: not world.vmsnap_processes(), "helper processes to end", limit=30)


def test_process_dies(world):
    victim = victims.Writers(world, mib=16)
    folder = world.directory("out")
    run = world.start_vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(), "--output",
                             folder / "x.img", *harness.PATIENT,
                             env={"VMSNAP_STOP_AT": "pause.resumed"})
    run.wait_stopped()
    system.kill(victim.pid)
    run.signal(signal.SIGCONT)
    run.wait().expect("vm")
    checks.assert_only(folder)


def test_qemu_refuses_to_start(world, guest):
    """A restore whose QEMU ends at once says what QEMU said, and leaves nothing."""
    image = world.path("vm.img")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    result = world.vmsnap("restore", image, "--run-dir", world.path("run"), "--", "-no-such-option")
    result.expect("vm")
    assert "no-such-option" in result.err, f"QEMU's own words are missing: {result}"
    checks.assert_running(guest)


SILENT_MONITOR = r"""#!/usr/bin/env python3
import re, signal, socket, sys
path = re.search("unix:([^,]+)", " ".join(sys.argv)).group(1)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
connection = listener.accept()
open(path + ".accepted", "w").close()
signal.pause()
"""


@pytest.mark.parametrize("command", ["snapshot", "park", "restore"])
def test_interrupted_before_a_monitor_greets(world, guest, command):
    """A QEMU that accepts and says nothing holds up nobody who has had enough."""
    program, folder, image = world.path("qemu"), world.directory("run"), world.path("vm.img")
    program.write_text(SILENT_MONITOR)
    program.chmod(0o755)
    monitor, run_dir = folder / "qmp.sock", folder
    if command == "restore":
        world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
        arguments = [image, "--qemu", program]
    else:
        world.start([program, f"unix:{monitor},"])
        harness.wait_until(monitor.exists, "the monitor")
        arguments = ["--qmp", monitor, "--output", image]
    if command != "snapshot":
        arguments += ["--run-dir", run_dir]
    run = world.start_vmsnap(command, *arguments)
    harness.wait_until((folder / "qmp.sock.accepted").exists, "vmsnap to connect")
    run.signal(signal.SIGINT)
    run.wait().expect("interrupted")
    checks.assert_running(guest)


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"], ids=["input", "all-three"])
def test_without_standard_descriptors(world, guest, closed):
    """No file of ours gets their numbers: the background would replace it."""
    image = world.path("vm.img")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    run_dir = world.path("run")
    restore = world.start(["sh", "-c", f'exec "$@" {closed}', "sh", harness.VMSNAP, "restore", image,
                           "--run-dir", run_dir, "--detach"])
    assert restore.wait(harness.LIMIT) == 0
    wait_for_end(world, run_dir)
    assert record(run_dir)["counters"]["poisoned"] == 0, record(run_dir)
    restored = qemu.restored(run_dir)
    victims.check_ordered_live(world, restored)
    restored.wait_for_progress()


def test_without_standard_output(world, guest):
    """A snapshot says nothing and is there; an export that goes nowhere failed."""
    image = world.path("vm.img")
    for status, arguments in ((0, ["snapshot", "--qmp", guest.qmp_socket, "--output", image]),
                              (1, ["export", image, "--raw", "-"])):
        run = world.start(["sh", "-c", 'exec "$@" >&-', "sh", harness.VMSNAP, *arguments])
        assert run.wait(harness.LIMIT) == status
    harness.verify(world, image)


def test_restored_vm_is_killed(world, guest):
    """The page server of a VM that is gone ends, too."""
    image = world.path("vm.img")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    run_dir = world.path("run")
    run = world.start_vmsnap("restore", image, "--run-dir", run_dir,
                             env={"VMSNAP_STOP_AT": "restore.half"})
    run.wait_stopped()
    pid = qemu.restored(run_dir).pid
    system.kill(pid)
    run.signal(signal.SIGCONT)
    run.wait().expect("vm")
