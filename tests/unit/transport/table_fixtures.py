"""Block tables for tests."""

import os
from pathlib import Path

from transport.table.layout import Description, Memory
from transport.table.writer import TableWriter

FIELDS = {"weights": "w1", "dtype": "bfloat16"}


def description(
    name: str = "replica-0",
    *,
    fields: dict[str, str] = FIELDS,
    status: str = "ok",
    transport: str = "shared_memory",
    memories: tuple[Memory, ...] = (),
    hash_name: str = "xxh3_128",
) -> Description:
    return Description(name, os.getpid(), hash_name, transport, status, dict(fields), memories)


def writer(path: Path, name: str = "replica-0", blocks: int = 64, block_size: int = 4, **about: object) -> TableWriter:
    return TableWriter(path, description(name, **about), block_size, blocks)  # type: ignore[arg-type]
