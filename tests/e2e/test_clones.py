"""Clones: many VMs from one image, on one memory."""

import re

import pytest

import checks
import harness
import qemu
import victims


def image_of(world, mib=192, check_mib=4, **options):
    guest = victims.LinuxGuest(world, mib=mib, check_mib=check_mib, **options)
    image = world.path("vm.img")
    world.vmsnap("snapshot", "--qmp", guest.qmp_socket, "--output", image).expect("ok")
    guest.kill()
    return image


def listed(world, farm):
    return world.vmsnap("clones", "--run-dir", farm, "--json").expect("ok").json


def stop(world, farm):
    world.vmsnap("clones", "--run-dir", farm, "--stop").expect("ok")
    harness.wait_until(lambda: not world.vmsnap_processes(), "the farm's page server to end")
    assert not (farm / "farm.sock").exists()


def test_clones_go_on_and_share(world):
    image = image_of(world)
    farm = world.path("farm")
    started = world.vmsnap("restore", image, "--clones", "3", "--run-dir", farm, "--detach",
                           "--json").expect("ok").json
    assert [clone["clone"] for clone in started["clones"]] == ["1", "2", "3"]
    clones = [qemu.restored(farm / str(number)) for number in (1, 2, 3)]
    for clone in clones:
        victims.assert_linux_goes_on(clone)
    status = listed(world, farm)
    assert [clone["state"] for clone in status["clones"]] == ["alive"] * 3
    for clone in status["clones"]:
        assert clone["memory"]["shared"] > 0
    # Each page of the image was read once, for all of them.
    assert status["server"]["read_pages"] <= status["server"]["data_pages"]
    stop(world, farm)
