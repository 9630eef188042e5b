"""`peerkv doctor`: what this machine has, what the replicas can exchange and how, and what should be fixed.

findings.py judges the facts that machine.py and replica_pairs.py collect; it is a pure function.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.default_model.packaged import DEFAULT_NAME
from engine.fleet import FleetError
from gateway.cli.doctor.finding import Finding, in_words
from gateway.cli.doctor.findings import judge, judge_fleet
from gateway.cli.doctor.links import LinkSpeeds, matrix_lines, measure
from gateway.cli.doctor.machine import Machine, look
from gateway.cli.doctor.other_nodes import ALONE, OtherNodes, judge_nodes, node_lines
from gateway.cli.doctor.other_nodes import look as look_for_nodes
from gateway.cli.doctor.replica_pairs import Fleet, Pair, pairs_of, path_in_words, read_fleet
from gateway.cli.elsewhere import flags_for, the_only_server
from gateway.serve.fleets import each_fleet
from gateway.settings import Settings

Running = tuple[Fleet | None, tuple[Pair, ...]]
"""The replicas of a model, if they run, and what each two of them exchange."""


def run(settings: Settings, *, as_json: bool = False, measure_links: bool = True, cacert: Path | None = None) -> int:
    """Print the report and return the exit status: 0 without problems, otherwise 1. Raises SettingsError for `cacert`."""
    machine = look(settings, cacert)
    speeds = measure(machine) if measure_links else None
    (fleet, pairs), *others = [_running(each.run_dir, machine) for each in each_fleet(settings)]
    nodes = look_for_nodes(settings.run_dir)
    findings = (*judge(machine, fleet, pairs), *judge_nodes(nodes))
    if fleet is None and not any(each for each, _ in others):
        findings += tuple(_elsewhere(settings))
    findings += tuple(finding for each, its_pairs in others if each for finding in judge_fleet(each, its_pairs))
    if as_json:
        print(_as_json(machine, speeds, fleet, pairs, findings, nodes, others))
    else:
        print("\n".join(report(machine, speeds, fleet, pairs, findings, nodes, others)))
    return 1 if any(finding.problem for finding in findings) else 0


def _elsewhere(settings: Settings) -> Iterator[Finding]:
    """Say what runs on this machine where nothing runs in the run_dir that is examined."""
    server = the_only_server()
    if server is not None:
        what = f"a peerkv runs on this machine with another run_dir, {server.run_dir}"
        yield Finding(False, what, f"to examine it: peerkv doctor {flags_for(server, settings.port)}")


def _running(run_dir: Path, machine: Machine) -> Running:
    try:
        fleet = read_fleet(run_dir)
    except FleetError as error:
        fleet = Fleet("", "", (), str(error))
    return fleet, pairs_of(fleet, machine.links) if fleet else ()


def report(
    machine: Machine,
    speeds: LinkSpeeds | None,
    fleet: Fleet | None,
    pairs: tuple[Pair, ...],
    findings: tuple[Finding, ...],
    nodes: OtherNodes = ALONE,
    others: Sequence[Running] = (),
) -> Iterator[str]:
    """Return the report as lines of text; `others` are what runs of further models."""
    yield from _machine_lines(machine)
    if speeds is not None:
        yield from matrix_lines(machine, speeds)
    yield ""
    yield from _fleet_lines(machine, fleet, pairs)
    for each, its_pairs in others:
        if each is not None and not each.error:
            yield from _fleet_lines(machine, each, its_pairs)
    yield from node_lines(nodes)
    for title, wanted in (("Problems", True), ("Notes", False)):
        chosen = [finding for finding in findings if finding.problem is wanted]
        if chosen:
            yield f"\n{title}"
        for finding in chosen:
            yield f"  - {finding.what}"
            if finding.remedy:
                yield f"    what to do: {finding.remedy}"
    if not any(finding.problem for finding in findings):
        yield "\nNo problem found."


def _machine_lines(machine: Machine) -> Iterator[str]:
    yield "This machine"
    yield f"  system      {machine.system}, Linux {machine.kernel}, Python {machine.python}"
    yield f"  processor   {machine.cores} cores"
    yield f"  memory      {in_words(machine.memory_bytes)}, {in_words(machine.memory_free_bytes)} available"
    yield f"  /dev/shm    {in_words(machine.shm_bytes)}, {in_words(machine.shm_free_bytes)} free"
    soft, hard = machine.descriptors
    yield f"  descriptors {soft}{f', raised to {hard} by a start' if hard > soft else ''}"
    if not machine.gpus:
        yield "  GPUs        none: replicas run on the CPU"
    for gpu in machine.gpus:
        yield f"  GPU {gpu.index:<7} {gpu.name}, {gpu.memory_mib / 1024:.0f} GiB"
    for words, named in _group_links(machine):
        yield f"  GPU paths   {named}: {words}"
    versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    yield f"  packages    {versions or 'neither vLLM nor torch'}"
    yield f"  model       {DEFAULT_NAME}: {machine.model_directory if machine.model_present else 'not fetched yet'}"


def _group_links(machine: Machine) -> Iterator[tuple[str, str]]:
    groups: dict[str, list[str]] = {}
    for link in machine.links:
        reads = "peer reads work" if link.peer_read == "OK" else f"peer reads: {link.peer_read}"
        groups.setdefault(f"{path_in_words(link.path)}; {reads}", []).append(f"{link.first}-{link.second}")
    for words, named in groups.items():
        yield words, "every two" if len(groups) == 1 and len(named) > 1 else " ".join(named)


def _fleet_lines(machine: Machine, fleet: Fleet | None, pairs: tuple[Pair, ...]) -> Iterator[str]:
    if fleet is None or fleet.error:
        yield f"No replicas run on port {machine.port}. When they do:"
        yield f"  they {_prospect(machine)}"
        return
    yield f"Replicas of {fleet.model}"
    for member in fleet.members:
        table = f"{member.cached_blocks} of {member.blocks} blocks cached" if member.blocks else "no block table"
        stored = f", {member.stored[0]} of {member.stored[1]} stored in host memory" if member.stored else ""
        yield f"  {member.name}   {member.state}, {member.device}, {table}{stored}"
    if groups := {member.fingerprint["groups"] for member in fleet.members if "groups" in member.fingerprint}:
        yield f"  KV cache: {' | '.join(sorted(groups))}"
    together = {(pair.transport, pair.path) for pair in pairs}
    if len(pairs) > 1 and len(together) == 1 and pairs[0].transport:
        yield f"  all pairs exchange KV by {_by(pairs[0])}"
        return
    for pair in pairs:
        way = f"exchange KV by {_by(pair)}" if pair.transport else f"exchange nothing: {'; '.join(pair.reasons)}"
        yield f"  {pair.first} and {pair.second} {way}"


def _prospect(machine: Machine) -> str:
    if machine.cpu_only_vllm or not machine.gpus:
        return "run on the CPU and exchange KV by shared memory"
    if len(machine.gpus) == 1:
        return "run on one GPU, where a single replica has no peer to exchange KV with"
    return "run one per GPU and exchange KV by CUDA IPC wherever peer reads work (see GPU paths)"


def _by(pair: Pair) -> str:
    return f"{pair.transport} ({pair.path})" if pair.path else pair.transport


def _as_json(
    machine: Machine,
    speeds: LinkSpeeds | None,
    fleet: Fleet | None,
    pairs: tuple[Pair, ...],
    findings: tuple[Finding, ...],
    nodes: OtherNodes,
    others: Sequence[Running],
) -> str:
    measured = (
        [{"reader": r, "owner": o, "gb_per_s": s.gb_per_s, "error": s.error} for (r, o), s in speeds.speeds.items()]
        if speeds
        else []
    )
    answer: dict[str, Any] = {
        "machine": asdict(machine),
        "links_measured": measured,
        "fleet": asdict(fleet) if fleet else None,
        "exchanges": [asdict(pair) for pair in pairs],
        "other_models": [
            {"fleet": asdict(each), "exchanges": [asdict(pair) for pair in its_pairs]} for each, its_pairs in others if each
        ],
        "other_nodes": asdict(nodes) if nodes.here else None,
        "problems": [asdict(finding) for finding in findings if finding.problem],
        "notes": [asdict(finding) for finding in findings if not finding.problem],
    }
    return json.dumps(answer, indent=2)
