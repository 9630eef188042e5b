import pytest

from engine.fleet import ReplicaState
from engine.replicas.lifecycle import Lifecycle, LifecycleAction, RestartPolicy

POLICY = RestartPolicy(
    startup_seconds_max=100,
    health_failures_max=3,
    backoff_seconds_min=1,
    backoff_seconds_max=5,
    healthy_seconds_reset=60,
    start_failures_max=3,
    terminate_seconds=10,
)


def started(now: float = 0.0) -> Lifecycle:
    life = Lifecycle(POLICY)
    assert life.start(now) is LifecycleAction.SPAWN
    life.spawned(42)
    return life


def ready(now: float = 0.0) -> Lifecycle:
    life = started(now)
    life.answered(now)
    assert life.state is ReplicaState.READY
    return life


def crash_and_come_back(life: Lifecycle, now: float) -> float:
    """Let a ready replica crash and get ready again; return the back-off it had to wait."""
    life.exited("killed by SIGKILL", now)
    assert life.state is ReplicaState.BACKOFF
    assert life.due is not None
    wait = life.due - now
    assert life.tick(life.due - 0.001) is None
    assert life.tick(now + wait) is LifecycleAction.SPAWN
    life.answered(now + wait)
    return wait


def test_a_replica_is_ready_when_it_answers() -> None:
    life = started()
    assert (life.state, life.pid) == (ReplicaState.STARTING, 42)
    life.answered(9.0)
    assert (life.state, life.reason) == (ReplicaState.READY, "")


def test_an_ended_replica_has_no_process_and_says_why() -> None:
    life = ready()
    assert life.exited("killed by SIGKILL", 5.0) is None
    assert (life.state, life.pid, life.reason) == (ReplicaState.BACKOFF, None, "killed by SIGKILL")


def test_the_wait_for_a_restart_doubles_up_to_its_bound() -> None:
    life = ready()
    assert [crash_and_come_back(life, float(10 * n)) for n in range(1, 6)] == [1, 2, 4, 5, 5]
    assert life.restarts == 5


def test_a_replica_that_crashes_after_getting_ready_is_never_given_up() -> None:
    life = ready()
    for n in range(50):
        crash_and_come_back(life, 10.0 * n)
    assert life.state is ReplicaState.READY


def test_the_wait_starts_anew_after_a_healthy_time() -> None:
    life = ready()
    crash_and_come_back(life, 1.0)
    crash_and_come_back(life, 10.0)
    assert life.due is not None
    assert life.tick(life.due) is None
    assert crash_and_come_back(life, 200.0) == 1


def test_a_replica_that_never_gets_ready_is_given_up() -> None:
    life = started()
    for now in (1.0, 11.0):
        life.exited("ended with status 1", now)
        assert life.state is ReplicaState.BACKOFF
        assert life.tick(now + 5) is LifecycleAction.SPAWN
    life.exited("ended with status 1", 21.0)
    assert life.state is ReplicaState.FAILED
    assert life.reason == "gave up after 3 failed starts: ended with status 1"
    assert life.tick(1e9) is None


def test_getting_ready_once_forgives_failed_starts() -> None:
    life = started()
    for now in (1.0, 11.0):
        life.exited("ended with status 1", now)
        life.tick(now + 5)
    life.answered(20.0)
    crash_and_come_back(life, 21.0)
    life.exited("killed by SIGKILL", 30.0)
    assert life.state is ReplicaState.BACKOFF


def test_a_failed_replica_can_be_restarted() -> None:
    life = started()
    life.give_up("no hope")
    assert (life.state, life.reason) == (ReplicaState.FAILED, "no hope")
    assert life.restart(9.0) is LifecycleAction.SPAWN
    assert life.state is ReplicaState.STARTING


def test_a_start_that_takes_too_long_is_ended_and_counts_as_failed() -> None:
    life = started()
    assert life.tick(99.9) is None
    assert life.tick(100.0) is LifecycleAction.KILL
    assert life.tick(101.0) is None
    life.exited("killed by SIGKILL", 102.0)
    assert life.reason == "not ready 100 s after its start; killed by SIGKILL"


def test_a_few_missed_checks_are_borne() -> None:
    life = ready()
    assert life.missed("no answer", 1.0) is None
    assert life.missed("no answer", 3.0) is None
    assert (life.state, life.reason, life.in_doubt) == (ReplicaState.READY, "no answer", True)
    life.answered(9.0)
    assert (life.reason, life.in_doubt) == ("", False)
    assert life.missed("no answer", 11.0) is None


def test_too_many_missed_checks_end_a_replica() -> None:
    life = ready()
    actions = [life.missed("no answer", float(n)) for n in range(3)]
    assert actions == [None, None, LifecycleAction.KILL]
    assert life.state is ReplicaState.BACKOFF
    life.exited("killed by SIGKILL", 5.0)
    assert life.reason == "no answer; killed by SIGKILL"
    assert life.tick(6.0) is LifecycleAction.SPAWN


def test_checks_that_fail_at_the_same_time_count_once() -> None:
    life = ready()
    assert [life.missed("no answer", 5.0 + n / 100) for n in range(90)] == [None] * 90
    assert [life.missed("no answer", 5.0 + n) for n in (1, 2)] == [None, LifecycleAction.KILL]


def test_an_engine_that_stands_still_is_in_doubt_and_then_ended() -> None:
    life = ready()
    assert life.stands_still(3.0, 3.0) is None
    assert (life.state, life.reason, life.in_doubt) == (ReplicaState.READY, "its engine made no step for 3 s", True)
    assert life.stands_still(0.0, 0.0) is None
    assert (life.reason, life.in_doubt) == ("", False)
    assert life.stands_still(19.0, 19.0) is None
    assert life.stands_still(20.0, 20.0) is LifecycleAction.KILL
    assert life.state is ReplicaState.BACKOFF


def test_an_engine_that_computes_for_long_is_borne_longer() -> None:
    life = ready()
    assert life.stands_still(599.0, 0.0) is None
    assert life.stands_still(600.0, 0.0) is LifecycleAction.KILL


def test_a_start_that_would_always_end_the_same_way_is_not_repeated() -> None:
    life = started()
    assert life.exited("unrecognized arguments: --no", 1.0, final=True) is None
    assert (life.state, life.reason, life.restarts) == (ReplicaState.FAILED, "unrecognized arguments: --no", 0)


def test_a_replica_that_says_it_is_dead_is_ended_at_once() -> None:
    life = ready()
    assert life.missed("/health answers 503", 1.0, dead=True) is LifecycleAction.KILL
    assert life.state is ReplicaState.BACKOFF


def test_checks_mean_nothing_while_it_starts_or_ends() -> None:
    life = started()
    assert [life.missed("no socket yet", float(n)) for n in range(9)] == [None] * 9
    life.answered(1.0)
    life.stop(2.0, 10)
    assert [life.missed("refused", float(n), dead=True) for n in range(9)] == [None] * 9
    life.answered(3.0)
    assert life.state is ReplicaState.DRAINING


def test_a_draining_replica_goes_on_until_it_is_restarted() -> None:
    life = ready()
    life.drain()
    assert (life.state, life.watched) == (ReplicaState.DRAINING, True)
    life.answered(1.0)
    assert (life.state, life.reason) == (ReplicaState.DRAINING, "draining")
    assert life.restart(2.0) is LifecycleAction.TERMINATE
    assert life.exited("ended with status 0", 3.0) is LifecycleAction.SPAWN
    assert life.state is ReplicaState.STARTING


def test_a_drained_replica_takes_requests_again_when_it_is_resumed() -> None:
    life = ready()
    life.drain()
    life.resume(1.0)
    assert (life.state, life.reason) == (ReplicaState.READY, "")
    life.restart(2.0)
    life.resume(3.0)  # too late: it is being stopped
    assert life.state is ReplicaState.DRAINING


def test_a_drained_replica_that_ends_gets_no_requests_when_it_is_back_either() -> None:
    life = ready()
    life.drain()
    crash_and_come_back(life, 1.0)
    assert (life.state, life.reason) == (ReplicaState.DRAINING, "draining")
    life.resume(5.0)
    assert life.state is ReplicaState.READY
    life.drain()
    life.exited("killed by SIGKILL", 9.0)
    life.resume(9.5)
    assert life.state is ReplicaState.BACKOFF
    assert life.tick(20.0) is LifecycleAction.SPAWN
    life.answered(21.0)
    assert life.state is ReplicaState.READY


def test_only_a_ready_replica_can_drain() -> None:
    life = started()
    life.drain()
    assert life.state is ReplicaState.STARTING


@pytest.mark.parametrize("ending", ["stop", "restart"])
def test_a_replica_that_ignores_the_request_to_end_is_killed(ending: str) -> None:
    life = ready()
    action = life.stop(5.0, 10) if ending == "stop" else life.restart(5.0)
    assert action is LifecycleAction.TERMINATE
    assert life.tick(14.9) is None
    assert life.tick(15.0) is LifecycleAction.KILL
    assert life.exited("killed by SIGKILL", 15.1) is (None if ending == "stop" else LifecycleAction.SPAWN)
    assert life.state is (ReplicaState.STOPPED if ending == "stop" else ReplicaState.STARTING)


def test_a_second_stop_shortens_the_wait() -> None:
    life = ready()
    life.stop(5.0, 100)
    life.stop(6.0, 0)
    assert life.tick(6.0) is LifecycleAction.KILL


def test_a_stopped_replica_stays_stopped() -> None:
    life = ready()
    life.exited("killed by SIGKILL", 1.0)
    assert life.stop(1.5, 10) is None
    assert life.state is ReplicaState.STOPPED
    assert life.tick(1e9) is None


def test_losing_the_host_is_no_failure_of_the_replica() -> None:
    life = started()
    for now in range(20):
        life.lost("the replica host ended", float(now))
        assert life.state is ReplicaState.BACKOFF
        assert life.tick(float(now)) is LifecycleAction.SPAWN
    life.stop(30.0, 10)
    life.lost("the replica host ended", 31.0)
    assert life.state is ReplicaState.STOPPED


def test_a_running_replica_is_not_started_twice() -> None:
    assert ready().start(1.0) is None
