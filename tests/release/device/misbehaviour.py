"""A server, and what it can do wrong."""

from __future__ import annotations

import functools
import gzip
import http.server
import math
import threading
import time


class Server:
    """Serves a directory over HTTP on loopback, as badly as a test wants.

    Attributes:
        folder: What it serves.
        faults: Functions of a handler and the bytes, by a part of the path they apply to.
        requests: Path and range of each request.
    """

    def __init__(self):
        self.folder, self.faults, self.requests = None, {}, []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                wanted = self.headers.get("Range")
                server.requests.append((self.path.lstrip("/"), wanted))
                fault = next((f for part, f in server.faults.items() if part in self.path), None)
                try:
                    (fault or serve)(self, server.folder / self.path.lstrip("/"))
                except OSError:
                    self.close_connection = True

            def log_message(self, *arguments):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self._http.shutdown()
        self._http.server_close()


def head(handler, code, length, **headers):
    handler.send_response(code)
    if length is None:
        handler.send_header("Connection", "close")
        handler.close_connection = True
    else:
        handler.send_header("Content-Length", str(length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def serve(handler, path, change=bytes, ranges=True, stop=None):
    """Answer as a store does, but for a change of the bytes, ranges, or an early end."""
    if not path.is_file():
        head(handler, 404, 0)
        return
    data, wanted = change(path.read_bytes()), handler.headers.get("Range")
    if wanted and ranges:
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(data):
            head(handler, 416, 0)
            return
        end = f"bytes {start}-{len(data) - 1}/{len(data)}"
        data = data[start:]
        head(handler, 206, len(data), Content_Range=end)
    else:
        head(handler, 200, len(data))
    if stop is not None:
        data = data[: math.ceil(len(data) * stop)]
        handler.close_connection = True
    handler.wfile.write(data)


def flips_a_bit(handler, path):
    def flip(data):
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]

    serve(handler, path, flip)


def stops_at(part):
    return functools.partial(serve, stop=part)


knows_no_ranges = functools.partial(serve, ranges=False)


def never_ends(handler, path):
    head(handler, 200, None)
    while True:
        handler.wfile.write(bytes(2**16))


@functools.cache
def bomb():
    return gzip.compress(bytes(200 * 2**20), 1)


def sends_a_bomb(handler, path):
    head(handler, 200, len(bomb()), Content_Encoding="gzip")
    handler.wfile.write(bomb())


def trickles(handler, path):
    data = path.read_bytes()
    head(handler, 200, len(data))
    for value in data:
        handler.wfile.write(bytes([value]))
        time.sleep(0.2)


def trickles_its_head(handler, path):
    for value in b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 1000:
        handler.wfile.write(bytes([value]))
        time.sleep(0.2)


def hangs_up(handler, path):
    handler.connection.close()
    handler.close_connection = True


def answers(code):
    return lambda handler, path: head(handler, code, 0)
