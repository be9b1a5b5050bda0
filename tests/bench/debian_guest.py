"""A Linux guest whose memory is like that of a machine in use: files of Debian
packages in the page cache, a Python and a Node.js process with a heap, and a
compiler that runs again and again. For measurements of size, where the test
guest's random bytes would say nothing.

Its disk is made of packages that this machine has installed; other machines
give other bytes, so figures are comparable within one run only.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
import linux_guest  # noqa: E402
import qemu  # noqa: E402

# Those that are not installed are left out.
PACKAGES = """
    libc6 libc6-dev linux-libc-dev libgcc-s1 libstdc++6 libgcc-12-dev libstdc++-12-dev
    python3-minimal python3.11-minimal libpython3.11-minimal libpython3.11-stdlib
    zlib1g libexpat1 libffi8 liblzma5 libbz2-1.0 libssl3 openssl
    perl-base perl-modules-5.36 libperl5.36 git libicu72 systemd
    gcc-12 cpp-12 binutils binutils-x86-64-linux-gnu libbinutils libctf0 libctf-nobfd0 libgprofng0
    libjansson4 libisl23 libmpfr6 libmpc3 libgmp10 libzstd1
    nodejs libnode108 libuv1 libcares2 libnghttp2-14 libbrotli1
""".split()

LEFT_OUT = ("/usr/share/doc/", "/usr/share/man/", "/usr/share/locale/", "/usr/include/node/",
            "/usr/lib/node_modules/")

# A heap of parsed programs, of which a part is replaced all the time.
PYTHON_WORK = """
import ast, glob, random, time
files = sorted(glob.glob('/usr/lib/python3.11/*.py'))
random.seed(1)
held = {}
for n in range(10**9):
    name = random.choice(files)
    text = open(name, encoding='utf-8').read()
    if len(held) >= 60:
        del held[random.choice(list(held))]
    tree = ast.parse(text)
    held[name] = (text.split(), ast.dump(tree)[:100000], tree if len(text) < 50000 else None)
    print('python', n, flush=True)
    time.sleep(0.05)
"""

NODE_WORK = """
const fs = require('fs');
const held = new Map();
let n = 0;
setInterval(() => {
  for (let i = 0; i < 2000; ++i) {
    const key = (n * 7919 + i * 104729) % 60000;
    held.set('session-' + key, {id: key, user: 'user' + key % 977, path: ['a', 'b', String(n)],
                                time: Date.now(), score: Math.sqrt(key + n)});
  }
  if (n % 20 == 0) held.set('text', JSON.stringify([...held.entries()].slice(0, 20000)));
  console.log('node', ++n);
}, 300);
"""

C_PROGRAM = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <pthread.h>
#include <linux/kvm.h>
int main(int argc, char** argv) { return printf("%d %s\\n", argc, argv[0]) < 0; }
"""

INIT = """#!/bin/sh
export PATH=/bin:/usr/bin
/bin/busybox mkdir -p /bin /proc /sys /dev /disk
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
exec </dev/ttyS0 >/dev/ttyS0 2>&1
for module in @MODULES@; do
  insmod /modules/$module.ko
done
mount -t ext4 /dev/vda /disk
mount -t proc proc /disk/proc
mount -t devtmpfs dev /disk/dev

chroot /disk /usr/bin/python3.11 /work/work.py &
if [ -e /disk/usr/bin/node ]; then chroot /disk /usr/bin/node /work/work.js & fi

# Into the page cache, in chunks as a program would read them.
find /disk/usr -type f -exec cat {} + >/dev/null
echo "all read"
n=0
while :; do
  n=$((n + 1))
  chroot /disk /usr/bin/x86_64-linux-gnu-gcc-12 -O2 -c /work/work.c -o /work/work-$n.o &&
    echo "compiled $n"
  sed -n 2p /proc/meminfo
  sleep 1
done
"""


def _files():
    """What the packages hold, with symlinks among directories resolved."""
    found = set()
    for package in PACKAGES:
        listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True,
                                check=False)
        for line in listed.stdout.splitlines() if listed.returncode == 0 else []:
            path = os.path.join(os.path.realpath(os.path.dirname(line)), os.path.basename(line))
            is_link_to_folder = os.path.islink(path) and os.path.isdir(path)
            if os.path.isdir(path) and not is_link_to_folder:
                continue
            if os.path.lexists(path) and not path.startswith(LEFT_OUT):
                found.add(path)
    return sorted(found)


def disk():
    """The path of an ext4 image with the packages' files; made once."""
    linux_guest.CACHE.mkdir(parents=True, exist_ok=True)
    target = linux_guest.CACHE / "debian-disk.ext4"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(prefix="vmsnap-disk-") as folder:
        root = pathlib.Path(folder)
        for name in ("proc", "dev", "tmp", "work", "usr/lib", "usr/lib64", "usr/bin", "usr/sbin"):
            (root / name).mkdir(parents=True, exist_ok=True)
        for name in ("lib", "lib64", "bin", "sbin"):
            (root / name).symlink_to(f"usr/{name}")
        for path in _files():
            copy = root / path.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy, follow_symlinks=False)
        for name, text in (("work.py", PYTHON_WORK), ("work.js", NODE_WORK), ("work.c", C_PROGRAM)):
            (root / "work" / name).write_text(text)
        part = linux_guest.CACHE / f".{target.name}.{os.getpid()}"
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", root, part, "1G"], check=True)
        part.rename(target)
    return target


def start(world, mib=1024):
    """The guest, which has read its files and begun to work."""
    boot = ["-kernel", str(linux_guest.kernel()),
            "-initrd", str(linux_guest.pack("debian-initramfs", INIT)),
            "-append", "console=ttyS0 quiet panic=-1 rdinit=/init",
            "-drive", f"file={disk()},format=raw,if=virtio,snapshot=on"]
    machine = qemu.Qemu(world, boot, mib=mib)
    for text in ("all read", "compiled 3"):
        machine.wait_for_text(text)
    return machine
