"""Memory that vanishes after the instant and before it was copied: the snapshot
fails with an exit status of its own and leaves no file. Never a wrong image."""

import os
import select
import signal
import threading

import pytest

import checks
import harness
import qemu
import system
import victims

MADVISE, FALLOCATE = "28", "285"


def in_discard(pid):
    """Whether a thread hangs in madvise or fallocate, for its event to be read."""
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/syscall", encoding="ascii") as file:
                if file.read().split()[0] in (MADVISE, FALLOCATE):
                    return True
        except OSError:
            pass
    return False


def start_stopped(world, victim, folder, point):
    run = world.start_vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(), "--output",
                             folder / "x.img", *harness.PATIENT, env={"VMSNAP_STOP_AT": point})
    run.wait_stopped()
    return run


def discard_some(victim, how, pages=64):
    """Discards from the fixed area; returns when that is done or hangs in the kernel."""
    _, offset, _ = victim.ask("fixed").split()
    victim.send(f"{how} {offset} {pages * 4096}")
    harness.wait_until(lambda: select.select([victim.process.stdout], [], [], 0)[0]
                       or in_discard(victim.pid), "the discard to happen or to wait for us")


KINDS = [("anon", "dontneed"), ("thp", "dontneed"), ("memfd", "remove"), ("memfd", "punch"),
         ("hugetlb", "punch")]


@pytest.mark.parametrize("memory, how", KINDS)
def test_discard_before_the_copy(world, memory, how):
    pages = 64
    if memory == "hugetlb":
        system.add_huge_pages(world, 32)
        pages = 512
    victim = victims.Writers(world, memory=memory, mib=16)
    folder = world.directory("out")
    run = start_stopped(world, victim, folder, "pause.resumed")
    discard_some(victim, how, pages)
    run.signal(signal.SIGCONT)
    result = run.wait()
    assert victim.read_line() == "DISCARDED 0"
    result.expect("discarded")
    checks.assert_only(folder)
    checks.assert_unharmed(victim.pid)
    victim.assert_live()


def test_discard_that_loses_nothing(world):
    """Untouched private pages of a file come back from it: no wrong image either way."""
    victim = victims.Writers(world, memory="memfd-private", mib=16)
    folder = world.directory("out")
    run = start_stopped(world, victim, folder, "pause.resumed")
    discard_some(victim, "dontneed")
    run.signal(signal.SIGCONT)
    result = run.wait().expect("ok", "discarded")
    assert victim.read_line() == "DISCARDED 0"
    if result.code == 0:
        victim.check_image(world, folder / "x.img")
    else:
        checks.assert_only(folder)
    victim.assert_live()


@pytest.mark.parametrize("memory, how", [("anon", "dontneed"), ("memfd", "punch")])
def test_discard_after_the_copy(world, memory, how):
    """By then the image has those pages: it succeeds, and has the old content."""
    victim = victims.Writers(world, memory=memory, mib=16)
    folder = world.directory("out")
    run = start_stopped(world, victim, folder, "copy.done")
    discard_some(victim, how)
    run.signal(signal.SIGCONT)
    result = run.wait()
    assert victim.read_line() == "DISCARDED 0"
    result.expect("ok")
    victim.check_image(world, folder / "x.img")
    victim.assert_live()


@pytest.mark.parametrize("memory, how", [("anon", "dontneed"), ("memfd", "punch")])
def test_discards_at_any_moment(world, memory, how):
    """Either it fails in the one right way, or the image is exact."""
    victim = victims.Writers(world, memory=memory, mib=64)
    _, offset, length = victim.ask("fixed").split()
    outcomes = []
    for attempt in range(8):
        folder = world.directory("out")
        run = world.start_vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(),
                                 "--output", folder / "x.img")
        place = int(offset) + (attempt * 137 + 5) * 4096 % int(length)
        victim.ask(f"{how} {place} 4096")
        result = run.wait().expect("ok", "discarded")
        outcomes.append(result.code)
        if result.code == 0:
            # The oracle knows nothing of the discard: look at that page alone.
            raw = harness.export(world, folder / "x.img")
            good, said = victim.judge(raw)
            assert good or said.endswith("to zeros"), said
        else:
            checks.assert_only(folder)
        victim.assert_live()
    checks.assert_unharmed(victim.pid)
    print("exit statuses:", outcomes)


class Balloon(threading.Thread):
    """Inflates and deflates a guest's balloon for as long as it is told to."""

    def __init__(self, guest):
        super().__init__(daemon=True)
        self._guest = guest
        self._ended = threading.Event()
        self.full, self.small = guest.mib << 20, (guest.mib - 32) << 20

    def run(self):
        while not self._ended.is_set():
            for target in (self.small, self.full):
                self.set_to(target)

    def set_to(self, target):
        with qemu.Qmp(self._guest.second_socket) as monitor:
            monitor.execute("balloon", value=target)
            harness.wait_until(lambda: monitor.execute("query-balloon")["actual"] == target,
                               "the balloon to follow")

    def stop(self):
        self._ended.set()
        self.join(harness.LIMIT)
        assert not self.is_alive(), "the balloon is stuck"


@pytest.mark.parametrize("ram", ["anon", "memfd"])
def test_balloon(world, ram):
    """A real balloon takes pages from a Linux guest and gives them back while it
    is captured. Snapshots fail for it, or are exact: the memory check in the
    restored guest tells."""
    guest = victims.LinuxGuest(world, ram=ram, second_monitor=True,
                               extra=["-device", "virtio-balloon,id=balloon"])
    files = checks.open_files(guest.pid)
    balloon = Balloon(guest)
    balloon.start()
    outcomes = []
    while len(outcomes) < 12 and harness.EXIT["discarded"] not in outcomes:
        folder = world.directory("out")
        image = folder / "vm.img"
        result = world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image,
                              *harness.PATIENT).expect("ok", "discarded")
        outcomes.append(result.code)
        if result.code == 0:
            run_dir = world.path("run")
            world.vmsnap("restore", image, "--run-dir", run_dir).expect("ok")
            copy = qemu.restored(run_dir)
            victims.assert_linux_goes_on(copy)
            system.kill(copy.pid)
        else:
            checks.assert_only(folder)
    balloon.stop()
    assert harness.EXIT["discarded"] in outcomes, f"the balloon was never in the way: {outcomes}"
    victims.assert_linux_goes_on(guest)
    # And with the balloon at rest, inflated, it can be captured and restored.
    balloon.set_to(balloon.small)
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", folder / "vm.img").expect("ok")
    checks.assert_running(guest, files)
    run_dir = world.path("run")
    world.vmsnap("restore", folder / "vm.img", "--run-dir", run_dir).expect("ok")
    victims.assert_linux_goes_on(qemu.restored(run_dir))
    victims.assert_linux_goes_on(guest)
