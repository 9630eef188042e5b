"""The process of the frame tiers, and a gateway that asks it."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from engine.frame_tiers import client as client_module
from engine.frame_tiers import service as service_module
from engine.frame_tiers.client import TierClient
from engine.frame_tiers.config import VARIABLE, TierConfig, decode_config, encode_config
from engine.frame_tiers.disk.disk_store import DiskStore
from engine.frame_tiers.messages import TierStats, encode
from engine.frame_tiers.service import Service
from tests.unit.engine.frame_tiers.node import SIZE, HostMemory
from tests.unit.engine.frame_tiers.vault_servers import valkey
from transport.fingerprint import fingerprint_digest
from transport.table.directory import TableDirectory

SECONDS = 30.0


def config(path, **about):
    told = {"socket": str(path / "tiers.sock"), "table_dir": str(path), "staging_bytes": 1 << 16}
    return TierConfig(**(told | {"disk": str(path / "disk"), "disk_bytes": 1 << 20} | about))


async def until(condition, what):
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - it is told over a socket
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serving(path, **about):
    """A service, and a client that is connected to it."""
    service, client = Service(config(path, **about)), TierClient(path / "tiers.sock")
    tasks = [asyncio.create_task(service.run()), asyncio.create_task(client.run())]
    try:
        await until(lambda: client.latest is not None, "a connection")
        yield service, client
    finally:
        for task in reversed(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def states(client):
    return {store.name: store.state for store in client.latest.stores}


async def test_a_gateway_asks_hears_the_figures_and_flushes(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "TELL_SECONDS", 0.02)
    memory = HostMemory(tmp_path)
    memory.put(range(8))
    fingerprint, keys = fingerprint_digest(memory.fields), memory.chain.tobytes()
    async with serving(tmp_path) as (_, client):
        await until(lambda: client.latest.stores[0].stored_frames == 9, "all to go down, the self-test's too")
        found = await asyncio.gather(*(client.promote(fingerprint, keys, 0, 5.0, lossy=False) for _ in range(5)))
        assert {(each.source, each.tokens) for each in found} == {("disk", 8 * SIZE)}
        assert [name for name in TableDirectory(tmp_path).tables() if name == "disk"]
        await until(lambda: client.latest.staged_blocks == 8, "the figures")  # once, though five asked
        memory.table.clear()
        assert await client.flush() == {"disk": ""}
        assert (await client.promote(fingerprint, keys, 0, 5.0, lossy=False)).source == ""
    assert not (tmp_path / "tiers.sock").exists()
    assert "disk" not in TableDirectory(tmp_path).tables()


async def test_whoever_waited_for_others_until_its_time_was_over_costs_nothing_more(tmp_path, monkeypatch):
    """Or what is asked while all are busy would keep all of them busy for nobody."""
    monkeypatch.setattr(service_module, "TELL_SECONDS", 0.02)
    monkeypatch.setattr(service_module, "PROMOTIONS_MAX", 1)
    memory = HostMemory(tmp_path)
    memory.put(range(8))
    fingerprint, keys = fingerprint_digest(memory.fields), memory.chain.tobytes()
    async with serving(tmp_path) as (service, client):
        await until(lambda: client.latest.stores[0].stored_frames == 9, "all to go down, the self-test's too")
        go, (store,) = threading.Event(), service._stores()
        asked, holds = [], store.holds
        monkeypatch.setattr(store, "holds", lambda *given: asked.append(go.wait(SECONDS)) or holds(*given))
        first = asyncio.create_task(client.promote(fingerprint, keys, 0, SECONDS, lossy=False))
        await until(lambda: service._under_way, "the only thread to be busy")
        second = await client.promote(fingerprint, keys[: 4 * 16], 0, 0.05, lossy=False)
        assert second is None
        go.set()
        assert (await first).source == "disk"
        await until(lambda: not service._under_way, "the end of both")
        assert len(asked) == 1
        await until(lambda: client.latest.promotions_late == 1, "the figures")


async def test_a_flush_while_the_process_is_away_says_that_its_stores_were_not_emptied(tmp_path):
    client = TierClient(tmp_path / "tiers.sock", ["disk", "vault"])
    failed = await client.flush()
    assert failed.keys() == {"disk", "vault"}
    assert all("does not answer" in why for why in failed.values())


async def test_the_end_waits_for_no_gateway_to_leave(tmp_path, monkeypatch):
    stays = asyncio.Event()
    monkeypatch.setattr(asyncio.Server, "wait_closed", lambda self: stays.wait())  # as from Python 3.12 on
    service, client = Service(config(tmp_path)), TierClient(tmp_path / "tiers.sock")
    serving, asking = asyncio.create_task(service.run()), asyncio.create_task(client.run())
    await until(lambda: client.latest is not None and set(states(client).values()) == {"ok"}, "a connection")
    serving.cancel()
    await asyncio.wait([serving], timeout=SECONDS)
    assert serving.done()
    assert serving.cancelled()
    asking.cancel()
    await asyncio.gather(serving, asking, return_exceptions=True)


async def test_a_store_that_cannot_be_used_says_why_and_is_used_once_it_can(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(service_module, "TELL_SECONDS", 0.02)
    other = DiskStore(tmp_path / "disk", 1 << 20)
    monkeypatch.setattr("engine.frame_tiers.disk.disk_store.LOCK_SECONDS_MAX", 0.0)
    monkeypatch.setattr(DiskStore.__init__, "__kwdefaults__", DiskStore.__init__.__kwdefaults__ | {"lock_seconds": 0.0})
    async with serving(tmp_path) as (_, client):
        await until(lambda: "in use by another peerkv" in states(client)["disk"], "a word")
        assert "not in use" in (await client.flush())["disk"]
        other.close()
        await until(lambda: states(client)["disk"] == "ok", "the disk to be used")


async def test_a_vault_that_is_gone_at_the_start_degrades_with_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "TELL_SECONDS", 0.02)
    async with serving(tmp_path, vault="valkey://127.0.0.1:1") as (_, client):
        await until(lambda: "failed its self-test" in states(client)["vault"], "a word")
        assert states(client)["disk"] == "ok"


async def test_a_wrong_password_is_in_the_gateways_log_and_warnings_until_it_is_mended(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(service_module, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(service_module, "TELL_SECONDS", 0.02)
    with valkey(tmp_path) as server:
        (tmp_path / "secret").write_text("wrong")
        about = {"vault": f"valkey://127.0.0.1:{server.address.port}", "vault_password_file": str(tmp_path / "secret")}
        async with serving(tmp_path, **about) as (_, client):
            await until(client.warnings, "a warning")
            (warning,) = client.warnings()
            assert "WRONGPASS" in warning
            assert "--vault-password-file" in warning
            (tmp_path / "secret").write_text(server.address.password)
            await until(lambda: not client.warnings(), "the vault to be used")
    lines = [record.message for record in caplog.records if record.module == "client"]
    assert lines == [warning, "the vault is in use again"]


async def test_disk_and_vault_are_both_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "TELL_SECONDS", 0.02)
    memory = HostMemory(tmp_path)
    memory.put(range(4))
    with valkey(tmp_path) as server:
        (tmp_path / "secret").write_text(server.address.password)
        about = {"vault": f"valkey://127.0.0.1:{server.address.port}", "vault_password_file": str(tmp_path / "secret")}
        async with serving(tmp_path, **about) as (_, client):
            await until(lambda: set(states(client).values()) == {"ok"}, "both")
            memory.put(range(4, 8), slot=4)
            await until(lambda: all(store.stored_frames >= 5 for store in client.latest.stores), "both to be filled")
            assert await client.flush() == {"disk": "", "vault": ""}


async def test_without_its_process_nothing_is_waited_for(tmp_path):
    client = TierClient(tmp_path / "tiers.sock")
    task = asyncio.create_task(client.run())
    began = time.monotonic()
    assert await client.promote(b"f" * 16, b"k" * 16, 0, 5.0, lossy=False) is None
    assert await client.flush() == {}
    assert time.monotonic() - began < 1.0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def silent(path):
    """A client of a process that answers nothing, an event that is set once it is asked, and the connections."""
    asked, connections = asyncio.Event(), []

    async def hear(reader, writer):
        connections.append(writer)
        writer.write(encode(TierStats()))
        while await reader.read(4096):
            asked.set()

    async with await asyncio.start_unix_server(hear, str(path / "tiers.sock")):
        client = TierClient(path / "tiers.sock")
        task = asyncio.create_task(client.run())
        try:
            await until(lambda: client.latest is not None, "a connection")
            yield client, asked, connections
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_request_that_is_cancelled_while_it_waits_does_not_go_on(tmp_path):
    async with silent(tmp_path) as (client, asked, _):
        waiting = asyncio.create_task(client.promote(b"f" * 16, b"k" * 16, 0, SECONDS, lossy=False))
        await asked.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_a_process_that_ends_while_it_is_asked_is_waited_for_no_longer(tmp_path):
    async with silent(tmp_path) as (client, asked, connections):
        waiting = asyncio.create_task(client.promote(b"f" * 16, b"k" * 16, 0, 2 * SECONDS, lossy=False))
        await asked.wait()
        connections[0].close()
        async with asyncio.timeout(SECONDS):
            assert await waiting is None


async def test_whoever_speaks_another_language_is_hung_up_on(tmp_path):
    async with serving(tmp_path) as (_, client):
        for said in (b"\xff\xff\xff\xff", b"\x03\x00\x00\x00abc"):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "tiers.sock"))
            writer.write(said)
            async with asyncio.timeout(SECONDS):
                while await reader.read(4096):
                    pass
            writer.close()
        assert client.latest is not None


def test_the_process_ends_in_order_and_leaves_a_disk_that_can_be_opened(tmp_path):
    memory = HostMemory(tmp_path)
    memory.put(range(8))
    environment = os.environ | {VARIABLE: encode_config(config(tmp_path))}
    process = subprocess.Popen([sys.executable, "-m", "engine.frame_tiers"], env=environment)
    try:
        deadline = time.monotonic() + SECONDS
        while not list((tmp_path / "disk").glob("*.frames")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
    store = DiskStore(tmp_path / "disk", 1 << 20)
    assert store.stats().errors == 0
    store.close()
    assert not (tmp_path / "tiers.sock").exists()


def test_without_a_configuration_it_says_so():
    found = subprocess.run([sys.executable, "-m", "engine.frame_tiers"], env=os.environ | {VARIABLE: "{"}, capture_output=True)
    assert found.returncode == 1
    assert b"cannot start" in found.stderr


def test_a_configuration_goes_through_the_environment_whole(tmp_path):
    told = config(tmp_path, vault="valkey://:secret@h")
    assert decode_config(encode_config(told)) == told
    assert told.stores == ("disk", "vault")
    assert config(tmp_path, disk="").stores == ()


async def test_what_a_gateway_pinned_stays_on_the_disk_until_it_is_unpinned_also_by_a_process_that_began_anew(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(service_module, "TELL_SECONDS", 0.02)
    monkeypatch.setattr(client_module, "RECONNECT_SECONDS", 0.02)
    memory = HostMemory(tmp_path)
    memory.put(range(8))
    fingerprint, keys = fingerprint_digest(memory.fields), memory.chain[:4].tobytes()
    client = TierClient(tmp_path / "tiers.sock")
    asking = asyncio.create_task(client.run())
    client.pin(5, [(b"another model" + bytes(3), keys), (fingerprint, keys)], 60.0)  # nobody hears it yet
    try:
        for _ in range(2):
            service = Service(config(tmp_path, pin_share_max=0.5))
            serving = asyncio.create_task(service.run())
            await until(lambda service=service: pinned_by(service) == 4, "the pin")
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            for gateway in service._gateways:  # as when its process ends
                gateway.close()
        service = Service(config(tmp_path, pin_share_max=0.5))
        serving = asyncio.create_task(service.run())
        await until(lambda: pinned_by(service) == 4, "the pin")
        client.pin(6, [(fingerprint, memory.chain[:8].tobytes())], 0.05)
        await until(lambda: pinned_by(service) == 8, "a longer pin")
        await until(lambda: pinned_by(service) == 4, "its end")
        client.unpin(5)
        await until(lambda: pinned_by(service) == 0, "the end of the pin")
        client.pin(5, [(fingerprint, keys)], 60.0)
        await until(lambda: pinned_by(service) == 4, "the pin")
        await client.flush()
        assert pinned_by(service) == 0
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


def pinned_by(service):
    """How many frames of a service's disk pins hold now."""
    return sum(len(store._keeping.pinned(store._index, 1 << 20)) for store in service._stores())
