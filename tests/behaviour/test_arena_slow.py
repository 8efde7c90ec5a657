"""Many connections at once: slow ones end and keep no voter out, and a whole class is served."""

import socket
import threading
import time

import pytest
from test_arena_hostile import Running

from fluxedu.arena.limits import LimitedHandler, LimitedServer


def open_limit(count):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count:
        pytest.skip(f"only {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


def test_nine_hundred_slow_connections_keep_no_voter_out_and_end(tmp_path):
    """Each sends one more byte of its headers every half second, as in the attack called Slowloris."""
    open_limit(2000)
    running = Running(tmp_path, deadline=2.5)
    slow, stop = [], threading.Event()
    try:
        for _ in range(900):
            connection = socket.create_connection(("127.0.0.1", running.port), timeout=10)
            connection.setblocking(False)
            slow.append(connection)
            trickle(slow[-1:], b"GET / HTTP/1.1\r\nX-Slow: ")

        def keep_on():
            while not stop.wait(0.5):
                trickle(slow, b"a")

        threading.Thread(target=keep_on, daemon=True).start()
        assert max(running.honest_vote() for _ in range(5)) < 2.0
        end = time.monotonic() + 12
        while (left := sum(map(is_open, slow))) and time.monotonic() < end:
            time.sleep(0.2)
        assert left == 0, f"{left} of 900 slow connections are still open"
        running.honest_vote()
    finally:
        stop.set()
        [connection.close() for connection in slow]
        assert running.close() == ""


def trickle(connections, piece):
    for connection in connections:
        try:
            connection.send(piece)
        except OSError:
            pass


def is_open(connection):
    try:
        while connection.recv(4096):
            pass
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def test_two_hundred_honest_browsers_at_the_same_moment_are_all_served(tmp_path):
    """They share one address, as behind a router."""
    running, statuses, barrier = Running(tmp_path, deadline=10.0), [], threading.Barrier(200)

    def one():
        barrier.wait()
        statuses.append(running.send(running.head("GET", "/"), seconds=60)[0])

    threads = [threading.Thread(target=one) for _ in range(200)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert statuses == [200] * 200 and running.close() == ""


class Large(LimitedHandler):
    def answer(self, body):
        self.send(bytes(30_000_000), "image/png")  # more than the buffers of the system hold


def test_clients_that_do_not_take_their_response_are_let_go():
    with LimitedServer("127.0.0.1", 0, Large) as server:
        server.deadline, threads = 1.0, threading.active_count()
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        slow = [socket.create_connection(server.server_address) for _ in range(20)]
        [connection.sendall(b"GET / HTTP/1.1\r\n\r\n") for connection in slow]
        time.sleep(0.5)
        assert threading.active_count() > threads + 10 and len(server.waiting) > 10
        end = time.monotonic() + 15
        while threading.active_count() > threads + 1 and time.monotonic() < end:
            time.sleep(0.1)
        assert threading.active_count() == threads + 1 and not server.waiting
        server.shutdown()
        thread.join(10)
        [connection.close() for connection in slow]


def test_of_one_address_no_more_than_64_connections_wait(monkeypatch):
    """The newest stay open, so a voter who comes later is always heard; in all there are 512 at most."""
    monkeypatch.setattr("fluxedu.arena.limits.GRACE", 0.2)
    with LimitedServer("127.0.0.1", 0, Large) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        slow = [socket.create_connection(server.server_address) for _ in range(100)]
        [connection.setblocking(False) for connection in slow]
        trickle(slow, b"GET")
        end = time.monotonic() + 8  # the deadline is at 10 seconds
        while sum(map(is_open, slow)) > 64 and time.monotonic() < end:
            time.sleep(0.05)
        assert [is_open(connection) for connection in slow] == [False] * 36 + [True] * 64
        for number in range(600):  # from as many addresses
            server.waiting[socket.socket()] = (f"10.0.{number // 250}.{number % 250}", time.monotonic())
        wait = time.monotonic() + 8
        while len(server.waiting) > 512 and time.monotonic() < wait:
            time.sleep(0.05)
        assert len(server.waiting) == 512
        server.shutdown()
        thread.join(10)
        [connection.close() for connection in [*slow, *server.waiting]]
