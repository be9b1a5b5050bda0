"""A VM with a disk that it writes to: --in-pause copies the disk at the instant of the
memory, and what is restored finds them to be of one instant.

The guest mirrors its disk in memory, and compares the two all the time."""

import os
import re
import subprocess

import pytest

import checks
import harness
import libvirt
import qemu
import system
import victims

DISK_BYTES = 4 << 20


def mirror_checks(machine):
    text = machine.serial_text()
    assert "MIRRORCHECK FAILED" not in text, text[-1000:]
    return len(re.findall(r"^mirrorcheck \d+ ok", text, re.MULTILINE))


def assert_mirror_goes_on(machine, more=3):
    before = mirror_checks(machine)
    harness.wait_until(lambda: mirror_checks(machine) >= before + more,
                       lambda: f"checks of the mirror; the console ends with "
                               f"{machine.serial_text()[-300:]!r}")


def reflink(source, target):
    subprocess.run(["cp", "--reflink=always", source, target], check=True)


def make_disk(folder, kind):
    disk = folder / f"disk.{kind}"
    plain = folder / "plain"
    plain.write_bytes(os.urandom(DISK_BYTES))
    subprocess.run(["qemu-img", "convert", "-q", "-O", kind, plain, disk], check=True)
    plain.unlink()
    return disk


def start(world, folder, disk, kind, by_libvirt):
    """The guest; what vmsnap is to be told of it; the name of its console's log when
    it is restored."""
    if by_libvirt:
        os.chown(folder, qemu.NOBODY, qemu.NOBODY)
        os.chown(disk, qemu.NOBODY, qemu.NOBODY)
        domain = libvirt.LinuxDomain(
            world, libvirt.Daemon(world),
            devices=f"<disk type='file' device='disk'><driver name='qemu' type='{kind}'/>"
                    f"<source file='{disk}'/><target dev='vda' bus='virtio'/></disk>")
        return domain, domain.arguments, "charserial0.log"
    guest = victims.LinuxGuest(world, check_mib=4, extra=[
        "-drive", f"file={disk},if=none,id=d0,format={kind}",
        "-device", "virtio-blk-pci,drive=d0"])
    return guest, ["--qmp", guest.qmp_socket], "serial0.log"


@pytest.mark.parametrize("kind,by_libvirt", [("raw", False), ("qcow2", False), ("qcow2", True)],
                         ids=["raw", "qcow2", "qcow2-libvirt"])
def test_disk_and_memory_are_of_one_instant(world, kind, by_libvirt):
    folder = system.mount_xfs(world)
    disk = make_disk(folder, kind)
    guest, target, console = start(world, folder, disk, kind, by_libvirt)
    assert_mirror_goes_on(guest)
    refused = world.vmsnap("snapshot", *target, "--output", world.path("x.img")).expect("refused")
    assert disk.name in refused.err or "vda" in refused.err or "d0" in refused.err, refused

    copy = folder / "copy"
    image = world.path("x.img")
    world.vmsnap("snapshot", *target, "--output", image, "--disks", "none",
                 "--in-pause", f"cp --reflink=always {disk} {copy}").expect("ok")
    late = folder / "late"
    assert_mirror_goes_on(guest)
    reflink(disk, late)
    checks.assert_unharmed(guest.pid)

    def restored(replacement):
        run_dir = world.path("run")
        world.vmsnap("restore", image, "--run-dir", run_dir, "--replace",
                     f"{disk}={replacement}").expect("ok")
        pid = int((run_dir / "qemu.pid").read_text())
        return qemu.Machine(pid, run_dir / "qmp.sock", run_dir / console)

    # Clones first, for a restored VM changes the copy.
    for clone in ("1", "2"):
        reflink(copy, folder / f"copy-{clone}")
    farm = world.path("farm")
    started = world.vmsnap("restore", image, "--clones", 2, "--run-dir", farm, "--detach", "--json",
                           "--replace", f"{disk}={folder}/copy-{{clone}}").expect("ok").json
    for clone in started["clones"]:
        place = farm / clone["clone"]
        assert_mirror_goes_on(qemu.Machine(clone["pid"], place / "qmp.sock", place / console))
    world.vmsnap("clones", "--run-dir", farm, "--stop").expect("ok")

    machine = restored(copy)
    assert_mirror_goes_on(machine)
    system.kill(machine.pid)
    # And the guest would have noticed: a copy of another moment.
    machine = restored(late)
    harness.wait_until(lambda: "MIRRORCHECK FAILED" in machine.serial_text(),
                       "the guest to find a disk that is too new")
    assert_mirror_goes_on(guest)


def test_overlay_in_the_pause(world):
    """Where files cannot be copied in no time: libvirt goes on with an overlay, and the
    disk below it stays as it was at the instant."""
    folder = world.directory("disks")
    disk = make_disk(folder, "qcow2")
    guest, target, console = start(world, folder, disk, "qcow2", by_libvirt=True)
    assert_mirror_goes_on(guest)
    image = world.path("x.img")
    world.vmsnap("snapshot", *target, "--output", image, "--disks", "none", "--in-pause",
                 f"virsh -c '{guest.daemon.uri}' snapshot-create-as {guest.name} --no-metadata "
                 f"--disk-only --atomic --diskspec vda,file={folder}/overlay.qcow2").expect("ok")
    assert_mirror_goes_on(guest)
    # Below which QEMU is to find the disk, though libvirt's command line says of that
    # that there is nothing below it.
    ours = folder / "ours.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", ours],
                   check=True)
    run_dir = world.path("run")
    world.vmsnap("restore", image, "--run-dir", run_dir, "--replace",
                 f"{disk}={ours}").expect("ok")
    pid = int((run_dir / "qemu.pid").read_text())
    assert_mirror_goes_on(qemu.Machine(pid, run_dir / "qmp.sock", run_dir / console))
    assert_mirror_goes_on(guest)
