from gateway.block_registry.chain import Chain
from gateway.planner.plan import PlanningRequest
from gateway.planner.recent_prompts import PROMPTS_MAX, RecentPrompts
from gateway.prompts.prompt_reader import KnownPrompt
from gateway.token_ids import TokenIds


def prompt(*ids: int) -> PlanningRequest:
    return PlanningRequest(KnownPrompt(TokenIds.of(ids), tokens=len(ids)))


def chain(*names: bytes) -> Chain:
    return Chain(b"".join(name.ljust(16, b".") for name in names))


def test_the_newest_prompt_that_begins_with_a_prefix_is_found() -> None:
    recent, first, second = RecentPrompts(), prompt(1, 2), prompt(1, 2, 3)
    recent.note(chain(b"one"), first)
    recent.note(chain(b"one", b"two"), second)
    assert recent.beginning_with(b"one".ljust(16, b"."), 1) is second
    assert recent.beginning_with(b"two".ljust(16, b"."), 2) is second
    assert recent.beginning_with(b"two".ljust(16, b"."), 1) is None
    assert recent.beginning_with(b"three".ljust(16, b"."), 3) is None


def test_old_ones_are_forgotten_by_number_and_by_tokens() -> None:
    recent = RecentPrompts()
    for number in range(PROMPTS_MAX + 1):
        recent.note(chain(b"%d" % number), prompt(number))
    assert recent.beginning_with(b"0".ljust(16, b"."), 1) is None
    assert recent.beginning_with(b"1".ljust(16, b"."), 1) is not None
    small = RecentPrompts(tokens_max=3)
    small.note(chain(b"a"), prompt(1, 2))
    small.note(chain(b"b"), prompt(1, 2))
    assert small.beginning_with(b"a".ljust(16, b"."), 1) is None
    assert small.beginning_with(b"b".ljust(16, b"."), 1) is not None
