"""No more processes or threads can be started (pids.max, TasksMax): from the first one
on that fails, every command ends as it should, and nobody is harmed."""

import pytest

import checks
import harness
import system
import test_serve
import test_serve_hostile
import victims

MIB = 1 << 20
ENOUGH = 40  # threads and processes, for all of the commands here


def until_enough(group, run):
    """Runs it with one more allowed each time, and returns how many were too few."""
    for allowed in range(1, ENOUGH):
        with group.allowing(allowed):
            result = run()
        assert result.code >= 0, f"{allowed} allowed: {result}"
        if result.code == 0:
            return allowed - 1
        assert "Resource temporarily unavailable" in result.err, f"{allowed} allowed: {result}"
    raise AssertionError(f"{ENOUGH} are not enough: {result}")


def test_snapshot(world):
    group = system.TaskGroup(world)
    victim = victims.Writers(world, mib=16)
    image = world.path("x.img")

    def snapshot():
        assert not image.exists()
        result = world.vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(),
                              "--cpus", 2, "--output", image)
        victim.assert_live()
        checks.assert_unharmed(victim.pid)
        assert image.exists() == (result.code == 0)
        return result

    # The guard, the threads that stop it, attach to it, answer its faults, and compress.
    assert until_enough(group, snapshot) >= 3
    world.vmsnap("verify", image).expect("ok")


def test_snapshot_of_a_vm(world):
    group = system.TaskGroup(world)
    guest = victims.OrderedGuest(world)
    image = world.path("x.img")

    def snapshot():
        result = world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image)
        checks.assert_running(guest)
        checks.assert_not_traced(guest.pid)
        assert image.exists() == (result.code == 0)
        return result

    assert until_enough(group, snapshot) >= 3
    victims.check_ordered_live(world, guest)


@pytest.mark.parametrize("allowed, vmms", [(3, 1), (6, 1), (7, 1), (8, 2)])
def test_serve_lets_wait_whom_it_has_no_threads_for(world, allowed, vmms):
    """One VMM is served by five threads, or by two."""
    group = system.TaskGroup(world)
    image, raw = test_serve_hostile.image_of_writers(world, world)
    path = world.path("uffd.sock")
    with group.allowing(allowed):
        run = world.start_vmsnap("serve", image, "--socket", path, "--prefetch", "none")
        harness.wait_until(path.exists, "the socket")
    served = []
    for _ in range(vmms):
        served.append(test_serve.connect(world, path, [(0, 16 * MIB)]))
        assert test_serve.read_back(world, served[-1], 0, 4096) == raw[:4096]
    late = test_serve.connect(world, path, [(0, 16 * MIB)])
    harness.wait_until(lambda: run.warned_of(": cannot start a thread"), "it to say so")
    for client in served:
        assert test_serve.read_back(world, client, 0, len(raw)) == raw
    system.kill(served[0].pid)
    assert test_serve.read_back(world, late, 0, len(raw)) == raw
    assert run.process.poll() is None, str(run.wait())
