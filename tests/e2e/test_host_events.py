"""What happens to guest memory on a live host while it is captured: each row of
the table in vmsnap(1), HOST EVENTS, names a test; those that are not elsewhere
are here. Each works, and the oracle says so, or fails as the table says."""

import json
import os
import pathlib
import re
import signal
import threading

import pytest

import checks
import harness
import qemu
import system
import victims

MIB = 32


def snapshot_exactly(world, victim, times=3):
    for _ in range(times):
        image = world.path("process.img")
        world.vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(), "--output", image,
                     "--force").expect("ok")
        victim.check_image(world, image)
        victim.assert_live()
    checks.assert_unharmed(victim.pid)


def test_every_row_has_its_test():
    """The manual's table and the tests do not drift apart."""
    manual = (harness.SOURCE / "man/vmsnap.1").read_text()
    table = manual.split(".Sh HOST EVENTS")[1].split(".Sh ")[0]
    rows = re.findall(r'^\.\\" tested by (\S+)$', table, re.MULTILINE)
    items = re.findall(r"^\.It ", table, re.MULTILINE)
    assert len(rows) == len(items) > 12, "a row of HOST EVENTS names no test, or several"
    for row in rows:
        file, test = row.split("::")
        source = (harness.SOURCE / "tests" / file).read_text()
        assert re.search(rf"def {test}\b|TEST(_[PF])?\(\w+, {test}\)", source), f"there is no {row}"


class Compaction(threading.Thread):
    """Moves pages about, on the whole host, for as long as it is told to."""

    def __init__(self):
        super().__init__(daemon=True)
        self._ended = threading.Event()

    def run(self):
        while not self._ended.wait(0.02):
            pathlib.Path("/proc/sys/vm/compact_memory").write_text("1")

    def stop(self):
        self._ended.set()
        self.join()


@pytest.mark.parametrize("memory", ["anon", "memfd"])
def test_compacted(world, memory):
    victim = victims.Writers(world, memory=memory, mib=MIB)
    compaction = Compaction()
    before = system.vmstat("pgmigrate_success")
    compaction.start()
    try:
        snapshot_exactly(world, victim)
    finally:
        compaction.stop()
    print("pages migrated on the host meanwhile:", system.vmstat("pgmigrate_success") - before)


def test_swapped_to_zram(world):
    system.add_zram_swap(world)
    victim = victims.Writers(world, mib=MIB, disturb="pageout")
    harness.wait_until(lambda: system.anonymous_swap_kib(victim.pid) > 0, "pages in swap")
    snapshot_exactly(world, victim)


@pytest.mark.parametrize("memory", ["anon", "thp", "memfd", "memfd-private"])
@pytest.mark.parametrize("how", ["copied", "direct"])
def test_written_by_the_kernel(world, memory, how):
    """read(2) into it, by copying and by O_DIRECT: the device writes the page."""
    victim = victims.Writers(world, memory=memory, mib=MIB, sweep_by=how, file=world.path("pages"))
    snapshot_exactly(world, victim, times=2)


@pytest.mark.parametrize("how, outcomes", [
    ("unmap", ["discarded"]), ("move", ["discarded"]), ("none", ["discarded"]),
    ("readonly", ["ok"])])
def test_mapping_changed(world, how, outcomes):
    """Parts of the memory that go, or may not be read, before they are copied."""
    victim = victims.Writers(world, mib=16)
    folder = world.directory("out")
    run = world.start_vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(), "--output",
                             folder / "x.img", *harness.PATIENT,
                             env={"VMSNAP_STOP_AT": "pause.resumed"})
    run.wait_stopped()
    _, offset, _ = victim.ask("fixed").split()
    assert victim.ask(f"{how} {offset} {64 * 4096}") == "DISCARDED 0"
    run.signal(signal.SIGCONT)
    result = run.wait().expect(*outcomes)
    if result.code == 0:
        victim.check_image(world, folder / "x.img")
    else:
        checks.assert_only(folder)
    before = victim.progress()
    harness.wait_until(lambda: victim.progress() > before, "the process to get on")
    checks.assert_not_traced(victim.pid)
    checks.assert_no_userfault(victim.pid)


@pytest.mark.parametrize("ram", ["anon", "memfd"])
def test_free_page_reporting(world, ram):
    """The guest tells what it does not use, and the host takes it back."""
    guest = victims.LinuxGuest(world, ram=ram, check_mib=4,
                               extra=["-device", "virtio-balloon,free-page-reporting=on"])
    outcomes = []
    for _ in range(4):
        folder = world.directory("out")
        image = folder / "vm.img"
        result = world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image,
                              *harness.PATIENT).expect("ok", "discarded")
        outcomes.append(result.code)
        if result.code:
            checks.assert_only(folder)
            continue
        run_dir = world.path("run")
        world.vmsnap("restore", image, "--run-dir", run_dir).expect("ok")
        copy = qemu.restored(run_dir)
        victims.assert_linux_goes_on(copy, more_ticks=2, more_checks=1)
        system.kill(copy.pid)
    victims.assert_linux_goes_on(guest)
    print("exit statuses:", outcomes)


def plug(monitor, number, mib=64):
    monitor.execute("object-add", **{"qom-type": "memory-backend-ram", "id": f"plugged{number}",
                                     "size": mib << 20})
    monitor.execute("device_add", driver="pc-dimm", id=f"dimm{number}", memdev=f"plugged{number}")


def test_memory_plugged_in(world):
    """What was plugged in before the snapshot is in it; what comes while it is
    copied is not, and does no harm. (In between: test_operator.py.)"""
    guest = victims.OrderedGuest(world, second_monitor=True,
                                 extra=["-m", "128M,slots=4,maxmem=1G"])
    with qemu.Qmp(guest.second_socket) as monitor:
        plug(monitor, 1)
        image = world.path("vm.img")
        run = world.start_vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image,
                                 *harness.PATIENT, env={"VMSNAP_STOP_AT": "copy.half"})
        run.wait_stopped()
        plug(monitor, 2)
        run.signal(signal.SIGCONT)
        run.wait().expect("ok")
    names = [region["name"] for region in harness.regions(world, image)]
    assert any("plugged1" in name for name in names) and not any("plugged2" in name for name in names)
    victims.check_ordered_image(world, image)
    checks.assert_running(guest)


@pytest.mark.parametrize("aio", ["threads", "native"])
def test_disk_read_past_the_page_cache(world, aio):
    """The host reads a disk straight into guest memory all the time; the guest,
    and what is restored of it, finds what it should."""
    disk = world.path("disk.raw")
    disk.write_bytes(os.urandom(4 << 20))
    guest = victims.LinuxGuest(world, check_mib=4, extra=[
        "-drive", f"file={disk},if=none,id=d0,format=raw,readonly=on,cache=none,aio={aio}",
        "-device", "virtio-blk-pci,drive=d0"])

    def disk_checks(machine):
        text = machine.serial_text()
        assert "DISKCHECK FAILED" not in text, text[-1000:]
        return len(re.findall(r"^diskcheck \d+ ok", text, re.MULTILINE))
    harness.wait_until(lambda: disk_checks(guest) > 0, "the first check of the disk")
    for _ in range(3):
        image = world.path("vm.img")
        world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
        run_dir = world.path("run")
        world.vmsnap("restore", image, "--run-dir", run_dir).expect("ok")
        copy = qemu.restored(run_dir)
        harness.wait_until(lambda: disk_checks(copy) > 1, "checks of the disk in the restored VM")
        victims.assert_linux_goes_on(copy, more_ticks=1, more_checks=1)
        system.kill(copy.pid)
        before = disk_checks(guest)
        harness.wait_until(lambda: disk_checks(guest) > before, "checks of the disk")


def test_within_its_bounds(world):
    """--bandwidth and --memory hold, and the image is exact all the same."""
    victim = victims.Writers(world, mib=64)
    image = world.path("process.img")
    figures = world.vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(), "--output",
                           image, "--memory", "64M", "--cpus", "1", "--bandwidth", "4M",
                           "--json").expect("ok").json
    victim.check_image(world, image)
    # Incompressible in large part; a second's worth is free. Slower is right, always.
    least = (figures["bytes"]["image"] - (6 << 20)) / (4 << 20)
    assert least > 0.5 and figures["total_ms"] / 1000 >= least, json.dumps(figures)
    victim.assert_live()
