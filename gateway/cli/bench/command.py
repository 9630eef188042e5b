"""`peerkv bench`: its flags, its sections in their order, and what it prints."""

import argparse
import asyncio
import itertools
import json
import os
import random
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gateway.cli.bench import first_token, overhead, throughput
from gateway.cli.bench.arrivals import arrivals, modest_rate, shared_prefixes
from gateway.cli.bench.flags import ANSWER_TOKENS, FIRST_TOKEN_SECONDS_MAX
from gateway.cli.bench.fresh_installation import StartedInstallation
from gateway.cli.bench.installation import Described, Installation, NotMeasured
from gateway.cli.bench.kinds import Kind, rows
from gateway.cli.bench.lengths import choose_lengths
from gateway.cli.bench.report import picture, print_results
from gateway.cli.bench.results import Results, given_arguments
from gateway.cli.bench.words import Words
from gateway.cli.elsewhere import run_dir_of
from gateway.cli.trust import trust
from gateway.settings import address, load
from gateway.tenants.loopback import port_here

SUFFIX_TOKENS = 32
WARM_TOKENS = 400
WORDS_AT_FIRST = 24
STOPPED = 130


def run(given: argparse.Namespace, console: Console | None = None, progress_console: Console | None = None) -> int:
    """Measure and print; return the exit status. Raises SettingsError, and NotMeasured after printing what was measured."""
    console, shown = console or Console(), progress_console or Console(stderr=True)
    # The port of a URL on this machine says which run_dir is meant.
    settings = load({"port": given.port or (port_here(given.url) if given.url else None)}, given.config)
    key = given.admin_key or (settings.admin_key.get_secret_value() if settings.admin_key else "")
    _check_files(given)
    results = Results()
    with ExitStack() as stack:
        stack.callback(_finish, results, given, console)
        url, run_dir = given.url or address(settings), settings.run_dir
        try:
            if given.start is not None:
                with shown.status("starting replicas and a gateway; the first time this downloads the default model"):
                    own = stack.enter_context(StartedInstallation(given.start))
                url, run_dir = own.url, own.run_dir
            verify = trust(url, given.cacert, settings.tls_cert)
            asyncio.run(_Bench(given, results, run_dir, shown).measure(Installation(url, given.api_key, key, verify)))
        except KeyboardInterrupt:
            shown.print("stopped" + ("; nothing was measured" if results.empty else "; results so far:"))
            return STOPPED
    return 0


def _check_files(given: argparse.Namespace) -> None:
    """Raise NotMeasured if a requested file cannot be written: better now than minutes later."""
    for path in (given.json, given.plot):
        if path is not None and (path.is_dir() or not os.access(path.absolute().parent, os.W_OK)):
            raise NotMeasured(f"{path} cannot be written: choose a file in an existing directory that you can write to")


def _finish(results: Results, given: argparse.Namespace, console: Console) -> None:
    """Print and write what was measured, even if incomplete."""
    if results.empty:
        return
    print_results(results, console)
    if given.json is not None:
        given.json.write_text(json.dumps(results.as_json(given_arguments()), indent=1) + "\n")
    if given.plot is not None:
        try:
            given.plot.write_text(picture(results))
        except ValueError as error:
            print(f"peerkv: {given.plot} was not drawn: {error}", file=sys.stderr)


class _Bench:
    """One measurement: the sections in order."""

    def __init__(self, given: argparse.Namespace, results: Results, run_dir: Path, console: Console) -> None:
        self._given, self._results, self._run_dir, self._console = given, results, run_dir, console
        self._source = random.SystemRandom()
        self._words = Words(self._source)
        self._token_seconds = 0.0
        self._answer_token_seconds = 0.0

    async def measure(self, installation: Installation) -> None:
        """Fill in the results. Raises NotMeasured."""
        columns = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        async with installation:
            described = self._results.described = await installation.describe()
            with Progress(*columns, console=self._console) as progress:
                await self._warm_up(installation, described)
                if "first-token" in self._given.only:
                    await self._first_token(installation, described, progress)
                if "overhead" in self._given.only:
                    await self._overhead(installation, described, progress)
                if "throughput" in self._given.only:
                    await self._throughput(installation, described, progress)

    async def _warm_up(self, installation: Installation, described: Described) -> None:
        """Learn how many tokens a word takes, and how fast prompts and answers are computed."""
        pinned = described.replicas if set(self._given.only) & {"first-token", "overhead"} else ("",)
        longest = min(WARM_TOKENS, described.context_tokens // 4)
        for tokens, replica in [(WORDS_AT_FIRST, pinned[0]), *((longest, name) for name in (*pinned, *pinned))]:
            answer = await installation.ask(self._words.text(tokens), answer_tokens=ANSWER_TOKENS, replica=replica)
            self._words.tokens_each *= answer.prompt_tokens / tokens
            self._token_seconds = answer.first_seconds / answer.prompt_tokens
            self._answer_token_seconds = (answer.seconds - answer.first_seconds) / answer.answer_tokens

    def _lengths(self, described: Described) -> list[int]:
        if self._given.lengths is None:
            times = (self._token_seconds, self._given.samples, FIRST_TOKEN_SECONDS_MAX)
            return list(choose_lengths(described.context_tokens, *times))
        longest = described.context_tokens - first_token.ANSWER_TOKENS
        if too_long := [length for length in self._given.lengths if length > longest]:
            raise NotMeasured(f"a prompt of {too_long[0]} tokens does not fit into the context of {described.context_tokens}")
        return list(self._given.lengths)

    async def _first_token(self, installation: Installation, described: Described, progress: Progress) -> None:
        if described.obstacles:
            self._results.notes.append(f"no imports were measured: {described.obstacles}")
        lengths = self._lengths(described)
        planned = first_token.trials(
            self._source, lengths, described.replicas, self._given.samples, imports=not described.obstacles
        )
        bar = progress.add_task("first token", total=len(planned))

        done = itertools.count(1)

        def step(trial: first_token.Trial) -> None:
            ran = next(done)  # more than planned if trials were disturbed
            total = max(ran, len(planned))
            progress.update(bar, completed=ran, total=total, description=f"first token, {trial.tokens:,} tokens")

        await first_token.measure(installation, described, self._words, planned, self._results.samples, step)
        self._note_what_is_missing(imports=not described.obstacles)

    def _note_what_is_missing(self, *, imports: bool) -> None:
        samples = self._results.samples
        disturbed = sum(not sample.good for sample in samples)
        if disturbed:
            text = f"{disturbed} of {len(samples)} samples are left out: their prompts did not come from the intended cache"
            self._results.notes.append(
                f"{text} (other requests, a cache that is too small, or steering that preferred to compute)"
            )
        for row in rows(samples):
            for kind in Kind:
                if kind not in row.seconds and (imports or kind is not Kind.IMPORT):
                    self._results.notes.append(f"no {kind.value} of {row.tokens:,} tokens was measured")

    async def _overhead(self, installation: Installation, described: Described, progress: Progress) -> None:
        known = overhead.sockets(installation.url, self._run_dir)
        replica = described.replicas[0]
        if replica not in known:
            how = run_dir_of(installation.url) or "--config"
            self._results.notes.append(
                f"the gateway's overhead was not measured: the replicas' sockets are not in this machine's run_dir ({how})"
            )
        bar = progress.add_task("gateway overhead", total=self._given.pairs + overhead.WARM_PAIRS)
        self._results.overhead = await overhead.measure(
            installation,
            described.model,
            replica,
            known.get(replica, ""),
            self._words,
            self._given.pairs,
            _advance(progress, bar),
        )

    async def _throughput(self, installation: Installation, described: Described, progress: Progress) -> None:
        given = self._given
        prefix_tokens = given.prefix_tokens or self._middle_length(described)
        rate = given.rate or self._modest_rate(described, prefix_tokens)
        times = arrivals(self._source, rate, given.seconds) or [0.0]
        planned = shared_prefixes(
            self._source,
            self._words,
            times,
            prefixes=given.prefixes,
            prefix_tokens=prefix_tokens,
            suffix_tokens=SUFFIX_TOKENS,
        )
        bar = progress.add_task(f"throughput, {rate:g} requests/s", total=len(planned))
        self._results.throughput = await throughput.run(
            installation, planned, rate=rate, answer_tokens=given.answer_tokens, step=_advance(progress, bar)
        )

    def _middle_length(self, described: Described) -> int:
        room = described.context_tokens - SUFFIX_TOKENS - self._given.answer_tokens
        lengths = self._lengths(described)
        middle: int = min(lengths[len(lengths) // 2], room)
        return max(1, middle)

    def _modest_rate(self, described: Described, prefix_tokens: int) -> float:
        """By the time of a request whose prefix is computed once for each that shares it."""
        answers = self._given.answer_tokens * self._answer_token_seconds
        return modest_rate(len(described.replicas), (prefix_tokens / 2 + SUFFIX_TOKENS) * self._token_seconds + answers)


def _advance(progress: Progress, bar: TaskID) -> Callable[[], None]:
    return lambda: progress.advance(bar)
