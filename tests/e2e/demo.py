"""The demonstration behind tests/demo: one VM, one snapshot, one lazy restore."""

import signal
import sys
import threading
import time

import checks
import harness
import linux_guest
import qemu
import victims

MIB = 512


def say(text=""):
    print(text, flush=True)


def figure(name, value):
    say(f"    {name:<40}{value}")


def mib(number):
    return f"{number / (1 << 20):.0f} MiB"


def snapshot(world, guest):
    image = world.path("vm.img")
    figures = world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image,
                           "--json").expect("ok").json
    pages, faults = figures["pages"], figures["fault_us"]
    figure("the guest stood still for", f"{figures['pause_ms']:.1f} ms")
    figure("the snapshot took", f"{figures['total_ms'] / 1000:.2f} s")
    figure("memory -> image", f"{mib(figures['bytes']['guest'])} -> "
                              f"{mib(figures['bytes']['image'])}")
    figure("pages zero / duplicate / stored",
           f"{pages['zero']} / {pages['duplicate']} / {pages['stored']}")
    figure("writes that had to wait", f"{figures['write_faults']}, half of them under "
                                      f"{faults['p50']:.0f} µs, the longest "
                                      f"{faults['max']:.0f} µs")
    return image


def restore(world, image):
    """Restores and watches the copy's console from the first moment on."""
    run_dir = world.path("run")
    console = run_dir / "serial0.log"
    first_tick = {}

    def watch():
        while "at" not in first_tick and time.monotonic() < started + harness.LIMIT:
            try:
                if linux_guest.ticks(console.read_text(errors="replace")):
                    first_tick["at"] = time.monotonic() - started
            except FileNotFoundError:
                pass
            time.sleep(0.002)

    started = time.monotonic()
    watcher = threading.Thread(target=watch)
    watcher.start()
    figures = world.vmsnap("restore", image, "--run-dir", run_dir, "--json").expect("ok").json
    complete = time.monotonic() - started
    watcher.join()
    if "at" not in first_tick:
        raise AssertionError("the restored guest never ticked")
    figure("its first tick came after", f"{first_tick['at']:.2f} s")
    figure("all of its memory was there after", f"{complete:.2f} s")
    figure("pages that it asked for by a touch", figures["faults"])
    return qemu.restored(run_dir)


def show_consoles(original, copy):
    """Both go on: prints the ends of both consoles side by side."""
    before = [linux_guest.ticks(machine.serial_text()) for machine in (original, copy)]
    victims.assert_linux_goes_on(original, more_ticks=5)
    victims.assert_linux_goes_on(copy, more_ticks=5)
    say(f"    {'original':<26}restored")
    ends = [machine.serial_text().replace("\r", "").rstrip("\n").split("\n")[-6:]
            for machine in (original, copy)]
    for left, right in zip(*ends):
        say(f"    {left:<26}{right}")
    after = [linux_guest.ticks(machine.serial_text()) for machine in (original, copy)]
    assert all(late > early for late, early in zip(after, before)), (before, after)


def demonstrate(world):
    say()
    say(f"1. Booting Debian's cloud kernel in QEMU ({MIB} MiB, emulated, so this takes a while)")
    guest = victims.LinuxGuest(world, mib=MIB, check_mib=32)
    files = checks.open_files(guest.pid)
    victims.assert_linux_goes_on(guest)
    say("   It ticks five times a second, and copies and compares a file in its memory.")
    say()
    say("2. A snapshot, from outside, while it works")
    image = snapshot(world, guest)
    checks.assert_running(guest, files)
    say()
    say("3. A restore beside the running original; pages come when they are touched")
    copy = restore(world, image)
    checks.assert_running(copy)
    say()
    say("4. Both go on, and both find their memory in order")
    show_consoles(guest, copy)
    harness.verify(world, image)
    checks.assert_running(guest, files)
    assert not world.vmsnap_processes(), "a page server was left"


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    world = harness.World()
    try:
        demonstrate(world)
    except (AssertionError, qemu.QmpError, OSError) as error:
        say(f"\nIt did not work: {error}")
        return 1
    finally:
        world.end()
    say("\nAll of this was checked as it happened. Nothing was left running.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
