"""What a replica's answer to /health says."""

from pathlib import Path

import pytest
from aiohttp import web

from engine.replicas.health import Health, HealthProbe


@pytest.mark.parametrize(
    ("status", "found"),
    [
        (200, Health("")),
        (503, Health("its engine has died", dead=True)),  # so vLLM's server says it
        (500, Health("/health answers 500")),
    ],
)
async def test_what_it_answers_is_told_in_words(tmp_path: Path, status: int, found: Health) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=status)

    app = web.Application()
    app.router.add_get("/health", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "r.sock")).start()
    probe = HealthProbe(str(tmp_path / "r.sock"), 5.0)
    try:
        assert await probe.ask() == found
    finally:
        await probe.close()
        await runner.cleanup()
