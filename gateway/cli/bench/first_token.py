"""Time to the first token of prompts: cold, by import and by local hit."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.cli.bench.installation import Described, Installation
from gateway.cli.bench.kinds import Kind, Sample, kind_of
from gateway.cli.bench.words import Words

SETTLE_SECONDS = 0.1
"""Pause before each request, so that the engines become idle."""
ANSWER_TOKENS = 2
EXTRA_SHARE = 1.0
"""Share of the prompts that may be retried because other requests interfered."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A prompt of `tokens` that is computed on `home`, then requested again by the kinds in `again`, in this order."""

    tokens: int
    home: str
    away: str
    again: tuple[Kind, ...]


def trials(
    source: random.Random, lengths: Sequence[int], replicas: Sequence[str], samples: int, *, imports: bool
) -> list[Trial]:
    """Return `samples` trials of each length in random order; replicas take turns as home, the order of kinds is random."""
    found = []
    for tokens in lengths:
        for number in range(samples):
            home, away = replicas[number % len(replicas)], replicas[(number + 1) % len(replicas)]
            again = [Kind.LOCAL, *([Kind.IMPORT] if imports else [])]
            source.shuffle(again)
            found.append(Trial(tokens, home, away, tuple(again)))
    source.shuffle(found)
    return found


async def run_trial(installation: Installation, described: Described, words: Words, trial: Trial) -> list[Sample]:
    """Measure one fresh prompt: computed, then from the caches. Raises NotMeasured."""
    prompt = words.text(trial.tokens)
    found = []
    for kind in (Kind.COLD, *trial.again):
        replica = trial.away if kind is Kind.IMPORT else trial.home
        await asyncio.sleep(SETTLE_SECONDS)
        answer = await installation.ask(prompt, answer_tokens=ANSWER_TOKENS, replica=replica)
        got = kind_of(answer.prompt_tokens, answer.local_tokens, answer.peer_tokens, described.block_size)
        cached = (answer.local_tokens, answer.peer_tokens)
        found.append(Sample(trial.tokens, kind, got, replica, answer.prompt_tokens, *cached, answer.first_seconds))
    return found


async def measure(
    installation: Installation,
    described: Described,
    words: Words,
    planned: Sequence[Trial],
    into: list[Sample],
    step: Callable[[Trial], None],
) -> None:
    """Run all trials, and disturbed ones once more; samples are appended to `into`. Raises NotMeasured."""
    spare = round(EXTRA_SHARE * len(planned))
    waiting = list(planned)
    while waiting:
        trial = waiting.pop(0)
        found = await run_trial(installation, described, words, trial)
        into.extend(found)
        step(trial)
        if spare and not all(sample.good for sample in found):
            spare -= 1
            waiting.append(trial)
