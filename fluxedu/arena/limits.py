"""A web server for a class, with a limit on everything that a client can hold: connections, time, bytes and attempts.

A client has ``DEADLINE`` seconds to send its whole request, and as long again to take the response. When more than
``PER_ADDRESS`` connections of one address wait for their client, or more than ``IN_ALL`` together, those that have
waited the longest are closed, so slow clients keep nobody out. The students behind one router share an address, which
is why the limits per address are generous.
"""

from __future__ import annotations

import io
import json
import re
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network

DEADLINE = 10.0  # seconds
PER_ADDRESS, IN_ALL = 64, 512  # connections that wait for their client
GRACE = 2.0  # seconds for which a connection does not count; a whole class may open the page at the same moment
MAX_HEAD, MAX_BODY = 32768, 4096  # bytes; a browser's cookies for localhost alone may take some thousand
_FIRST_LINE = re.compile(rb"[A-Z]{1,20} /[!-~]* HTTP/[1-9]\.\d\r?\n")
_HEADERS = {
    "Connection": "close",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self' data: 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
}


class Refused(Exception):
    """Ends a request with a status and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Limit:
    """At most ``most`` events per key within ``seconds``."""

    def __init__(self, most: int, seconds: float):
        self.most, self.seconds, self.lock = most, seconds, threading.Lock()
        self.times: dict[str, list[float]] = {}

    def spend(self, key: str) -> bool:
        """Count one event; returns False, and does not count it, if there have been too many."""
        now = time.monotonic()
        with self.lock:
            self.times = {k: times for k, times in self.times.items() if times and times[-1] > now - self.seconds}
            recent = [before for before in self.times.get(key, ()) if before > now - self.seconds]
            self.times[key] = recent + [now] * (len(recent) < self.most)
            return len(recent) < self.most

    def refund(self, key: str) -> None:
        """Undo one ``spend``."""
        with self.lock:
            del self.times.get(key, [])[-1:]


def client_network(address: str) -> str:
    """The IPv4 address, or the network of an IPv6 address: its first 64 bits, as one client may have all the rest."""
    address = address.partition("%")[0].removeprefix("::ffff:")  # without the zone; IPv4 as an IPv6 socket shows it
    return str(ip_network((address, 64), strict=False)) if ":" in address else address


class LimitedServer(ThreadingHTTPServer):
    """A server with one thread per connection."""

    daemon_threads, request_queue_size, deadline, last_warning = True, 256, DEADLINE, ""

    def __init__(self, host: str, port: int, handler: type[LimitedHandler]):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.lock = threading.Lock()
        self.waiting: dict[socket.socket, tuple[str, float]] = {}  # for its client, named by its address, since when
        super().__init__((host, port), handler)

    def set_waiting(self, connection: socket.socket, client: str | None) -> None:
        """From now on, the connection waits for this client and may be closed; None: it waits for nobody."""
        with self.lock:
            self.waiting.pop(connection, None)
            if client is not None:
                self.waiting[connection] = (client, time.monotonic())

    def service_actions(self) -> None:
        """Close what exceeds the limits; called after each new connection, and twice a second."""
        with self.lock:
            old = time.monotonic() - GRACE
            slow = Counter(client for client, since in self.waiting.values() if since < old)
            for connection, (client, _) in list(self.waiting.items()):  # the oldest first
                if slow[client] > PER_ADDRESS or len(self.waiting) > IN_ALL:
                    slow[client] -= 1
                    del self.waiting[connection]
                    with suppress(OSError):  # the client has gone already
                        connection.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: socket.socket) -> None:
        self.set_waiting(request, None)
        super().shutdown_request(request)

    def handle_error(self, request, client_address) -> None:
        """Print one line instead of a traceback, as when no further thread can be started."""
        self.warn(f"{type(sys.exc_info()[1]).__name__}: {sys.exc_info()[1]}")

    def warn(self, message: str) -> None:
        """Print one line; the same one only once in a row."""
        if message != self.last_warning:
            print("fluxedu:", " ".join(message.split())[:300], file=sys.stderr, flush=True)
        self.last_warning = message


class _Reader(socket.SocketIO):
    """Reads a connection up to a time and a number of bytes."""

    def __init__(self, connection: socket.socket, seconds: float):
        super().__init__(connection, "rb")
        self.connection, self.end, self.bytes_left = connection, time.monotonic() + seconds, MAX_HEAD + MAX_BODY

    def readinto(self, buffer) -> int:
        self.connection.settimeout(max(self.end - time.monotonic(), 0.001))
        count = super().readinto(memoryview(buffer)[: self.bytes_left]) if self.bytes_left else 0
        self.bytes_left -= count
        return count


class LimitedHandler(BaseHTTPRequestHandler):
    """Answers one request per connection by calling ``answer``, which may raise Refused."""

    protocol_version = default_request_version = request_version = "HTTP/1.1"
    server_version, sys_version, requestline = "fluxedu", "", ""
    disable_nagle_algorithm = True
    server: LimitedServer

    def answer(self, body: bytes) -> None:
        """Send the response to a GET or POST request."""
        raise NotImplementedError

    def handle(self) -> None:
        self.client = client_network(self.client_address[0])
        self.server.set_waiting(self.connection, self.client)
        reader = _Reader(self.connection, self.server.deadline)
        self.rfile = io.BufferedReader(reader)
        try:
            self.raw_requestline = self.rfile.readline()
            if not _FIRST_LINE.fullmatch(self.raw_requestline):
                raise Refused(
                    400, "the first line of a request must be like GET / HTTP/1.1, and not longer than 32 KB."
                )
            if not self.parse_request():  # which has sent an error
                return
            if not reader.bytes_left:
                raise Refused(431, f"the headers of a request must be at most {MAX_HEAD} bytes.")
            if self.command not in ("GET", "POST"):
                raise Refused(405, f"this server answers GET and POST, not {self.command}.")
            body = self._body() if self.command == "POST" else b""
            self.server.set_waiting(self.connection, None)
            self.answer(body)
        except TimeoutError:
            self.send_error(408, f"a request must arrive within {self.server.deadline:g} seconds.")
        except Refused as error:
            self.send_error(error.status, str(error))
        except ConnectionError:
            pass  # the client has gone
        except Exception as error:  # a mistake must not end the class's vote
            self.server.warn(f"{self.requestline[:100]}: {type(error).__name__}: {error}")
            self.send_error(500, "Something went wrong on the server. Please tell your teacher.")

    def _body(self) -> bytes:
        length, *others = self.headers.get_all("Content-Length", [""])
        if "Transfer-Encoding" in self.headers:
            raise Refused(501, "send the body in one piece, with Content-Length instead of Transfer-Encoding.")
        if others or not re.fullmatch("[0-9]{1,20}", length):
            raise Refused(400 if length else 411, "a POST request needs one header Content-Length, a whole number.")
        if int(length) > MAX_BODY:
            raise Refused(413, f"a request must be a JSON object of at most {MAX_BODY} bytes.")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refused(400, "the request ended before its Content-Length.")
        return body

    def send(self, body: bytes, kind: str = "application/json", status: int = 200, **headers: str) -> None:
        """Send a whole response, and wait until the client hangs up.

        Closing a connection with unread data in it would discard a response that is still on its way.
        """
        self.server.set_waiting(self.connection, self.client)
        self.send_response(status)
        about = {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in (about | _HEADERS | headers).items():
            self.send_header(name, value)
        with suppress(OSError):  # the client has gone, or does not take the response
            self.connection.settimeout(self.server.deadline)
            self.end_headers()
            self.wfile.write(body)
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1.0)
            end = time.monotonic() + 1.0
            while self.connection.recv(65536) and time.monotonic() < end:
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send an error as JSON; ``parse_request`` calls this too."""
        self.send(json.dumps({"error": (message or "this request cannot be read.")[:300]}).encode(), status=code)

    def log_message(self, *_) -> None:
        """Prints nothing: the file of votes is the log."""
