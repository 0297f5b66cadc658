"""Connects to ADDRESS PORT with each socket API of Python, and prints the peer that each API sees as JSON."""

import asyncio
import errno
import http.client
import json
import select
import socket
import sys

address, port = sys.argv[1], int(sys.argv[2])
seen = {}

with socket.create_connection((address, port), timeout=5) as sock:
    seen["socket"] = list(sock.getpeername())

with socket.socket() as sock:
    sock.setblocking(False)
    code = sock.connect_ex((address, port))
    assert code in (0, errno.EINPROGRESS), errno.errorcode[code]
    assert select.select([], [sock], [], 5)[1], "no connection"
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    seen["nonblocking"] = list(sock.getpeername())

with socket.socket(socket.AF_INET6) as sock:
    sock.settimeout(5)
    sock.connect(("::ffff:" + address, port))
    seen["v6"] = list(sock.getpeername()[:2])


async def dial():
    _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), 5)
    peer = writer.get_extra_info("peername")
    writer.close()
    return list(peer)


seen["asyncio"] = asyncio.run(dial())

connection = http.client.HTTPConnection(address, port, timeout=5)
connection.request("GET", "/")
seen["http"] = connection.getresponse().read().decode().strip()

print(json.dumps(seen))
