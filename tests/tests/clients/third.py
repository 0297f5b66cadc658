"""A server with persistent connections that answers every third request with 500, and logs the status of each response.

The path /split sends each response in pieces; all others send it at once. Arguments: address, port, log file.
"""
import itertools
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NUMBER, LOCK = itertools.count(1), threading.Lock()
LOG = open(sys.argv[3], "w", buffering=1)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        # The body looks like a response itself.
        body = b"HTTP/1.1 500 no\r\n" * 3
        with LOCK:
            status = 500 if next(NUMBER) % 3 == 0 else 200
            LOG.write(f"{status}\n")
        text = f"HTTP/1.1 {status} is it\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        pieces = [text] if self.path != "/split" else [text[:3], text[3:10], text[10:11], text[11:40], text[40:]]
        for piece in pieces:
            self.wfile.write(piece)
            self.wfile.flush()
            if len(pieces) > 1:
                time.sleep(0.002)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
