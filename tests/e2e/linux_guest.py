#!/usr/bin/python3
"""A small Linux guest: Debian's cloud kernel and a busybox initramfs.

The kernel is fetched as a package and unpacked, not installed, and kept in
tests/cache. The guest prints "tick N" five times a second and "memcheck N ok"
each time it has copied a file of random data within its memory and found the
copy equal and the original's checksum unchanged.

Run as a program, it builds both and prints their paths (tests/demo does that).
"""

import fcntl
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

CACHE = pathlib.Path(__file__).resolve().parents[1] / "cache"
META_PACKAGE = "linux-image-cloud-amd64"

AGENT_PACKAGE = "qemu-guest-agent"

# In this order; for a balloon, which gives guest memory back while the VM runs,
# for the disk of tests/bench/debian_guest.py, and for the guest agent's channel.
MODULES = ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev",
           "virtio_pci", "virtio_balloon", "virtio_blk", "virtio_console"]

INIT = """#!/bin/sh
# The only process tree of the guest.
export PATH=/bin
/bin/busybox mkdir -p /bin /proc /sys /dev /data
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
mount -t tmpfs -o size=80% data /data
for module in @MODULES@; do
  insmod /modules/$module.ko
done

# Ticks: the console shows that time goes on. The interval is the sleep's.
(
  n=0
  while :; do
    n=$((n + 1))
    echo "tick $n"
    sleep 0.2
  done
) &

# The guest agent, if it is here, and the clock that it sets.
if [ -x /usr/sbin/qemu-ga ]; then
  mkdir /sbin
  ln -s /bin/hwclock /sbin/hwclock
  for port in /sys/class/virtio-ports/*; do
    if [ "$(cat $port/name)" = org.qemu.guest_agent.0 ]; then
      /usr/sbin/qemu-ga -p /dev/${port##*/} -t /dev &
    fi
  done
  while :; do
    echo "clock $(date +%s)"
    sleep 0.2
  done &
fi

# A disk, if there is one, is read past the guest's page cache, so that the host
# writes into guest memory. One that is read only must always be the same; one that is
# not must be what its mirror in memory is: memory and disk are of one instant then.
if [ -b /dev/vda ] && [ $(cat /sys/block/vda/ro) = 0 ]; then
  (
    dd if=/dev/vda of=/data/mirror bs=64k iflag=direct 2>/dev/null
    blocks=$(($(cat /sys/block/vda/size) / 128))
    n=0
    while :; do
      n=$((n + 1))
      block=$((n * 7 % blocks))
      dd if=/dev/urandom of=/data/block bs=64k count=1 2>/dev/null
      dd if=/data/block of=/dev/vda bs=64k seek=$block oflag=direct conv=notrunc 2>/dev/null
      dd if=/data/block of=/data/mirror bs=64k seek=$block conv=notrunc 2>/dev/null
      if dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | cmp - /data/mirror; then
        echo "mirrorcheck $n ok"
      else
        echo "MIRRORCHECK FAILED in round $n"
      fi
    done
  ) &
elif [ -b /dev/vda ]; then
  (
    want=$(dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum)
    n=0
    while :; do
      n=$((n + 1))
      if [ "$(dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum)" = "$want" ]; then
        echo "diskcheck $n ok"
      else
        echo "DISKCHECK FAILED in round $n"
      fi
    done
  ) &
fi

# Memory that must stay right: a file, its checksum, and ever new copies of it.
dd if=/dev/urandom of=/data/original bs=1M count=@MIB@ 2>/dev/null
sum=$(sha256sum </data/original)
n=0
while :; do
  n=$((n + 1))
  cp /data/original /data/copy
  if cmp /data/original /data/copy && [ "$(sha256sum </data/original)" = "$sum" ]; then
    echo "memcheck $n ok"
  else
    echo "MEMCHECK FAILED in round $n"
  fi
  rm /data/copy
done
"""


def _run(*command, **options):
    return subprocess.run(list(map(str, command)), check=True, **options)


def _unpack(package, folder):
    """Fetches a package and unpacks it below `folder`; returns where."""
    # apt drops its privileges for a download, so the directory is open to it.
    os.chmod(folder, 0o777)
    try:
        _run("apt-get", "-qq", "download", package, cwd=folder)
    except subprocess.CalledProcessError:  # gone from the mirror since the lists came
        _run("apt-get", "-qq", "update")
        _run("apt-get", "-qq", "download", package, cwd=folder)
    archive = next(pathlib.Path(folder).glob("*.deb"))
    root = pathlib.Path(folder) / "root"
    _run("dpkg-deb", "-x", archive, root)
    return root


def kernel():
    """The path of a Debian cloud kernel, from the cache or fetched; the modules
    lie beside it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two tests at once, one fetches it
        # An older cache may lack a module that was added to the list since.
        cached = sorted(path for path in CACHE.glob("kernel-*/vmlinuz")
                        if all((path.parent / f"{name}.ko").exists() for name in MODULES))
        return cached[-1] if cached else _fetch_kernel()


def _fetch_kernel():
    depends = _run("apt-cache", "depends", META_PACKAGE, stdout=subprocess.PIPE, text=True).stdout
    package = re.search(r"Depends: (linux-image-\S+)", depends)
    if not package:
        raise RuntimeError(f"apt knows no kernel below {META_PACKAGE}: {depends!r}; "
                           "run apt-get update")
    with tempfile.TemporaryDirectory(prefix="vmsnap-kernel-") as folder:
        root = _unpack(package.group(1), folder)
        part = pathlib.Path(tempfile.mkdtemp(prefix=".part-", dir=CACHE))
        part.chmod(0o755)
        shutil.copyfile(next(root.glob("boot/vmlinuz-*")), part / "vmlinuz")
        for name in MODULES:
            shutil.copyfile(next(root.rglob(f"{name}.ko")), part / f"{name}.ko")
        # Renamed into place, so that a broken run leaves no half of a kernel.
        final = CACHE / package.group(1).replace("linux-image", "kernel")
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    return final / "vmlinuz"


def agent():
    """The path of qemu-ga, from the cache or fetched."""
    CACHE.mkdir(parents=True, exist_ok=True)
    final = CACHE / "qemu-ga"
    if not final.exists():
        with tempfile.TemporaryDirectory(prefix="vmsnap-agent-") as folder:
            part = CACHE / f".qemu-ga.{os.getpid()}"
            shutil.copy(_unpack(AGENT_PACKAGE, folder) / "usr/sbin/qemu-ga", part)
            part.rename(final)
    return final


def libraries(program):
    """What a program of this machine's Debian is loaded with, by absolute paths.
    All that qemu-ga needs, qemu-system needs too."""
    said = _run("ldd", program, stdout=subprocess.PIPE, text=True).stdout
    if "not found" in said:
        raise RuntimeError(f"{program} lacks libraries: {said}")
    return [pathlib.Path(path) for path in re.findall(r"(/\S+) \(0x", said)]


def initramfs(mib=8, with_agent=False):
    """The path of an initramfs whose memory check uses a file of `mib` MiB; with
    the guest agent it also prints its clock, in "clock SECONDS"."""
    init = INIT.replace("@MIB@", str(mib))
    if not with_agent:
        return pack(f"initramfs3-{mib}", init)
    files = {"usr/sbin/qemu-ga": agent()}
    files.update((str(path).lstrip("/"), path) for path in libraries(agent()))
    return pack(f"initramfs3-agent-{mib}", init, files)


def pack(name, init, files=None):
    """The path of an initramfs of busybox, the modules, `files` (name in it ->
    path) and `init`, in which @MODULES@ becomes the modules' names."""
    CACHE.mkdir(parents=True, exist_ok=True)
    target = CACHE / f"{name}.cpio.gz"
    busybox = shutil.which("busybox")
    if busybox is None:
        raise RuntimeError("busybox is not installed (package busybox-static)")
    with tempfile.TemporaryDirectory(prefix="vmsnap-initramfs-") as folder:
        root = pathlib.Path(folder)
        (root / "bin").mkdir()
        (root / "dev").mkdir()
        shutil.copy(busybox, root / "bin/busybox")
        (root / "bin/sh").symlink_to("busybox")
        (root / "modules").mkdir()
        for module in MODULES:
            shutil.copy(kernel().parent / f"{module}.ko", root / "modules")
        for inside, path in (files or {}).items():
            (root / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / inside)
        (root / "init").write_text(init.replace("@MODULES@", " ".join(MODULES)))
        (root / "init").chmod(0o755)
        part = CACHE / f".{target.name}.{os.getpid()}"
        with open(part, "wb") as out:
            names = "\n".join(sorted(str(path.relative_to(root)) for path in root.rglob("*")))
            archive = _run("cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0", cwd=root,
                           input=names.encode(), stdout=subprocess.PIPE).stdout
            out.write(_run("gzip", "-1n", input=archive, stdout=subprocess.PIPE).stdout)
        part.rename(target)
    return target


def boot_arguments(mib=8, with_agent=False):
    """What QEMU needs to boot it."""
    return ["-kernel", str(kernel()), "-initrd", str(initramfs(mib, with_agent)),
            "-append", "console=ttyS0 quiet panic=-1 rdinit=/init"]


def ticks(console):
    """The last tick on a console's text; 0 before the first."""
    found = re.findall(r"^tick (\d+)\s*$", console, re.MULTILINE)
    return int(found[-1]) if found else 0


def clock(console):
    """The last time of day on the console of a guest with the agent, in seconds."""
    found = re.findall(r"^clock (\d+)\s*$", console, re.MULTILINE)
    return int(found[-1]) if found else 0


def memory_checks(console):
    """The number of the last memory check that was right; raises if one failed."""
    if "MEMCHECK FAILED" in console:
        raise AssertionError(f"the guest's memory is wrong; its console:\n{console[-2000:]}")
    found = re.findall(r"^memcheck (\d+) ok\s*$", console, re.MULTILINE)
    return int(found[-1]) if found else 0


if __name__ == "__main__":
    try:
        print(kernel())
        print(initramfs(int(sys.argv[1]) if len(sys.argv) > 1 else 8))
    except (RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"linux_guest.py: {error}")
