"""What cannot be captured right is refused before the VM is touched: with the
right exit status, a reason, no file, and a guest that never even paused."""

import mmap
import os
import subprocess
import sys

import pytest

import checks
import harness
import qemu
import victims


def refuse(world, machine, *arguments, code="refused", words=()):
    """Runs a snapshot of a VM that must be refused."""
    folder = world.directory("out")
    result = world.vmsnap("snapshot", "--qmp", machine.qmp_socket, "--output", folder / "vm.img",
                          *arguments).expect(code)
    checks.assert_only(folder)
    checks.assert_unharmed(machine.pid)
    for word in words:
        assert word.lower() in result.err.lower(), f"the reason does not mention {word}: {result}"
    return result


def test_migration_blocker(world):
    """What QEMU itself says it cannot save, is not saved."""
    shm = f"/dev/shm/{world.folder.name}-ivshmem"
    world.at_end(lambda: os.unlink(shm))
    guest = victims.OrderedGuest(world, second_monitor=True, extra=[
        "-object", f"memory-backend-file,id=iv,size=1M,share=on,mem-path={shm}",
        "-device", "ivshmem-plain,memdev=iv,master=off"])
    with qemu.Qmp(guest.second_socket) as monitor:
        refuse(world, guest, words=["ivshmem"])
        monitor.execute("query-status")
        assert "STOP" not in monitor.events, "the VM was paused before it was refused"
    checks.assert_running(guest)


def test_device_that_cannot_be_saved(world):
    disk = world.path("disk.raw")
    disk.write_bytes(bytes(1 << 20))
    guest = victims.OrderedGuest(world, extra=[
        "-drive", f"file={disk},if=none,id=n0,format=raw,readonly=on",
        "-device", "nvme,serial=x,drive=n0"])
    refuse(world, guest, words=["nvme"])
    checks.assert_running(guest)


def test_writable_disk(world):
    disk = world.path("disk.raw")
    disk.write_bytes(bytes(1 << 20))
    guest = victims.OrderedGuest(world, extra=[
        "-drive", f"file={disk},if=none,id=d0,format=raw", "-device", "virtio-blk-pci,drive=d0"])
    refuse(world, guest, words=["--disks none"])
    image = world.path("vm.img")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image, "--disks",
                 "none").expect("ok")
    checks.assert_running(guest)
    victims.check_ordered_image(world, image)


def test_another_process_writes_the_ram(world):
    """Writes by others would pass the write protection by."""
    guest = victims.OrderedGuest(world, ram="memfd")
    shared = next(f"/proc/{guest.pid}/fd/{fd}" for fd in os.listdir(f"/proc/{guest.pid}/fd")
                  if "memory-backend-memfd" in os.readlink(f"/proc/{guest.pid}/fd/{fd}"))
    with open(shared, "r+b") as file, mmap.mmap(file.fileno(), 1 << 20):
        result = refuse(world, guest)
        assert str(os.getpid()) in result.err, f"the other process is not named: {result}"
    # A mapping that cannot write does no harm.
    with open(shared, "rb") as file, mmap.mmap(file.fileno(), 1 << 20, prot=mmap.PROT_READ):
        world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output",
                     world.path("vm.img")).expect("ok")
    checks.assert_running(guest)


def test_range_with_another_userfault(world):
    """A process that handles its own page faults (a lazily restored one, say)."""
    client = victims.Talker(world, "fc_client", "--register-only", "1")
    result = world.vmsnap("snapshot", "--pid", client.pid, *client.range_arguments(), "--output",
                          world.path("x.img")).expect("refused")
    assert "userfault" in result.err.lower() or "uffd" in result.err.lower(), str(result)
    checks.assert_not_traced(client.pid)
    assert checks.ranges_with_userfault(client.pid), "its own registration must stay"


def test_vm_waiting_for_a_migration(world):
    guest = qemu.Qemu(world, ["-incoming", "defer"])
    refuse(world, guest, words=["inmigrate"])
    assert guest.status() == "inmigrate"


def test_vm_after_a_migration(world):
    """Its state belongs to whoever it was sent to."""
    guest = victims.OrderedGuest(world)
    with qemu.Qmp(guest.qmp_socket) as monitor:
        monitor.execute("stop")
        monitor.execute("migrate", uri=f"exec:cat > {world.path('stream')}")
        harness.wait_until(lambda: monitor.execute("query-migrate")["status"] == "completed",
                           "the migration")
    refuse(world, guest, words=["postmigrate"])
    assert guest.status() == "postmigrate"


def test_existing_file(world, guest):
    image = world.path("vm.img")
    image.write_text("precious")
    arguments = ["snapshot", "--qmp", guest.qmp_socket, "--output", image]
    world.vmsnap(*arguments).expect("exists")
    assert image.read_text() == "precious"
    world.vmsnap(*arguments, "--force").expect("ok")
    harness.verify(world, image)
    checks.assert_running(guest)


def test_in_pause_command(world, guest):
    """It runs at the instant: the VM is paused then. Its failure is ours."""
    seen = world.path("seen")
    folder = world.directory("out")
    arguments = ["snapshot", "--qmp", guest.qmp_socket, "--output", folder / "vm.img", "--in-pause"]
    before = len(guest.serial_text())
    command = (f"wc -c < {guest.serial} > {seen}; sleep 1; wc -c < {guest.serial} >> {seen}")
    world.vmsnap(*arguments, command).expect("ok")
    first, second = map(int, seen.read_text().split())
    assert before <= first == second, "the guest ran while the command did"
    harness.verify(world, folder / "vm.img")
    (folder / "vm.img").unlink()
    world.vmsnap(*arguments, "exit 3").expect("pause_command")
    checks.assert_only(folder)
    checks.assert_running(guest)


MISUSE = {
    "nothing": [],
    "no target": ["snapshot", "--output", "{out}"],
    "two targets": ["snapshot", "--qmp", "{qmp}", "--pid", "1", "--output", "{out}"],
    "no output": ["snapshot", "--qmp", "{qmp}"],
    "no range": ["snapshot", "--pid", "{pid}", "--output", "{out}"],
    "range with --qmp": ["snapshot", "--qmp", "{qmp}", "--range", "1000-2000", "--output", "{out}"],
    "range not hex": ["snapshot", "--pid", "{pid}", "--range", "xyz-zzz", "--output", "{out}"],
    "range unaligned": ["snapshot", "--pid", "{pid}", "--range", "1001-2000", "--output", "{out}"],
    "range reversed": ["snapshot", "--pid", "{pid}", "--range", "3000-2000", "--output", "{out}"],
    "range empty": ["snapshot", "--pid", "{pid}", "--range", "3000-3000", "--output", "{out}"],
    "ranges overlap": ["snapshot", "--pid", "{pid}", "--range", "1000-4000", "--range",
                       "3000-5000", "--output", "{out}"],
    "disks": ["snapshot", "--qmp", "{qmp}", "--disks", "maybe", "--output", "{out}"],
    "option": ["snapshot", "--qmp", "{qmp}", "--output", "{out}", "--no-such-option"],
    "command": ["no-such-command"],
    "key of an image file": ["snapshot", "--qmp", "{qmp}", "--output", "{out}", "--key-file", "/etc/hostname"],
    "key of a parked image": ["park", "--qmp", "{qmp}", "--output", "{out}", "--key-file", "/etc/hostname"],
}


@pytest.mark.parametrize("case", list(MISUSE))
def test_misuse(world, guest, case):
    folder = world.directory("out")
    arguments = [word.format(qmp=guest.qmp_socket, pid=guest.pid, out=folder / "x.img")
                 for word in MISUSE[case]]
    result = world.vmsnap(*arguments).expect("usage")
    assert result.err.strip() and not result.out.strip(), f"the reason belongs on stderr: {result}"
    checks.assert_only(folder)
    checks.assert_running(guest)


def test_wrong_targets(world, guest):
    """Things that are not there, or not what they should be."""
    out = world.directory("out")
    snapshot = ["snapshot", "--output", out / "x.img"]
    world.vmsnap(*snapshot, "--qmp", world.path("nothing.sock")).expect("vm", "io", "usage")
    world.vmsnap(*snapshot, "--qmp", guest.serial).expect("vm", "io", "usage")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output",
                 out / "no/such/directory.img").expect("io", "usage")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    world.vmsnap(*snapshot, "--pid", gone.pid, "--range", "1000-2000").expect("vm", "refused")
    # Addresses where the process has nothing, or nothing that could be captured.
    world.vmsnap(*snapshot, "--pid", guest.pid, "--range", "1000-2000").expect("refused", "usage")
    checks.assert_only(out)
    checks.assert_running(guest)


@pytest.mark.parametrize("mode", [0o700, 0o777], ids=["to the monitor", "to the process"])
def test_no_privilege(world, guest, mode):
    """An ordinary user is told what is missing, and nothing happens."""
    guest.qmp_socket.chmod(mode)
    out = world.directory("out")
    out.chmod(0o777)
    done = subprocess.run(["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups",
                           harness.VMSNAP, "snapshot", "--qmp", guest.qmp_socket, "--output",
                           out / "x.img"], capture_output=True, text=True, timeout=harness.LIMIT,
                          check=False, cwd="/")
    if done.returncode in (126, 127):
        harness.need(False, "readable build directory", "nobody cannot run the program there")
    assert done.returncode == harness.EXIT["privilege"], f"{done.returncode}: {done.stderr}"
    assert done.stderr.strip()
    checks.assert_only(out)
    checks.assert_running(guest)
