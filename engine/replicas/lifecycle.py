"""When a replica is started, given up or restarted: a pure state machine. Times are seconds of one monotonic clock.

A method takes what happened and `now`, changes the state, and returns what the shell must do, if anything.
"""

from dataclasses import dataclass
from enum import Enum, auto
from math import inf

from engine.fleet import ReplicaState

LOADING = "loading the model"
"""Why a replica that starts is not ready, unless something else is known."""


class LifecycleAction(Enum):
    """What the shell does to the replica's process. A replica that ends is reported by `exited`."""

    SPAWN = auto()
    TERMINATE = auto()
    KILL = auto()


class Goal(Enum):
    """What follows when the process ends."""

    RUN = auto()  # that was a failure
    RESTART = auto()
    STOP = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """The bounds of a replica's life; times are seconds."""

    startup_seconds_max: float = 600.0
    health_failures_max: int = 3  # failed checks in a row before a replica is restarted
    miss_seconds_apart: float = 1.0  # failed checks closer together count as one
    core_frozen_seconds_max: float = 20.0  # no step and no CPU time, with requests: the replica is restarted
    core_silent_seconds_max: float = 600.0  # no step, with requests: the same
    backoff_seconds_min: float = 0.5
    backoff_seconds_max: float = 30.0
    healthy_seconds_reset: float = 60.0  # once ready for this long, the back-off starts over
    start_failures_max: int = 3  # consecutive failed starts before the replica is given up
    terminate_seconds: float = 10.0  # from SIGTERM to SIGKILL

    def backoff_seconds(self, failures: int) -> float:
        """Return the wait before the start after `failures` (at least 1) consecutive failures: doubling, capped."""
        return min(self.backoff_seconds_max, self.backoff_seconds_min * 2.0 ** min(failures - 1, 32))


class Lifecycle:
    """The life of one supervised process. `state`, `pid`, `restarts` and `reason` are for reading."""

    def __init__(self, policy: RestartPolicy) -> None:
        self.state = ReplicaState.STOPPED
        self.pid: int | None = None
        self.restarts = 0
        self.reason = "not started yet"
        self._policy = policy
        self._goal = Goal.RUN
        self._running = False
        self._drained = False  # until somebody says otherwise, also if it ends meanwhile
        self._due: float | None = None  # when `tick` has something to do
        self._failures = 0  # in a row, of any kind
        self._start_failures = 0  # in a row, without getting ready
        self._misses = 0  # health checks in a row
        self._missed_at = -inf
        self._still = False  # its engine is stuck
        self._blame = ""  # why we killed it

    @property
    def due(self) -> float | None:
        """When `tick` must be called next."""
        return self._due

    @property
    def running(self) -> bool:
        """Whether a process exists, or was asked for and has not been reported as ended."""
        return self._running

    @property
    def watched(self) -> bool:
        """Whether health checks are meaningful now."""
        states = (ReplicaState.STARTING, ReplicaState.READY, ReplicaState.DRAINING)
        return self._running and self._goal is Goal.RUN and self.state in states

    @property
    def in_doubt(self) -> bool:
        """Whether the last health check failed or its engine is stuck."""
        return self._misses > 0 or self._still

    def start(self, now: float) -> LifecycleAction | None:
        """Start it for the first time, or again after STOPPED or FAILED; no effect while it runs."""
        if self._running:
            return None
        self._failures = self._start_failures = 0
        return self._spawn(now)

    def held_back(self, why: str) -> None:
        """Its start has to wait, for however long."""
        self.reason = why
        self._due = None

    def let_go(self, now: float) -> None:
        """It starts now."""
        self.reason = LOADING
        self._due = now + self._policy.startup_seconds_max

    def spawned(self, pid: int) -> None:
        """Its process has this id."""
        self.pid = pid

    def answered(self, now: float) -> None:
        """A health check succeeded."""
        if not self.watched:
            return
        if self._misses:
            self._misses = 0
            self.reason = "draining" if self.state is ReplicaState.DRAINING else ""
        if self.state is ReplicaState.STARTING:
            self._start_failures = 0
            if self._drained:
                self._enter(ReplicaState.DRAINING, "draining")
                return
            self._enter(ReplicaState.READY, "")
            self._due = now + self._policy.healthy_seconds_reset

    def missed(self, why: str, now: float, *, dead: bool = False) -> LifecycleAction | None:
        """A health check failed; `dead`: the replica itself says that it is dead.

        Failures less than `miss_seconds_apart` apart count as one: a momentary problem may fail many checks at once.
        """
        if not self.watched or self.state is ReplicaState.STARTING:
            return None
        self.reason = why
        if now - self._missed_at >= self._policy.miss_seconds_apart:
            self._misses += 1
            self._missed_at = now
        if not dead and self._misses < self._policy.health_failures_max:
            return None
        return self._kill(why)

    def stands_still(self, silent_seconds: float, frozen_seconds: float) -> LifecycleAction | None:
        """How long its engine has made no step although it should, and used no CPU time either; zeros if it makes progress."""
        if not self.watched or self.state is ReplicaState.STARTING:
            return None
        if not silent_seconds:
            if self._still:
                self._still = False
                self.reason = "draining" if self.state is ReplicaState.DRAINING else ""
            return None
        self._still = True
        self.reason = f"its engine made no step for {max(1, round(silent_seconds))} s"
        policy = self._policy
        if frozen_seconds < policy.core_frozen_seconds_max and silent_seconds < policy.core_silent_seconds_max:
            return None
        return self._kill(self.reason)

    def exited(self, how: str, now: float, *, final: bool = False) -> LifecycleAction | None:
        """Its process ended; `how` in words. `final`: another start would end the same way."""
        was_ready = self.state is not ReplicaState.STARTING
        reason = f"{self._blame}; {how}" if self._blame else how
        self._gone()
        if self._goal is Goal.STOP:
            self._enter(ReplicaState.STOPPED, "stopped")
            return None
        if self._goal is Goal.RESTART:
            self.restarts += 1
            return self._spawn(now)
        self._failures += 1
        self._start_failures = 0 if was_ready else self._start_failures + 1
        if not was_ready and final:
            self._enter(ReplicaState.FAILED, reason)
            return None
        if self._start_failures >= self._policy.start_failures_max:
            self._enter(ReplicaState.FAILED, f"gave up after {self._start_failures} failed starts: {reason}")
            return None
        self._enter(ReplicaState.BACKOFF, reason)
        self._due = now + self._policy.backoff_seconds(self._failures)
        return None

    def lost(self, why: str, now: float) -> None:
        """Its process is gone through no fault of its own: it will be started again at the next `tick`."""
        if not self._running:
            return
        goal = self._goal
        self._gone()
        if goal is Goal.STOP:
            self._enter(ReplicaState.STOPPED, "stopped")
            return
        self._enter(ReplicaState.BACKOFF, why)
        self._due = now

    def give_up(self, why: str) -> None:
        """It cannot be started at all."""
        self._gone()
        self._enter(ReplicaState.FAILED, why)

    def tick(self, now: float) -> LifecycleAction | None:
        """The time `due` has come (harmless if called earlier)."""
        if self._due is None or now < self._due:
            return None
        self._due = None
        if self._goal is not Goal.RUN:
            return LifecycleAction.KILL if self._running else None
        if self.state is ReplicaState.STARTING:
            return self._kill(f"not ready {self._policy.startup_seconds_max:g} s after its start")
        if self.state is ReplicaState.BACKOFF:
            self.restarts += 1
            return self._spawn(now)
        if self.state is ReplicaState.READY:
            self._failures = 0
        return None

    def drain(self) -> None:
        """No new requests from now on, until `resume`, `restart` or `stop`; no effect unless it is READY."""
        if self.state is ReplicaState.READY:
            self._drained = True
            self._enter(ReplicaState.DRAINING, "draining")

    def resume(self, now: float) -> None:
        """Take requests again after `drain`, once it is ready; no effect on one that is being stopped or restarted."""
        self._drained = False
        if self.state is ReplicaState.DRAINING and self._goal is Goal.RUN:
            self._enter(ReplicaState.READY, "")
            self._due = now + self._policy.healthy_seconds_reset

    def restart(self, now: float) -> LifecycleAction | None:
        """Stop it and start it again; a FAILED, STOPPED or waiting one starts at once."""
        self._drained = False
        if not self._running:
            self.restarts += 1
            return self.start(now)
        return self._end(Goal.RESTART, "restarting", now, self._policy.terminate_seconds)

    def stop(self, now: float, terminate_seconds: float) -> LifecycleAction | None:
        """Stop it for good: SIGTERM, then SIGKILL after `terminate_seconds`."""
        if not self._running:
            self._goal = Goal.STOP
            self._enter(ReplicaState.STOPPED, "stopped")
            return None
        return self._end(Goal.STOP, "stopping", now, terminate_seconds)

    def _spawn(self, now: float) -> LifecycleAction:
        self._goal = Goal.RUN
        self._running = True
        self._misses = 0
        self._missed_at = -inf
        self._still = False
        self._enter(ReplicaState.STARTING, LOADING)
        self._due = now + self._policy.startup_seconds_max
        return LifecycleAction.SPAWN

    def _end(self, goal: Goal, reason: str, now: float, terminate_seconds: float) -> LifecycleAction:
        self._goal = goal
        self._enter(ReplicaState.DRAINING, reason)
        self._due = now + terminate_seconds
        return LifecycleAction.TERMINATE

    def _kill(self, why: str) -> LifecycleAction:
        self._blame = self.reason = why
        if self.state is not ReplicaState.STARTING:
            self._enter(ReplicaState.BACKOFF, why)
        return LifecycleAction.KILL

    def _gone(self) -> None:
        self._running = False
        self.pid = None
        self._blame = ""

    def _enter(self, state: ReplicaState, reason: str) -> None:
        self.state = state
        self.reason = reason
        self._due = None
