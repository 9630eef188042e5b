"""What an admin has done with replicas: drained, resumed, restarted, each without a failed request if others are ready."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping

from engine.fleet import FleetControl, FleetError, Replica, ReplicaState
from gateway.errors import ApiError, UnknownReplica
from gateway.replica_control.hand_over import HandOver
from gateway.replica_control.shapes import ControlledReplica, ReplicaList, Step
from transport.node.names import node_of, on_node

_logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1
HAND_OVER_SECONDS_MAX = 60.0


class NotNow(ApiError):
    """The replica, or the fleet, is not in a state in which that can be done."""

    status = 409
    type = "invalid_request_error"
    code = "not_now"


class RunElsewhere(ApiError):
    """Another process runs the replica."""

    status = 409
    type = "invalid_request_error"
    code = "replica_runs_elsewhere"


class _Work:
    """What is being done with one replica, and what came of the last time."""

    def __init__(self) -> None:
        self.step = Step.NONE
        self.handed_over_tokens = 0
        self.failure = ""
        self.task: asyncio.Task[None] | None = None

    @property
    def under_way(self) -> bool:
        return self.task is not None and not self.task.done()


class ReplicaControl:
    """Belongs to one event loop. `in_flight` tells this gateway's requests by replica; seconds bound each wait."""

    def __init__(
        self,
        fleet: FleetControl,
        hand_over: HandOver,
        in_flight: Callable[[], Mapping[str, int]],
        *,
        drain_seconds: float,
        startup_seconds_max: float,
    ) -> None:
        self._fleet = fleet
        self._hand_over = hand_over
        self._in_flight = in_flight
        self.drain_seconds = drain_seconds
        self._startup_seconds_max = startup_seconds_max
        self._work: dict[str, _Work] = {}

    def all(self) -> ReplicaList:
        """Every replica now."""
        counts = self._in_flight()
        shown = [self._shown(replica, counts) for replica in self._fleet.snapshot().replicas]
        return ReplicaList(restartable=self._fleet.restarts, replicas=shown)

    def names(self) -> list[str]:
        """The names of all replicas now."""
        return [replica.name for replica in self._fleet.snapshot().replicas]

    async def drain(self, name: str, *, force: bool = False) -> ControlledReplica:
        """Send it nothing new, and hand over what it holds, which goes on when this returns. Raises ApiError.

        The only ready replica is refused unless `force`: nobody could serve until it is resumed.
        """
        drained_already = self._own(name).state is ReplicaState.DRAINING
        work = self._begin(name, last_one_too=force or drained_already)
        await self._fleet.drain(name)
        self._run(name, work, self._drained(name, work))
        return self._now(name)

    async def resume(self, name: str) -> ControlledReplica:
        """Send it requests again. Raises ApiError."""
        work = self._work_of(name)
        if work.step is Step.RESTARTING:
            raise NotNow(f"{name} is being restarted, and gets requests as soon as it is ready.")
        await self._stop(work)
        await self._fleet.resume(name)
        return self._now(name)

    async def restart(self, name: str, *, force: bool = False) -> ControlledReplica:
        """Drain it, hand over, restart it; that goes on when this returns. Raises ApiError.

        The only ready replica is refused unless `force`: nobody could serve meanwhile.
        """
        self._own(name)
        if not self._fleet.restarts:
            raise RunElsewhere(
                f"{name} is run by `peerkv engine`, not by this gateway, which can only drain it: have its operator restart it."
            )
        work = self._begin(name, last_one_too=force)
        await self._fleet.drain(name)
        self._run(name, work, self._restarted(name, work))
        return self._now(name)

    async def close(self) -> None:
        """End what is under way."""
        for work in self._work.values():
            await self._stop(work)

    def _find(self, name: str) -> Replica:
        replicas = self._fleet.snapshot()
        found = replicas.find(name)
        if found is None:
            raise UnknownReplica(name, [replica.name for replica in replicas.replicas])
        return found

    def _own(self, name: str) -> Replica:
        """The replica, if it is this node's. Raises UnknownReplica and RunElsewhere."""
        found = self._find(name)
        if node := node_of(name):
            plain = name.removeprefix(on_node(node, ""))
            raise RunElsewhere(f"{name} is a replica of {node}: do that by the gateway of {node}, which calls it {plain}.")
        return found

    def _work_of(self, name: str) -> _Work:
        self._own(name)
        return self._work.setdefault(name, _Work())

    def _begin(self, name: str, *, last_one_too: bool) -> _Work:
        work = self._work_of(name)
        if work.under_way:
            raise NotNow(f"{name} is busy {work.step.value or 'with another command'}.")
        if not last_one_too and all(replica.name == name for replica in self._fleet.snapshot().ready()):
            raise NotNow(
                f"No other replica than {name} is ready, so that nobody could serve; force it, or wait for another one."
            )
        work.failure, work.handed_over_tokens = "", 0
        return work

    def _run(self, name: str, work: _Work, steps: Coroutine[None, None, None]) -> None:
        work.step = Step.HANDING_OVER
        work.task = asyncio.create_task(steps, name=f"the control of {name}")
        work.task.add_done_callback(_tell_of_defect)

    async def _stop(self, work: _Work) -> None:
        if work.task is not None:
            work.task.cancel()
            await asyncio.gather(work.task, return_exceptions=True)
        work.step = Step.NONE

    async def _drained(self, name: str, work: _Work) -> None:
        try:
            async with asyncio.timeout(HAND_OVER_SECONDS_MAX):
                work.handed_over_tokens = await self._hand_over.run(name)
        except TimeoutError:
            _logger.warning("the hand-over of %s took longer than %g s, the rest is left", name, HAND_OVER_SECONDS_MAX)
        finally:
            work.step = Step.NONE

    async def _restarted(self, name: str, work: _Work) -> None:
        try:
            await self._drained(name, work)
            work.step = Step.DRAINING
            if not await self._idle(name):
                _logger.warning("%s is restarted with requests that did not finish in time", name)
            work.step = Step.RESTARTING
            before = self._find(name).restarts
            await self._fleet.restart(name)
            work.failure = await self._ready_again(name, before)
        except (FleetError, ApiError) as error:
            work.failure = str(error)
        finally:
            work.step = Step.NONE

    async def _idle(self, name: str) -> bool:
        """Wait for the requests of this gateway, then for those of others."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self.drain_seconds
        while self._in_flight().get(name, 0):
            if loop.time() >= end:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return await self._fleet.idle_in(name, max(0.0, end - loop.time()))

    async def _ready_again(self, name: str, before: int) -> str:
        """Wait until it was restarted and is ready; returns why not, "" if it is."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._startup_seconds_max
        while loop.time() < end:
            found = self._find(name)
            if found.restarts > before and found.state is ReplicaState.READY:
                return ""
            if found.state is ReplicaState.FAILED:
                return found.reason
            await asyncio.sleep(POLL_SECONDS)
        return f"it was not ready again in {self._startup_seconds_max:g} s"

    def _now(self, name: str) -> ControlledReplica:
        return self._shown(self._find(name), self._in_flight())

    def _shown(self, replica: Replica, counts: Mapping[str, int]) -> ControlledReplica:
        work = self._work.get(replica.name) or _Work()
        return ControlledReplica(
            name=replica.name,
            node=node_of(replica.name),
            state=str(replica.state),
            reason=replica.reason,
            device=replica.device,
            restarts=replica.restarts,
            requests=counts.get(replica.name, 0),
            step=work.step,
            handed_over_tokens=work.handed_over_tokens,
            failure=work.failure,
        )


def _tell_of_defect(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _logger.error("%s ended unexpectedly", task.get_name(), exc_info=error)
