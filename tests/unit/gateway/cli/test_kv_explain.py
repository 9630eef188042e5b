"""/kv/explain in words: the shape, and `peerkv kv explain`."""

import io
from types import SimpleNamespace

import httpx
import msgspec
import pytest
from rich.console import Console

from gateway.cli import kv_explain
from gateway.cli.main import build_parser
from gateway.ledger.attempts import Attempt
from gateway.ledger.ledger import LEFT_STATUS, LOST_STATUS, Ledger
from gateway.planner.promotions import Promotion
from gateway.stats.explain import Explanation, explain, request_id_of
from gateway.steering.choices import Choice, Expected, Option
from tests.unit.gateway.ledger.begun_attempts import begun
from transport.groups import Group
from transport.table.deliveries import Delivery, DeliveryReason, FromSource

RECORD = Delivery(
    tag=5,
    arrived_ns=1_000_000_000,
    scheduled_ns=1_050_000_000,
    first_token_ns=1_120_000_000,
    prompt_tokens=1000,
    peer_tokens=320,
    computed_tokens=680,
    import_ns=4_000_000,
    import_wait_ns=6_000_000,
    import_bytes=1 << 20,
    planned_tokens=800,
    stale_blocks=30,
    failed_blocks=30,
    source="replica-0",
    why=DeliveryReason.CHECK_FAILED,
)


def opened(ledger: Ledger) -> Attempt:
    attempt = begun(
        5,
        request_id="r-1",
        at=1e9,
        began_at=50.0,
        endpoint="chat",
        replica="replica-1",
        source="replica-0",
        action=Choice.PULL,
        prompt_tokens=1000,
        block_size=16,
        peer_tokens=800,
        best_available_tokens=800,
        best_held_tokens=800,
        seconds=(0.01, 0.02, 0.03),
        options=(
            Option("replica-1", "replica-0", Choice.PULL, None, Expected(0.0, 0.0, 0.06, 0, 960, 40), 0.06),
            Option("replica-0", None, Choice.HIT, None, Expected(1.0, 0.0, 0.5, 960, 0, 40), 1.5),
        ),
    )
    ledger.open(attempt)
    return attempt


def settled() -> Attempt:
    ledger = Ledger(10)
    attempt = opened(ledger)
    ledger.delivered(RECORD)
    attempt.first_byte_seconds = 0.125
    ledger.ended(attempt, 200, 51.0)
    return attempt


def test_an_attempt_shows_what_was_expected_delivered_and_lost() -> None:
    (attempt,) = explain("r-1", [settled()], {}).attempts
    assert attempt.expected.first_token_seconds == pytest.approx(0.06)
    assert (attempt.expected.computed_tokens, attempt.expected.best_available_tokens) == (200, 800)
    (delivered,) = attempt.delivered
    assert (delivered.peer_tokens, delivered.computed_tokens, delivered.why) == (320, 680, "check_failed")
    assert (delivered.queue_seconds, delivered.first_token_seconds) == (pytest.approx(0.05), pytest.approx(0.12))
    assert (delivered.import_seconds, delivered.import_wait_seconds) == (pytest.approx(0.004), pytest.approx(0.006))
    assert (attempt.reason, attempt.lost_tokens, attempt.settled) == ("check_failed", 480, True)
    assert (attempt.status, attempt.first_byte_seconds, attempt.ended_seconds) == (200, 0.125, 1.0)
    assert [option.seconds for option in attempt.options] == [0.06, 1.5]


def test_an_attempt_shows_what_each_group_of_its_replicas_cache_makes_an_import_cost() -> None:
    groups = (Group("full", 16, 0, 2, 4096), Group("state", 64, 0, 3, 9000), Group("window", 16, 128, 1, 512))
    tables = {"replica-1": SimpleNamespace(groups=groups)}
    (attempt,) = explain("r-1", [settled()], tables).attempts
    assert [(each.kind, each.token_bytes, each.import_bytes) for each in attempt.groups] == [
        ("full", 256, 0),
        ("state", 0, 9000),
        ("window", 0, 4096),
    ]
    written = io.StringIO()
    Console(file=written, width=200).print(kv_explain.render(attempt))
    assert "256 bytes a token for 2 layers of full attention; 9,000 bytes for 3 layers of state" in written.getvalue()
    assert "4,096 bytes for 1 layers of window of 128 tokens" in written.getvalue()


def test_what_disk_and_vault_brought_up_is_told() -> None:
    attempt = settled()
    attempt.promotion = Promotion("disk", 640, 0.25)
    (shown,) = explain("r-1", [attempt], {}).attempts
    assert (shown.promoted.source, shown.promoted.tokens, shown.promoted.seconds) == ("disk", 640, 0.25)
    written = io.StringIO()
    Console(file=written, width=200).print(kv_explain.render(shown))
    assert "disk and vault, 0.250 s: 640 tokens are up from disk" in written.getvalue()
    attempt.promotion = Promotion("", 0, 0.01, "not stored")
    assert "disk and vault, 0.010 s: not stored" in ended(200, promoted=explain("r-1", [attempt], {}).attempts[0].promoted)


def test_an_import_from_several_sources_names_them_all() -> None:
    attempt = settled()
    attempt.deliveries = (msgspec.structs.replace(RECORD, further=(FromSource("replica-0.host-memory", 64),)),)
    (shown,) = explain("r-1", [attempt], {}).attempts
    told = [(each.source, each.tokens) for each in shown.delivered[0].sources]
    assert told == [("replica-0", 256), ("replica-0.host-memory", 64)]
    assert "order of the prompt: 256 tokens from replica-0, 64 tokens from replica-0.host-memory" in ended(
        200, delivered=shown.delivered
    )
    assert [(each.source, each.tokens) for each in explain("r-1", [settled()], {}).attempts[0].delivered[0].sources] == [
        ("replica-0", 320)
    ]
    assert "order of the prompt" not in ended(200)


def test_a_running_attempt_is_not_final() -> None:
    ledger = Ledger(10)
    running = opened(ledger)
    (attempt,) = explain("r-1", [running], {}).attempts
    assert (attempt.settled, attempt.status, attempt.reason) == (False, None, "unknown")
    ledger.delivered(RECORD)
    (attempt,) = explain("r-1", [running], {}).attempts
    assert (attempt.settled, attempt.reason) == (False, "check_failed")


def ended(status: int | None, **values: object) -> str:
    """What the command says of an attempt that ended so."""
    (attempt,) = explain("r-1", [settled()], {}).attempts
    output = io.StringIO()
    shown = attempt.model_copy(update={"status": status, **values})
    Console(file=output, width=140).print(kv_explain.render(shown))
    return output.getvalue()


def test_the_end_of_an_attempt_is_told_in_words() -> None:
    assert "no answer: replica-1 died or broke off" in ended(LOST_STATUS)
    assert "the client left" in ended(LEFT_STATUS)
    assert "still running" in ended(None)
    assert "status 400" in ended(400)


def test_nothing_lost_is_told_as_a_sentence() -> None:
    text = ended(200, reason="none", reason_in_words="", lost_tokens=0)
    assert text.splitlines()[-1] == "nothing was lost: it got all that any replica had"


def test_a_replica_that_the_caller_chose_is_told_to_be_so() -> None:
    chosen = settled()
    chosen.pinned = True
    (attempt,) = explain("r-1", [chosen], {}).attempts
    assert attempt.pinned
    assert "the caller chose the replica" in ended(200, pinned=True)
    assert "the caller chose" not in ended(200)


@pytest.mark.parametrize("prefix", ["", "cmpl-", "chatcmpl-", "embd-", "score-", "pooling-"])
def test_the_id_in_an_answers_body_names_the_request_too(prefix: str) -> None:
    assert request_id_of(f"{prefix}r-1") == "r-1"


def command(answer: httpx.Response, *flags: str) -> tuple[int, str, list[str]]:
    """Exit status and output of the command, and the paths that it asked for."""
    paths = []

    def reply(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path.decode())
        return answer

    output = io.StringIO()
    parsed = build_parser().parse_args(["kv", "explain", "r-1/..", "--url", "http://gateway:1", *flags])
    status = kv_explain.run(parsed, Console(file=output, width=140), httpx.MockTransport(reply))
    return status, output.getvalue(), paths


def body() -> httpx.Response:
    return httpx.Response(200, content=explain("r-1", [settled()], {}).model_dump_json())


def test_the_command_puts_it_into_words() -> None:
    status, output, paths = command(body())
    assert (status, paths) == (0, ["/kv/explain/r-1%2F.."])
    for words in ("pull on replica-1, importing from replica-0", "check_failed", "480 tokens lost", "hit on replica-0 1.500 s"):
        assert words in output


def test_the_command_gives_the_body_as_json() -> None:
    status, output, _ = command(body(), "--json")
    assert status == 0
    assert Explanation.model_validate_json(output).attempts[0].lost_tokens == 480


def test_an_unknown_request_is_an_error_that_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    status, output, _ = command(httpx.Response(404))
    assert (status, output) == (1, "")
    assert "no request 'r-1/..'" in capsys.readouterr().err
