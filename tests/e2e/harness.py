"""What every end-to-end test needs: where things are, processes that are
certain to be gone afterwards, and running vmsnap.

The build directory is $VMSNAP_BUILD (set by ctest), else build/.
"""

import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import time

import pytest

SOURCE = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("VMSNAP_BUILD", SOURCE / "build"))
VMSNAP = BUILD / "vmsnap"
LIBVIRT_MONITOR = BUILD.resolve() / "vmsnap-libvirt-monitor"
GUESTS = BUILD / "guests"
CACHE = SOURCE / "tests" / "cache"

# Long enough for a loaded machine: a limit here is for hangs, it asserts no speed.
LIMIT = float(os.environ.get("VMSNAP_TEST_LIMIT", "120"))

# For runs that a test stops on purpose: nobody is to give up on them meanwhile.
PATIENT = ["--stall-limit", "600"]


def until_written(point):
    """Options of a snapshot that is to get to `point`: on a loaded machine, all may
    be copied before the guest has a turn to write."""
    return ["--bandwidth", "8M"] if point.startswith("copy.fault") else []


# Exit statuses by the names that the code gives them.
EXIT = {name: int(number) for name, number in re.findall(
    r"case ErrorCode::(\w+): return (\d+);", (SOURCE / "formats/error.cpp").read_text())}

# What a machine of the continuous integration may lack. Anything else that a
# test needs and does not find there is a failure, not a skip.
MAY_BE_MISSING_IN_CI = {"kvm", "hugetlb", "swap", "ksm", "systemd", "cgroup", "fuse",
                        "reflink"}


def need(condition, name, reason):
    """Skips the test with the reason unless `condition` holds."""
    if condition:
        return
    with open(BUILD / "skipped.txt", "a", encoding="utf-8") as record:
        test = os.environ.get("PYTEST_CURRENT_TEST", "?").split(" ")[0]
        record.write(f"{test}: {name}: {reason}\n")
    if os.environ.get("CI") and name not in MAY_BE_MISSING_IN_CI:
        pytest.fail(f"this machine lacks {name} ({reason}), and CI must not skip for that")
    pytest.skip(f"{name}: {reason}")


def wait_until(condition, what, limit=LIMIT, step=0.02):
    """Polls until condition() is true and returns its value. `what` is a text, or a
    function that gives it, for what is known only at the end."""
    end = time.monotonic() + limit
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {limit:.0f} s in vain: {what() if callable(what) else what}")
        time.sleep(step)


def process_state(pid):
    """R, S, T, Z ... of a process; None when there is none."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()[0]


def is_running(pid):
    return process_state(pid) not in (None, "Z", "X")


class Finished:
    """How a vmsnap run ended."""

    def __init__(self, arguments, code, out, err):
        self.arguments, self.code, self.out, self.err = arguments, code, out, err

    @property
    def json(self):
        try:
            return json.loads(self.out)
        except ValueError:
            raise AssertionError(f"no JSON on stdout of {self}") from None

    def __str__(self):
        command = " ".join(map(str, self.arguments))
        return (f"`vmsnap {command}`: exit status {self.code}\n"
                f"--- stdout\n{self.out[-4000:]}\n--- stderr\n{self.err[-4000:]}\n---")

    def expect(self, *names):
        """Asserts the exit status: "ok" or names of formats/error.h."""
        wanted = [0 if name == "ok" else EXIT[name] for name in names]
        assert self.code in wanted, f"expected {' or '.join(names)} {wanted}: {self}"
        return self


class Running:
    """A vmsnap that runs. Output goes to files: a page server that lives on in
    the background would keep a pipe open for ever."""

    def __init__(self, world, arguments, env=None, **popen):
        self.arguments = [str(argument) for argument in arguments]
        self._out = tempfile.TemporaryFile("w+", dir=world.folder)
        self._err = tempfile.TemporaryFile("w+", dir=world.folder)
        self.process = world.start([VMSNAP, *self.arguments], env=env, stdin=subprocess.DEVNULL,
                                   stdout=self._out, stderr=self._err, **popen)
        self.pid = self.process.pid

    def wait(self, limit=LIMIT):
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            state = process_state(self.pid)
            stack = "\n".join(self._stacks())
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"still running (state {state}) after {limit:.0f} s: "
                                 f"{self._finished(None)}\n{stack}") from None
        return self._finished(code)

    def wait_stopped(self):
        """Until VMSNAP_STOP_AT took effect. Fails if the process ended instead."""
        def stopped():
            if self.process.poll() is not None:
                raise AssertionError(f"never got to its stop: {self.wait()}")
            return process_state(self.pid) == "T"
        wait_until(stopped, f"vmsnap {' '.join(self.arguments)} to stop at its test point")

    def signal(self, number):
        self.process.send_signal(number)

    def warned_of(self, text):
        """Whether it has written that already."""
        return text.encode() in os.pread(self._err.fileno(), 1 << 20, 0)

    def _finished(self, code):
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read())
        return Finished(self.arguments, code, *texts)

    def _stacks(self):
        for task in pathlib.Path(f"/proc/{self.pid}/task").glob("*"):
            try:
                yield f"{task.name} {(task / 'comm').read_text().strip()} " \
                      f"{(task / 'wchan').read_text()}"
            except OSError:
                pass


class World:
    """One test's processes and files. All are gone when it ends.

    Every process started here carries a mark in its environment, which its
    children inherit, so that a restored QEMU or a page server that went into
    the background is found as well.
    """

    _count = 0

    def __init__(self):
        World._count += 1
        self.mark = f"{os.getpid()}-{World._count}"
        # Below /tmp and short: a socket's path has at most 107 characters.
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="vmsnap-test-", dir="/tmp"))
        self.folder.chmod(0o755)
        self._at_end = []
        self._names = itertools.count(1)

    def path(self, name):
        """A new path for a file, socket or directory; not created."""
        number = next(self._names)
        stem, dot, suffix = name.partition(".")
        return self.folder / f"{stem}{number}{dot}{suffix}"

    def directory(self, name):
        path = self.path(name)
        path.mkdir()
        return path

    def start(self, command, env=None, **popen):
        environment = {**os.environ, **(env or {}), "VMSNAP_TEST_WORLD": self.mark}
        return subprocess.Popen([str(word) for word in command], env=environment,
                                start_new_session=True, **popen)

    def vmsnap(self, *arguments, env=None, limit=LIMIT, **popen):
        """Runs vmsnap to its end."""
        return Running(self, arguments, env, **popen).wait(limit)

    def start_vmsnap(self, *arguments, env=None, **popen):
        return Running(self, arguments, env, **popen)

    def at_end(self, action):
        self._at_end.append(action)

    def processes(self):
        """The living processes of this world, {pid: command line}."""
        wanted = f"VMSNAP_TEST_WORLD={self.mark}".encode()
        found = {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                if wanted not in pathlib.Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    continue
                command = pathlib.Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if command and is_running(entry):
                found[int(entry)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
        return found

    def vmsnap_processes(self):
        """Pids of vmsnap in any role: a guard, a page server, libvirt's client."""
        found = []
        for pid in self.processes():
            try:
                executable = os.readlink(f"/proc/{pid}/exe")
            except OSError:
                continue
            if executable.split(" (deleted)")[0] in (str(VMSNAP.resolve()), str(LIBVIRT_MONITOR)):
                found.append(pid)
        return found

    def end(self):
        deadline = time.monotonic() + 20
        while True:
            left = self.processes()
            if not left:
                break
            assert time.monotonic() < deadline, f"cannot be killed: {left}"
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.02)
            self._reap()
        errors = []
        for action in reversed(self._at_end):
            try:
                action()
            except Exception as error:  # the others must still be undone
                errors.append(error)
        shutil.rmtree(self.folder, ignore_errors=True)
        assert not errors, f"not cleaned up: {errors}"

    @staticmethod
    def _reap():
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


def regions(world, image):
    """The regions of an image, in the order of its raw export."""
    return world.vmsnap("show", image, "--json").expect("ok").json["regions"]


def export(world, image):
    """The raw export of an image."""
    raw = world.path("export.raw")
    world.vmsnap("export", image, "--raw", raw).expect("ok")
    length = sum(int(region["length"]) for region in regions(world, image))
    assert raw.stat().st_size == length, f"{raw.stat().st_size} bytes, the regions have {length}"
    return raw


def verify(world, image):
    world.vmsnap("verify", image).expect("ok")


def run_checker(name, *arguments):
    """check_ordered or check_writers; returns (is good, what it said)."""
    done = subprocess.run([GUESTS / name, *map(str, arguments)], capture_output=True, text=True,
                          timeout=LIMIT, check=False)
    assert done.returncode in (0, 1), f"{name}: {done.stdout}{done.stderr}"
    return done.returncode == 0, done.stdout.strip()
