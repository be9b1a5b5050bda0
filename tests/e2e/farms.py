"""Farms of clones, for the tests of them."""

import ctypes

import harness
import qemu
import victims

LIBC = ctypes.CDLL(None, use_errno=True)


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
