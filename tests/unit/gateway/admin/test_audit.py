"""What admins do is written down before it is done, in lines that cannot be changed unnoticed."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.admin.audit import Audited
from gateway.admin.audit_chain import FIRST, AuditLog, ChainBroken, verify
from gateway.cli.main import main
from gateway.errors import SettingsError
from gateway.tenants.access import AdminAccess
from tests.unit.gateway.running_door import running_door

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
ADMIN = {"authorization": "Bearer the-admin-key"}


def written(path: Path, count: int = 5) -> list[bytes]:
    log = AuditLog(path)
    for number in range(count):
        log.add({"time": f"t{number}", "act": "POST", "path": '/kv/flush","hash":"x'})
    log.close()
    return path.read_bytes().splitlines(keepends=True)


def test_a_chain_is_gone_on_with_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    first = written(path, 2)
    again = written(path, 3)
    assert again[:2] == first
    chain = verify(path)
    assert (chain.entries, chain.since, chain.until) == (5, "t0", "t2")
    assert json.loads(again[0])["previous"] == FIRST
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("line", range(5))
@pytest.mark.parametrize("how", ["changed", "taken out", "doubled", "swapped", "cut off"])
def test_whatever_is_done_to_a_line_is_noticed(tmp_path: Path, line: int, how: str) -> None:
    path = tmp_path / "audit.jsonl"
    lines = written(path)
    if how == "changed":
        lines[line] = lines[line].replace(b"POST", b"GET ")
    elif how == "taken out":
        del lines[line]
    elif how == "doubled":
        lines.insert(line, lines[line])
    elif how == "swapped":
        lines[line], lines[line - 1] = lines[line - 1], lines[line]
    else:
        lines[line] = lines[line][:-10]
    path.write_bytes(b"".join(lines))
    if how == "taken out" and line == len(lines):  # the last one: its hash, kept elsewhere, is not found
        assert verify(path).entries == line
        return
    with pytest.raises(ChainBroken, match="line"):
        verify(path)
    with pytest.raises(SettingsError, match="Move the file away"):
        AuditLog(path)


@pytest.mark.parametrize("body", [b"no JSON}", b"\xff}", b'["n"}'])
def test_a_line_that_has_its_hash_but_is_no_entry_is_noticed(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b'%b,"hash":"%b"}\n' % (body[:-1], hashlib.sha256(body).hexdigest().encode()))
    with pytest.raises(ChainBroken, match="line 1"):
        verify(path)


def test_the_command_says_whether_a_log_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "audit.jsonl"
    lines = written(path)
    assert main(["audit", "verify", str(path)]) == 0
    printed = capsys.readouterr().out
    last = json.loads(lines[-1])["hash"]
    assert "5 entries as they were written, from t0 to t4" in printed
    assert last in printed
    path.write_bytes(b"".join(lines[:-1]))
    assert main(["audit", "verify", str(path)]) == 0
    assert main(["audit", "verify", str(path), "--hash", last]) == 1
    assert main(["audit", "verify", str(tmp_path / "nothing")]) == 1
    path.write_bytes(b"".join(lines[1:]))
    assert main(["audit", "verify", str(path)]) == 1
    assert "line 1 does not follow" in capsys.readouterr().err


def test_one_file_has_one_writer_and_has_to_be_writable(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    with pytest.raises(SettingsError, match="another gateway"):
        AuditLog(tmp_path / "audit.jsonl")
    log.close()
    with pytest.raises(SettingsError, match="cannot write"):
        AuditLog(tmp_path / "no" / "directory")


class FullDisk(AuditLog):
    full = False

    def add(self, values: dict[str, Any]) -> None:
        if self.full:
            raise OSError("the disk is full")
        super().add(values)


async def test_acts_are_written_down_with_what_came_of_them_and_reading_is_not(tmp_path: Path) -> None:
    async with running_door(tmp_path, admin_key="the-admin-key") as door:
        await door.add_engine("replica-0")
        path = tmp_path / "audit.jsonl"
        log, front = FullDisk(path), door.server.config.loaded_app
        front._admin = Audited(front._admin, log, AdminAccess(SecretStr("the-admin-key")), lambda: NOON)
        assert (await door.get("/kv/stats", headers=ADMIN))[0] == 200
        assert (await door.post("/kv/flush?x=1", headers=ADMIN | {"x-request-id": "mine"}))[0] == 200
        assert (await door.post("/kv/flush"))[0] == 401
        assert (await door.post("/v1/completions", {"prompt": "x"}, headers=ADMIN))[0] == 200
        log.full = True
        status, answer, heads = await door.post("/kv/flush", headers=ADMIN)
        assert (status, heads["retry-after"]) == (503, "1"), answer
        assert len((await door.seen("replica-0"))["resets"]) == 1
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        asked = {"time": "2026-11-30T12:00:00.000+00:00", "act": "POST", "path": "/kv/flush", "query": "x=1", "id": "mine"}
        assert [entry["status"] for entry in entries] == [None, 200]
        assert all(entry.items() >= {**asked, "client": "127.0.0.1"}.items() for entry in entries)
        assert verify(path).entries == 2
        log.close()
