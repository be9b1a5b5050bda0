"""`vmsnap serve`: the page server alone, for VMMs that speak Firecracker's UFFD
handshake."""

import os
import signal

import pytest

import checks
import harness
import victims

MIB = 1 << 20


@pytest.fixture(scope="module", name="image")
def an_image(shared_world):
    """An image of a process's memory and its raw export."""
    victim = victims.Writers(shared_world, mib=16)
    path = shared_world.path("x.img")
    shared_world.vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(),
                        "--output", path).expect("ok")
    return path, harness.export(shared_world, path).read_bytes()


def serve(world, image, *options):
    socket = world.path("uffd.sock")
    run = world.start_vmsnap("serve", image, "--socket", socket, *options)
    harness.wait_until(lambda: socket.exists() or run.process.poll() is not None, "the socket")
    assert run.process.poll() is None, f"did not start: {run.wait()}"
    return run, socket


def connect(world, socket, layout, **options):
    regions = ",".join(f"{offset}:{length}" for offset, length in layout)
    extra = [word for name, value in options.items()
             for word in ("--" + name.replace("_", "-"), value)]
    return victims.Talker(world, "fc_client", "--socket", socket, "--regions", regions, *extra)


def read_back(world, client, offset, length):
    path = world.path("read.raw")
    assert client.ask(f"read {offset} {length} {path}") == f"READ {length}"
    return path.read_bytes()


@pytest.mark.parametrize("options", [
    {}, {"page_size_field": "new"}, {"page_size_field": "old"}, {"pieces": 7}],
    ids=["both-fields", "page_size", "page_size_kib", "in-pieces"])
def test_serves_every_byte(world, image, options):
    path, raw = image
    _, socket = serve(world, path)
    # Two regions that are not in the file's order, with a gap between them.
    client = connect(world, socket, [(8 * MIB, 4 * MIB), (0, 6 * MIB)], **options)
    assert read_back(world, client, 0, 4 * MIB) == raw[8 * MIB:12 * MIB]
    assert read_back(world, client, 4 * MIB, 6 * MIB) == raw[:6 * MIB]


def test_discarded_memory_reads_as_zeros(world, image):
    """What the VMM gave back (a balloon) does not come back from the image."""
    path, raw = image
    _, socket = serve(world, path)
    client = connect(world, socket, [(0, 16 * MIB)])
    assert read_back(world, client, 0, MIB) == raw[:MIB]
    for offset in (0, 12 * MIB):  # one that was served, one that was never touched
        assert client.ask(f"dontneed {offset} {8 * 4096}") == "DONE 0"
        assert read_back(world, client, offset, 8 * 4096) == bytes(8 * 4096)
        after = offset + 8 * 4096
        assert read_back(world, client, after, 4096) == raw[after:after + 4096]


def test_each_vmm_gets_its_own_pages(world, image):
    """Two at once on one socket, with different parts of the image in one place,
    and what one gives back the other keeps."""
    path, raw = image
    _, socket = serve(world, path, "--prefetch", "none")
    one = connect(world, socket, [(0, 8 * MIB)])
    two = connect(world, socket, [(4 * MIB, 8 * MIB)])
    for offset in range(0, 8 * MIB, MIB):
        assert read_back(world, one, offset, MIB) == raw[offset:offset + MIB]
        assert read_back(world, two, offset, MIB) == raw[4 * MIB + offset:5 * MIB + offset]
    assert one.ask(f"dontneed 0 {MIB}") == "DONE 0"
    assert read_back(world, one, 0, MIB) == bytes(MIB)
    assert read_back(world, two, 0, MIB) == raw[4 * MIB:5 * MIB]
    one.process.kill()
    one.process.wait()
    assert read_back(world, two, 4 * MIB, 4 * MIB) == raw[8 * MIB:12 * MIB]


def test_write_protect_where_it_was_not_registered_for(world, image):
    path, raw = image
    run, socket = serve(world, path, "--write-protect")
    client = connect(world, socket, [(0, 16 * MIB)])
    assert read_back(world, client, 0, 16 * MIB) == raw
    run.signal(signal.SIGTERM)
    assert "is not registered for write protection" in run.wait().expect("interrupted").err


def test_gives_up_its_privileges(world, image):
    """All threads, those that serve a VMM as well."""
    path, raw = image
    run, socket = serve(world, path)
    client = connect(world, socket, [(0, MIB)])
    assert read_back(world, client, 0, MIB) == raw[:MIB]
    assert len(os.listdir(f"/proc/{run.pid}/task")) > 2
    checks.assert_unprivileged(run.pid)


@pytest.mark.parametrize("sealed", [False, True], ids=["clear", "encrypted"])
@pytest.mark.parametrize("owner", [0, 65534], ids=["ours", "of-another"])
def test_packs_of_a_store_are_opened_without_privileges(world, image, sealed, owner):
    path, raw = image
    store, key = world.path("store"), world.path("key")
    key.write_text("a key of this test")
    options = ["--key-file", key] if sealed else []
    world.vmsnap("import", path, "--store", store, *options).expect("ok")
    for folder, _, names in os.walk(store):
        for name in [".", *names]:
            os.chown(os.path.join(folder, name), owner, -1)
    run, socket = serve(world, "latest", "--store", store, *options)
    client = connect(world, socket, [(0, 16 * MIB)])
    assert read_back(world, client, 0, 16 * MIB) == raw
    checks.assert_unprivileged(run.pid, checks.CAP_DAC_READ_SEARCH if owner else 0)


@pytest.mark.parametrize("which", ["store", "packs", "above"])
def test_packs_in_a_directory_of_another(world, image, which):
    """The files are ours, but without privileges nobody gets to them."""
    path, raw = image
    above = world.directory("home")
    store = above / "store"
    world.vmsnap("import", path, "--store", store).expect("ok")
    folder = {"store": store, "packs": store / "packs", "above": above}[which]
    folder.chmod(0o700)
    os.chown(folder, 65534, -1)
    run, socket = serve(world, "latest", "--store", store)
    client = connect(world, socket, [(0, 16 * MIB)])
    assert read_back(world, client, 0, 16 * MIB) == raw
    checks.assert_unprivileged(run.pid, checks.CAP_DAC_READ_SEARCH)


BAD_HANDSHAKES = {
    "not JSON": "hello, is this the page server?",
    "not an array": '{"base_host_virt_addr": 4096}',
    "empty": "[]",
    "field missing": '[{"base_host_virt_addr": 4096, "size": 4096, "page_size": 4096}]',
    "beyond the image": '[{"base_host_virt_addr": 4096, "size": 4096, "offset": 1099511627776, '
                        '"page_size": 4096}]',
    "offset overflows": '[{"base_host_virt_addr": 4096, "size": 8192, '
                        '"offset": 18446744073709547520, "page_size": 4096}]',
    "unaligned": '[{"base_host_virt_addr": 4097, "size": 4096, "offset": 0, "page_size": 4096}]',
    "page size": '[{"base_host_virt_addr": 4096, "size": 4096, "offset": 0, "page_size": 3}]',
    "negative": '[{"base_host_virt_addr": -4096, "size": 4096, "offset": 0, "page_size": 4096}]',
    "a string": '[{"base_host_virt_addr": "4096", "size": 4096, "offset": 0, "page_size": 4096}]',
}


@pytest.mark.parametrize("case", list(BAD_HANDSHAKES))
def test_bad_handshake(world, image, case):
    """It is refused with a reason, and the connection is closed. Whether the
    server then ends or waits for the next VMM, nothing of it goes wrong."""
    path, _ = image
    run, socket = serve(world, path)
    client = connect(world, socket, [(0, MIB)], handshake=BAD_HANDSHAKES[case])
    assert client.ask("closed") == "CLOSED"
    finish_with_error(run)
    checks.assert_not_traced(client.pid)


def test_handshake_without_a_descriptor(world, image):
    path, _ = image
    run, socket = serve(world, path)
    client = connect(world, socket, [(0, MIB)], no_fd=1)
    assert client.ask("closed") == "CLOSED"
    finish_with_error(run)


def finish_with_error(run):
    """It ended with an error of its own accord, or serves on until it is told to
    end; either way it has said something."""
    if run.process.poll() is None:
        try:
            run.process.wait(1)
        except Exception:
            run.signal(signal.SIGTERM)
    result = run.wait()
    assert result.code > 0, f"died of a signal, or called it a success: {result}"
    assert result.err.strip(), f"no reason given: {result}"


def test_client_goes_away(world, image):
    """A VMM that dies leaves no server that hangs."""
    path, raw = image
    run, socket = serve(world, path)
    client = connect(world, socket, [(0, 16 * MIB)])
    assert read_back(world, client, 0, 4096) == raw[:4096]
    client.process.kill()
    client.process.wait()
    try:
        code = run.process.wait(10)
        assert code >= 0, f"died of signal {-code}"
    except Exception:
        run.signal(signal.SIGTERM)
        assert run.wait().code in (0, harness.EXIT["interrupted"])


def test_damaged_image(world, image):
    """A page that cannot be read right is poison to the reader: SIGBUS, no bytes."""
    path, raw = image
    copy = world.path("damaged.img")
    data = bytearray(path.read_bytes())
    # The middle of the file is page data; damage much of it.
    for at in range(len(data) // 3, 2 * len(data) // 3, 512):
        data[at] ^= 0x55
    copy.write_bytes(data)
    assert world.vmsnap("verify", copy).code == harness.EXIT["damaged"]
    socket = world.path("uffd.sock")
    run = world.start_vmsnap("serve", copy, "--socket", socket)
    harness.wait_until(lambda: socket.exists() or run.process.poll() is not None, "the socket")
    if run.process.poll() is not None:
        run.wait().expect("damaged")  # so damaged that it cannot even be opened
        return
    client = connect(world, socket, [(0, len(raw))])
    out = world.path("read.raw")
    client.send(f"read 0 {len(raw)} {out}")
    assert client.process.wait(harness.LIMIT) == -signal.SIGBUS, "read wrong bytes as if right"
    got = out.read_bytes() if out.exists() else b""
    assert raw.startswith(got[:len(got) // 4096 * 4096]), "wrong bytes were served"
