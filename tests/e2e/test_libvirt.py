"""VMs whose only monitor is libvirt's: snapshots by way of libvirt, which may fail at
any moment as vmsnap may, and VMs that are restored without it."""

import shutil
import signal
import subprocess
import time

import pytest

import checks
import harness
import libvirt
import qemu
import victims
from test_kill import SNAPSHOT_POINTS


@pytest.fixture(scope="module", name="daemon")
def daemon_of_this_file(shared_world):
    return libvirt.Daemon(shared_world)


@pytest.fixture(scope="module", name="ordered")
def ordered_domain(shared_world, daemon):
    return libvirt.OrderedDomain(shared_world, daemon)


def assert_as_before(domain, files=None):
    checks.assert_unharmed(domain.pid, files)
    assert domain.state() == "running"
    domain.wait_for_progress()


def assert_nothing_left(world):
    harness.wait_until(lambda: not world.vmsnap_processes(),
                       lambda: f"helper processes to end: {world.processes()}", limit=30)


def snapshot(world, domain, *arguments, **options):
    image = world.path("x.img")
    return image, world.vmsnap("snapshot", *domain.arguments, "--output", image, *arguments, **options)


def test_an_image_is_one_instant(shared_world, ordered):
    files = checks.open_files(ordered.pid)
    for _ in range(5):
        image, done = snapshot(shared_world, ordered, "--json")
        done.expect("ok")
        victims.check_ordered_image(shared_world, image)
        assert done.json["pause_ms"] > 0
    assert_as_before(ordered, files)
    assert_nothing_left(shared_world)
    victims.check_ordered_live(shared_world, ordered)


def test_a_paused_domain_stays_so(shared_world, ordered):
    files = checks.open_files(ordered.pid)
    ordered.daemon.virsh("suspend", ordered.name)
    image, done = snapshot(shared_world, ordered)
    done.expect("ok")
    assert ordered.state() == "paused"
    ordered.daemon.virsh("resume", ordered.name)
    victims.check_ordered_image(shared_world, image)
    assert_as_before(ordered)
    # What QEMU keeps of it as long as it is paused, the next one takes away.
    snapshot(shared_world, ordered)[1].expect("ok")
    assert_as_before(ordered, files)


@pytest.mark.parametrize("point", SNAPSHOT_POINTS)
def test_kill(shared_world, ordered, point):
    files = checks.open_files(ordered.pid)
    folder = shared_world.directory("out")
    image = folder / "x.img"
    command = ["snapshot", *ordered.arguments, "--output", image]
    result = shared_world.vmsnap(*command, *harness.until_written(point),
                                 env={"VMSNAP_KILL_AT": point})
    assert result.code == -signal.SIGKILL, f"never got to {point}: {result}"
    harness.wait_until(lambda: ordered.status() == "running", "the domain to run again", limit=30)
    assert_as_before(ordered)
    assert_nothing_left(shared_world)
    shared_world.vmsnap(*command, "--force").expect("ok")
    checks.assert_only(folder, "x.img")
    victims.check_ordered_image(shared_world, image)
    victims.check_ordered_live(shared_world, ordered)
    assert_as_before(ordered, files)


def assert_resumed_by_others(world, domain, run, image):
    failed = run.wait().expect("vm")
    assert "somebody else resumed the VM" in failed.err, failed
    assert not image.exists()
    assert_as_before(domain)
    assert_nothing_left(world)


@pytest.mark.parametrize("point", ["pause.stopped", "pause.state_saved", "pause.armed"])
def test_resumed_in_the_pause(shared_world, ordered, point):
    """By somebody else: of that, too, libvirt tells, and late."""
    image = shared_world.path("x.img")
    run = shared_world.start_vmsnap("snapshot", *ordered.arguments, "--output", image,
                                    *harness.PATIENT, env={"VMSNAP_STOP_AT": point})
    run.wait_stopped()
    ordered.daemon.virsh("resume", ordered.name)
    run.signal(signal.SIGCONT)
    assert_resumed_by_others(shared_world, ordered, run, image)


def test_resumed_and_paused_in_the_pause(shared_world, ordered):
    image = shared_world.path("x.img")
    virsh = f"virsh -c '{ordered.daemon.uri}'"
    run = shared_world.start_vmsnap(
        "snapshot", *ordered.arguments, "--output", image, "--in-pause",
        f"{virsh} resume {ordered.name}; {virsh} suspend {ordered.name}")
    assert_resumed_by_others(shared_world, ordered, run, image)


@pytest.fixture(scope="module", name="late")
def vmsnap_that_hears_late(shared_world):
    """Of events: see late_events.py."""
    folder = shared_world.directory("late")
    shutil.copy(harness.VMSNAP, folder / "vmsnap")
    shutil.copy(harness.LIBVIRT_MONITOR, folder / "real-monitor")
    shutil.copy(harness.SOURCE / "tests/e2e/late_events.py", folder / "vmsnap-libvirt-monitor")
    return folder / "vmsnap"


@pytest.mark.parametrize("before", ["running", "paused"])
@pytest.mark.parametrize("meanwhile", ["", "resume", "resume suspend"])
def test_late_events(shared_world, ordered, late, before, meanwhile):
    """What others did in the pause is known only when it is over."""
    image = shared_world.path("x.img")
    virsh = f"virsh -c '{ordered.daemon.uri}'"
    if before == "paused":
        ordered.daemon.virsh("suspend", ordered.name)
        time.sleep(0.5)  # so that its event has come
    done = subprocess.run(
        [late, "snapshot", *ordered.arguments, "--output", image, "--in-pause",
         "; ".join(f"{virsh} {word} {ordered.name}" for word in meanwhile.split()) or "true"],
        capture_output=True, text=True, check=False, timeout=harness.LIMIT)
    if meanwhile:
        assert done.returncode == harness.EXIT["vm"], done
        assert "somebody else resumed the VM" in done.stderr
        assert not image.exists()
    else:
        assert done.returncode == 0, done
        victims.check_ordered_image(shared_world, image)
    if before == "paused":
        assert ordered.state() == ("running" if meanwhile == "resume" else "paused")
        if meanwhile != "resume":
            ordered.daemon.virsh("resume", ordered.name)
    assert_as_before(ordered)


@pytest.mark.parametrize("point", ["snapshot.registered", "pause.stopped", "pause.armed"])
def test_libvirt_dies(world, point):
    """The snapshot fails; a domain that stands still then runs as soon as there is a
    libvirt again, which the guard waits for."""
    daemon = libvirt.Daemon(world)
    domain = libvirt.OrderedDomain(world, daemon)
    image = world.path("x.img")
    run = world.start_vmsnap("snapshot", *domain.arguments, "--output", image, *harness.PATIENT,
                             env={"VMSNAP_STOP_AT": point})
    run.wait_stopped()
    daemon.kill()
    run.signal(signal.SIGCONT)
    failed = run.wait().expect("vm")
    assert "libvirt domain 'ordered'" in failed.err, failed
    assert not image.exists()
    if point.startswith("pause."):
        assert "a guard" in failed.err, failed
    daemon.start()
    harness.wait_until(lambda: domain.state() == "running", "the domain to run again")
    assert_as_before(domain)
    assert_nothing_left(world)
    image, done = snapshot(world, domain)
    done.expect("ok")
    victims.check_ordered_image(world, image)


def test_libvirt_hangs(world):
    """In the pause. It is given some seconds; then the guard goes on asking."""
    daemon = libvirt.Daemon(world)
    domain = libvirt.OrderedDomain(world, daemon)
    image = world.path("x.img")
    run = world.start_vmsnap("snapshot", *domain.arguments, "--output", image, *harness.PATIENT,
                             env={"VMSNAP_STOP_AT": "pause.stopped"})
    run.wait_stopped()
    daemon.process.send_signal(signal.SIGSTOP)
    run.signal(signal.SIGCONT)
    failed = run.wait().expect("vm")
    assert "no answer in time" in failed.err, failed
    assert not image.exists()
    daemon.process.send_signal(signal.SIGCONT)
    harness.wait_until(lambda: domain.state() == "running", "the domain to run again")
    assert_as_before(domain)
    assert_nothing_left(world)


def test_libvirt_hangs_from_the_beginning(world, daemon, ordered):
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        run = world.start_vmsnap("snapshot", *ordered.arguments, "--output", world.path("x.img"))
        harness.wait_until(lambda: len(world.vmsnap_processes()) >= 2, "libvirt's client to begin")
        run.signal(signal.SIGINT)
        run.wait().expect("interrupted")
        assert_nothing_left(world)
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert_as_before(ordered)


def test_linux_is_restored_without_libvirt(world, daemon):
    domain = libvirt.LinuxDomain(world, daemon)
    files = checks.open_files(domain.pid)
    image, done = snapshot(world, domain, "--json")
    done.expect("ok")
    victims.assert_linux_goes_on(domain)
    assert_as_before(domain, files)
    assert world.vmsnap("show", image, "--json").expect("ok").json["source"]["name"] == "linux"

    def restored_goes_on():
        run_dir = world.path("run")
        world.vmsnap("restore", image, "--run-dir", run_dir).expect("ok")
        pid = int((run_dir / "qemu.pid").read_text())
        victims.assert_linux_goes_on(
            qemu.Machine(pid, run_dir / "qmp.sock", run_dir / "charserial0.log"))
    restored_goes_on()
    # libvirt removes what it made for the domain, which the command line names.
    daemon.virsh("destroy", domain.name)
    restored_goes_on()

    farm = world.path("farm")
    world.vmsnap("restore", image, "--clones", 2, "--run-dir", farm, "--detach").expect("ok")
    world.vmsnap("clones", "--run-dir", farm, "--stop").expect("ok")


def test_backup(shared_world, ordered):
    config = shared_world.path("backup.toml")
    store = shared_world.path("store")
    config.write_text(f'store = "{store}"\nsample = "100%"\n'
                      f'[[vm]]\nlibvirt = "ordered"\nconnect = "{ordered.daemon.uri}"\n')
    shared_world.vmsnap("backup", "--config", config).expect("ok")
    listed = shared_world.vmsnap("list", "--store", store, "--vm", "ordered", "--json").expect("ok")
    assert len(listed.json) == 1, listed
    assert_as_before(ordered)


def test_what_cannot_be(shared_world, ordered):
    def says(code, *arguments):
        failed = shared_world.vmsnap("snapshot", *arguments, "--output",
                                     shared_world.path("x.img")).expect(code)
        return failed.err
    uri = ordered.daemon.uri
    assert "Domain not found" in says("vm", "--libvirt", "nobody", "--connect", uri)
    assert "Failed to connect" in says("vm", "--libvirt", "ordered", "--connect",
                                       "qemu:///session?socket=/nowhere")
    assert "excludes" in says("usage", "--libvirt", "ordered", "--qmp", "/x")
    assert "--libvirt" in says("usage", "--connect", uri, "--qmp", "/x")
    # By number and by UUID, as virsh takes them.
    number = ordered.daemon.virsh("domid", ordered.name)
    for name in (number, ordered.daemon.virsh("domuuid", ordered.name)):
        shared_world.vmsnap("snapshot", "--libvirt", name, "--connect", uri, "--output",
                            shared_world.path("x.img")).expect("ok")
    assert_as_before(ordered)
