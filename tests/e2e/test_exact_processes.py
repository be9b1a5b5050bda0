"""The image of a process with threads that watch each other is one instant, on
every kind of memory, and while the kernel moves that memory about."""

import pytest

import checks
import harness
import system
import victims

MIB = 32


def snapshot_and_judge(world, victim, times=2, options=()):
    files = checks.open_files(victim.pid)
    for _ in range(times):
        folder = world.directory("out")
        image = folder / "process.img"
        figures = world.vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(),
                               "--output", image, "--json", *options).expect("ok").json
        checks.assert_only(folder, "process.img")
        checks.assert_unharmed(victim.pid, files)
        harness.verify(world, image)
        published = victim.check_image(world, image)
        assert min(published[:2]) > 0, f"a writer had not begun: {published}"
        victim.assert_live()
        pages = figures["pages"]
        assert pages["total"] == MIB * 256
        assert pages["zero"] + pages["duplicate"] + pages["stored"] == pages["total"], pages


@pytest.mark.parametrize("memory", ["anon", "thp", "memfd", "memfd-private"])
def test_memory(world, memory):
    victim = victims.Writers(world, memory=memory, mib=MIB)
    if memory == "thp":
        assert system.huge_kib(victim.pid) > 0, "no huge page was made"
    snapshot_and_judge(world, victim, times=3)


def test_deltas(world):
    """Compressing takes longer, and the instant is the same."""
    snapshot_and_judge(world, victims.Writers(world, mib=MIB), options=["--delta"])


@pytest.mark.parametrize("memory", ["hugetlb", "hugetlb-private"])
def test_hugetlb(world, memory):
    system.add_huge_pages(world, MIB + 8)
    snapshot_and_judge(world, victims.Writers(world, memory=memory, mib=MIB))


def test_many_ranges_and_writers(world):
    """Several ranges of one process are of the same instant."""
    victim = victims.Writers(world, mib=MIB, threads=6, split=1)
    assert len(victim.ranges) == 4
    snapshot_and_judge(world, victim)


@pytest.mark.parametrize("memory", ["anon", "thp", "memfd", "memfd-private"])
def test_swapped_and_paged_out(world, memory):
    system.add_swap(world)
    victim = victims.Writers(world, memory=memory, mib=MIB, disturb="pageout")
    if memory in ("anon", "thp"):
        harness.wait_until(lambda: system.anonymous_swap_kib(victim.pid) > 0, "pages in swap")
    snapshot_and_judge(world, victim)


@pytest.mark.parametrize("memory", ["anon", "memfd"])
def test_collapsed(world, memory):
    victim = victims.Writers(world, memory=memory, mib=MIB, disturb="collapse")
    if memory == "anon":
        harness.wait_until(lambda: system.huge_kib(victim.pid) > 0, "a collapsed huge page")
    snapshot_and_judge(world, victim)


def test_collapsed_and_split_again(world):
    """Huge pages come and go all the time."""
    system.add_swap(world)
    victim = victims.Writers(world, mib=MIB, disturb="collapse,pageout")
    snapshot_and_judge(world, victim)


def test_forking(world):
    """Children share the memory copy-on-write while it is captured."""
    victim = victims.Writers(world, mib=16, disturb="fork")
    image = world.path("process.img")
    for _ in range(3):
        world.vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(),
                     "--output", image, "--force").expect("ok")
        victim.check_image(world, image)
        victim.assert_live()
    checks.assert_unharmed(victim.pid)


def test_parts_of_the_ranges(world):
    """Only what was asked for is in the image, in ascending order."""
    victim = victims.Writers(world, mib=16)
    start = victim.ranges[0][0]
    _, fixed, length = map(str, victim.ask("fixed").split())
    first = start + int(fixed)
    ranges = [(first + 0x100000, first + 0x101000), (first, first + 0x3000)]
    image = world.path("part.img")
    world.vmsnap("snapshot", "--pid", victim.pid,
                 *(word for low, high in ranges for word in ("--range", f"0x{low:x}-0x{high:x}")),
                 "--output", image).expect("ok")
    raw = harness.export(world, image).read_bytes()
    victim.stop()
    whole = victim.dump(world.path("dump.raw")).read_bytes()
    victim.go_on()
    wanted = b"".join(whole[low - start:high - start] for low, high in sorted(ranges))
    assert int(length) > 0x101000 and raw == wanted
