"""Clones: many VMs from one image, on one memory."""

import os
import signal

import farms
import harness
import qemu
import victims

PAGE = 4096


def test_go_on_and_share(world):
    farm = farms.Farm(world, farms.linux_image(world))
    clones = farm.add(3)
    for clone in clones:
        victims.assert_linux_goes_on(clone)
    status = farm.status()
    assert [clone["state"] for clone in status["clones"]] == ["alive"] * 3
    assert all(clone["memory"]["shared"] > 0 for clone in status["clones"])
    # Each page of the image is read once for all of them; a fault may just
    # overtake the reading ahead.
    server = status["server"]
    assert server["read_pages"] <= server["data_pages"] * 1.05
    farm.stop()
    farm.assert_gone()


def test_second_clone_needs_no_event(world):
    """What the first one read is there for the second."""
    farm = farms.Farm(world, farms.ordered_image(world))
    first, = farm.add(1, "--start-paused")
    content = farms.all_memory(first)
    harness.wait_until(lambda: farm.server()["prefetch_done"], "all pages to be there")
    before = farm.server()["read_pages"]
    second, = farm.add(1, "--start-paused")
    assert farms.all_memory(second) == content
    server = farm.server()
    assert server["read_pages"] == before
    one = server["clones"][1]
    # Loading the device state and reading zeros aside.
    assert one["brought"] == 0 and one["found"] == 0, one
    farm.stop()


def test_isolated_from_each_other_and_from_the_image(world):
    image = farms.ordered_image(world)
    raw = harness.export(world, image)
    farm = farms.Farm(world, image)
    clones = farm.add(3, "--start-paused")
    expected = victims.guest_physical(world, image, raw).read_bytes()
    for clone in clones:
        assert farms.all_memory(clone) == expected
    # Two run on and write all over; the third must not see it.
    for clone in clones[:2]:
        clone.qmp("cont")
        clone.wait_for_progress(2)
    for clone in clones[:2]:
        victims.check_ordered_live(world, clone)
        assert farms.all_memory(clone) != expected
    assert farms.all_memory(clones[2]) == expected
    clones[2].qmp("cont")
    clones[2].wait_for_progress()
    victims.check_ordered_live(world, clones[2])
    late, = farm.add(1, "--start-paused")
    assert farms.all_memory(late) == expected
    world.vmsnap("verify", image).expect("ok")
    farm.stop()


def test_come_and_go(world):
    image = farms.ordered_image(world)
    farm = farms.Farm(world, image)
    one, two = farm.add(2, "--", "-name", "clone-{clone}")
    assert "clone-2" in world.processes()[two.pid]
    three, = farm.add(1)
    farm.stop("2")
    states = {clone["clone"]: clone["state"] for clone in farm.status()["clones"]}
    assert states == {"1": "alive", "2": "ended", "3": "alive"}
    for clone in (one, three):
        clone.wait_for_progress()
        victims.check_ordered_live(world, clone)
    # Of another image, no.
    other = farms.ordered_image(world)
    refused = world.vmsnap("restore", other, "--clones", 1, "--run-dir", farm.dir).expect("exists")
    assert "another image" in refused.err
    removed = world.vmsnap("clones", "--run-dir", farm.dir, "--remove", "1", "--json").expect("ok")
    assert removed.json == {"run_dir": str(farm.dir), "clones": [
        {"clone": "1", "state": "removed", "pid": one.pid}]}
    assert not (farm.dir / "1").exists()
    world.vmsnap("clones", "--run-dir", farm.dir, "--stop", "9").expect("usage")
    waiting = world.start_vmsnap("clones", "--run-dir", farm.dir, "--wait", "--json")
    os.kill(three.pid, signal.SIGKILL)
    ended = waiting.wait().expect("ok").json["clones"]
    assert {clone["clone"]: clone["state"] for clone in ended} == {"2": "ended", "3": "ended"}
    farm.assert_gone()


def test_a_clone_cannot_be_captured_or_parked(world):
    farm = farms.Farm(world, farms.ordered_image(world))
    clone, = farm.add(1)
    refused = world.vmsnap("snapshot", "--qmp", clone.qmp_socket, "--output", world.path("x.img"),
                           "--restore-wait", 3 * harness.LIMIT).expect("refused")
    assert "clone" in refused.err
    world.vmsnap("park", "--qmp", clone.qmp_socket, "--output", world.path("x.img")).expect("refused")
    for arguments in (["--memory", "8M"], ["--clones", "1", "--memory", "64K"],
                      ["--clones", "1", "--record-working-set"]):
        world.vmsnap("restore", farm.image, *arguments).expect("usage")
    clone.wait_for_progress()
    victims.check_ordered_live(world, clone)
    farm.stop()


def test_shared_pages_stay_under_their_limit(world):
    farm = farms.Farm(world, farms.ordered_image(world))
    clones = farm.add(2, "--memory", "6M", "--start-paused")
    for clone in clones:
        content = farms.all_memory(clone)
        assert content == farms.all_memory(clone)
        assert farm.server()["resident_pages"] <= (6 << 20) // PAGE
    server = farm.server()
    assert server["dropped_pages"] > 0
    for clone in clones:
        clone.qmp("cont")
        clone.wait_for_progress()
        victims.check_ordered_live(world, clone)
    farm.stop()


def test_balloon_gives_zeros_to_one_alone(world):
    """A page that one clone gave back is zero for that one from then on, and
    what it was for all the others."""
    image = farms.linux_image(world, mib=192, extra=["-device", "virtio-balloon,id=balloon"])
    farm = farms.Farm(world, image)
    one, two, = farm.add(2)
    with qemu.Qmp(one.qmp_socket) as monitor:
        for target in (96 << 20, 192 << 20, 96 << 20):
            monitor.execute("balloon", value=target)
            harness.wait_until(lambda: monitor.execute("query-balloon")["actual"] == target,
                               "the balloon to follow")
    clones = {clone["name"]: clone for clone in farm.server()["clones"]}
    assert clones["1"]["removed"] > (80 << 20) // PAGE
    assert clones["2"]["removed"] == 0
    for clone in (one, two):
        victims.assert_linux_goes_on(clone)
    three, = farm.add(1)
    victims.assert_linux_goes_on(three)
    farm.stop()


def test_each_clone_is_a_new_generation(world):
    """As QEMU tells its guest; the test guest's kernel has no driver for it."""
    old = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"
    farm = farms.Farm(world, farms.linux_image(world, extra=["-device", f"vmgenid,guid={old}"]))
    clones = farm.add(2)
    generations = {clone.qmp("query-vm-generation-id")["guid"] for clone in clones}
    assert len(generations) == 2 and old not in generations
    for clone in clones:
        victims.assert_linux_goes_on(clone)
    farm.stop()
    plain = farms.Farm(world, farms.ordered_image(world))
    started = world.vmsnap("restore", plain.image, "--clones", 1, "--run-dir", plain.dir,
                           "--detach").expect("ok")
    assert "vmgenid" in started.err
    plain.stop()
