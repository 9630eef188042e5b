"""`peerkv kv ls`, `rm`, `export` and `import`: what a disk, a vault or host memory keeps, without a gateway."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engine.frame_tiers import archive
from engine.frame_tiers.disk.disk_store import DiskStore
from engine.frame_tiers.secrecy import OPEN, Secrecy, SecretRefused, read_secret
from engine.frame_tiers.store import FrameStore, StoreRefused
from engine.frame_tiers.vault.address import AddressRefused, parse, with_secrets
from engine.frame_tiers.vault.vault_store import VaultStore
from gateway.errors import SettingsError

MIB = 1 << 20
LOCK_SECONDS = 0.5
_NO_BOUND = 1 << 62


def add_views(views: argparse._SubParsersAction[Any]) -> None:
    """Add the commands to those of `peerkv kv`."""
    _add(views, "ls", _ls, "list what a disk, a vault or host memory keeps, by model")
    rm = _add(views, "rm", _rm, "remove what a disk or a vault keeps of a model")
    rm.add_argument("model", metavar="MODEL", help="as `kv ls` shows it, or its beginning, 8 digits at least")
    out = _add(views, "export", _export, "copy what a disk, a vault or host memory keeps into a file")
    out.add_argument("file", type=Path, metavar="FILE", help="the file, which must not be there yet")
    out.add_argument("--model", default="", metavar="MODEL", help="only what it keeps of this model (default: everything)")
    back = _add(views, "import", _import, "copy a file of `kv export` into a disk or a vault")
    back.add_argument("file", type=Path, metavar="FILE", help="the file")
    back.add_argument(
        "--disk-bytes", type=int, default=_NO_BOUND, metavar="BYTES", help="what the disk may keep (default: all that fits)"
    )


def _add(
    views: argparse._SubParsersAction[Any], name: str, work: Callable[[argparse.Namespace, Console], None], summary: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = views.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--disk", type=Path, metavar="DIR", help="the directory of --disk; to change it, end peerkv first")
    where.add_argument("--vault", metavar="URL", help="the server of --vault, such as valkey://vault.lan:6379")
    where.add_argument("--host-memory", type=Path, metavar="DIR", help="the directory of --table-dir, of replicas that run")
    parser.add_argument(
        "--vault-password-file", type=Path, metavar="FILE", help="file with the vault's password (default: none)"
    )
    parser.add_argument(
        "--vault-ca-file", type=Path, metavar="FILE", help="certificates that vouch for it (default: the system's)"
    )
    parser.add_argument(
        "--tier-secret-file",
        type=Path,
        metavar="FILE",
        help="that of disk and vault: with it, what is copied out of host memory is theirs, and encrypted (default: none)",
    )
    parser.set_defaults(run=run, parser=parser, work=work)
    return parser


def run(arguments: argparse.Namespace, console: Console | None = None) -> int:
    """Run one of the commands; return its exit status, 1 when it was not done. Raises SettingsError."""
    try:
        arguments.work(arguments, console or Console())
    except (StoreRefused, OSError) as error:
        print(f"peerkv: {error}", file=sys.stderr)
        return 1
    return 0


def _ls(arguments: argparse.Namespace, console: Console) -> None:
    counts: dict[str, list[int]] = {}
    with _kept(arguments) as found:
        for kept in found:
            count = counts.setdefault(kept.model, [0, 0, kept.created_ns])
            count[0] += 1
            count[1] += kept.bytes
            count[2] = min(count[2], kept.created_ns)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("model and rank", "blocks", "MiB", "since"):
        table.add_column(column, justify="left" if column in ("model and rank", "since") else "right", no_wrap=True)
    for model, (blocks, size, created_ns) in sorted(counts.items(), key=lambda entry: -entry[1][1]):
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(created_ns / 1e9)) if created_ns else ""
        table.add_row(model, f"{blocks:,}", f"{size / MIB:,.1f}", since)
    console.print(table if counts else "nothing is kept there")


def _rm(arguments: argparse.Namespace, console: Console) -> None:
    wanted = _of_model(arguments.model)
    with _store(arguments) as store, _kept(arguments) as found:
        moved = archive.remove(store, found, wanted)
    console.print(f"removed {moved.frames:,} blocks, {moved.bytes / MIB:,.1f} MiB")


def _export(arguments: argparse.Namespace, console: Console) -> None:
    wanted = _of_model(arguments.model) if arguments.model else lambda each: True
    if arguments.disk is not None:
        moved = archive.write_file(arguments.file, archive.frames_on_disk(arguments.disk, wanted))
    elif arguments.host_memory is not None:
        frames = archive.frames_in_host_memory(arguments.host_memory, wanted, _secrecy(arguments))
        moved = archive.write_file(arguments.file, frames)
    else:
        with _vault(arguments) as store:
            moved = archive.write_file(arguments.file, archive.frames_in_vault(store, wanted))
    console.print(_told("copied", moved))


def _import(arguments: argparse.Namespace, console: Console) -> None:
    with _store(arguments) as store:
        moved = archive.read_file(arguments.file, store)
        dropped = store.stats().dropped_frames
    console.print(_told("copied", moved) + (f"; {dropped:,} found no room" if dropped else ""))


def _told(what: str, moved: archive.Moved) -> str:
    damaged = f"; {moved.damaged:,} are damaged and left out" if moved.damaged else ""
    return f"{what} {moved.frames:,} blocks, {moved.bytes / MIB:,.1f} MiB{damaged}"


def _of_model(model: str) -> Callable[[bytes], bool]:
    """Raises SettingsError."""
    digits = model.lower()
    if not 8 <= len(digits) <= 32 or not set(digits) <= set("0123456789abcdef"):
        raise SettingsError(f"'{model}' is not 8 to 32 hex digits: `peerkv kv ls` shows models")
    return lambda each: each.hex().startswith(digits)


@contextmanager
def _kept(arguments: argparse.Namespace) -> Iterator[Iterator[archive.Kept]]:
    if arguments.disk is not None:
        yield archive.on_disk(arguments.disk)
        return
    if arguments.host_memory is not None:
        yield archive.in_host_memory(arguments.host_memory, _secrecy(arguments))
        return
    with _vault(arguments) as store:
        yield archive.in_vault(store)


@contextmanager
def _store(arguments: argparse.Namespace) -> Iterator[FrameStore]:
    """The store, to change it. Raises SettingsError for host memory."""
    if arguments.host_memory is not None:
        raise SettingsError(
            "only its replica changes host memory: `peerkv kv flush` empties it, and what is imported into a disk or a vault"
            " comes up from there"
        )
    if arguments.disk is None:
        with _vault(arguments) as vault:
            yield vault
        return
    disk = DiskStore(arguments.disk, getattr(arguments, "disk_bytes", _NO_BOUND), lock_seconds=LOCK_SECONDS)
    try:
        yield disk
    finally:
        disk.close()


def _secrecy(arguments: argparse.Namespace) -> Secrecy:
    """Raises SettingsError."""
    try:
        return read_secret(arguments.tier_secret_file) if arguments.tier_secret_file is not None else OPEN
    except SecretRefused as refused:
        raise SettingsError(str(refused)) from None


@contextmanager
def _vault(arguments: argparse.Namespace) -> Iterator[VaultStore]:
    """Raises SettingsError."""
    try:
        address = with_secrets(parse(arguments.vault), arguments.vault_password_file, arguments.vault_ca_file)
    except AddressRefused as refused:
        raise SettingsError(str(refused)) from None
    store = VaultStore(address)
    try:
        yield store
    finally:
        store.close()
