"""A wire between two nodes that can be made to fail: a port that leads to another one."""

import contextlib
import socket
import threading
from dataclasses import dataclass
from typing import Literal, Protocol

PIECE_BYTES = 1 << 16
ACCEPT_SECONDS_MAX = 5.0
DRIBBLE_SECONDS = 0.005

Toward = Literal["asker", "owner"]
Then = Literal["go on", "cut", "end one way", "hold", "dribble"]


@dataclass(frozen=True, slots=True)
class Passed:
    """What is passed on, and what becomes of the connection then."""

    data: bytes
    then: Then = "go on"


class WireFault(Protocol):
    """What becomes of bytes while it is in force. Called by one thread at a time."""

    refuses: bool
    """Whether every connection is ended at once."""
    anew: bool
    """Whether it begins with other connections, since it follows them from their first byte."""
    hit: bool
    """Whether it did something."""

    def passed(self, connection: int, toward: Toward, data: bytes) -> Passed:
        """Return what is passed on of `data`."""


class Wire:
    """Listens on `port`, and leads to `target` on loopback, until it is closed."""

    def __init__(self, port: int, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", port), backlog=64)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._fault: WireFault | None = None
        self._over = threading.Event()
        self._count = self._ended = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, fault: WireFault) -> None:
        """Have `fault` in force."""
        with self._lock:
            self._fault, self._over = fault, threading.Event()
            if fault.anew:
                self._ended = self._count
                self._end_all(True)

    def disarm(self) -> None:
        """Pass on everything again, on other connections: what these held is lost."""
        with self._lock:
            self._fault = None
            self._over.set()
            self._end_all(True)

    def close(self) -> None:
        """End everything."""
        self._end(self._listener)
        with self._lock:
            self._over.set()
            self._end_all(True)

    def _end_all(self, wanted: bool) -> None:
        for each in self._open if wanted else ():
            self._end(each)

    def _end(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with self._listener:
            while True:
                try:
                    near, _ = self._listener.accept()
                except OSError:
                    return
                fault = self._fault
                if fault is not None and fault.refuses:
                    fault.hit = True
                    near.close()
                    continue
                try:
                    far = socket.create_connection(("127.0.0.1", self._target), ACCEPT_SECONDS_MAX)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                self._lead(near, far)

    def _lead(self, near: socket.socket, far: socket.socket) -> None:
        with self._lock:
            self._count += 1
            number = self._count
            self._open |= {near, far}
        both = threading.Barrier(2)
        for source, sink, toward in ((near, far, "owner"), (far, near, "asker")):
            threading.Thread(target=self._pump, args=(number, source, sink, toward, both), daemon=True).start()

    def _pump(self, number: int, source: socket.socket, sink: socket.socket, toward: Toward, both: threading.Barrier) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE_BYTES):
                with self._lock:
                    fault, over = self._fault, self._over
                    if number <= self._ended:  # what was still on its way there
                        break
                    passed = Passed(data) if fault is None else fault.passed(number, toward, data)
                if passed.then == "dribble":
                    self._dribble(sink, passed.data, over)
                    break
                sink.sendall(passed.data)
                if passed.then == "hold":
                    over.wait()
                if passed.then == "end one way":
                    sink.shutdown(socket.SHUT_WR)
                    over.wait()
                if passed.then != "go on":
                    break
        self._end(source)
        self._end(sink)
        both.wait()  # the other thread still uses both
        source.close()
        with self._lock:
            self._open.discard(source)

    def _dribble(self, sink: socket.socket, data: bytes, over: threading.Event) -> None:
        for place in range(len(data)):
            sink.sendall(data[place : place + 1])
            if over.wait(DRIBBLE_SECONDS):
                return
