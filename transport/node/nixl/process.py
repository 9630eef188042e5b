"""Keeps a process with NIXL, and gives it orders with deadlines.

What NIXL has begun it cannot take back: a read that was given up may still write, however late. Its memory is free again once
NIXL says that the read is over, or once the process is gone; so a process in which a read stays in doubt is ended.
"""

import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from transport.node.messages import NodeError
from transport.node.nixl.ability import Ability
from transport.node.nixl.orders import Channel, Disown, Done, Failed, Forget, Order, Read, Ready, Said, Target
from transport.node.threads import start_thread
from transport.table.layout import Region

_logger = logging.getLogger(__name__)

START_SECONDS_MAX = 30.0
ORDER_SECONDS_MAX = 5.0
QUARANTINE_SECONDS_MAX = 10.0
"""How long a read may be in doubt."""
LOOK_SECONDS = 0.2
PAUSE_SECONDS, PAUSE_SECONDS_MAX = 0.5, 60.0


class OrderFailed(NodeError):
    """NIXL could not do what it was told to."""


@dataclass(slots=True, eq=False)
class Transfer:
    """A read. While it is not `over` its memory may be written."""

    ended: threading.Event = field(default_factory=threading.Event)
    over: bool = False
    failure: str = ""
    doubtful_since: float = 0.0

    def wait(self, seconds: float) -> None:
        """Wait for its end. Raises NodeError if it fails, or takes longer; then it may not be over."""
        if not self.ended.wait(seconds):
            raise NodeError(f"a read by NIXL did not end in {seconds:g} s", "silent")
        if self.failure:
            raise NodeError(self.failure)

    def give_up(self, why: str = "") -> None:
        """Nobody waits for it any more: if it is not over soon, its process is ended."""
        self.doubtful_since = self.doubtful_since or time.monotonic()
        if why and not self.ended.is_set():
            self.failure = self.failure or why
            self.ended.set()


@dataclass(slots=True)
class _Asked:
    answered: threading.Event = field(default_factory=threading.Event)
    answer: Done | Failed | None = None


class NixlProcess:
    """NIXL's agent `name` as a process, started again when it ends; `target` is the memory that is read into, if any is.

    Any thread may order. `life` counts the processes: what an earlier one knew and owned is gone.
    """

    def __init__(self, name: str, found: Ability, environment: Mapping[str, str], target: Region | None) -> None:
        self.life = 0
        self.trouble = "NIXL is being started"
        self.name = name
        self.command = [sys.executable, "-m", __package__ or "", found.package, name]
        self.environment = dict(environment)
        self._target = target
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: dict[int, _Asked] = {}
        self._reads: dict[int, Transfer] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="peerkv-nixl", daemon=True)

    @property
    def pid(self) -> int:
        """The process now, 0 if there is none."""
        process = self._process
        return process.pid if process is not None else 0

    def start(self) -> None:
        """Keep a process from now on."""
        self._thread.start()

    def close(self) -> None:
        """End it; nothing is written once this returns."""
        self._closed.set()
        self.end("this node ends")
        if self._thread.is_alive():
            self._thread.join()

    def end(self, why: str) -> None:
        """Have the process end at once, however stuck it is; another is started."""
        with self._lock:
            if self._process is not None:
                if not self._closed.is_set():
                    _logger.warning("%s is ended: %s", self.name, why)
                self._process.kill()

    def new_id(self) -> int:
        """Return a number for an order."""
        return next(self._ids)

    def ask(self, order: Order, seconds: float = ORDER_SECONDS_MAX) -> Done:
        """Give an order that has an answer. Raises OrderFailed, and NodeError if the answer does not come or takes longer."""
        assert not isinstance(order, Read | Forget | Disown)
        asked = _Asked()
        with self._lock:
            self._asked[order.id] = asked
        try:
            self._send(order)
            if not asked.answered.wait(seconds):
                raise NodeError(f"{self.name} does not answer")
        finally:
            with self._lock:
                self._asked.pop(order.id, None)
        if asked.answer is None:
            raise NodeError(f"{self.name} ended")
        if isinstance(asked.answer, Failed):
            raise OrderFailed(asked.answer.reason)
        return asked.answer

    def read(self, agent: str, spans: bytes, life: int) -> Transfer:
        """Begin a read, as `Read` has it. Raises NodeError if the process is not that of `life` any more."""
        order, transfer = Read(self.new_id(), agent, spans), Transfer()
        with self._lock:
            channel = self._channel
            if life != self.life or channel is None:
                raise NodeError(f"{self.name} ended")
            self._reads[order.id] = transfer
        self._send(order, channel)  # what is not sent whole ends the process
        return transfer

    def tell(self, order: Forget | Disown) -> None:
        """Give an order that has no answer."""
        self._send(order)

    def _send(self, order: Order, to: Channel | None = None) -> None:
        """Send an order to the process now; one that was meant for the process behind `to` to no other."""
        with self._sending:
            channel = self._channel
            if channel is None or (to is not None and to is not channel):
                raise NodeError(self.trouble or f"{self.name} ended")
            try:
                channel.send(order)
            except (OSError, ValueError) as error:  # half of a message went, or none: nothing more can be said to it
                self.end(f"it takes no orders: {error}")
                raise NodeError(f"{self.name} takes no orders: {error}") from error

    def _keep(self) -> None:
        pause = PAUSE_SECONDS
        while not self._closed.is_set():
            began = time.monotonic()
            try:
                self._live()
            except (OSError, NodeError) as error:
                self._say(f"NIXL ended: {error}")
            pause = PAUSE_SECONDS if time.monotonic() - began > PAUSE_SECONDS_MAX else min(2 * pause, PAUSE_SECONDS_MAX)
            self._closed.wait(pause)

    def _say(self, trouble: str) -> None:
        if trouble != self.trouble:
            self.trouble = trouble
            if trouble and not self._closed.is_set():
                _logger.warning("%s: %s", self.name, trouble)

    def _live(self) -> None:
        """One process, from its start to its end. Raises NodeError, which says how it ended, and OSError."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            command = [*self.command, str(theirs.fileno()), str(os.getpid())]
            with self._lock:
                if self._closed.is_set():
                    return
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, env=self.environment, pass_fds=(theirs.fileno(),)
                )
            theirs.close()
            try:
                self._serve(Channel(ours))
            finally:
                self._process.kill()
                code = self._process.wait()
                self._forget_all()
        raise NodeError(f"it was killed by signal {-code}" if code < 0 else f"its exit status is {code}")

    def _serve(self, channel: Channel) -> None:
        self._await_ready(channel)
        with self._lock:
            self.life += 1
            self._channel = channel
        if self._target is not None:
            start_thread("peerkv-nixl-target", self._use, self._target)
        else:
            self._say("")
        while (messages := channel.receive(LOOK_SECONDS)) is not None:
            for message in messages:
                self._hear(message)
            self._end_if_in_doubt()

    def _await_ready(self, channel: Channel) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline:
            said = channel.receive(LOOK_SECONDS)
            if said is None:
                raise NodeError("it ended before it was ready; the log says why")
            if said:
                if isinstance(said[0], Ready):
                    return
                raise NodeError(said[0].reason if isinstance(said[0], Failed) else "it says something else")
        raise NodeError(f"it was not ready in {START_SECONDS_MAX:g} s")

    def _use(self, target: Region) -> None:
        try:
            self.ask(Target(self.new_id(), target), START_SECONDS_MAX)
        except NodeError as error:
            self._say(f"NIXL cannot read into our memory: {error}")
            self.end(self.trouble)
            return
        self._say("")

    def _hear(self, message: Said) -> None:
        if not isinstance(message, Done | Failed):
            raise NodeError("it says something else")
        with self._lock:
            transfer = self._reads.get(message.id)
            asked = self._asked.get(message.id)
        if transfer is not None:
            if isinstance(message, Failed):
                transfer.failure = message.reason
                transfer.give_up()
            if isinstance(message, Done) or not message.begun:
                transfer.over = True
                with self._lock:
                    del self._reads[message.id]
            transfer.ended.set()
        elif asked is not None:
            asked.answer = message
            asked.answered.set()

    def _end_if_in_doubt(self) -> None:
        late = time.monotonic() - QUARANTINE_SECONDS_MAX
        with self._lock:
            doubtful = any(0 < transfer.doubtful_since < late for transfer in self._reads.values())
        if doubtful:
            self.end("a read that was given up may still write")

    def _forget_all(self) -> None:
        """The process is gone: nothing is written any more, and nothing is answered."""
        with self._sending, self._lock:
            self._channel = self._process = None
            asked, reads = list(self._asked.values()), list(self._reads.values())
            self._asked.clear()
            self._reads.clear()
        for transfer in reads:
            transfer.failure = transfer.failure or f"{self.name} ended"
            transfer.over = True
            transfer.ended.set()
        for each in asked:
            each.answered.set()
