"""Clones: many VMs from one image, on one memory."""

import ctypes
import json
import os
import random
import signal
import socket
import threading
import time

import pytest

import checks
import harness
import qemu
import victims

PAGE = 4096
LIBC = ctypes.CDLL(None, use_errno=True)
THOROUGH = bool(os.environ.get("VMSNAP_TEST_LONG"))


class Farm:
    """The clones of one image in one run directory."""

    def __init__(self, world, image):
        self.world, self.image, self.dir = world, image, world.path("farm")

    def add(self, count, *arguments, env=None):
        """Starts so many more; their machines."""
        started = self.world.vmsnap("restore", self.image, "--clones", count, "--run-dir", self.dir,
                                    "--detach", "--json", *arguments, env=env).expect("ok").json
        assert len(started["clones"]) == count
        return [qemu.restored(self.dir / clone["clone"]) for clone in started["clones"]]

    def status(self):
        return self.world.vmsnap("clones", "--run-dir", self.dir, "--json").expect("ok").json

    def server(self):
        """Counters; none in the moment in which the page server is being replaced."""
        return self.status()["server"]

    def stop(self, *names):
        self.world.vmsnap("clones", "--run-dir", self.dir, "--stop", *names).expect("ok")

    def assert_gone(self):
        """The last to leave turns off the light."""
        harness.wait_until(lambda: not self.world.vmsnap_processes(), "the page server to end")
        assert not (self.dir / "farm.sock").exists()


def linux_image(world, mib=128, check_mib=4, **options):
    guest = victims.LinuxGuest(world, mib=mib, check_mib=check_mib, **options)
    image = world.path("vm.img")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    guest.kill()
    return image


def ordered_image(world):
    guest = victims.OrderedGuest(world)
    image = world.path("vm.img")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    guest.kill()
    return image


def read_waiting(pid, address, length):
    """Like qemu.read_memory(), but waits for a page that is missing, as the
    guest would: through /proc/PID/mem that would be an error."""
    buffer = ctypes.create_string_buffer(length)
    local = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), length)
    remote = (ctypes.c_void_p * 2)(address, length)
    got = LIBC.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if got != length:
        raise OSError(ctypes.get_errno(), f"{got} of {length} bytes at {address:#x}")
    return buffer.raw


def all_memory(machine):
    host = machine.host_address(victims.ORDERED_START)
    return b"".join(read_waiting(machine.pid, host + at, 4 << 20)
                    for at in range(0, victims.ORDERED_END - victims.ORDERED_START, 4 << 20))


def qemu_count(world):
    return sum("qemu-system" in command for command in world.processes().values())


def test_go_on_and_share(world):
    farm = Farm(world, linux_image(world))
    clones = farm.add(3)
    for clone in clones:
        victims.assert_linux_goes_on(clone)
    status = farm.status()
    assert [clone["state"] for clone in status["clones"]] == ["alive"] * 3
    assert all(clone["memory"]["shared"] > 0 for clone in status["clones"])
    # Each page of the image is read once for all of them; a fault may just
    # overtake the reading ahead.
    server = status["server"]
    assert server["read_pages"] <= server["data_pages"] * 1.05
    farm.stop()
    farm.assert_gone()


def test_second_clone_needs_no_event(world):
    """What the first one read is there for the second."""
    farm = Farm(world, ordered_image(world))
    first, = farm.add(1, "--start-paused")
    content = all_memory(first)
    harness.wait_until(lambda: farm.server()["prefetch_done"], "all pages to be there")
    before = farm.server()["read_pages"]
    second, = farm.add(1, "--start-paused")
    assert all_memory(second) == content
    server = farm.server()
    assert server["read_pages"] == before
    one = server["clones"][1]
    # Loading the device state and reading zeros aside.
    assert one["brought"] == 0 and one["found"] == 0, one
    farm.stop()


def test_isolated_from_each_other_and_from_the_image(world):
    image = ordered_image(world)
    raw = harness.export(world, image)
    farm = Farm(world, image)
    clones = farm.add(3, "--start-paused")
    expected = victims.guest_physical(world, image, raw).read_bytes()
    for clone in clones:
        assert all_memory(clone) == expected
    # Two run on and write all over; the third must not see it.
    for clone in clones[:2]:
        clone.qmp("cont")
        clone.wait_for_progress(2)
    for clone in clones[:2]:
        victims.check_ordered_live(world, clone)
        assert all_memory(clone) != expected
    assert all_memory(clones[2]) == expected
    clones[2].qmp("cont")
    clones[2].wait_for_progress()
    victims.check_ordered_live(world, clones[2])
    late, = farm.add(1, "--start-paused")
    assert all_memory(late) == expected
    world.vmsnap("verify", image).expect("ok")
    farm.stop()


def test_come_and_go(world):
    image = ordered_image(world)
    farm = Farm(world, image)
    one, two = farm.add(2, "--", "-name", "clone-{clone}")
    assert "clone-2" in world.processes()[two.pid]
    three, = farm.add(1)
    farm.stop("2")
    states = {clone["clone"]: clone["state"] for clone in farm.status()["clones"]}
    assert states == {"1": "alive", "2": "ended", "3": "alive"}
    for clone in (one, three):
        clone.wait_for_progress()
        victims.check_ordered_live(world, clone)
    # Of another image, no.
    other = ordered_image(world)
    refused = world.vmsnap("restore", other, "--clones", 1, "--run-dir", farm.dir).expect("exists")
    assert "another image" in refused.err
    removed = world.vmsnap("clones", "--run-dir", farm.dir, "--remove", "1", "--json").expect("ok")
    assert removed.json == {"run_dir": str(farm.dir), "clones": [
        {"clone": "1", "state": "removed", "pid": one.pid}]}
    assert not (farm.dir / "1").exists()
    world.vmsnap("clones", "--run-dir", farm.dir, "--stop", "9").expect("usage")
    waiting = world.start_vmsnap("clones", "--run-dir", farm.dir, "--wait", "--json")
    os.kill(three.pid, signal.SIGKILL)
    ended = waiting.wait().expect("ok").json["clones"]
    assert {clone["clone"]: clone["state"] for clone in ended} == {"2": "ended", "3": "ended"}
    farm.assert_gone()


def test_what_cannot_start_leaves_its_number_free(world):
    """Whoever tries again has overlays by number: {clone} must mean the same."""
    farm = Farm(world, ordered_image(world))
    failing = ["restore", farm.image, "--run-dir", farm.dir, "--qemu", "/nope", "--clones"]
    world.vmsnap(*failing, 2).expect("vm")
    assert not farm.dir.exists()
    farm.dir.mkdir()  # by somebody else: it stays
    world.vmsnap(*failing, 2).expect("vm")
    assert farm.dir.exists() and not list(farm.dir.glob("[0-9]*"))
    one, two = farm.add(2, "--", "-name", "clone-{clone}")
    commands = world.processes()
    assert "clone-1" in commands[one.pid] and "clone-2" in commands[two.pid]
    world.vmsnap(*failing, 1).expect("vm")
    assert [clone["clone"] for clone in farm.status()["clones"]] == ["1", "2"]
    assert not (farm.dir / "3").exists()
    for clone in (one, two):
        clone.wait_for_progress()
        victims.check_ordered_live(world, clone)
    farm.stop()
    farm.assert_gone()


def kill_page_servers(world, farm, stop, kills):
    while not stop.wait(1):
        server = farm.server()
        if server:
            os.kill(server["server_pid"], signal.SIGKILL)
            kills.append(server["server_pid"])


def test_page_server_killed_again_and_again(world):
    """Under write load of clones with little room, so that pages come and go."""
    farm = Farm(world, ordered_image(world))
    clones = farm.add(30 if THOROUGH else 6, "--memory", "8M")
    stop, kills = threading.Event(), []
    killer = threading.Thread(target=kill_page_servers, args=(world, farm, stop, kills))
    killer.start()
    time.sleep(60 if THOROUGH else 8)
    stop.set()
    killer.join()
    assert len(set(kills)) >= 3, kills
    said = [len(clone.serial_text()) for clone in clones]
    harness.wait_until(lambda: all(len(clone.serial_text()) > before
                                   for clone, before in zip(clones, said)),
                       "all clones to go on", limit=300 if THOROUGH else harness.LIMIT)
    for clone in clones:
        victims.check_ordered_live(world, clone)
    assert farm.server()["restarts"] >= 3
    farm.stop()
    farm.assert_gone()


def test_keeper_killed_and_reattached(world):
    farm = Farm(world, linux_image(world))
    clones = farm.add(2, "--memory", "4M")  # pages are still to come, for ever
    for pid in world.vmsnap_processes():
        os.kill(pid, signal.SIGKILL)
    harness.wait_until(lambda: not world.vmsnap_processes(), "the farm's processes to end")
    for clone in clones:
        checks.assert_not_traced(clone.pid)
    refused = world.vmsnap("restore", farm.image, "--clones", 1, "--run-dir", farm.dir).expect("exists")
    assert "--reattach" in refused.err
    world.vmsnap("restore", "--reattach", farm.dir / "1").expect("usage")
    world.vmsnap("restore", "--reattach", farm.dir, "--prefetch", "none").expect("usage")
    world.vmsnap("restore", "--reattach", farm.dir).expect("ok")
    for clone in clones:
        victims.assert_linux_goes_on(clone)
    world.vmsnap("restore", "--reattach", farm.dir).expect("exists")
    late, = farm.add(1)
    victims.assert_linux_goes_on(late)
    farm.stop()
    farm.assert_gone()
    world.vmsnap("restore", "--reattach", farm.dir).expect("vm")


def test_a_clone_cannot_be_captured_or_parked(world):
    farm = Farm(world, ordered_image(world))
    clone, = farm.add(1)
    refused = world.vmsnap("snapshot", "--qmp", clone.qmp_socket, "--output", world.path("x.img"),
                           "--restore-wait", 3 * harness.LIMIT).expect("refused")
    assert "clone" in refused.err
    world.vmsnap("park", "--qmp", clone.qmp_socket, "--output", world.path("x.img")).expect("refused")
    for arguments in (["--memory", "8M"], ["--clones", "1", "--memory", "64K"],
                      ["--clones", "1", "--record-working-set"]):
        world.vmsnap("restore", farm.image, *arguments).expect("usage")
    clone.wait_for_progress()
    victims.check_ordered_live(world, clone)
    farm.stop()


def test_shared_pages_stay_under_their_limit(world):
    farm = Farm(world, ordered_image(world))
    clones = farm.add(2, "--memory", "6M", "--start-paused")
    for clone in clones:
        content = all_memory(clone)
        assert content == all_memory(clone)
        assert farm.server()["resident_pages"] <= (6 << 20) // PAGE
    server = farm.server()
    assert server["dropped_pages"] > 0
    for clone in clones:
        clone.qmp("cont")
        clone.wait_for_progress()
        victims.check_ordered_live(world, clone)
    farm.stop()


def test_balloon_gives_zeros_to_one_alone(world):
    """A page that one clone gave back is zero for that one from then on, and
    what it was for all the others."""
    image = linux_image(world, mib=192, extra=["-device", "virtio-balloon,id=balloon"])
    farm = Farm(world, image)
    one, two, = farm.add(2)
    with qemu.Qmp(one.qmp_socket) as monitor:
        for target in (96 << 20, 192 << 20, 96 << 20):
            monitor.execute("balloon", value=target)
            harness.wait_until(lambda: monitor.execute("query-balloon")["actual"] == target,
                               "the balloon to follow")
    clones = {clone["name"]: clone for clone in farm.server()["clones"]}
    assert clones["1"]["removed"] > (80 << 20) // PAGE
    assert clones["2"]["removed"] == 0
    for clone in (one, two):
        victims.assert_linux_goes_on(clone)
    three, = farm.add(1)
    victims.assert_linux_goes_on(three)
    farm.stop()


def test_run_directory_of_another(world):
    """Its page server, which has no privileges, gets to what the clones have in it."""
    image = ordered_image(world)
    farm = Farm(world, image)
    farm.dir.mkdir(mode=0o700)
    os.chown(farm.dir, 65534, -1)
    for clone in farm.add(2):
        victims.check_ordered_live(world, clone)
    checks.assert_unprivileged(farm.server()["server_pid"], checks.CAP_DAC_READ_SEARCH)
    farm.stop()
    farm.assert_gone()


def damaged_image(world):
    """And what it was before."""
    image = ordered_image(world)
    raw = harness.export(world, image)
    with open(image, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        random.seed(5)
        for _ in range(20):
            file.seek(random.randrange(size // 8, size // 2))
            file.write(os.urandom(64))
    return image, victims.guest_physical(world, image, raw)


def count_poisoned(machine, expected):
    """Pages that cannot be read; the others must be right."""
    poisoned = 0
    with open(expected, "rb") as file:
        host = machine.host_address(victims.ORDERED_START)
        for at in range(0, victims.ORDERED_END - victims.ORDERED_START, PAGE):
            want = file.read(PAGE)
            try:
                assert read_waiting(machine.pid, host + at, PAGE) == want, f"wrong at {at:#x}"
            except OSError:
                poisoned += 1
    return poisoned


def test_damaged_pages_are_poison_not_zeros(world):
    image, expected = damaged_image(world)
    farm = Farm(world, image)
    clone, = farm.add(1, "--start-paused")
    poisoned = count_poisoned(clone, expected)
    assert poisoned > 0
    assert farm.server()["clones"][0]["poisoned"] >= poisoned
    farm.stop()


@pytest.mark.parametrize("options", [["--clones", 1], ["--prefetch", "none"]],
                         ids=["clone", "vm"])
def test_the_exit_status_tells_of_poison(world, options):
    """Also if the VM ends before its memory is there, or is served to its end."""
    image, expected = damaged_image(world)
    run_dir = world.path("run")
    run = world.start_vmsnap("restore", image, "--run-dir", run_dir, "--start-paused", *options)
    machine_dir = run_dir / "1" if "--clones" in options else run_dir

    def ready():
        assert run.process.poll() is None, f"ended: {run.wait()}"
        try:
            record = json.loads((machine_dir / "restore.json").read_text())
        except (FileNotFoundError, ValueError):
            return False
        return record["phase"] in ("running", "loaded") and record["ready_ms"] > 0
    harness.wait_until(ready, "the VM")
    machine = qemu.restored(machine_dir)
    assert count_poisoned(machine, expected) > 0
    os.kill(machine.pid, signal.SIGKILL)
    assert "could not be read back" in run.wait().expect("poisoned").err


def test_a_keeper_survives_what_it_is_sent(world):
    """Messages that are wrong, and somebody who asks and never reads."""
    image = ordered_image(world)
    farm = Farm(world, image)
    clone, = farm.add(1)
    keeper = json.loads((farm.dir / "farm.json").read_text())["keeper_pid"]
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(harness.LIMIT)
    connection.connect(str(farm.dir / "farm.sock"))
    for name in (7, None, [], {}, "", "2", "../farm", "/", "1"):
        connection.send(json.dumps({"do": "join", "clone": name}).encode())
        assert "error" in json.loads(connection.recv(1 << 17)), name
    connection.send(b'{"do": "join"}')
    assert "error" in json.loads(connection.recv(1 << 17))
    assert len(farm.server()["clones"]) == 1, "it joined twice"
    with pytest.raises(OSError):  # it gives up on us, not on the others
        for _ in range(100000):
            connection.send(b'{"do": "status"}')
    assert len(farm.server()["clones"]) == 1
    assert harness.is_running(keeper)
    victims.check_ordered_live(world, clone)
    farm.stop()
    farm.assert_gone()


@pytest.mark.parametrize("point", ["restore.start", "restore.launched", "restore.registered",
                                   "restore.loading"])
def test_starter_killed(world, point):
    """A clone that is cut short before it ran leaves nothing; the others live."""
    farm = Farm(world, ordered_image(world))
    good, = farm.add(1)
    result = world.vmsnap("restore", farm.image, "--clones", 1, "--run-dir", farm.dir, "--detach",
                          env={"VMSNAP_KILL_AT": point}).expect("vm")
    assert "killed" in result.err
    harness.wait_until(lambda: qemu_count(world) == 1, "the half-started clone to end")
    good.wait_for_progress()
    victims.check_ordered_live(world, good)
    farm.stop()
    farm.assert_gone()


def test_each_clone_is_a_new_generation(world):
    """As QEMU tells its guest; the test guest's kernel has no driver for it."""
    old = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"
    farm = Farm(world, linux_image(world, extra=["-device", f"vmgenid,guid={old}"]))
    clones = farm.add(2)
    generations = {clone.qmp("query-vm-generation-id")["guid"] for clone in clones}
    assert len(generations) == 2 and old not in generations
    for clone in clones:
        victims.assert_linux_goes_on(clone)
    farm.stop()
    plain = Farm(world, ordered_image(world))
    started = world.vmsnap("restore", plain.image, "--clones", 1, "--run-dir", plain.dir,
                           "--detach").expect("ok")
    assert "vmgenid" in started.err
    plain.stop()
