"""`peerkv serve` with a certificate, and with several names of its model, as a process over fake engines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import sys
from pathlib import Path

from tests.unit.gateway.http_server.test_tls import write_certificate
from tests.unit.gateway.running_door import until
from tests.unit.gateway.serve.test_run import COMPLETION, ROOT, peerkv


async def test_serve_speaks_https_under_all_names_of_the_model(tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path, "one.example")
    flags = ("--tls-cert", str(cert), "--tls-key", str(key), "--served-model-name", "main", "--model-aliases", "gpt-4o other")
    async with peerkv(tmp_path, *flags) as gateway:
        await until(lambda: any("curl" in line for line in gateway.out), 30)
        url, trusted = f"https://127.0.0.1:{gateway.port}", ssl.create_default_context(cafile=cert)
        assert f"at {url}/v1 (2 of 2 replicas ready)" in "".join(gateway.out)
        async with gateway.session.get(f"{url}/v1/models", ssl=trusted) as answer:
            assert [card["id"] for card in (await answer.json())["data"]] == ["main", "gpt-4o", "other"]
        for name, status in (("gpt-4o", 200), ("main", 200), ("gpt-5", 404)):
            body = {**COMPLETION, "model": name}
            async with gateway.session.post(f"{url}/v1/completions", json=body, ssl=trusted) as answer:
                assert answer.status == status
        words = (sys.executable, "-m", "gateway.cli", "kv", "stats", "--json", "--url", url, "--cacert", str(cert))
        asked = await asyncio.create_subprocess_exec(
            *words, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert json.loads((await asked.communicate())[0])["model"] == "main"
        gateway.signal(signal.SIGHUP)
        await until(lambda: any("certificate and settings are read again" in line for line in gateway.err))
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
