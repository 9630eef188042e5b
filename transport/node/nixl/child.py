"""What runs in a process with NIXL: carries out the agent's orders until the agent closes the channel."""

import logging
import time
from collections import deque

import numpy as np

from transport.node.nixl.binding import NixlAgent
from transport.node.nixl.mapping import Mapping
from transport.node.nixl.orders import Channel, Disown, Done, Failed, Forget, Know, Own, Read, Ready, Said, Target

_logger = logging.getLogger(__name__)

LOOK_SECONDS = 50e-6
"""Between two looks at the reads that are under way."""
VANISHED_SECONDS = 60.0
"""Addresses that were offered are used for nothing else for so long: somebody may be about to read them."""


class Child:
    """Serves one channel."""

    def __init__(self, agent: NixlAgent, channel: Channel) -> None:
        self._agent = agent
        self._channel = channel
        self._target: Mapping | None = None
        self._owned: dict[int, tuple[Mapping, ...]] = {}
        self._vanished: deque[tuple[float, Mapping]] = deque()
        self._reads: dict[int, tuple[int, str]] = {}
        self._forgetting: set[str] = set()
        self._doubtful: set[str] = set()

    def run(self) -> None:
        """Carry out orders until the channel ends."""
        self._channel.send(Ready())
        while (orders := self._channel.receive(0 if self._reads else None)) is not None:
            for order in orders:
                self._take(order)
            if self._reads and not self._look() and not orders:
                time.sleep(LOOK_SECONDS)

    def _take(self, order: Said) -> None:
        try:
            answer = self._carry_out(order)
        except Exception as error:  # noqa: BLE001 - NIXL's errors have no class of their own; the agent counts and logs them
            answer = _failed(order, error)
        if answer is not None:
            self._channel.send(answer)

    def _carry_out(self, order: Said) -> Done | Failed | None:
        match order:
            case Target():
                self._target = self._registered(Mapping(order.region, writable=True))
                return Done(order.id)
            case Own():
                return self._own(order)
            case Disown():
                self._disown(order.id)
            case Know():
                self._know(order)
                return Done(order.id)
            case Forget():
                self._forgetting.add(order.agent)
                self._forget()
            case Read():
                return self._read(order)
        return None

    def _registered(self, mapping: Mapping) -> Mapping:
        try:
            self._agent.register(mapping.address, mapping.size)
        except Exception:
            mapping.close()
            raise
        return mapping

    def _own(self, order: Own) -> Done:
        self._sweep()
        mappings: list[Mapping] = []
        self._owned[order.id] = ()
        try:
            for region in order.regions:
                mappings.append(self._registered(Mapping(region, writable=order.writable)))
                self._owned[order.id] = tuple(mappings)
            metadata = self._agent.metadata([(mapping.address, mapping.size) for mapping in mappings])
        except Exception:
            self._disown(order.id)
            raise
        return Done(order.id, addresses=tuple(mapping.address for mapping in mappings), metadata=metadata)

    def _disown(self, number: int) -> None:
        for mapping in self._owned.pop(number, ()):
            try:
                self._agent.deregister(mapping.address, mapping.size)
            finally:
                mapping.vanish()
                self._vanished.append((time.monotonic() + VANISHED_SECONDS, mapping))

    def _sweep(self) -> None:
        while self._vanished and self._vanished[0][0] < time.monotonic():
            self._vanished.popleft()[1].close()

    def _read(self, order: Read) -> Failed | None:
        target = self._target
        spans = np.frombuffer(order.spans, "<u8").reshape(-1, 3)
        size = np.uint64(0 if target is None else target.size)
        if target is None or not len(spans) or (spans[:, 0] > size).any() or (spans[:, 2] > size - spans[:, 0]).any():
            raise ValueError("a read beyond our memory")
        here = np.stack([spans[:, 0] + np.uint64(target.address), spans[:, 2]], axis=1)
        read = self._agent.prepare(order.agent, here, spans[:, 1:])
        try:
            self._agent.begin(read)
        except Exception as error:  # noqa: BLE001 - as in `_take`; but some of it may have begun
            return Failed(order.id, _words(error), begun=True)
        self._reads[order.id] = read, order.agent
        return None

    def _know(self, order: Know) -> None:
        name = self._agent.know(order.metadata)
        if name != order.agent:
            self._forgetting.add(name)
            self._forget()
            raise ValueError("metadata of another process")
        self._forgetting.discard(name)

    def _busy(self) -> set[str]:
        """Return the agents that something may yet come from."""
        return {agent for _, agent in self._reads.values()} | self._doubtful

    def _forget(self) -> None:
        """Forget agents that are not wanted any more, once nothing is read from them."""
        for agent in self._forgetting - self._busy():
            self._forgetting.discard(agent)
            try:
                self._agent.forget(agent)
            except Exception as error:  # noqa: BLE001 - as in `_take`
                _logger.info("%s cannot be forgotten: %s", agent, _words(error))

    def _look(self) -> bool:
        """Tell the agent of the reads that ended; return whether any did."""
        ended: list[Done | Failed] = []
        for number, (read, _) in self._reads.items():
            try:
                if self._agent.over(read):
                    ended.append(Done(number))
            except Exception as error:  # noqa: BLE001 - as in `_take`; it failed, and nobody knows what it may write yet
                ended.append(Failed(number, _words(error), begun=True))
        for answer in ended:
            read, agent = self._reads.pop(answer.id)
            if isinstance(answer, Done):
                self._agent.release(read)
            else:
                self._doubtful.add(agent)
            self._channel.send(answer)
        if ended and self._forgetting:
            self._forget()
        return bool(ended)


def _failed(order: Said, error: Exception) -> Failed | None:
    _logger.info("an order to NIXL failed: %s: %s", type(order).__name__, _words(error))
    return Failed(order.id, _words(error)) if isinstance(order, Target | Own | Know | Read) else None


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1000]
