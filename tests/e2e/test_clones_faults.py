"""Clones when something fails: page servers killed, pages damaged, nonsense sent."""

import fcntl
import json
import os
import random
import re
import signal
import socket
import threading
import time

import pytest

import checks
import farms
import harness
import qemu
import victims

PAGE = 4096
THOROUGH = bool(os.environ.get("VMSNAP_TEST_LONG"))


def test_what_cannot_start_leaves_its_number_free(world):
    """Whoever tries again has overlays by number: {clone} must mean the same."""
    farm = farms.Farm(world, farms.ordered_image(world))
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


def test_a_keeper_that_is_about_to_end_is_waited_for(world):
    """It holds its lock for a moment after it has stopped to listen."""
    farm = farms.Farm(world, farms.ordered_image(world))
    farm.dir.mkdir()
    held = open(farm.dir / "lock", "w", encoding="ascii")
    fcntl.lockf(held, fcntl.LOCK_EX)
    threading.Timer(0.5, held.close).start()
    (clone,) = farm.add(1)
    clone.wait_for_progress()
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
    farm = farms.Farm(world, farms.ordered_image(world))
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


def kill_its_processes(world):
    for pid in world.vmsnap_processes():
        os.kill(pid, signal.SIGKILL)
    harness.wait_until(lambda: not world.vmsnap_processes(), "the farm's processes to end")


def test_keeper_killed_and_reattached(world):
    farm = farms.Farm(world, farms.linux_image(world))
    clones = farm.add(2, "--memory", "4M")  # pages are still to come, for ever
    kill_its_processes(world)
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


def test_a_clone_that_cannot_be_taken_over(world):
    """It is named, and the others are served."""
    farm = farms.Farm(world, farms.ordered_image(world))
    well, _ = farm.add(2)
    kill_its_processes(world)
    record = farm.dir / "2/restore.json"
    record.write_text(re.sub(r'"uffd": \d+', '"uffd": 0', record.read_text()))
    refused = world.vmsnap("restore", "--reattach", farm.dir, "--json").expect("vm")
    assert refused.json["clones"] == ["1"]
    assert "clone 2;" in refused.err
    victims.check_ordered_live(world, well)
    farm.stop("1")
    farm.assert_gone()


def test_run_directory_of_another(world):
    """Its page server, which has no privileges, gets to what the clones have in it."""
    image = farms.ordered_image(world)
    farm = farms.Farm(world, image)
    farm.dir.mkdir(mode=0o700)
    os.chown(farm.dir, 65534, -1)
    for clone in farm.add(2):
        victims.check_ordered_live(world, clone)
    checks.assert_unprivileged(farm.server()["server_pid"], checks.CAP_DAC_READ_SEARCH)
    farm.stop()
    farm.assert_gone()


def damaged_image(world):
    """And what it was before."""
    image = farms.ordered_image(world)
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
                assert farms.read_waiting(machine.pid, host + at, PAGE) == want, f"wrong at {at:#x}"
            except OSError:
                poisoned += 1
    return poisoned


def test_damaged_pages_are_poison_not_zeros(world):
    image, expected = damaged_image(world)
    farm = farms.Farm(world, image)
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
    image = farms.ordered_image(world)
    farm = farms.Farm(world, image)
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
    farm = farms.Farm(world, farms.ordered_image(world))
    good, = farm.add(1)
    result = world.vmsnap("restore", farm.image, "--clones", 1, "--run-dir", farm.dir, "--detach",
                          env={"VMSNAP_KILL_AT": point}).expect("vm")
    assert "killed" in result.err
    harness.wait_until(lambda: farms.qemu_count(world) == 1, "the half-started clone to end")
    good.wait_for_progress()
    victims.check_ordered_live(world, good)
    farm.stop()
    farm.assert_gone()
