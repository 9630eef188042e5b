"""Throughput of a fleet under open-loop requests with shared prefixes."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.cli.bench.arrivals import Arrival
from gateway.cli.bench.installation import Answer, Installation, NotMeasured, PromptTokens
from gateway.cli.bench.spread import quantile


@dataclass(frozen=True, slots=True)
class Throughput:
    """Figures of a run of `seconds`, from the first arrival to the last answer. `first_*` are seconds to the first token."""

    rate: float
    requests: int
    failures: int
    seconds: float
    requests_per_second: float
    prompt_tokens_per_second: float
    answer_tokens_per_second: float
    first_p50: float
    first_p90: float
    first_p99: float
    whole_p50: float
    tokens: PromptTokens
    """From the engines' own counters, including other callers' prompts."""


async def run(
    installation: Installation, arrivals: Sequence[Arrival], *, rate: float, answer_tokens: int, step: Callable[[], None]
) -> Throughput:
    """Send each request at its time and count failures. Raises NotMeasured if none succeeded."""
    answers: list[Answer] = []
    failures: list[str] = []
    before = await installation.prompt_tokens()
    began = time.perf_counter()

    async def one(arrival: Arrival) -> None:
        await asyncio.sleep(max(0.0, arrival.at - (time.perf_counter() - began)))
        try:
            answers.append(await installation.ask(arrival.prompt, answer_tokens=answer_tokens))
        except NotMeasured as error:
            failures.append(str(error))
        step()

    async with asyncio.TaskGroup() as group:
        for arrival in arrivals:
            group.create_task(one(arrival))
    seconds = time.perf_counter() - began
    if not answers:
        raise NotMeasured(f"no request of the throughput run succeeded: {failures[0] if failures else 'none came'}")
    return summary(answers, len(failures), rate, seconds, (await installation.prompt_tokens()).since(before))


def summary(answers: Sequence[Answer], failures: int, rate: float, seconds: float, tokens: PromptTokens) -> Throughput:
    """The figures of a run's answers. Raises ValueError if there are none."""
    firsts = [answer.first_seconds for answer in answers]
    return Throughput(
        rate=rate,
        requests=len(answers) + failures,
        failures=failures,
        seconds=seconds,
        requests_per_second=len(answers) / seconds,
        prompt_tokens_per_second=sum(answer.prompt_tokens for answer in answers) / seconds,
        answer_tokens_per_second=sum(answer.answer_tokens for answer in answers) / seconds,
        first_p50=quantile(firsts, 0.5),
        first_p90=quantile(firsts, 0.9),
        first_p99=quantile(firsts, 0.99),
        whole_p50=quantile([answer.seconds for answer in answers], 0.5),
        tokens=tokens,
    )
