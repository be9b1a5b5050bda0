"""The host of a virtual machine finds memory when it is first touched, which can take
ten times as long as to use it (2.7 ms a MiB were seen): whatever is measured first would
pay for that."""

import subprocess
import sys

TOUCH = """
import mmap
with open("/proc/meminfo", encoding="ascii") as file:
    fields = dict(line.split(":") for line in file)
size = (int(fields["MemAvailable"].split()[0]) << 10) - (2 << 30)
if size > 0:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, size, 4096):
        memory[at] = 1
"""


def have_all():
    """Touches all memory that is free, in a process of its own: the peak of ours would
    be inherited by those that are measured."""
    subprocess.run([sys.executable, "-c", TOUCH], check=True)
