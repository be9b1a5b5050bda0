"""VMs that libvirt runs: a daemon of our own, and domains of it."""

import json
import os
import re
import subprocess
import xml.sax.saxutils

import harness
import linux_guest
import qemu
import victims


class Daemon:
    """libvirtd as an unprivileged user runs it, with all it has below our folder."""

    def __init__(self, world):
        harness.need(harness.LIBVIRT_MONITOR.exists(), "libvirt",
                     "vmsnap was built without libvirt-dev")
        self._world = world
        self.folder = world.directory("libvirt")
        config = self.folder / "config" / "libvirt"
        config.mkdir(parents=True)
        # No second daemon for the consoles.
        (config / "qemu.conf").write_text('stdio_handler = "file"\n')
        names = {"HOME": "home", "XDG_RUNTIME_DIR": "run", "XDG_CONFIG_HOME": "config",
                 "XDG_CACHE_HOME": "cache", "XDG_DATA_HOME": "data"}
        self._environment = {key: str(self.folder / name) for key, name in names.items()}
        for name in names.values():
            (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        # As /run is; libvirt writes the state of a domain there with each change.
        run = self.folder / "run"
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=700", "tmpfs", run], check=True)
        world.at_end(lambda: subprocess.run(["umount", "-l", run], check=True))
        for path in (self.folder, *self.folder.rglob("*")):
            os.chown(path, qemu.NOBODY, qemu.NOBODY)
        self._log = world.path("libvirtd.log")
        self.socket = self.folder / "run" / "libvirt" / "libvirt-sock"
        self.uri = f"qemu:///session?socket={self.socket}"
        self.process = None
        self.start()

    def start(self):
        with open(self._log, "a", encoding="utf-8") as log:
            self.process = self._world.start(
                ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "libvirtd"],
                env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/")

        def answers():
            assert self.process.poll() is None, f"libvirtd ended: {self._log.read_text()}"
            return self._virsh("version").returncode == 0
        harness.wait_until(answers, "libvirtd to answer")

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.socket.unlink()

    def _virsh(self, *words):
        return subprocess.run(["virsh", "-q", "-c", self.uri, *map(str, words)], text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, check=False,
                              timeout=harness.LIMIT)

    def virsh(self, *words):
        done = self._virsh(*words)
        assert done.returncode == 0, f"virsh {words}: {done.stderr}"
        return done.stdout.strip()


class Domain(qemu.Machine):
    """A VM whose only monitor is libvirt's. `boot` is the <os> element's content,
    `devices` more of <devices>."""

    def __init__(self, world, daemon, name, boot, devices="", mib=128, commandline=()):
        self.daemon, self.name = daemon, name
        self.folder = world.directory("domain")
        self.folder.chmod(0o777)
        serial = self.folder / "serial.log"
        words = "".join(f"<qemu:arg value={xml.sax.saxutils.quoteattr(word)}/>" for word in commandline)
        description = world.path("domain.xml")
        # libvirt cleans the environment: the mark is for the world's end.
        description.write_text(f"""
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{name}</name><memory unit='MiB'>{mib}</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type>{boot}</os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='{serial}'/></serial>
    {devices}
  </devices>
  <qemu:commandline>
    {words}<qemu:env name='VMSNAP_TEST_WORLD' value='{world.mark}'/>
  </qemu:commandline>
</domain>""")
        daemon.virsh("create", description)
        pid = next(pid for pid, command in world.processes().items() if f"guest={name}," in command)
        super().__init__(pid, None, serial)

    @property
    def arguments(self):
        """What vmsnap is to be told of it."""
        return ["--libvirt", self.name, "--connect", self.daemon.uri]

    def qmp(self, command, **arguments):
        question = json.dumps({"execute": command, "arguments": arguments})
        answer = json.loads(self.daemon.virsh("qemu-monitor-command", self.name, question))
        if "error" in answer:
            raise qemu.QmpError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def state(self):
        return self.daemon.virsh("domstate", self.name)


class OrderedDomain(Domain):
    """The boot sector of victims.OrderedGuest."""

    def __init__(self, world, daemon, name="ordered"):
        image = victims.build_boot_sector(world.directory("boot"))
        super().__init__(world, daemon, name, "<boot dev='fd'/>",
                         f"<disk type='file' device='floppy'><driver name='qemu' type='raw'/>"
                         f"<source file='{image}'/><target dev='fda'/><readonly/></disk>")
        self.wait_for_text("R.")


class LinuxDomain(Domain):
    """The Linux guest of victims.LinuxGuest, with what libvirt's users have in theirs."""

    def __init__(self, world, daemon, name="linux", mib=256, devices=""):
        folder = world.directory("boot")
        words = linux_guest.boot_arguments(4, with_agent=False)
        given = dict(zip(words[::2], words[1::2]))
        assert set(given) == {"-kernel", "-initrd", "-append"}, given
        for key in ("-kernel", "-initrd"):
            copy = folder / re.sub(r"\W", "", key)
            copy.write_bytes(open(given[key], "rb").read())
            copy.chmod(0o644)
            given[key] = copy
        super().__init__(
            world, daemon, name,
            f"<kernel>{given['-kernel']}</kernel><initrd>{given['-initrd']}</initrd>"
            f"<cmdline>{xml.sax.saxutils.escape(given['-append'])}</cmdline>",
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
            "<interface type='user'><model type='virtio'/></interface>"
            "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"
            "<video><model type='vga'/></video><graphics type='vnc' port='-1'/>" + devices, mib=mib)
        self.wait_for_text("tick 1")
        self.wait_for_text("memcheck 1 ok")
