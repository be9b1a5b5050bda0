"""The guests and processes that the tests snapshot, each with its oracle."""

import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import time

import harness
import linux_guest
import qemu

# The memory that the boot sector writes (guest-physical).
ORDERED_START = 16 << 20
ORDERED_END = 80 << 20
PAGE = 4096


def build_boot_sector(folder, start=ORDERED_START, end=ORDERED_END):
    """Assembles tests/guests/ordered.S into a boot sector."""
    return assemble("ordered.S", pathlib.Path(folder) / "boot.img", 512, start, end,
                    bits="--32", emulation="elf_i386")


def build_rom(folder, start=ORDERED_START, end=ORDERED_END):
    """Assembles tests/guests/async_fault.S into a ROM."""
    return assemble("async_fault.S", pathlib.Path(folder) / "rom.bin", 65536, start, end,
                    bits="--64", emulation="elf_x86_64")


def assemble(name, image, size, start, end, bits, emulation):
    """A program of tests/guests, with START and END, into a flat file of `size` bytes."""
    for command in (["as", bits, "--defsym", f"START={start}", "--defsym", f"END={end}",
                     "-o", f"{image}.o", harness.SOURCE / "tests/guests" / name],
                    ["ld", "-m", emulation, "-Ttext=0x7c00", "--oformat", "binary",
                     "-o", image, f"{image}.o"]):
        subprocess.run(command, check=True)
    assert image.stat().st_size == size
    image.chmod(0o644)
    return image


class OrderedGuest(qemu.Qemu):
    """The boot sector under QEMU; ready means that it is counting."""

    def __init__(self, world, ram="anon", **options):
        image = build_boot_sector(world.directory("boot"))
        boot = ["-drive", f"file={image},format=raw,if=floppy,readonly=on"]
        super().__init__(world, boot, ram=ram, **options)
        self.wait_for_text("R.")


class AsyncFaultGuest(qemu.Qemu):
    """async_fault.S under KVM: two tasks, of which the second runs while a page
    of the first is not there. Ready means that the first has passed over all of
    its pages, those from 16 MiB to the end of memory."""

    def __init__(self, world, mib):
        harness.need(os.access("/dev/kvm", os.R_OK | os.W_OK), "kvm", "there is no /dev/kvm")
        rom = build_rom(world.directory("boot"), end=mib << 20)
        # Nested, this MSR is offered and then refused, whereupon QEMU aborts.
        cpu = "host,arch-capabilities=off"
        try:
            super().__init__(world, ["-cpu", cpu, "-bios", str(rom)], mib=mib, accel="kvm")
        except AssertionError as error:
            harness.need(False, "kvm", f"KVM does not run the guest: {error}")
        self.wait_for_start()

    def wait_for_start(self):
        """Probes: a KVM that does not run it, or has no asynchronous page faults,
        is a reason to skip."""
        try:
            harness.wait_until(lambda: self.serial_text() or not harness.is_running(self.pid),
                               "a sign of the guest", limit=20)
        except AssertionError:
            harness.need(False, "kvm", "KVM does not run a guest of a few hundred instructions")
        said = self.serial_text()[:1]
        harness.need(said not in ("", "X"), "kvm",
                     f"KVM does not run the guest: {said!r} {self.log.read_text()[-300:]}")
        harness.need(said != "N", "kvm", "KVM offers no asynchronous page faults")
        self.wait_for_text("R.")


def check_ordered(raw, offset=0, start=ORDERED_START, end=ORDERED_END):
    """Asserts that a raw file is one instant; returns (edges, counter)."""
    good, said = harness.run_checker("check_ordered", raw, "--address", start, "--pages",
                                     (end - start) // PAGE, "--offset", offset)
    assert good, f"not one instant: {said}"
    return tuple(map(int, said.split()[1:]))


def guest_physical(world, image, raw, start=ORDERED_START, end=ORDERED_END):
    """Cuts guest memory out of a raw export; returns a new file. The regions of
    main memory follow one another, whatever lies between them in the export."""
    out = world.path("ram.raw")
    with open(raw, "rb") as source, open(out, "wb") as target:
        wanted, offset = start, 0
        for region in harness.regions(world, image):
            length, address = int(region["length"]), region_address(region)
            main = region["name"].split("/")[-1] in ("pc.ram", "ram0", "ram1")
            if main and address is not None and address <= wanted < address + length:
                stop = min(end, address + length)
                source.seek(offset + wanted - address)
                target.write(source.read(stop - wanted))
                wanted = stop
            offset += length
        assert wanted == end, f"the image has no memory at {wanted:x}"
    return out


def region_address(region):
    """A region's guest-physical or process address; None if it has none."""
    value = region.get("address")
    if isinstance(value, str):
        value = int(value, 16)
    return None if value is None or value == (1 << 64) - 1 else value


def check_ordered_image(world, image):
    """Export, cut, check: an image of an OrderedGuest."""
    raw = harness.export(world, image)
    ram = guest_physical(world, image, raw)
    try:
        return check_ordered(ram)
    finally:
        raw.unlink()
        ram.unlink()


def check_ordered_live(world, machine):
    """The same for the memory of a guest that is there: stops it, looks, and
    lets it go on."""
    machine.qmp("stop")
    try:
        ram = world.path("live.raw")
        ram.write_bytes(b"".join(
            machine.read_physical(start, 16 << 20)
            for start in range(ORDERED_START, ORDERED_END, 16 << 20)))
        try:
            return check_ordered(ram)
        finally:
            ram.unlink()
    finally:
        machine.qmp("cont")


class LinuxGuest(qemu.Qemu):
    """Debian's kernel with linux_guest.py's init; ready means that it has ticked
    and checked its memory once."""

    def __init__(self, world, ram="anon", check_mib=8, with_agent=False, **options):
        # Copies, which an unprivileged QEMU can read wherever our source lies.
        folder = world.directory("boot")
        boot = linux_guest.boot_arguments(check_mib, with_agent)
        for place in (1, 3):
            boot[place] = shutil.copy(boot[place], folder)
            os.chmod(boot[place], 0o644)
        super().__init__(world, boot, ram=ram, **options)
        self.wait_for_text("tick 1")
        self.wait_for_text("memcheck 1 ok")


def assert_linux_goes_on(machine, more_ticks=3, more_checks=2):
    """Ticks and memory checks come on, from now."""
    ticks = linux_guest.ticks(machine.serial_text())
    checks = linux_guest.memory_checks(machine.serial_text())

    def later():
        text = machine.serial_text()
        assert harness.is_running(machine.pid), f"QEMU ended; its console:\n{text[-2000:]}"
        return (linux_guest.ticks(text) >= ticks + more_ticks
                and linux_guest.memory_checks(text) >= checks + more_checks)
    harness.wait_until(later, lambda: f"ticks beyond {ticks} and memory checks beyond {checks}; "
                                      f"the console ends with {machine.serial_text()[-300:]!r}")


class Talker:
    """A program of tests/guests that prints RANGE lines and READY, and answers
    a line on its stdin with a line."""

    def __init__(self, world, name, *arguments):
        self.name = name
        self._stderr = open(world.path(f"{name}.err"), "w+", encoding="utf-8")
        self.process = world.start([harness.GUESTS / name, *arguments], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=self._stderr)
        self.pid = self.process.pid
        self._buffer = b""
        self.ranges = []
        while True:
            line = self.read_line()
            if line.startswith("SKIP "):
                harness.need(False, self.skip_name(line), f"{name}: {line[5:]}")
            if line == "READY":
                break
            found = re.fullmatch(r"RANGE ([0-9a-f]+)-([0-9a-f]+)", line)
            assert found, f"{name} printed {line!r}"
            self.ranges.append(tuple(int(end, 16) for end in found.groups()))

    @staticmethod
    def skip_name(line):
        return "hugetlb" if "hugetlb" in line else "ksm" if "MERGEABLE" in line else "kvm"

    def read_line(self, limit=harness.LIMIT):
        end = time.monotonic() + limit
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], end - time.monotonic())
            assert ready, f"{self.name} said nothing for {limit:.0f} s"
            part = os.read(self.process.stdout.fileno(), 65536)
            self._stderr.seek(0)
            assert part, f"{self.name} ended, {self.process.wait()}: {self._stderr.read()}"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def send(self, line):
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def ask(self, line):
        self.send(line)
        return self.read_line()

    def range_arguments(self):
        return [word for start, end in self.ranges for word in ("--range", f"{start:x}-{end:x}")]

    def progress(self):
        return int(self.ask("progress").split()[1])

    def assert_live(self):
        """Its memory is right, by its own oracle, and it gets on."""
        said = self.ask("check")
        assert said.startswith("OK "), f"the memory of the running {self.name}: {said}"
        before = self.progress()
        harness.wait_until(lambda: self.progress() > before, f"progress of {self.name}")

    def stop(self):
        os.kill(self.pid, signal.SIGSTOP)
        harness.wait_until(lambda: all(
            harness.process_state(f"{self.pid}/task/{task}") in ("T", None)
            for task in os.listdir(f"/proc/{self.pid}/task")), f"{self.name} to stop")

    def go_on(self):
        os.kill(self.pid, signal.SIGCONT)

    def dump(self, path):
        """Its ranges as a raw file, like an export; it should be stopped."""
        with open(path, "wb") as out:
            for start, end in self.ranges:
                out.write(qemu.read_memory(self.pid, start, end - start))
        return path


class Writers(Talker):
    """writers.cpp: threads that watch each other."""

    def __init__(self, world, memory="anon", mib=64, threads=2, seed=1, **options):
        extra = [word for name, value in options.items()
                 for word in ("--" + name.replace("_", "-"), value)]
        self._shape = ["--mib", mib, "--threads", threads, "--seed", seed]
        super().__init__(world, "writers", "--memory", memory, *self._shape, *extra)

    def judge(self, raw):
        """What check_writers says of a raw file: (is good, its words)."""
        return harness.run_checker("check_writers", raw, *self._shape)

    def check_image(self, world, image):
        raw = harness.export(world, image)
        good, said = self.judge(raw)
        assert good, f"not one instant: {said}"
        raw.unlink()
        return [int(word) for word in said.split()[2:]]


class KvmOrdered(Talker):
    """kvm_ordered.cpp: counters written by a guest under KVM_RUN."""

    START = 1 << 20  # guest-physical address of the first counter

    def __init__(self, world, mib=32, memory="anon"):
        self.mib = mib
        super().__init__(world, "kvm_ordered", "--mib", mib, "--memory", memory)

    def judge(self, raw):
        return harness.run_checker("check_ordered", raw, "--address", self.START, "--offset",
                                   self.START, "--pages", ((self.mib << 20) - self.START) // PAGE)

    def check_image(self, world, image):
        raw = harness.export(world, image)
        good, said = self.judge(raw)
        assert good, f"not one instant: {said}"
        raw.unlink()
        return tuple(map(int, said.split()[1:]))
