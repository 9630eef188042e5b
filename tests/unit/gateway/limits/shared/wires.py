"""Connections for tests that block, to a real server: they lose what they are told to lose."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from typing import Literal

from engine.frame_tiers.vault.address import VaultAddress
from engine.frame_tiers.vault.resp import Reply, VaultError, hello, pieces, read_reply
from gateway.limits.account import Account
from gateway.limits.shared.commands import LOAD, Sender, understood
from gateway.tenants.keys import Key

Fault = Literal["none", "request lost", "reply lost", "request late"]
_names = itertools.count()


def fresh_name() -> str:
    """A key's name that the server has not had."""
    return f"key-{next(_names)}"


class Server:
    """A real server, spoken to as a test goes on."""

    def __init__(self, address: VaultAddress) -> None:
        self._socket = socket.create_connection((address.host, address.port), timeout=10)
        for words in (*hello(address), LOAD):
            assert not isinstance(self.run(b"".join(pieces(words))), VaultError)

    def run(self, command: bytes) -> Reply:
        """The reply to an encoded command."""
        self._socket.sendall(command)
        data = b""
        while (found := read_reply(data, 0)) is None:
            data += self._socket.recv(65536)
        assert found[1] == len(data)
        return found[0]

    def look(self, key: Key, micros: bytes) -> Account:
        """The account as it is."""
        told = understood(self.run(Sender(b"a-test", 1, micros).hold(key.name, [])))
        assert told is not None
        return told.account

    def close(self) -> None:
        self._socket.close()


class Wire:
    """One connection. The first fault breaks it: what is sent after that goes nowhere, and what is `late` comes when told."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.fault: Fault = "none"
        self.broken = False
        self.late: list[bytes] = []

    def send(self, command: bytes, done: Callable[[Reply], None]) -> None:
        if self.broken:
            if self.late:
                self.late.append(command)
            return
        if self.fault == "none":
            done(self._server.run(command))
            return
        self.broken = True
        if self.fault == "reply lost":
            self._server.run(command)
        elif self.fault == "request late":
            self.late.append(command)

    def deliver_late(self) -> None:
        """What was under way when the connection broke reaches the server after all."""
        for command in self.late:
            self._server.run(command)
        self.late.clear()
