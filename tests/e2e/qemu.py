"""QEMU guests and their monitor."""

import json
import os
import pathlib
import re
import socket
import subprocess

import harness

NOBODY = 65534

# The kinds of guest RAM: name -> (QEMU arguments, MiB). {shm} is a file.
RAM_KINDS = {
    "anon": ([], 128),
    "memfd": (["-object", "memory-backend-memfd,id=ram0,size=128M,share=on",
               "-machine", "memory-backend=ram0"], 128),
    "file": (["-object", "memory-backend-file,id=ram0,size=128M,share=on,mem-path={shm}",
              "-machine", "memory-backend=ram0"], 128),
    "file-private": (["-object", "memory-backend-file,id=ram0,size=128M,share=off,mem-path={shm}",
                      "-machine", "memory-backend=ram0"], 128),
    "two-backends": (["-object", "memory-backend-ram,id=ram0,size=64M",
                      "-object", "memory-backend-memfd,id=ram1,size=64M,share=on",
                      "-numa", "node,memdev=ram0", "-numa", "node,memdev=ram1"], 128),
    "above-4g": ([], 5120),
    "vga": (["-device", "VGA"], 128),
}


class QmpError(Exception):
    pass


class Qmp:
    """A client of QEMU's monitor protocol. The monitor serves one at a time, so
    connections here are short; while vmsnap has it, we wait."""

    def __init__(self, path, limit=harness.LIMIT):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(limit)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rw", encoding="utf-8")
        self._number = 0
        self.events = []  # the names of those that came so far
        self._read()  # the greeting
        self.execute("qmp_capabilities")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()
        self._socket.close()

    def _read(self):
        line = self._file.readline()
        if not line:
            raise QmpError("QEMU closed its monitor")
        return json.loads(line)

    def execute(self, command, **arguments):
        # QEMU may send us the answer to a command of the client before us, which
        # did not wait for it: by the id we know our own.
        self._number += 1
        question = {"execute": command, "arguments": arguments, "id": self._number}
        self._file.write(json.dumps(question) + "\n")
        self._file.flush()
        while True:
            answer = self._read()
            if "event" in answer:
                self.events.append(answer["event"])
            if answer.get("id") != self._number:
                continue
            if "error" in answer:
                raise QmpError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]


class Machine:
    """A running QEMU that we know by its monitor: one of ours or a restored one."""

    def __init__(self, pid, qmp_socket, serial):
        self.pid, self.qmp_socket, self.serial = pid, qmp_socket, serial

    def qmp(self, command, **arguments):
        with Qmp(self.qmp_socket) as monitor:
            return monitor.execute(command, **arguments)

    def hmp(self, line):
        return self.qmp("human-monitor-command", **{"command-line": line})

    def status(self):
        return self.qmp("query-status")["status"]

    def serial_text(self):
        try:
            return pathlib.Path(self.serial).read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def host_address(self, physical):
        answer = self.hmp(f"gpa2hva 0x{physical:x}")
        found = re.search(r"is (0x[0-9a-f]+)", answer)
        assert found, f"gpa2hva: {answer!r}"
        return int(found.group(1), 16)

    def read_physical(self, physical, length):
        """Guest memory, through our own door: /proc/PID/mem. May be torn
        unless the guest is stopped."""
        return read_memory(self.pid, self.host_address(physical), length)

    def wait_for_text(self, text):
        def there():
            if not harness.is_running(self.pid):
                raise AssertionError(f"QEMU ended; its console:\n{self.serial_text()[-2000:]}")
            return text in self.serial_text()
        harness.wait_until(there, f"{text!r} on the console")

    def wait_for_progress(self, more=1):
        """Until the guest has written `more` bytes to its console from now on."""
        before = len(self.serial_text())

        def there():
            if not harness.is_running(self.pid):
                raise AssertionError(f"QEMU ended; its console:\n{self.serial_text()[-2000:]}")
            return len(self.serial_text()) >= before + more
        harness.wait_until(there, f"progress of the guest beyond {before} bytes of console")


def read_memory(pid, address, length):
    """Bytes of another process; what was never touched reads as zeros."""
    parts = []
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        while length:
            part = os.pread(fd, min(length, 1 << 24), address)
            assert part, f"nothing at {address:x} of process {pid}"
            parts.append(part)
            address += len(part)
            length -= len(part)
    finally:
        os.close(fd)
    return b"".join(parts)


class Qemu(Machine):
    """A guest, under TCG if nothing else is said, started here. `boot` is a list
    of QEMU arguments that gives it something to run; `before` are words before QEMU's
    name, of a command that becomes QEMU."""

    def __init__(self, world, boot, ram="anon", mib=None, extra=(), unprivileged=False,
                 second_monitor=False, accel="tcg", before=()):
        self.folder = world.directory("qemu")
        arguments, default_mib = RAM_KINDS[ram]
        shm = pathlib.Path(f"/dev/shm/{world.folder.name}-{self.folder.name}")
        self.mib = mib or default_mib
        self.log = self.folder / "qemu.log"
        command = [*before, "qemu-system-x86_64", "-accel", accel, "-m", str(self.mib), "-nodefaults",
                   "-display", "none", "-qmp", f"unix:{self.folder}/qmp.sock,server=on,wait=off",
                   "-serial", f"file:{self.folder}/serial.log",
                   *[word.format(shm=shm) for word in arguments], *boot, *extra]
        # For a test that must talk to QEMU while vmsnap has the first one.
        self.second_socket = self.folder / "second.sock"
        if second_monitor:
            command += ["-qmp", f"unix:{self.second_socket},server=on,wait=off"]
        if "{shm}" in " ".join(arguments):
            world.at_end(lambda: shm.unlink(missing_ok=True))
        if unprivileged:
            os.chown(self.folder, NOBODY, NOBODY)
            command = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups",
                       "--inh-caps=-all", "--bounding-set=-all", *command,
                       "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,"
                       "resourcecontrol=deny"]
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = world.start(command, stdin=subprocess.DEVNULL, stdout=log,
                                       stderr=log, cwd=self.folder)
        super().__init__(self.process.pid, self.folder / "qmp.sock", self.folder / "serial.log")

        def listening():
            if self.process.poll() is not None:
                raise AssertionError(f"QEMU did not start: {self.log.read_text()}")
            return self.qmp_socket.exists()
        harness.wait_until(listening, "QEMU's monitor")

    def is_well(self):
        """Whether it runs, and answers at its monitor in reasonable time."""
        if self.process.poll() is not None:
            return False
        try:
            with Qmp(self.qmp_socket, limit=10) as monitor:
                return monitor.execute("query-status")["status"] == "running"
        except (OSError, QmpError):
            return False

    def kill(self):
        self.process.kill()
        # Not wait(): one who traces it, even stopped, delays its reaping.
        harness.wait_until(lambda: not harness.is_running(self.pid), "QEMU to die")


def restored(run_dir):
    """The machine that `vmsnap restore --run-dir` made."""
    run_dir = pathlib.Path(run_dir)
    pid = int((run_dir / "qemu.pid").read_text())
    return Machine(pid, run_dir / "qmp.sock", run_dir / "serial0.log")
