"""A man in the middle of QEMU's monitor, for tests of a QMP that misbehaves.

vmsnap finds the VM by the credentials of whoever listens at the socket, so a
socket of our own would not do. This one connects as QEMU's only client, takes
over QEMU's own listening socket (pidfd_getfd), and accepts vmsnap there: the
peer is QEMU's process as far as the kernel says, and we have the line.
"""

import ctypes
import json
import os
import select
import socket
import threading

import harness

PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


def listening_socket(pid, path):
    """A copy of the file descriptor with which process `pid` listens at `path`."""
    inodes = set()
    with open("/proc/net/unix", encoding="ascii") as table:
        for line in table:
            words = line.split()
            if words[-1] == str(path) and words[3] == "00010000":
                inodes.add(words[6])
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            name = os.readlink(f"/proc/{pid}/fd/{entry}")
        except FileNotFoundError:
            continue
        if name.startswith("socket:[") and name[8:-1] in inodes:
            pidfd = os.pidfd_open(pid)
            copy = _libc.syscall(PIDFD_GETFD, pidfd, int(entry), 0)
            os.close(pidfd)
            assert copy >= 0, os.strerror(ctypes.get_errno())
            return socket.socket(fileno=copy)
    raise AssertionError(f"process {pid} does not listen at {path}")


class Proxy:
    """Passes everything on, in both directions, file descriptors included, until
    the command `at` comes along. That is passed on as well, but what QEMU says
    from then on is treated according to `how`:

    stall    nothing is passed on any more
    garbage  the answer is replaced by bytes that are no JSON, the rest passed on
    error    the answer is replaced by a QMP error
    types    the answer is replaced by one whose values are of other types
    odd      the answer is replaced by an error whose description is no text
    deep     the answer is replaced by half a million arrays within each other
    close    both connections are closed

    Anything but a word is what QEMU answers instead.
    """

    def __init__(self, machine, at=None, how=None):
        self.at, self.how = at, how
        self.commands = []  # what vmsnap sent, in order
        self.took_effect = False
        self._id = None  # of the command `at`
        self._upstream = socket.socket(socket.AF_UNIX)
        self._upstream.connect(str(machine.qmp_socket))
        # QEMU has a client now, and does not accept any more until that one goes.
        assert select.select([self._upstream], [], [], 30)[0], "no greeting"
        self._listener = listening_socket(machine.pid, machine.qmp_socket)
        self._listener.settimeout(harness.LIMIT)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self):
        """Lets go of QEMU, which then serves its next client."""
        self._ended.set()
        self._thread.join(harness.LIMIT)
        assert not self._thread.is_alive()

    def _run(self):
        try:
            # The accepted socket may wait for a client that never comes.
            while not self._ended.is_set():
                if select.select([self._listener], [], [], 0.1)[0]:
                    try:
                        downstream, _ = self._listener.accept()
                    except BlockingIOError:  # non-blocking, as QEMU has it
                        continue
                    self._listener.close()
                    with downstream:
                        downstream.setblocking(True)
                        self._relay(downstream)
                    break
        finally:
            self._listener.close()
            self._upstream.close()

    def _relay(self, downstream):
        pending = b""
        while not self._ended.is_set():
            ready, _, _ = select.select([downstream, self._upstream], [], [], 0.1)
            if downstream in ready:
                data, files, _, _ = socket.recv_fds(downstream, 65536, 8)
                if not data:
                    return
                pending += data
                while b"\n" in pending or self._whole(pending):
                    line, _, pending = pending.partition(b"\n")
                    self._note(line)
                socket.send_fds(self._upstream, [data], files)
                for file in files:
                    os.close(file)
            if self._upstream in ready:
                data = self._upstream.recv(65536)
                if not data:
                    return
                data = self._answer(data)
                if data is None:
                    return
                if data:
                    downstream.sendall(data)

    @staticmethod
    def _whole(text):
        try:
            json.loads(text)
            return True
        except ValueError:
            return False

    def _note(self, line):
        try:
            command = json.loads(line)
        except ValueError:
            return
        self.commands.append(command.get("execute"))
        if command.get("execute") == self.at:
            self._id = command.get("id")

    def _answer(self, data):
        """What becomes of data from QEMU: bytes to pass on, or None to close."""
        if self.at is None or self.at not in self.commands:
            return data
        if self.how == "stall":
            self.took_effect = True
            return b""
        if self.how == "close":
            self.took_effect = True
            return None
        if self.took_effect or (b'"return"' not in data and b'"error"' not in data):
            return data
        self.took_effect = True
        if not isinstance(self.how, str):
            return json.dumps({"return": self.how, "id": self._id}).encode() + b"\n"
        if self.how == "garbage":
            return b"\x00\xff{{{ this is not JSON ]]]\n"
        if self.how == "types":
            odd = {"name": 5, "status": ["running"], "qemu": {"major": "x"}, "fdset-id": "y"}
            return json.dumps({"return": odd, "id": self._id}).encode() + b"\n"
        if self.how == "odd":
            return json.dumps({"error": {"class": 1, "desc": ["no"]}, "id": self._id}).encode() + b"\n"
        if self.how == "deep":
            return b'{"return": ' + b"[" * 500000 + b"]" * 500000 + b"}\n"
        return b'{"error": {"class": "GenericError", "desc": "the test says no"}}\n'
