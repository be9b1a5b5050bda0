"""What the tests change in the machine, and change back: swap, huge pages, KSM."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

import harness

KSM = pathlib.Path("/sys/kernel/mm/ksm")
KSM_SWITCH = KSM / "run"
HUGE_PAGES = pathlib.Path("/proc/sys/vm/nr_hugepages")


def add_swap(world, mib=512):
    """Adds a swap file for the time of the test."""
    path = world.path("swap")
    with open(path, "wb") as file:
        path.chmod(0o600)
        for _ in range(mib):  # swapon refuses holes
            file.write(bytes(1 << 20))
    subprocess.run(["mkswap", "-q", path], check=True)
    done = subprocess.run(["swapon", path], capture_output=True, text=True, check=False)
    harness.need(done.returncode == 0, "swap", done.stderr.strip())
    world.at_end(lambda: subprocess.run(["swapoff", path], check=True))


def add_zram_swap(world, mib=256):
    """Adds compressed memory as swap for the time of the test."""
    control = pathlib.Path("/sys/class/zram-control")
    harness.need(control.exists(), "zram", "the kernel has no zram")
    number = (control / "hot_add").read_text().strip()

    def remove():
        subprocess.run(["swapoff", f"/dev/zram{number}"], check=False, capture_output=True)
        (control / "hot_remove").write_text(number)
    world.at_end(remove)
    pathlib.Path(f"/sys/block/zram{number}/disksize").write_text(f"{mib}M")
    device = f"/dev/zram{number}"
    harness.wait_until(lambda: os.path.exists(device), f"{device} to be there")
    subprocess.run(["mkswap", "-q", device], check=True)
    subprocess.run(["swapon", "-p", "100", device], check=True)


def vmstat(name):
    """A counter of /proc/vmstat."""
    text = pathlib.Path("/proc/vmstat").read_text()
    return int(text.split(f"\n{name} ")[1].split()[0])


def add_huge_pages(world, mib):
    """Has the kernel set aside huge pages for the time of the test."""
    harness.need(HUGE_PAGES.exists(), "hugetlb", "the kernel has no hugetlbfs")
    before = HUGE_PAGES.read_text()
    world.at_end(lambda: HUGE_PAGES.write_text(before))
    wanted = int(before) + mib // 2
    pathlib.Path("/proc/sys/vm/compact_memory").write_text("1")
    HUGE_PAGES.write_text(str(wanted))
    got = int(HUGE_PAGES.read_text())
    harness.need(got >= wanted, "hugetlb", f"{got} huge pages of {wanted} could be had")


def run_ksm(world):
    """Runs ksmd, fast, for the time of the test."""
    harness.need(KSM_SWITCH.exists(), "ksm", "the kernel has no KSM")
    for name, value in (("pages_to_scan", "20000"), ("sleep_millisecs", "10"), ("run", "1")):
        file = KSM / name
        before = file.read_text().strip()
        world.at_end(lambda file=file, before=before: file.write_text(before))
        file.write_text(value)
    def stop():
        wait_for_ksm()  # or the last snapshot, of another test, would start it again
        KSM_SWITCH.write_text("2")  # takes all merged pages apart again
    world.at_end(stop)  # before the old values come back


def wait_for_ksm():
    """Until no snapshot, of this or another test, keeps ksmd paused any more."""
    harness.wait_until(lambda: KSM_SWITCH.read_text() == "1\n", "ksmd to be put back")


def merged_pages():
    return int((KSM / "pages_sharing").read_text())


def anonymous_swap_kib(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmSwap:")[1].split()[0])


def huge_kib(pid):
    """How much of a process is mapped by transparent huge pages."""
    total = 0
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("AnonHugePages:", "ShmemPmdMapped:")):
            total += int(line.split()[1])
    return total


def mount_small_disk(world, kib):
    """A tmpfs that is full after `kib` KiB."""
    folder = world.directory("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "vmsnap-test", folder],
                   check=True)
    world.at_end(lambda: subprocess.run(["umount", "-l", folder], check=True))
    return folder


def mount_xfs(world, mib=512):
    """A file system in which a copy of a file is a reference to its blocks."""
    with open("/proc/filesystems", encoding="ascii") as known:
        harness.need("\txfs\n" in known.read(), "reflink", "the kernel has no XFS")
    disk = world.path("xfs.img")
    disk.touch()
    os.truncate(disk, mib << 20)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", disk], check=True)
    folder = world.directory("xfs")
    mounted = subprocess.run(["mount", "-o", "loop", disk, folder], check=False)
    harness.need(mounted.returncode == 0, "reflink", "XFS cannot be mounted here")
    world.at_end(lambda: subprocess.run(["umount", "-l", folder], check=True))
    return folder


def mount_fuse(world):
    """A folder in a file system that lacks what NFS lacks: O_TMPFILE."""
    harness.need(os.path.exists("/dev/fuse"), "fuse", "there is no /dev/fuse")
    folder = world.directory("fuse")
    mounted = subprocess.run(["bindfs", world.directory("behind"), folder], check=False)
    harness.need(mounted.returncode == 0, "fuse", "it cannot be mounted here")
    world.at_end(lambda: subprocess.run(["umount", "-l", folder], check=True))
    with pytest.raises(OSError):
        os.open(folder, os.O_RDWR | os.O_TMPFILE)
    return folder


def remove_folder(path):
    shutil.rmtree(path, ignore_errors=True)


class Cgroup:
    """One of a controller, of the second or the first version."""

    def __init__(self, world, controller):
        self._controller = controller
        mounts = [line.split() for line in pathlib.Path("/proc/mounts").read_text().splitlines()]
        roots = [(pathlib.Path(mount[1]), mount[2]) for mount in mounts
                 if (mount[2] == "cgroup" and controller in mount[3].split(","))
                 or (mount[2] == "cgroup2" and controller in
                     (pathlib.Path(mount[1]) / "cgroup.subtree_control").read_text())]
        harness.need(roots, "cgroup", f"no cgroup can limit {controller}")
        root, kind = roots[0]
        self._second = kind == "cgroup2"
        self.path = root / world.folder.name
        try:
            self.path.mkdir()
        except OSError as error:
            harness.need(False, "cgroup", str(error))
        world.at_end(self._remove)
        self._before = root / self._ours(kind).lstrip("/")

    def _ours(self, kind):
        for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if (kind == "cgroup2") == (controllers == "") and (
                    kind == "cgroup2" or self._controller in controllers.split(",")):
                return path
        return "/"

    def _remove(self):
        harness.wait_until(lambda: not (self.path / "cgroup.procs").read_text(), "an empty cgroup")
        self.path.rmdir()

    @contextlib.contextmanager
    def entered(self):
        """What is started meanwhile is in it."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (self._before / "cgroup.procs").write_text(str(os.getpid()))


class TaskGroup(Cgroup):
    """In which there are so many processes and threads, and no more."""

    def __init__(self, world):
        super().__init__(world, "pids")

    @contextlib.contextmanager
    def allowing(self, count):
        """What is started meanwhile is in it; `count` is beside those of the test."""
        with self.entered():
            ours = int((self.path / "pids.current").read_text())
            (self.path / "pids.max").write_text(str(ours + count))
            yield
        (self.path / "pids.max").write_text(str(count))


class MemoryGroup(Cgroup):
    """That counts and limits memory."""

    def __init__(self, world):
        super().__init__(world, "memory")

    def limit(self, count):
        name = "memory.max" if self._second else "memory.limit_in_bytes"
        (self.path / name).write_text(str(count))

    def used(self):
        """Bytes that cannot be had back by forgetting files."""
        wanted = {"anon", "shmem"} if self._second else {"total_rss", "total_shmem"}
        words = [line.split() for line in (self.path / "memory.stat").read_text().splitlines()]
        return sum(int(count) for name, count in words if name in wanted)

    def kills(self):
        """How often something in it was killed for want of memory."""
        name = "memory.events" if self._second else "memory.oom_control"
        words = [line.split() for line in (self.path / name).read_text().splitlines()]
        return sum(int(count) for what, count in words if what == "oom_kill")


DEBUGGER = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
SEIZE, CONTINUE = 0x4206, 7
for task in os.listdir(f"/proc/{sys.argv[1]}/task"):
    assert libc.ptrace(SEIZE, int(task), None, None) == 0, ctypes.get_errno()
print("attached", flush=True)
while True:
    pid, status = os.waitpid(-1, 0x40000000)
    if os.WIFSTOPPED(status):
        number = os.WSTOPSIG(status)
        libc.ptrace(CONTINUE, pid, None, 0 if number == signal.SIGTRAP else number)
"""


@contextlib.contextmanager
def debugged(pid):
    """Somebody traces all threads of a process, and lets them run."""
    debugger = subprocess.Popen([sys.executable, "-c", DEBUGGER, str(pid)], text=True,
                                stdout=subprocess.PIPE)
    try:
        assert debugger.stdout.readline() == "attached\n"
        yield
    finally:
        debugger.kill()
        debugger.wait()
        debugger.stdout.close()


def kill(pid):
    """Kills a process of the test's own and waits until it is gone."""
    os.kill(pid, signal.SIGKILL)
    harness.wait_until(lambda: not harness.is_running(pid), f"process {pid} to end")
