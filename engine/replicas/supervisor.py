"""Keeps the replicas running: carries out what `lifecycle` decides, and publishes the result."""

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from engine.fleet import FleetError, FleetSnapshot, ReplicaState, own_pid_namespace, reasons_in_words, write_fleet
from engine.host_process.directories import Claim, claim_all, release
from engine.host_process.logs import LOG_TAIL_LINES, describe_exit, full_disk, is_final, prepare_log_dir, root_cause
from engine.host_process.messages import Event, Exited, Hello, Kill, Preloaded, Spawned, Terminate
from engine.replicas.devices import usable_cores
from engine.replicas.draining import idle_in
from engine.replicas.health import Health
from engine.replicas.host_link import HostLink
from engine.replicas.launch import EngineSettings, plan_launches, replica_env
from engine.replicas.lifecycle import Lifecycle, LifecycleAction
from engine.replicas.member import Member, narrate
from engine.replicas.model_check import check_model
from engine.replicas.shared_memory_check import check_host_memory, check_room
from engine.replicas.start_turns import StartTurns
from engine.replicas.tier_process import NAME as TIERS
from engine.replicas.tier_process import TierProcess
from transport.table.directory import TableDirectory

log = logging.getLogger("peerkv.supervisor")

HOST_QUIT_SECONDS_MAX = 15.0
OVERDUE_SECONDS = 3.0  # after the last report, requests no longer count as overdue
HOST_GONE = "the replica host ended"


class Supervisor:
    """Runs the replicas of `settings`. A FleetView; all methods belong to one event loop.

    `progress` gets lines for people: what is being waited for, and why something failed.
    """

    def __init__(
        self,
        settings: EngineSettings,
        progress: Callable[[str], None] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Start nothing yet. Raises FleetError if it could not start with these settings."""
        self._settings = settings
        self._pid_namespace = own_pid_namespace()
        self._progress = progress or log.info
        environ = os.environ if environ is None else environ
        cores = usable_cores()
        self._host_env = replica_env(settings, environ, cores)
        self._members = {p.name: Member(p, settings) for p in plan_launches(settings, environ, cores)}
        self._turns = StartTurns(self._members.values())
        self._tables = TableDirectory(settings.table_dir)
        self._host_life = Lifecycle(settings)
        self._tiers = TierProcess(settings, self._host_env) if settings.frame_tiers else None
        self._link: HostLink | None = None
        self._claims: tuple[Claim, ...] = ()
        self._tasks: list[asyncio.Task[None]] = []
        self._moved = asyncio.Event()  # set, and replaced, at each change
        self._stopping = False
        self._cleanup = asyncio.Lock()
        self._snapshot = self._look()

    restarts = True

    def snapshot(self) -> FleetSnapshot:
        """The replicas now."""
        return self._snapshot

    def suspect(self, name: str, *, overdue: bool = False) -> None:
        """Check the replica `name` at once."""
        if (member := self._members.get(name)) is not None:
            if overdue:
                member.overdue_until = self._now() + OVERDUE_SECONDS
            member.look.set()

    async def start(self) -> None:
        """Claim the directories and start the replicas; does not wait for them. Raises FleetError."""
        settings = self._settings
        await asyncio.to_thread(prepare_log_dir, settings.log_dir)
        check_room(settings)
        check_host_memory(settings)
        await self._check_model()
        paths = (settings.run_dir, settings.table_dir)
        self._claims = await asyncio.to_thread(claim_all, paths, settings.claim_seconds_max)
        write_fleet(settings.run_dir, self._snapshot)
        loops = [self._keep_host(), self._keep_time(), *(self._watch(m) for m in self._members.values())]
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        for task in self._tasks:
            task.add_done_callback(self._task_ended)

    async def _check_model(self) -> None:
        """Raise ModelRefused for a model that no replica could load."""
        if self._settings.launcher is None and await check_model(self._settings, self._host_env):
            self._progress("the hub cannot be reached: the model is taken from its cache")
            for env in (self._host_env, *(member.launch.env for member in self._members.values())):
                env["HF_HUB_OFFLINE"] = "1"

    def last_line(self, name: str) -> str:
        """What the replica `name` logged last since it was started, "" for nothing."""
        return (self._member(name).run_log() or [""])[-1]

    async def wait_ready(self, count: int = 1) -> FleetSnapshot:
        """Return as soon as `count` replicas are READY. Raises FleetError once that can no longer happen."""
        while len((now := self._snapshot).ready()) < count:
            hopeless = [r for r in now.replicas if r.state is ReplicaState.FAILED]
            if self._stopping or any(t.done() for t in self._tasks) or len(now.replicas) - len(hopeless) < count:
                raise FleetError(reasons_in_words(hopeless) or "the supervisor ended")
            await self._moved.wait()
        return now

    async def drain(self, name: str) -> None:
        """Send `name` no new requests until `resume` or `restart`. Raises FleetError for an unknown name."""
        self._member(name).life.drain()
        self._publish()

    async def resume(self, name: str) -> None:
        """Send `name` requests again after `drain`. Raises FleetError for an unknown name."""
        self._member(name).life.resume(self._now())
        self._publish()

    async def idle_in(self, name: str, seconds: float) -> bool:
        """Wait until `name` has no requests, `seconds` at most; tell whether that is so. Raises FleetError."""
        return await idle_in([self._member(name)], self._tables.tables, seconds)

    async def drain_all(self, seconds: float) -> bool:
        """Send nobody new requests, and wait until they have none, `seconds` at most; tell whether that is so.

        To be followed by `stop`: what is not ready is stopped at once.
        """
        draining = []
        for member in self._members.values():
            member.life.drain()
            if member.life.state is ReplicaState.DRAINING:
                draining.append(member)
            else:
                self._perform(member, member.life.stop(self._now(), self._settings.terminate_seconds))
        self._publish()
        return await idle_in(draining, self._tables.tables, seconds)

    async def restart(self, name: str) -> None:
        """Stop `name` and start it again; does not wait. Raises FleetError for an unknown name."""
        member = self._member(name)
        self._perform(member, member.life.restart(self._now()))
        self._publish()

    async def stop(self, drain_seconds: float) -> None:
        """End the replicas (SIGTERM, after `drain_seconds` SIGKILL), and remove the directories.

        May be called again while it waits, to shorten the wait.
        """
        self._stopping = True
        if self._link is not None and self._host_life.state is ReplicaState.STARTING:
            await self._link.kill()  # it is importing, and would only listen when done
        for member in self._members.values():
            self._perform(member, member.life.stop(self._now(), drain_seconds))
        if self._link is not None and self._tiers is not None:
            self._link.tell(Terminate(TIERS))  # it writes what it has taken
        self._publish()
        self._wake()
        async with self._cleanup:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_seconds + self._settings.terminate_seconds):
                    while self._link is not None and self._any_running():
                        await self._moved.wait()
            await self._end()
            release(self._claims)
            self._claims = ()

    async def _end(self) -> None:
        """End the host and our tasks."""
        link, self._link = self._link, None
        if link is not None:
            await link.close(HOST_QUIT_SECONDS_MAX)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        for member in self._members.values():
            member.life.lost(HOST_GONE, self._now())
            await member.probe.close()
        self._tables.close()
        self._publish()

    def _any_running(self) -> bool:
        return any(m.life.running for m in self._members.values()) or (self._tiers is not None and self._tiers.running)

    def _member(self, name: str) -> Member:
        if name not in self._members:
            raise FleetError(f"there is no replica {name!r}: there are {', '.join(self._members)}")
        return self._members[name]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    # The host

    async def _keep_host(self) -> None:
        """Keep a replica host running as long as there is hope, and process what it reports."""
        life = self._host_life
        life.start(self._now())
        while not self._stopping:
            how = await self._run_host()
            life.tick(self._now())  # it may have run well for a long time
            life.exited(how, self._now())
            self._host_ended()
            if self._stopping or life.due is None:
                return
            due = life.due
            await asyncio.sleep(max(0.0, due - self._now()))
            life.tick(due)

    async def _run_host(self) -> str:
        """Start a host, process its reports until it ends, and return how it ended."""
        try:
            held = tuple(c.lock_fd for c in self._claims)
            link = self._link = await HostLink.open(self._settings, held, self._host_env)
        except OSError as error:
            return f"cannot be started: {error}"
        self._start_tiers(link)
        if self._settings.preloads:
            self._progress("importing vLLM, once for all replicas")
        if self._host_life.restarts == 0:
            for member in self._members.values():
                self._perform(member, member.life.start(self._now()))
            self._publish()
        self._wake()
        try:
            async for event in link.events():
                self._heed(event)
        except (msgspec.MsgspecError, ValueError) as error:
            log.error("the replica host sent an invalid report: %s", error)
        return await link.kill()

    def _host_ended(self) -> None:
        """All replicas ended with their host."""
        self._link = None
        if self._tiers is not None:
            self._tiers.running = False
        why = f"{HOST_GONE}: {self._host_life.reason}"
        if not self._stopping:
            self._progress(why)
        for member in self._members.values():
            self._turns.forget(member)
            if self._host_life.state is ReplicaState.FAILED:
                member.life.give_up(why)
            else:
                member.life.lost(why, self._now())
        self._publish()

    def _heed(self, event: Event) -> None:
        match event:
            case Hello() if not self._settings.preloads:
                self._host_life.answered(self._now())
            case Preloaded(seconds):
                self._host_life.answered(self._now())
                self._progress(f"vLLM is imported ({seconds:.1f} s)")
            case Exited(name, _, code) if name == TIERS:
                self._tiers_ended(code)
            case Spawned(name, pid) if name != TIERS:
                self._members[name].life.spawned(pid)
            case Exited(name, _, code):
                self._replica_ended(self._members[name], code)
        self._publish()

    def _start_tiers(self, link: HostLink) -> None:
        if self._tiers is not None and link is self._link and not self._stopping:
            link.tell(self._tiers.spawn(self._now()))

    def _tiers_ended(self, code: int) -> None:
        if self._tiers is None:
            return
        wait, link = self._tiers.ended(self._now()), self._link
        if not self._stopping and link is not None:
            log.error("the process of disk and vault ended (%s) and is started again", describe_exit(code))
            asyncio.get_running_loop().call_later(wait, self._start_tiers, link)
        self._wake()

    def _replica_ended(self, member: Member, code: int) -> None:
        starting = member.life.state is ReplicaState.STARTING
        lines = member.run_log() if starting else []
        cause = root_cause(lines)
        if starting and not lines:
            cause = full_disk(Path(member.launch.log))
        how = describe_exit(code) + (f": {cause}" if cause else "")
        self._perform(member, member.life.exited(how, self._now(), final=is_final(code, cause)))
        for line in () if cause else lines[-LOG_TAIL_LINES:]:
            self._progress(f"{member.name} | {line}")

    # The replicas

    async def _keep_time(self) -> None:
        """Carry out what becomes due: back-offs, deadlines."""
        while True:
            moved = self._moved
            dues = [m.life.due for m in self._members.values() if m.life.due is not None]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(dues, default=None) if self._link else None):
                    await moved.wait()
            if self._link is not None:
                for member in self._members.values():
                    self._perform(member, member.life.tick(self._now()))
                self._publish()

    async def _watch(self, member: Member) -> None:
        """Check a replica's health, for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(member.poll_seconds()):
                    await member.look.wait()
            member.look.clear()
            pid = member.life.pid
            if pid is None or not member.life.watched:
                continue
            health = await member.probe.ask()
            if pid == member.life.pid:  # otherwise that was about an earlier process
                self._judge(member, pid, health)

    def _judge(self, member: Member, pid: int, health: Health) -> None:
        now = self._now()
        if health.unknown:
            log.error("%s could not be checked, through no fault of its own: %s", member.name, health.why)
        elif health.well:
            member.life.answered(now)
            found = member.core.look(pid, self._tables.tables().get(member.name), now, overdue=now < member.overdue_until)
            self._perform(member, member.life.stands_still(found.silent_seconds, found.frozen_seconds))
        else:
            self._perform(member, member.life.missed(health.why, now, dead=health.dead))
        self._publish()

    def _perform(self, member: Member, action: LifecycleAction | None) -> None:
        if action is None:
            return
        if self._link is None:
            member.life.lost(HOST_GONE, self._now())
            return
        match action:
            case LifecycleAction.SPAWN:
                if not self._turns.hold(member):
                    self._spawn(self._link, member)
            case _ if self._turns.forget(member):
                self._perform(member, member.life.exited("it had not been started", self._now()))
            case LifecycleAction.TERMINATE:
                self._link.tell(Terminate(member.name))
            case LifecycleAction.KILL:
                self._link.tell(Kill(member.name))

    def _spawn(self, link: HostLink, member: Member) -> None:
        link.tell(member.spawn_command())
        member.look.set()

    # What others see

    def _look(self) -> FleetSnapshot:
        settings = self._settings
        return FleetSnapshot(
            version=0,
            model=settings.model,
            served_model_name=settings.served_model_name or settings.model,
            table_dir=str(settings.table_dir),
            replicas=tuple(m.seen() for m in self._members.values()),
            pid_namespace=self._pid_namespace,
            vllm_args=settings.vllm_args,
        )

    def _publish(self) -> None:
        """Start replicas whose turn has come, and publish changes, if any."""
        if self._link is not None:
            for member in self._turns.due(self._now()):
                self._spawn(self._link, member)
        before, fresh = self._snapshot, self._look()
        if fresh.replicas == before.replicas:
            return
        self._snapshot = dataclasses.replace(fresh, version=before.version + 1)
        for former, now, member in zip(before.replicas, fresh.replicas, self._members.values(), strict=True):
            for line in narrate(former, now, (member.life.due or 0.0) - self._now()):
                self._progress(line)
        try:
            if self._claims:
                write_fleet(self._settings.run_dir, self._snapshot)
        except OSError as error:
            log.error("fleet.json is out of date: %s", error)
        self._wake()

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    def _task_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the supervisor has a defect", exc_info=error)
        self._wake()
