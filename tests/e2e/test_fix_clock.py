"""`restore --fix-clock` on a Linux guest with the agent that Debian ships. Its
real-time clock starts years in the past, so that no other clock explains the
right time."""

import json
import socket
import subprocess
import time

import pytest

import harness
import linux_guest
import qemu
import victims

LONG_AGO = 1577836800  # 2020-01-01
DAY = 86400


class AgentGuest(victims.LinuxGuest):
    """Ready means that its agent has answered as well."""

    def __init__(self, world):
        self.agent_socket = world.path("agent.sock")
        try:
            linux_guest.libraries(linux_guest.agent())
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            harness.need(False, "network", f"qemu-ga cannot be fetched: {error}")
        super().__init__(world, check_mib=4, with_agent=True, extra=[
            "-rtc", "base=2020-01-01T00:00:00,clock=vm",
            "-chardev", f"socket,id=agent,path={self.agent_socket},server=on,wait=off",
            "-device", "virtio-serial",
            "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"])
        harness.wait_until(self.answers, "the guest agent")

    def answers(self):
        """What is sent before the agent has opened its end is lost, so it is asked
        again and again."""
        with self.talk(limit=1) as channel:
            channel.sendall(b'\xff{"execute": "guest-sync-delimited", "arguments": {"id": 7}}\n')
            try:
                for line in channel.makefile("rb"):
                    if json.loads(line.rpartition(b"\xff")[2]).get("return") == 7:
                        return True
            except TimeoutError:
                pass
        return False

    def talk(self, limit=harness.LIMIT):
        channel = socket.socket(socket.AF_UNIX)
        channel.settimeout(limit)
        channel.connect(str(self.agent_socket))
        return channel


def assert_clock_of_long_ago(machine):
    victims.assert_linux_goes_on(machine)
    clock = linux_guest.clock(machine.serial_text())
    assert LONG_AGO <= clock < LONG_AGO + DAY, clock


def assert_clock_of_the_host(machine, since):
    """The guest's clock, once the agent has set it, is between ours before the
    restore and ours now; but for the minute that a slow machine may lose."""
    harness.wait_until(lambda: linux_guest.clock(machine.serial_text()) > LONG_AGO + DAY,
                       lambda: f"another time than {linux_guest.clock(machine.serial_text())}")
    victims.assert_linux_goes_on(machine)
    clock = linux_guest.clock(machine.serial_text())
    assert since - 60 <= clock <= time.time() + 60, clock


@pytest.fixture(name="image")
def an_image(world):
    guest = AgentGuest(world)
    assert_clock_of_long_ago(guest)
    # What somebody else left half said must not stand in our way.
    with guest.talk() as agent:
        agent.sendall(b'{"execute": "guest-pi')
        victims.assert_linux_goes_on(guest)
    image = world.path("vm.img")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    assert_clock_of_long_ago(guest)
    guest.kill()
    return image


def test_restored(world, image):
    run_dir = world.path("run")
    world.vmsnap("restore", image, "--run-dir", run_dir).expect("ok")
    assert_clock_of_long_ago(qemu.restored(run_dir))

    run_dir = world.path("run")
    since = time.time()
    restored = world.vmsnap("restore", image, "--run-dir", run_dir, "--fix-clock").expect("ok")
    assert "--fix-clock" not in restored.err, restored.err
    assert_clock_of_the_host(qemu.restored(run_dir), since)


def test_clones(world, image):
    farm = world.path("farm")
    since = time.time()
    started = world.vmsnap("restore", image, "--clones", 2, "--run-dir", farm, "--detach",
                           "--json", "--fix-clock").expect("ok")
    assert "--fix-clock" not in started.err, started.err
    for clone in started.json["clones"]:
        assert_clock_of_the_host(qemu.restored(farm / clone["clone"]), since)
    world.vmsnap("clones", "--run-dir", farm, "--stop").expect("ok")
