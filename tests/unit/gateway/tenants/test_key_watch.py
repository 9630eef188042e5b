"""The keys file while the gateway runs: changes are taken up, broken files are not, and are told of once."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from gateway.errors import NotAuthenticated
from gateway.tenants.key_file import read_keys, write_keys
from gateway.tenants.key_watch import watch_keys
from gateway.tenants.keys import Key, Keys, digest_of, no_keys
from gateway.tenants.tenants import Tenants
from tests.unit.gateway.running_door import until

NONE = no_keys()


def key(token: str, name: str = "a", **values: object) -> Key:
    return Key(name=name, tenant="t", sha256=digest_of(token.encode()).hex(), **values)


def may_call(tenants: Tenants, token: str) -> bool:
    try:
        tenants.authenticate(b"Bearer " + token.encode())
    except NotAuthenticated:
        return False
    return True


def put(path: Path, text: str | None) -> None:
    path.unlink() if text is None else path.write_text(text)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    write_keys(path, NONE.with_key(key("one")))
    return path


@pytest.fixture
def tenants(path: Path) -> Tenants:
    return Tenants([], keys=read_keys(path))


async def test_a_new_file_is_taken_up(path: Path, tenants: Tenants) -> None:
    watch = watch_keys(path, tenants)
    await watch.look()
    write_keys(path, NONE.with_key(key("two")))
    await watch.look()
    assert not may_call(tenants, "one")
    assert may_call(tenants, "two")


async def test_a_broken_file_keeps_the_old_keys_and_is_told_of_once(
    path: Path, tenants: Tenants, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watch = watch_keys(path, tenants)
    await watch.look()
    put(path, "broken")
    await watch.look()
    watch.reload()
    await watch.look()
    assert may_call(tenants, "one")
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "is not TOML" in caplog.text
    put(path, None)
    await watch.look()
    assert may_call(tenants, "one")
    write_keys(path, NONE.with_key(key("two")))
    await watch.look()
    assert may_call(tenants, "two")
    assert "read again: 1 keys" in caplog.records[-1].message


async def test_the_watch_looks_by_itself_again_and_again(path: Path, tenants: Tenants) -> None:
    watch = watch_keys(path, tenants, poll_seconds=0.01)
    task = asyncio.create_task(watch.run())
    for token in ("two", "three"):
        write_keys(path, NONE.with_key(key(token)))
        await until(lambda token=token: may_call(tenants, token))
    task.cancel()


async def test_the_watch_looks_at_once_when_it_is_asked_and_not_before(path: Path, tenants: Tenants) -> None:
    watch = watch_keys(path, tenants, poll_seconds=3600)
    await watch.look()
    looked, look = asyncio.Event(), watch.look

    async def looks() -> None:
        looked.set()
        await look()

    watch.look = looks  # type: ignore[method-assign]
    task = asyncio.create_task(watch.run())
    write_keys(path, NONE.with_key(key("two")))
    for _ in range(10):  # turns of the event loop
        await asyncio.to_thread(path.read_bytes)
    assert not looked.is_set()
    watch.reload()
    await until(lambda: may_call(tenants, "two"))
    task.cancel()


async def test_the_watch_goes_on_whatever_happens(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Tenants):
        uses = 0

        def use(self, keys: Keys) -> None:
            self.uses += 1
            if self.uses == 1:
                raise ZeroDivisionError
            super().use(keys)

    tenants = Failing([], keys=read_keys(path))
    write_keys(path, NONE.with_key(key("two")))
    task = asyncio.create_task(watch_keys(path, tenants, poll_seconds=0.01).run())
    await until(lambda: may_call(tenants, "two"))
    assert [record.message for record in caplog.records if record.exc_info] == [f"{path} could not be looked at"]
    assert not task.done()
    task.cancel()
