#!/usr/bin/python3
"""Stands in for vmsnap-libvirt-monitor: starts the real one, which is called
real-monitor beside this, and passes its events on a quarter of a second late, its
answers at once. Events stay in their order."""

import array
import json
import os
import pathlib
import select
import socket
import subprocess
import sys
import time

LATE = 0.25

if os.fork():
    os._exit(0)
os.setsid()
client = socket.socket(fileno=os.dup(0))
ours, theirs = socket.socketpair()
subprocess.run([pathlib.Path(__file__).with_name("real-monitor"), *sys.argv[1:]], stdin=theirs,
               check=True)
theirs.close()
os.close(0)

waiting = []  # (when, line)
received = b""
while True:
    limit = max(0, waiting[0][0] - time.monotonic()) if waiting else None
    ready, _, _ = select.select([client, ours], [], [], limit)
    while waiting and waiting[0][0] <= time.monotonic():
        client.sendall(waiting.pop(0)[1])
    if client in ready:
        data, ancillary, _, _ = client.recvmsg(65536, socket.CMSG_SPACE(32))
        if not data:
            break
        descriptors = array.array("i")
        for _, _, sent in ancillary:
            descriptors.frombytes(sent)
        socket.send_fds(ours, [data], list(descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
    if ours in ready:
        data = ours.recv(65536)
        if not data:
            break
        received += data
        *lines, received = received.split(b"\n")
        for line in lines:
            if "event" in json.loads(line):
                waiting.append((time.monotonic() + LATE, line + b"\n"))
            else:
                client.sendall(line + b"\n")
