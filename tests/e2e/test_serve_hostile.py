"""Ten thousand handshakes that no good VMM sends, to a `vmsnap serve` that serves a
good one meanwhile."""

import array
import ctypes
import json
import mmap
import os
import random
import resource
import signal
import socket
import struct
import time

import pytest

import checks
import harness
import test_serve
import victims

MIB = 1 << 20
HANDSHAKES = 10000
SYS_userfaultfd = 323
PR_SET_PDEATHSIG = 1
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00

libc = ctypes.CDLL(None, use_errno=True)


def region(base, size, offset, page=4096):
    return {"base_host_virt_addr": base, "size": size, "offset": offset, "page_size": page}


def odd_number(rng):
    return rng.choice([0, 1, 4095, 4096, 8192, 1 << 21, 16 * MIB, (1 << 47) - 4096, 1 << 47,
                       (1 << 63) - 4096, (1 << 64) - 4096, (1 << 64) - 1, 1 << 64, -4096, 0.5,
                       "4096", None, [], {}, rng.getrandbits(64), rng.getrandbits(30) << 12])


def valid_text(rng):
    count = rng.randint(1, 4)
    return json.dumps([region((1 + i) << 32, rng.randint(1, 256) * 4096, i * 2 * MIB)
                       for i in range(count)]).encode()


def random_text(rng):
    """A message: valid, with odd numbers, with changed bytes, or nothing of the kind."""
    kind = rng.randrange(6)
    if kind == 0:
        return valid_text(rng)
    if kind == 1:
        regions = [{key: odd_number(rng) if rng.random() < 0.3 else value
                    for key, value in region(rng.randint(1, 100) << 20, 4096, 0).items()}
                   for _ in range(rng.randint(0, 20))]
        return json.dumps(regions).encode()
    if kind == 2:
        text = bytearray(valid_text(rng))
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(text))
            choice = rng.randrange(3)
            if choice == 0:
                text[at] = rng.randrange(256)
            elif choice == 1:
                del text[at:at + rng.randint(1, 9)]
            else:
                text[at:at] = rng.randbytes(rng.randint(1, 9))
            text = text or bytearray(b"[")
        return bytes(text)
    if kind == 3:
        return b"[" + rng.randbytes(rng.randint(0, 200))
    if kind == 4:
        return b"[" * rng.randint(1, 3000)
    if rng.random() < 0.1:
        return b"[" + b" " * rng.randint(200 << 10, 600 << 10)
    return rng.randbytes(rng.randint(0, 64))


def send(path, rng, text, descriptors):
    """Sends in a few pieces, and goes away with or without waiting for the end."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))  # waits while the backlog is full
        connection.settimeout(harness.LIMIT)
        try:
            pieces = rng.choice([1, 1, 1, 2, 5])
            length = max(1, (len(text) + pieces - 1) // pieces)
            for at in range(0, max(1, len(text)), length):
                piece = text[at:at + length] or b" "
                if descriptors and at == 0:
                    rights = array.array("i", descriptors)
                    connection.sendmsg([piece], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                else:
                    connection.sendall(piece)
            if rng.random() < 0.3:
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)
        except (BrokenPipeError, ConnectionResetError):
            pass


def hostile_child(path, rng):
    """A process with a real userfaultfd: registered or not, spoken to or not, and
    a handshake that fits it or does not. It touches memory, gives some back, and
    is killed at any moment."""
    pid = os.fork()
    if pid:
        return pid
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(os.open("/dev/null", os.O_RDWR), 1)
    try:
        uffd = libc.syscall(SYS_userfaultfd, os.O_CLOEXEC | rng.choice([0, os.O_NONBLOCK]))
        memory = mmap.mmap(-1, MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        features = rng.choice([0, 1 << 3, 1 << 3 | 1 << 6, 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6])
        if rng.random() < 0.9:
            libc.ioctl(uffd, UFFDIO_API, struct.pack("<QQQ", 0xAA, features, 0))
        if rng.random() < 0.9:
            libc.ioctl(uffd, UFFDIO_REGISTER, struct.pack("<QQQQ", address, MIB, 1, 0))
        start = address + rng.choice([0, 0, 4096, -MIB, MIB])
        text = json.dumps([region(start, MIB, rng.choice([0, 15 * MIB]))]).encode()
        send(path, rng, text, [uffd])
        for _ in range(rng.randrange(8)):
            at = rng.randrange(256) * 4096
            if rng.random() < 0.3:
                memory.madvise(mmap.MADV_DONTNEED, at, 4096)
            else:
                memory[at] = memory[at] ^ 1
    finally:
        os._exit(0)


THREADS_OF_ONE_SESSION = 6  # with main's


def descriptors_of(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads_of(pid):
    return len(os.listdir(f"/proc/{pid}/task"))


def image_of_writers(world, shared_world):
    """An image of 16 MiB, and what is in it."""
    victim = victims.Writers(shared_world, mib=16)
    image = world.path("x.img")
    world.vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(),
                 "--output", image).expect("ok")
    return image, harness.export(world, image).read_bytes()


def test_ten_thousand_handshakes(world, shared_world):
    seed = int(os.environ.get("VMSNAP_TEST_SEED", random.randrange(1 << 32)))
    print(f"seed {seed}")
    rng = random.Random(seed)
    image, raw = image_of_writers(world, shared_world)
    path = world.path("uffd.sock")
    run = world.start_vmsnap("serve", image, "--socket", path, "--prefetch", "none")
    harness.wait_until(path.exists, "the socket")
    good = test_serve.connect(world, path, [(0, 16 * MIB)])
    assert test_serve.read_back(world, good, 0, 4096) == raw[:4096]
    # Its answerers begin one after the other, and the first may have answered.
    harness.wait_until(lambda: threads_of(run.pid) >= THREADS_OF_ONE_SESSION, "its threads")
    before = descriptors_of(run.pid), threads_of(run.pid)

    started = time.monotonic()
    others = [os.open("/dev/null", os.O_RDWR), *os.pipe(), os.memfd_create("x")]
    children, silent = [], []
    chunk = len(raw) // 100
    for number in range(HANDSHAKES):
        if number % 100 == 0:  # the good one goes on meanwhile
            at = number // 100 * chunk // 4096 * 4096
            assert test_serve.read_back(world, good, at, 4096) == raw[at:at + 4096], f"seed {seed}"
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            children = []
        if number % 40 == 0:
            children.append(hostile_child(path, rng))
            continue
        if number % 500 == 1:  # connects and says nothing
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(path))
            silent.append(connection)
            continue
        descriptors = rng.choices(others, k=rng.choice([0, 0, 1, 1, 1, 2, 16, 17, 100]))
        send(path, rng, random_text(rng), descriptors)
    print(f"{HANDSHAKES} handshakes in {time.monotonic() - started:.1f} s")
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for connection in silent:
        connection.close()

    assert run.process.poll() is None, f"seed {seed}: {run.wait()}"
    assert test_serve.read_back(world, good, 0, len(raw)) == raw, f"seed {seed}"
    harness.wait_until(lambda: descriptors_of(run.pid) <= before[0] and
                       threads_of(run.pid) <= before[1],
                       f"what the others left to go, seed {seed}")
    run.signal(signal.SIGTERM)
    run.wait().expect("interrupted")


def connect_silently(path):
    connection = socket.socket(socket.AF_UNIX)

    def connected():  # the socket is there a moment before it is listened on
        return connection.connect_ex(str(path)) == 0
    harness.wait_until(connected, "a connection")
    return connection


HAVE_TO_WAIT = "VMMs that connect have to wait"


@pytest.mark.parametrize("files, connections", [(40, 40), (4096, 264)],
                         ids=["no-descriptor", "no-room"])
def test_more_connections_than_it_can_take(world, shared_world, files, connections):
    """Those that come too late wait; it uses no processor meanwhile, and says so once.

    As many connect as there are descriptors: a session's second one is opened later,
    by its own thread.
    """
    image, raw = image_of_writers(world, shared_world)
    path = world.path("uffd.sock")
    run = world.start_vmsnap(
        "serve", image, "--socket", path, "--prefetch", "none",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)))
    harness.wait_until(path.exists, "the socket")
    assert run.process.poll() is None, f"did not start: {run.wait()}"
    silent = [connect_silently(path) for _ in range(connections)]
    harness.wait_until(lambda: run.warned_of(HAVE_TO_WAIT), "it to be full")
    harness.wait_until(lambda: checks.uses_no_processor(run.pid), "it to wait")
    for connection in silent:
        connection.close()
    good = test_serve.connect(world, path, [(0, 16 * MIB)])
    assert test_serve.read_back(world, good, 0, MIB) == raw[:MIB]
    run.signal(signal.SIGTERM)
    assert run.wait().expect("interrupted").err.count(HAVE_TO_WAIT) == 1
