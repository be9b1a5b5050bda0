"""What a disk may hold after the power went, made of a record of what programs
did to it (tests/replay/record_writes.cpp).

The rules: what was fsynced is there. Of what was written since, each sector may
be there or not, in any order. A name that was made, changed or removed since its
folder was last fsynced may be as it was or as it is.
"""

import os
import pathlib
import struct

CREATE, WRITE, SYNC, SYNC_FOLDER, MOVE, REMOVE, MAKE_FOLDER, TRUNCATE = range(8)
SECTOR = 512


def read(path):
    """The operations, in order: (operation, inode, offset, path, second, data)."""
    found = []
    data = pathlib.Path(path).read_bytes()
    at = 0
    while at < len(data):
        operation, inode, offset, length, first, second = struct.unpack_from("<6Q", data, at)
        at += 48
        parts = []
        for size in (first, second, length):
            parts.append(data[at:at + size])
            at += size
        found.append((operation, inode, offset, parts[0].decode(), parts[1].decode(), parts[2]))
    return found


class Disk:
    """Names and contents as programs see them, and what of them is durable."""

    def __init__(self):
        self.files = {}     # inode: bytearray, all that was written
        self.pending = {}   # inode: writes since its last fsync
        self.names = {}     # path: inode, as programs see it
        self.folders = []
        self.name_changes = {}  # folder: changes since its last fsync
        self.durable_names = {}
        self.known = {}     # inode numbers of later processes for the same file

    def apply(self, step):
        operation, inode, offset, path, second, data = step
        inode = self.known.get(inode, inode)
        if operation == CREATE and offset == 1:
            self.known[step[1]] = self.names[path]
        elif operation == CREATE:
            self.files[inode], self.pending[inode] = bytearray(), []
            self._name(path, inode)
        elif operation == WRITE:
            self._put(self.files[inode], offset, data)
            self.pending[inode].append((offset, data))
        elif operation == TRUNCATE:
            content = self.files[inode]
            content[:] = content[:offset].ljust(offset, b"\0")
            self.pending[inode].append((offset, None))
        elif operation == SYNC:
            self.pending[inode] = []
        elif operation == SYNC_FOLDER:
            for name, value in self.name_changes.pop(path.rstrip("/"), []):
                self._set(self.durable_names, name, value)
        elif operation == MOVE:
            inode = self.names[path]
            self._name(second, inode)
            self._name(path, None)
        elif operation == REMOVE:
            self._name(path, None)
        elif operation == MAKE_FOLDER:
            self.folders.append(path)

    def _name(self, path, inode):
        self._set(self.names, path, inode)
        self.name_changes.setdefault(os.path.dirname(path), []).append((path, inode))

    @staticmethod
    def _set(names, path, inode):
        if inode is None:
            names.pop(path, None)
        else:
            names[path] = inode

    @staticmethod
    def _put(content, offset, data):
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        content[offset:offset + len(data)] = data

    def crash(self, random, root, folder):
        """One state that a crash now may leave, below `folder` instead of `root`."""
        for path in self.folders:
            (folder / os.path.relpath(path, root)).mkdir(parents=True, exist_ok=True)
        names = dict(self.durable_names)
        for changes in self.name_changes.values():
            # A journal keeps the order of names in a folder, mostly; not here.
            keep = random.random()
            for name, value in changes:
                if random.random() < keep:
                    self._set(names, name, value)
        for path, inode in names.items():
            content = bytearray(self.files[inode])
            for offset, data in self.pending[inode]:
                # Sectors that did not get there have what was before: nothing.
                for start in range(0, len(data or b""), SECTOR):
                    if random.random() < 0.5:
                        end = min(start + SECTOR, len(data))
                        content[offset + start:offset + end] = bytes(end - start)
            if self.pending[inode] and random.random() < 0.3:
                del content[random.randrange(len(content) + 1):]
            (folder / os.path.relpath(path, root)).write_bytes(content)
