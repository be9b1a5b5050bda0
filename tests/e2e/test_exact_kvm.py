"""The image of memory that a guest writes through KVM_RUN is one instant."""

import pytest

import checks
import harness
import victims


@pytest.mark.parametrize("memory", ["anon", "thp", "memfd"])
def test_guest_under_kvm(world, memory):
    victim = victims.KvmOrdered(world, memory=memory)
    files = checks.open_files(victim.pid)
    last = 0
    for _ in range(5):
        image = world.path("kvm.img")
        world.vmsnap("snapshot", "--pid", victim.pid, *victim.range_arguments(),
                     "--output", image).expect("ok")
        checks.assert_unharmed(victim.pid, files)
        harness.verify(world, image)
        edges, counter = victim.check_image(world, image)
        assert edges <= 1 and counter > last, f"{edges} edges, counter {counter} after {last}"
        last = counter
        victim.assert_live()
