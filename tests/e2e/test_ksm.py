"""Memory that KSM merges while it is captured. A file of its own, with which no other
test runs: KSM works on every QEMU of the host, whose snapshots may fail for it."""

import signal

import harness
import system
import test_exact_processes
import victims


def test_merged_by_ksm(world):
    system.run_ksm(world)
    victim = victims.Writers(world, mib=test_exact_processes.MIB, disturb="ksm", sweep_us=500000)
    harness.wait_until(lambda: system.merged_pages() > 0, "KSM to merge pages")
    test_exact_processes.snapshot_and_judge(world, victim)


def test_ksm_starts_while_snapshots_run(world):
    """The first finds it standing still, the second does not; the last of them puts it back."""
    def start():
        victim = victims.Writers(world, mib=16, disturb="ksm", sweep_us=500000)
        image = world.path("process.img")
        run = world.start_vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(),
                                 "--output", image, *harness.PATIENT,
                                 env={"VMSNAP_STOP_AT": "pause.resumed"})
        run.wait_stopped()
        return victim, image, run

    system.run_ksm(world)
    system.KSM_SWITCH.write_text("0")
    _, _, first = start()
    system.KSM_SWITCH.write_text("1")
    victim, image, second = start()
    assert system.KSM_SWITCH.read_text() == "0\n", "ksmd works while a snapshot is made"
    first.signal(signal.SIGCONT)
    second.signal(signal.SIGCONT)
    first.wait().expect("ok", "discarded")  # pages may have been merged in between
    second.wait().expect("ok")
    victim.check_image(world, image)
    system.wait_for_ksm()
