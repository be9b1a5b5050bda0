"""vmsnap backup --config: what cron runs."""

import json

import victims


def write_config(world, store, sockets, extra="", of_each=""):
    path = world.path("backup.toml")
    text = f'store = "{store}"\n{extra}\n'
    for i, socket in enumerate(sockets):
        text += f'[[vm]]\nname = "vm{i}"\nqmp = "{socket}"\n{of_each}\n'
    path.write_text(text)
    return path


def run(world, config, *codes, arguments=()):
    result = world.vmsnap("backup", "--config", config, *arguments).expect(*codes)
    events = [json.loads(line) for line in result.out.splitlines()]
    assert events[-1]["event"] == "end" and events[-1]["status"] == result.code
    return events


def test_two_vms_night_after_night(world):
    guests = [victims.OrderedGuest(world) for _ in range(2)]
    store = world.path("store")
    config = write_config(world, store, [guest.qmp_socket for guest in guests],
                          'max-age = "1h"\nsample = "100%"\ndelta = true\n[keep]\nlast = 2\n',
                          'tags = ["nightly"]')
    for night in range(3):
        events = run(world, config, "ok")
        assert [event["event"] for event in events] == ["snapshot", "snapshot", "prune", "verify",
                                                        "end"]
        assert all(event["ok"] for event in events[:2])
        assert events[2]["removed"] == (2 if night == 2 else 0)
        assert events[3]["damaged"] == 0 and events[3]["packs"] > 0
    entries = world.vmsnap("list", "--store", store, "--json").expect("ok").json
    assert len(entries) == 4 and all("nightly" in entry["tags"] for entry in entries)
    for guest in guests:
        victims.check_ordered_live(world, guest)
    run(world, config, "ok", arguments=["--check"])


def test_vms_of_the_same_name_and_of_none(world):
    """QEMU's own names say nothing of who is who: those of the configuration do."""
    same = [victims.OrderedGuest(world, extra=["-name", "guest"]) for _ in range(2)]
    store = world.path("store")

    def night():
        nameless = victims.OrderedGuest(world)  # a new process, and so a new qemu-PID
        config = write_config(world, store, [guest.qmp_socket for guest in (*same, nameless)],
                              'sample = "0%"\n[keep]\nlast = 1\n')
        events = run(world, config, "ok")
        nameless.kill()
        return events[-2]

    assert night()["removed"] == 0
    assert night()["removed"] == 3
    entries = world.vmsnap("list", "--store", store, "--json").expect("ok").json
    assert sorted(entry["tags"] for entry in entries) == [["backup:vm0"], ["backup:vm1"],
                                                          ["backup:vm2"]]
    prune = ["prune", "--store", store, "--keep-last", "1", "--dry-run", "--json"]
    assert world.vmsnap(*prune).expect("ok").json["removed"] == 0
    one = world.vmsnap(*prune, "--vm", "vm2").expect("ok").json["decisions"]
    assert [decision["group"] for decision in one] == ["vm2"]
    world.vmsnap(*prune, "--vm", "vm3").expect("usage")


def test_what_others_took_stays(world):
    """[keep] is for the VMs of the file: not for those of another one, nor for what
    was taken by hand, even of the same VM."""
    guests = [victims.OrderedGuest(world, extra=["-name", f"vm{i}"]) for i in range(2)]
    store = world.path("store")
    both = write_config(world, store, [guest.qmp_socket for guest in guests], 'sample = "0%"')
    for _ in range(2):
        run(world, both, "ok")
        world.vmsnap("snapshot", "--qmp", guests[0].qmp_socket, "--store", store).expect("ok")
    one = write_config(world, store, [guests[0].qmp_socket], 'sample = "0%"\n[keep]\nlast = 1\n')
    prune = run(world, one, "ok")[-2]
    assert (prune["event"], prune["removed"]) == ("prune", 2)
    entries = world.vmsnap("list", "--store", store, "--json").expect("ok").json
    tags = sorted(" ".join(entry["tags"]) for entry in entries)
    assert tags == ["", "", "backup:vm0", "backup:vm1", "backup:vm1"]


def test_one_of_them_fails(world):
    guest = victims.OrderedGuest(world)
    store = world.path("store")
    gone = world.path("gone.qmp")
    config = write_config(world, store, [gone, guest.qmp_socket], 'max-age = "1h"')
    result = world.vmsnap("backup", "--config", config).expect("some_failed")
    assert f"VM 'vm0' ({gone}): cannot connect" in result.err and "-qmp unix:PATH" in result.err
    events = run(world, config, "some_failed")
    assert events[0]["remedy"]
    assert not events[0]["ok"] and events[0]["error"] and events[0]["status"] > 0
    assert events[1]["ok"] and events[-1]["failed"] == ["vm0"]
    assert {"event": "stale", "vm": "vm0"} in events
    run(world, config, "stale", arguments=["--check"])


def test_a_store_that_is_damaged(world):
    guest = victims.OrderedGuest(world)
    store = world.path("store")
    config = write_config(world, store, [guest.qmp_socket], 'sample = "100%"')
    run(world, config, "ok")
    pack = next((store / "packs").iterdir())
    with open(pack, "r+b") as file:
        file.seek(4096 + 20)
        file.write(b"damage")
    events = run(world, config, "damaged")
    assert events[0]["ok"], "a damaged store takes no snapshots"


def test_a_config_with_a_typo(world):
    config = write_config(world, world.path("store"), [world.path("x")], "smaple = 5")
    result = world.vmsnap("backup", "--config", config).expect("usage")
    assert "smaple" in result.err and not result.out
