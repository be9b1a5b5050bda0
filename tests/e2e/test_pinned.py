"""Memory of a VM that is pinned is written past its page tables: refused, or copied
while the VM stands still."""

import signal
import socket

import checks
import harness
import qemu
import qmp_proxy
import victims

PAGE = 4096
PINNED = 100 << 20  # guest-physical; the guest does not use it


class PinningGuest(victims.OrderedGuest):
    """The ordered writer, in a QEMU that has one more page pinned, and that can be
    told to have it written by the kernel."""

    def __init__(self, world):
        path = world.path("pin.sock")
        super().__init__(world, before=[
            "env", f"LD_PRELOAD={harness.BUILD / 'tests/libpin_memory.so'}", f"PIN_SOCKET={path}"])
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        world.at_end(self._socket.close)
        self._lines = self._socket.makefile("r")
        self._page = self.host_address(PINNED)
        self._tell(f"pin {self._page:x} {PAGE:x}")

    def _tell(self, line):
        self._socket.sendall(f"{line}\n".encode())
        answer = int(self._lines.readline())
        harness.need(not (line.startswith("pin") and answer in (1, 38)), "io_uring",
                     f"io_uring is not to be had here (errno {answer})")
        assert answer == 0, f"{line}: errno {answer}"

    def write_unseen(self, byte):
        self._tell(f"write {self._page:x} {byte:x}")
        assert qemu.read_memory(self.pid, self._page, PAGE) == bytes([byte]) * PAGE


def test_refused(world):
    guest = PinningGuest(world)
    folder = world.directory("out")
    result = world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output",
                          folder / "vm.img").expect("refused")
    assert "pinned" in result.err and "--copy-pinned" in result.err, result
    checks.assert_only(folder)
    checks.assert_running(guest)


def test_copied_while_the_vm_stands_still(world):
    """What the kernel writes as soon as the VM goes on is not in the image."""
    guest = PinningGuest(world)
    guest.write_unseen(0x41)
    image = world.path("vm.img")
    run = world.start_vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image,
                             "--copy-pinned", *harness.PATIENT, env={"VMSNAP_STOP_AT": "pause.resumed"})
    run.wait_stopped()
    guest.write_unseen(0x42)
    run.signal(signal.SIGCONT)
    run.wait().expect("ok")
    harness.verify(world, image)
    victims.check_ordered_image(world, image)
    raw = world.path("vm.raw")
    world.vmsnap("export", image, "--raw", raw).expect("ok")
    page = victims.guest_physical(world, image, raw, PINNED, PINNED + PAGE)
    assert page.read_bytes() == b"\x41" * PAGE
    checks.assert_running(guest)
    victims.check_ordered_live(world, guest)


def test_assigned_device(world):
    """A device of the host, which writes on while the VM stands still. There is none
    here: QEMU's answer is made up."""
    guest = PinningGuest(world)
    folder = world.directory("out")
    proxy = qmp_proxy.Proxy(guest, "qom-list", [{"name": "gpu0", "type": "child<vfio-pci>"}])
    result = world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", folder / "vm.img",
                          "--copy-pinned").expect("refused")
    proxy.close()
    assert proxy.took_effect and "gpu0" in result.err, result
    checks.assert_only(folder)
    checks.assert_running(guest)
