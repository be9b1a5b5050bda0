"""The command line and its manual page say the same; what scripts see is stable."""

import json
import os
import re
import shutil
import subprocess

import pytest

import checks
import harness
import qemu
import victims

COMMANDS = ["snapshot", "restore", "clones", "park", "unpark", "serve", "show", "verify", "export",
            "list", "import", "rm", "undelete", "prune", "repair", "diff", "key", "backup"]


def help_of(*command):
    done = subprocess.run([harness.VMSNAP, *command, "--help"], capture_output=True, text=True,
                          timeout=harness.LIMIT, check=False)
    assert done.returncode == 0 and not done.stderr, done
    return done.stdout


def manual():
    return (harness.SOURCE / "man/vmsnap.1").read_text()


def options_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--help", "--help-all"}


def options_in_manual():
    """mdoc writes an option as `Fl -name`; in running text it may be `--name`."""
    text = manual()
    found = {f"--{name}" for name in re.findall(r"\bFl -([a-z][a-z-]+)", text)}
    return found - {"--help"}


def test_every_command_is_in_help_and_manual():
    text = help_of()
    for command in COMMANDS:
        assert re.search(rf"^\s+{command}\b", text, re.MULTILINE), f"{command} is not in --help"
        assert re.search(rf"\b{command}\b", manual()), f"{command} is not in vmsnap.1"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_manual(command):
    missing = options_in(help_of(command)) - options_in_manual()
    assert not missing, f"vmsnap {command} has {sorted(missing)}, vmsnap.1 does not"


def test_every_option_of_the_manual_exists():
    real = options_in(help_of()).union(*(options_in(help_of(command)) for command in COMMANDS))
    # QEMU's own options are written with one dash and are not ours.
    unknown = options_in_manual() - real
    assert not unknown, f"vmsnap.1 describes {sorted(unknown)}, which no command has"


def test_every_exit_status_is_in_the_manual():
    for name, number in harness.EXIT.items():
        assert re.search(rf"^\.It (Sy )?{number}\b", manual(), re.MULTILINE), (
            f"exit status {number} ({name}) is not listed in vmsnap.1")


@pytest.mark.parametrize("page", ["vmsnap.1", "vmsnap-backup.5", "vmsnap-image.5", "vmsnap-store.5"])
def test_manual_pages_are_clean(page):
    harness.need(shutil.which("mandoc"), "mandoc", "not installed")
    done = subprocess.run(["mandoc", "-Tlint", "-W", "warning", harness.SOURCE / "man" / page],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_version():
    done = subprocess.run([harness.VMSNAP, "--version"], capture_output=True, text=True, check=True)
    assert re.search(r"\d+\.\d+\.\d+", done.stdout), done.stdout


@pytest.fixture(scope="module", name="victim")
def a_victim(shared_world):
    # Some of its pages stay untouched for as long as this takes.
    return victims.Writers(shared_world, mib=16, touch_us=1000000)


@pytest.fixture(scope="module", name="image")
def an_image(shared_world, victim):
    path = shared_world.path("x.img")
    shared_world.vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(),
                        "--output", path).expect("ok")
    return path


def test_json_of_a_snapshot(shared_world, victim):
    image = shared_world.path("x.img")
    result = shared_world.vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(),
                                 "--output", image, "--json").expect("ok")
    figures = result.json
    assert set(figures) >= {"id", "file", "pause_ms", "total_ms", "attach_ms", "pages", "bytes",
                            "write_faults", "fault_us"}, figures
    assert set(figures["pages"]) >= {"total", "zero", "duplicate", "stored"}
    assert set(figures["bytes"]) >= {"guest", "image"}
    assert set(figures["fault_us"]) >= {"p50", "p99", "max"}
    assert figures["bytes"]["image"] == image.stat().st_size
    assert figures["bytes"]["guest"] == 16 << 20
    assert 0 < figures["pause_ms"] <= figures["total_ms"]
    assert re.fullmatch(r"[0-9a-f]{32}", figures["id"])
    assert not result.err.strip(), f"nothing to say beside the JSON: {result}"


def test_json_of_a_name_that_is_not_utf8(shared_world, victim):
    folder = shared_world.directory("odd")
    image = folder / os.fsdecode(b"\xff.img")
    result = shared_world.vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(),
                                 "--output", image, "--json").expect("ok")
    assert result.json["file"] == f"{folder}/\ufffd.img"
    checks.assert_only(folder, image.name)


def test_json_of_an_error(shared_world, victim):
    """A failure's reason is on stderr, and stdout holds JSON or nothing."""
    result = shared_world.vmsnap("snapshot", "--pid", victim.pid, "--range", "1000-2000",
                                 "--output", shared_world.path("x.img"), "--json")
    assert result.code > 0 and result.err.strip(), str(result)
    if result.out.strip():
        json.loads(result.out)


@pytest.mark.parametrize("wrong", [
    ["--tag", ""], ["--tag", "x" * 256], ["--tag", "a\nb"], ["--dedup-domain", "x" * 256],
    [word for i in range(65) for word in ("--tag", str(i))]],
    ids=["empty", "long", "control", "domain", "many"])
def test_tags_are_looked_at_before_anything_is_done(shared_world, victim, image, wrong):
    store = shared_world.path("store")
    for command in (["snapshot", "--pid", victim.pid, *victim.range_arguments()],
                    ["import", image], ["park", "--qmp", shared_world.path("none.qmp")]):
        result = shared_world.vmsnap(*command, "--store", store, *wrong).expect("usage")
        assert not result.out and "damaged" not in result.err, str(result)
    assert not store.exists()


def test_no_progress_in_a_pipe(shared_world, victim):
    """Without a terminal there is a summary and no drawing."""
    result = shared_world.vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(),
                                 "--output", shared_world.path("x.img")).expect("ok")
    for text in (result.out, result.err):
        assert "\r" not in text and "\x1b" not in text, repr(text)
    assert result.out.strip(), "no summary"


def test_show(shared_world, image):
    text = shared_world.vmsnap("show", image).expect("ok").out
    fields = shared_world.vmsnap("show", image, "--json").expect("ok").json
    assert fields["id"] in text
    assert sum(int(region["length"]) for region in fields["regions"]) == 16 << 20


def test_verify_json(shared_world, image):
    result = shared_world.vmsnap("verify", image, "--json").expect("ok")
    assert isinstance(result.json, dict)


def test_export_is_sparse_and_not_overwritten(shared_world, image):
    raw = harness.export(shared_world, image)
    assert raw.stat().st_blocks * 512 < raw.stat().st_size, "zero pages take up disk space"
    before = raw.stat().st_mtime_ns
    shared_world.vmsnap("export", image, "--raw", raw).expect("exists")
    assert raw.stat().st_mtime_ns == before


@pytest.mark.parametrize("command", [["show"], ["verify"], ["export", "--raw", "{out}"],
                                     ["restore", "--run-dir", "{out}"],
                                     ["serve", "--socket", "{out}"]],
                         ids=lambda command: command[0])
def test_what_is_no_image(shared_world, image, command):
    """Neither a text, nor an empty file, nor half an image, nor one that is not there."""
    half = shared_world.path("half.img")
    half.write_bytes(image.read_bytes()[:image.stat().st_size // 2])
    text = shared_world.path("text.img")
    text.write_text("This is no image.\n" * 1000)
    empty = shared_world.path("empty.img")
    empty.touch()
    for file, code in ((half, "damaged"), (text, "damaged"), (empty, "damaged"),
                       (shared_world.path("absent.img"), "io")):
        folder = shared_world.directory("out")
        words = [word.format(out=folder / "out") for word in command[1:]]
        result = shared_world.vmsnap(command[0], file, *words)
        assert result.code == harness.EXIT[code], f"{file.name}: {result}"
        assert not (folder / "out").is_file(), "a file was made of it"


def test_a_process_image_cannot_be_restored(shared_world, image):
    result = shared_world.vmsnap("restore", image, "--run-dir", shared_world.path("run"))
    assert result.code in (harness.EXIT["refused"], harness.EXIT["usage"],
                           harness.EXIT["unsupported"]), str(result)
    assert result.err.strip()


def test_dry_run(shared_world):
    """Prints the command that would start the VM, and starts nothing."""
    guest = victims.OrderedGuest(shared_world)
    image = shared_world.path("vm.img")
    shared_world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    before = set(shared_world.processes())
    run_dir = shared_world.path("run")
    result = shared_world.vmsnap("restore", image, "--run-dir", run_dir, "--dry-run", "--",
                                 "-name", "extra").expect("ok")
    assert "qemu-system-x86_64" in result.out and "-incoming" in result.out, str(result)
    assert str(guest.qmp_socket) not in result.out, "the original's monitor would be taken"
    assert str(guest.serial) not in result.out, "the original's console would be overwritten"
    assert re.search(r"-name'?\s+'?extra", result.out), "the extra arguments are missing"
    assert set(shared_world.processes()) <= before
    checks.assert_running(guest)


def test_a_restore_keeps_off_its_original(shared_world):
    """What the original writes and listens on stays its own; its -readconfig is refused."""
    capture, usb, listens = (shared_world.path(name) for name in ("n.pcap", "u.pcap", "n.sock"))
    config = shared_world.path("vm.cfg")
    config.write_text('[global]\n  driver = "usb-mouse"\n  property = "serial"\n  value = "1"\n')
    guest = victims.OrderedGuest(shared_world, extra=[
        "-netdev", f"stream,id=n,server=on,addr.type=unix,addr.path={listens}",
        "-device", "e1000,netdev=n", "-object", f"filter-dump,id=f,netdev=n,file={capture}",
        "-device", "qemu-xhci", "-device", f"usb-mouse,pcap={usb}", "-readconfig", config])
    harness.wait_until(listens.exists, "the original to listen")
    files = [path.stat() for path in (capture, usb, listens)]
    image, run_dir = shared_world.path("vm.img"), shared_world.path("run")
    shared_world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    refused = shared_world.vmsnap("restore", image, "--run-dir", run_dir).expect("usage")
    assert str(config) in refused.err and "after --" in refused.err and not run_dir.exists()
    shared_world.vmsnap("restore", image, "--run-dir", run_dir, "--detach", "--",
                        "-readconfig", config).expect("ok")
    restored = qemu.restored(run_dir)
    restored.wait_for_progress()
    assert (run_dir / "net-n.sock").is_socket()
    restored.qmp("quit")
    harness.wait_until(lambda: not harness.is_running(restored.pid), "the restored VM to end")
    for path, before in zip((capture, usb, listens), files):
        now = path.stat()
        assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), path
    checks.assert_running(guest)
