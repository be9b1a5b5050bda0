"""What must hold for a process after anything was done to it."""

import os
import pathlib
import re

import harness


def open_files(pid):
    """What the process has open, without the numbers."""
    found = []
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{entry}"))
        except FileNotFoundError:
            pass
    return sorted(re.sub(r":\[\d+\]", "", name) for name in found)


def traced_threads(pid):
    """What is the matter with those that are traced, or stopped."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            status = pathlib.Path(f"/proc/{pid}/task/{task}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has ended
        tracer = re.search(r"TracerPid:\s*(\d+)", status).group(1)
        state = re.search(r"State:\s*(\S)", status).group(1)
        if tracer != "0" or state in "tT":
            found.append(f"thread {task} of {pid}: state {state}, traced by {tracer}")
    return found


def assert_not_traced(pid):
    assert not traced_threads(pid)


def ranges_with_userfault(pid):
    """Mappings that are registered with a uffd: flags um (missing) or uw."""
    found, current = [], ""
    for line in pathlib.Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            current = line
        elif line.startswith("VmFlags:") and {"um", "uw", "ui"} & set(line.split()[1:]):
            found.append(current)
    return found


def assert_no_userfault(pid):
    """The last reference may go a moment after its holder's death."""
    harness.wait_until(lambda: not ranges_with_userfault(pid),
                       f"process {pid} to have no uffd left", limit=20)


def assert_unharmed(pid, files_before=None):
    """Nothing of us is left in a process that we attached to."""
    assert harness.is_running(pid), f"process {pid} is gone"
    assert_not_traced(pid)
    assert_no_userfault(pid)
    if files_before is not None:
        # A monitor connection closes when QEMU's main loop comes round.
        harness.wait_until(lambda: len(open_files(pid)) <= len(files_before),
                           lambda: f"process {pid} to have no file more open than before "
                           f"({set(open_files(pid)) - set(files_before)})", limit=20)


def assert_goes_on(machine):
    """A guest that runs and gets on."""
    harness.wait_until(lambda: machine.status() == "running",
                       lambda: f"the VM to run (it is {machine.status()})", limit=30)
    machine.wait_for_progress()


def assert_running(machine, files_before=None):
    """The same, and it has nothing of us in it."""
    assert_goes_on(machine)
    assert_unharmed(machine.pid, files_before)


CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1 << 1, 1 << 2


def assert_unprivileged(pid, kept=0):
    """No thread of it has a capability but those, nor can get one."""
    own = pathlib.Path(f"/proc/{pid}/status")
    harness.wait_until(lambda: "NoNewPrivs:\t1" in own.read_text(), f"{pid} to begin to serve")
    looked_at = 0
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        try:
            text = (task / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has ended
        looked_at += 1
        status = dict(re.findall(r"^(\w+):\s*(\S+)", text, re.M))
        for name in ("CapEff", "CapPrm", "CapBnd"):
            assert int(status[name], 16) == kept, f"{name} of {task}: {status[name]}"
        for name in ("CapInh", "CapAmb"):
            assert int(status[name], 16) == 0, f"{name} of {task}: {status[name]}"
        assert status["NoNewPrivs"] == "1"
    assert looked_at, f"no thread of {pid} could be looked at"


def assert_only(folder, *names):
    """Nothing else is in a directory: no temporary file stayed."""
    found = sorted(entry.name for entry in pathlib.Path(folder).iterdir())
    assert found == sorted(names), f"{folder} holds {found}, expected {sorted(names)}"


def uses_no_processor(pid):
    """Whether a process uses no processor time for a moment: all its threads wait."""
    def spent():
        words = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(words[11]) + int(words[12])
    before = spent()
    try:
        harness.wait_until(lambda: spent() > before + 2, "", limit=0.5)
        return False
    except AssertionError:
        return True
