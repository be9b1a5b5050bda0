"""The oracles themselves: each accepts memory of one instant and rejects
memory of two. An oracle that cannot fail would make every other test green.

Nothing of vmsnap runs here: the images are made of /proc/PID/mem.
"""

import random

import pytest

import harness
import victims

PAGE = victims.PAGE


def pages_that_differ(one, other):
    return [page for page in range(len(one) // PAGE)
            if one[page * PAGE:(page + 1) * PAGE] != other[page * PAGE:(page + 1) * PAGE]]


def two_instants(world, victim):
    """Two dumps of a process, with progress between them."""
    dumps = []
    for _ in range(2):
        before = victim.progress()
        harness.wait_until(lambda start=before: victim.progress() > start + 2, "progress")
        victim.stop()
        dumps.append(victim.dump(world.path("dump.raw")).read_bytes())
        victim.go_on()
    return dumps


def assert_rejects_mixtures(world, judge, early, late, number=12):
    """`judge` accepts both dumps, and no mixture of them."""
    path = world.path("mixture.raw")
    for whole in (early, late):
        path.write_bytes(whole)
        good, said = judge(path)
        assert good, said
    changed = pages_that_differ(early, late)
    assert len(changed) > 2, "nothing happened between the dumps"
    choice = random.Random(1)
    for attempt in range(number):
        mixed = bytearray(early)
        if attempt % 2 == 0:  # a single page is from later
            taken = [choice.choice(changed[1:-1])]
        else:  # everything from some page on is
            place = choice.randrange(1, len(changed) - 1)
            taken = changed[place:]
        for page in taken:
            mixed[page * PAGE:(page + 1) * PAGE] = late[page * PAGE:(page + 1) * PAGE]
        path.write_bytes(mixed)
        good, said = judge(path)
        assert not good, f"accepts pages {taken[:4]}... of a later instant: {said}"


@pytest.mark.parametrize("memory", ["anon", "memfd"])
def test_writers_oracle(world, memory):
    victim = victims.Writers(world, memory=memory, mib=16)
    early, late = two_instants(world, victim)
    assert_rejects_mixtures(world, victim.judge, early, late)
    victim.assert_live()


def test_writers_oracle_sees_each_area(world):
    """One wrong byte in any area, or a page at a wrong place, is seen."""
    victim = victims.Writers(world, mib=16)
    before = victim.progress()
    harness.wait_until(lambda: victim.progress() > before + 100000, "progress")
    victim.stop()
    dump = victim.dump(world.path("dump.raw")).read_bytes()
    victim.go_on()
    area = len(dump) // 8
    path = world.path("wrong.raw")
    for name, start in (("writers", 0), ("uniform", 5 * area), ("fixed", 6 * area),
                        ("holes", 7 * area)):
        wrong = bytearray(dump)
        wrong[start + area // 2 + 2047] ^= 1
        path.write_bytes(wrong)
        good, said = victim.judge(path)
        assert not good, f"a flipped bit among the {name} goes unseen: {said}"
    for name, start in (("writers", 0), ("fixed", 6 * area)):
        wrong = bytearray(dump)
        one, other = start + 3 * PAGE, start + 4 * PAGE
        wrong[one:one + PAGE], wrong[other:other + PAGE] = (
            dump[other:other + PAGE], dump[one:one + PAGE])
        path.write_bytes(wrong)
        good, said = victim.judge(path)
        assert not good, f"two exchanged pages of the {name} go unseen: {said}"


def test_writers_check_notices_damage(world):
    """The process's own check of its live memory is no formality either."""
    victim = victims.Writers(world, mib=16)
    victim.assert_live()
    _, offset, _ = victim.ask("fixed").split()
    with open(f"/proc/{victim.pid}/mem", "r+b", buffering=0) as memory:
        memory.seek(victim.ranges[0][0] + int(offset) + 5 * PAGE)
        memory.write(b"damage")
    assert victim.ask("check").startswith("BAD fixed page 5 ")


def test_kvm_oracle(world):
    victim = victims.KvmOrdered(world)
    early, late = two_instants(world, victim)
    assert_rejects_mixtures(world, victim.judge, early, late)
    victim.assert_live()


def test_qemu_oracle(world):
    guest = victims.OrderedGuest(world)

    def judge(raw):
        return harness.run_checker("check_ordered", raw, "--address", victims.ORDERED_START,
                                   "--pages", (victims.ORDERED_END - victims.ORDERED_START) // PAGE)

    dumps = []
    for _ in range(2):
        guest.wait_for_progress(3)
        guest.qmp("stop")
        dumps.append(guest.read_physical(victims.ORDERED_START,
                                         victims.ORDERED_END - victims.ORDERED_START))
        guest.qmp("cont")
    assert_rejects_mixtures(world, judge, *dumps)
    victims.check_ordered_live(world, guest)
    guest.wait_for_progress()
