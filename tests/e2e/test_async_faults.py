"""Where KVM has asynchronous page faults, a guest runs something else while it
waits for one of its pages. Who is to give it the page is stopped here, so that
this lasts as long as a test likes."""

import os
import re
import signal

import harness
import qemu
import victims


def image_of_a_guest(world, mib):
    guest = victims.AsyncFaultGuest(world, mib)
    image = world.path("vm.img")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    guest.kill()
    return image


def assert_runs_the_other_task(machine):
    """It waits for a page, and works: the second task counts up, again and again.
    Returns its console."""
    def works():
        text = machine.serial_text()
        return text if re.search(r"\[w{20,}$", text) else None
    text = harness.wait_until(
        works, lambda: f"the second task; the console ends {machine.serial_text()[-40:]!r}")
    assert machine.status() == "running"
    return text


def assert_first_task_goes_on(machine, before):
    """The page came, and all the others, and each was right."""
    def passed():
        text = machine.serial_text()
        assert not set(text) & set("!X"), f"wrong memory: {text[-80:]!r}"
        return text if text.endswith("...") else None
    text = harness.wait_until(passed, "passes over all pages")
    assert re.match(r"w*\]", text[len(before):]), f"after the wait: {text[len(before):][:40]!r}"


def test_captured(world):
    """A write to a page that is not yet copied waits in the same way. Not the first
    ones, which are the guest's kernel's: for these it cannot but wait."""
    guest = victims.AsyncFaultGuest(world, mib=512)
    point = "copy.fault:100"
    image = world.path("vm.img")
    snapshot = world.start_vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image,
                                  *harness.PATIENT, *harness.until_written(point),
                                  env={"VMSNAP_STOP_AT": point})
    snapshot.wait_stopped()
    console = assert_runs_the_other_task(guest)
    snapshot.signal(signal.SIGCONT)
    snapshot.wait().expect("ok")
    assert_first_task_goes_on(guest, console)


def test_restored(world):
    image = image_of_a_guest(world, mib=64)
    run_dir = world.path("run")
    restore = world.start_vmsnap("restore", image, "--run-dir", run_dir, "--prefetch", "none",
                                 env={"VMSNAP_STOP_AT": "restore.half"})
    restore.wait_stopped()
    copy = qemu.restored(run_dir)
    console = assert_runs_the_other_task(copy)
    restore.signal(signal.SIGCONT)
    assert_first_task_goes_on(copy, console)


def test_clones(world):
    """Each waits for itself. Memory enough that both are still at it when the
    page server is stopped."""
    image = image_of_a_guest(world, mib=256)
    farm = world.path("farm")
    started = world.vmsnap("restore", image, "--clones", 2, "--run-dir", farm, "--prefetch", "none",
                           "--detach", "--json").expect("ok").json
    servers = world.vmsnap_processes()
    for server in servers:
        os.kill(server, signal.SIGSTOP)
    clones = [qemu.restored(farm / clone["clone"]) for clone in started["clones"]]
    consoles = [assert_runs_the_other_task(clone) for clone in clones]
    for server in servers:
        os.kill(server, signal.SIGCONT)
    for clone, console in zip(clones, consoles):
        assert_first_task_goes_on(clone, console)
    world.vmsnap("clones", "--run-dir", farm, "--stop").expect("ok")
