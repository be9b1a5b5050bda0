"""The host of a virtual machine finds memory when it is first touched, which can take
ten times as long as to use it (2.7 ms a MiB were seen): whatever is measured first would
pay for that."""

import mmap

PAGE = 4096
LEFT_ALONE = 2 << 30


def have_all():
    """Touches all memory that is free."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":") for line in file)
    free = int(fields["MemAvailable"].split()[0]) * 1024 - LEFT_ALONE
    if free <= 0:
        return
    memory = mmap.mmap(-1, free // PAGE * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, len(memory), PAGE):
        memory[at] = 1
    memory.close()
