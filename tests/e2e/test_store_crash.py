"""The power goes at any moment: whatever order the disk had, each snapshot that
was committed is there and whole, and the store can be used."""

import random

import pytest

import crash_replay
import harness
import victims

RECORDER = harness.BUILD / "tests" / "librecord_writes.so"
CRASHES = 40


class Recorded:
    """Imports, a removal and prunes of a store, with every step to the disk."""

    def __init__(self, world):
        self.world, self.store, self.log = world, world.path("store"), world.path("log")
        victim = victims.Writers(world, mib=16)
        self.images = []
        for _ in range(3):
            self.images.append(world.path("x.img"))
            world.vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(),
                         "--output", self.images[-1]).expect("ok")
        victim.stop()
        # After each command: how many steps there were, and which snapshots.
        self.ends, self.there = [], []
        for image in self.images:
            self._run("import", image, "--store", self.store)
        self._run("rm", "--store", self.store, *sorted(self.there[0]))
        self._run("prune", "--store", self.store)
        self._run("prune", "--store", self.store)
        self.steps = crash_replay.read(self.log)
        assert len(self.steps) > 50

    def _run(self, *arguments):
        env = {"LD_PRELOAD": str(RECORDER), "RECORD_UNDER": str(self.store),
               "RECORD_INTO": str(self.log)}
        self.world.vmsnap(*arguments, env=env).expect("ok")
        self.ends.append(len(crash_replay.read(self.log)))
        self.there.append(self.ids(self.store))

    def ids(self, store):
        return set(self.world.vmsnap("list", "--store", store, "--quiet").expect("ok").out.split())

    def complaints(self, chance, without=None):
        """What is wrong after crashes at some points; `without` an operation
        that the disk then does not obey."""
        disk, done, found = crash_replay.Disk(), 0, []
        points = range(self.ends[0], len(self.steps) + 1)
        for point in sorted(chance.sample(points, min(CRASHES, len(points)))):
            for step in self.steps[done:point]:
                if step[0] != without:
                    disk.apply(step)
            done = point
            left = self.world.directory("crash")
            disk.crash(chance, str(self.store), left)
            try:
                self.check(left, max(i for i, end in enumerate(self.ends) if end <= point))
            except AssertionError as wrong:
                found.append(f"after step {point} of {len(self.steps)}: {wrong}")
        return found

    def check(self, left, finished):
        now, then = self.there[finished], self.there[min(finished + 1, len(self.there) - 1)]
        found = self.ids(left)
        assert found >= now & then, f"{now & then - found} is gone"
        assert found <= now | then, f"{found - now - then} is new"
        for command in (["verify"], ["import", self.images[0]], ["prune"], ["verify"]):
            self.world.vmsnap(*command, "--store", left).expect("ok")


@pytest.fixture(name="recorded")
def a_record(world):
    return Recorded(world)


def test_power_fails(recorded):
    assert not recorded.complaints(random.Random(1))


@pytest.mark.parametrize("lie", [crash_replay.SYNC, crash_replay.SYNC_FOLDER],
                         ids=["files", "folders"])
def test_a_disk_that_lies_is_noticed(recorded, lie):
    """Without fsync, snapshots are lost: the test above could fail."""
    assert recorded.complaints(random.Random(1), without=lie)
