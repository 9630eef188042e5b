"""The page in a browser: headless Chromium, over a front door whose figures a test chooses."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import UnknownModel
from gateway.kept_prefixes.shapes import PrefixReport
from gateway.limits.shapes import KeyUse, LimitUse, TenantUse
from gateway.stats.explain import Explanation, explain
from gateway.stats.shapes import KvStats
from tests.unit.gateway.ledger.begun_attempts import begun
from tests.unit.gateway.running_door import running_door, until
from tests.unit.gateway.ui.scenes import Fleet
from transport.table.deliveries import Delivery

playwright = pytest.importorskip("playwright.async_api", reason="needs playwright: pip install playwright")
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

KEY = "the-admin-key"
SHOWN = "main:not([hidden])"


@contextlib.asynccontextmanager
async def page_over(
    directory: Path, fleet: Fleet, *, width: int = 1280, dark: bool = False, **settings: Any
) -> AsyncIterator[Any]:
    """The opened page. It must ask nobody but the gateway, and say nothing on the console but that answers were errors."""
    complaints: list[str] = []
    asked: list[str] = []
    async with running_door(directory, sight=fleet, **settings) as door, playwright.async_playwright() as started:
        browser = await started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = await browser.new_context(color_scheme="dark" if dark else "light", viewport={"width": width, "height": 800})
        page = await context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        try:
            await page.goto(door.url + "/ui")
            yield page
        finally:
            await browser.close()
    assert [url for url in asked if not url.startswith((door.url, "data:"))] == []
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []


async def rows(page: Any, table: str) -> list[list[str]]:
    """The texts of a table's cells."""
    script = "body => [...body.rows].map(row => [...row.cells].map(cell => cell.textContent))"
    found: list[list[str]] = await page.eval_on_selector(f"#{table} tbody", script)
    return found


async def says(page: Any, place: str, text: str) -> None:
    """Wait until it says so there."""
    await page.locator(place).filter(has_text=text).wait_for()


async def column(page: Any, table: str, place: int) -> Sequence[str]:
    return [cells[place] for cells in await rows(page, table)]


async def test_the_page_shows_replicas_transfers_prefixes_and_reasons(tmp_path: Path) -> None:
    async with page_over(tmp_path, Fleet(4, host_memory=True)) as page:
        await page.wait_for_selector(SHOWN)
        assert await page.text_content("#model") == "org/some-model-8B"
        assert await column(page, "replicas", 0) == [f"replica-{place}" for place in range(4)]
        assert await column(page, "replicas", 1) == ["✓ ready", "✓ ready", "✕ failed", "! ejected"]
        assert "out of memory" in (await rows(page, "replicas"))[2][-1]
        assert len(await rows(page, "transfers")) == 12
        assert (await rows(page, "prefixes"))[0][-1] == "replica-0, replica-1, replica-2, replica-3"
        assert "replica-1 (refused: pins would take more" in (await rows(page, "kept"))[0][-1]
        assert await column(page, "ledger", 0) == ["load", "evicted", "none", "cold"]
        assert len(await rows(page, "tiers")) == 4
        assert not await page.is_visible("#limits-section")


async def test_disk_vault_and_other_nodes_are_shown_with_what_moves(tmp_path: Path) -> None:
    async with page_over(tmp_path, Fleet(4, host_memory=True, below=True, nodes=3)) as page:
        await says(page, "#below tbody tr:first-child td:nth-child(6)", "/s")
        disk, vault = await rows(page, "below")
        assert disk[:3] == ["disk", "✓ ok", "46 % of 8.0 GiB"]
        assert disk[5].endswith("/s")
        assert disk[7].endswith("/s")
        assert disk[-1] == "70 not found, 1,200 gave way"
        assert vault[:2] == ["vault", "! failing"]
        assert vault[5] == vault[7] == "\N{EN DASH}"
        assert vault[-1] == "vault.example:6379 does not answer: timed out, 40 not written, 3 failed operations"
        fits = "table => table.parentElement.scrollWidth <= table.parentElement.clientWidth"
        for table in ("below", "nodes", "replicas"):
            assert await page.eval_on_selector(f"#{table}", fits)
        told = await page.text_content("#below-more")
        assert told.startswith("Brought up for 320 prompts, late for 4 of them. Replicas imported 8,800 blocks")
        assert told.endswith("17 blocks gave way in host memory before they were written.")
        assert await column(page, "nodes", 0) == ["node-b", "node-c", "node-d"]
        assert await column(page, "nodes", 1) == ["✓ heard", "✕ not heard: it says nothing: no route to host", "✓ heard"]
        assert await column(page, "nodes", 2) == ["NIXL", "TCP", "NIXL"]
        assert [cell.endswith("/s") for cell in await column(page, "nodes", 4)] == [True, False, True]
        assert await column(page, "nodes", -1) == ["changed 3", "changed 3, silent 128", "changed 3"]
        transfers = {cells[0]: cells[2] for cells in await rows(page, "transfers")}
        assert (transfers["node-b:replica-0"], transfers["replica-1"]) == ("network", "cuda ipc")


async def test_of_several_models_one_is_shown_and_another_can_be_chosen(tmp_path: Path) -> None:
    class Several(Fleet):
        def stats(self, model: str = "") -> KvStats:
            return super().stats().model_copy(update={"model": model or "one", "models": ["one", "two"]})

        def prefixes(self, limit: int, model: str = "") -> PrefixReport:
            return super().prefixes(12 if model == "two" else 1)

    async with page_over(tmp_path, Several(1)) as page:
        await page.wait_for_selector(SHOWN)
        assert await page.text_content("#model") == "one"
        assert len(await rows(page, "prefixes")) == 1
        await page.select_option("#models", "two")
        await says(page, "#model", "two")
        assert len(await rows(page, "prefixes")) == 12
        assert await page.get_by_label("Model").input_value() == "two"


async def test_a_gateway_that_comes_back_with_other_models_has_these_to_choose_from(tmp_path: Path) -> None:
    class Several(Fleet):
        models = ("one", "two")

        def stats(self, model: str = "") -> KvStats:
            if model and model not in self.models:
                raise UnknownModel(model, self.models)
            return super().stats().model_copy(update={"model": model or self.models[0], "models": list(self.models)})

    fleet = Several(1)
    async with page_over(tmp_path, fleet) as page:
        await page.wait_for_selector(SHOWN)
        await page.select_option("#models", "two")
        await says(page, "#model", "two")
        fleet.models = ("three", "two")
        await page.wait_for_selector("#models option[value=three]", state="attached")
        assert await page.get_by_label("Model").input_value() == "two"
        fleet.models = ("four", "five")
        await says(page, "#model", "four")
        assert await page.locator("#models option").all_text_contents() == ["four", "five"]


async def test_with_one_model_there_is_nothing_to_choose(tmp_path: Path) -> None:
    async with page_over(tmp_path, Fleet(1)) as page:
        await page.wait_for_selector(SHOWN)
        assert not await page.is_visible("#models")


async def test_shares_by_source_and_rates_come_with_time(tmp_path: Path) -> None:
    async with page_over(tmp_path, Fleet(2)) as page:
        await page.wait_for_selector("#sources-chart rect.peer")
        label = await page.get_attribute("#sources-chart svg", "aria-label")
        assert label == (
            "Prompt tokens since this page was opened: own cache 50 %, other replicas 20 %, tiers 10 %, computed 20 %"
        )
        assert all(now.endswith("/s") for now in await column(page, "transfers", 3))


async def test_tenants_are_shown_with_what_is_left_of_their_limits(tmp_path: Path) -> None:
    class Limited(Fleet):
        def stats(self, model: str = "") -> KvStats:
            keys = [KeyUse(key="batch", requests_in_flight=2, limits={"tokens_per_minute": LimitUse(limit=1000, used=250)})]
            use = TenantUse(tenant="team-a", requests=7, uncached_tokens=10, cached_tokens=90, keys=keys)
            use.refused["tokens_per_minute"] = 3
            return super().stats().model_copy(update={"limits": [use]})

    async with page_over(tmp_path, Limited(1)) as page:
        await page.wait_for_selector(SHOWN)
        (cells,) = await rows(page, "limits")
        assert cells[:4] == ["team-a", "7", "10", "90"]
        assert cells[-2:] == ["tokens per minute 3", "batch: 2 requests now, tokens per minute 250 of 1,000"]


async def test_an_empty_fleet_is_told_in_words(tmp_path: Path) -> None:
    async with page_over(tmp_path, Fleet(0)) as page:
        await page.wait_for_selector(SHOWN)
        tables = ("replicas", "transfers", "prefixes", "kept", "ledger")
        assert [(await rows(page, table))[0][0][:12] for table in tables] == [
            *("There are no", "No replica h", "No prefix ha", "None. POST /", "No request i"),
        ]
        for section in ("#tiers-section", "#below-section", "#nodes-section"):
            assert not await page.is_visible(section)


@pytest.mark.parametrize("dark", [False, True])
async def test_32_replicas_fit_and_the_busiest_transfers_are_shown(tmp_path: Path, dark: bool) -> None:
    async with page_over(tmp_path, Fleet(32), dark=dark) as page:
        await page.wait_for_selector(SHOWN)
        assert len(await rows(page, "replicas")) == 32
        assert len(await rows(page, "transfers")) == 24
        assert await page.text_content("#transfers-more") == "72 more pairs transferred less."
        assert (await rows(page, "prefixes"))[0][-1].endswith("replica-7 and 24 more")
        paper, ink = await page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
        assert (luminance(paper) < luminance(ink)) is dark
        assert contrast(paper, ink) > 7
        assert contrast(paper, await page.eval_on_selector(".hint", "e => getComputedStyle(e).color")) > 4.5
        assert contrast(paper, await page.eval_on_selector("td.bad", "e => getComputedStyle(e).color")) > 4.5
        assert contrast(paper, await page.eval_on_selector("td.good", "e => getComputedStyle(e).color")) > 4.5


def luminance(color: str) -> float:
    """Relative luminance of `rgb(…)`, by WCAG 2."""
    parts = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


async def test_in_a_narrow_window_tables_scroll_and_the_page_does_not(tmp_path: Path) -> None:
    async with page_over(tmp_path, Fleet(4, host_memory=True, below=True, nodes=2), width=320) as page:
        await page.wait_for_selector(SHOWN)
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert await page.eval_on_selector(
            "#replicas", "table => table.parentElement.scrollWidth > table.parentElement.clientWidth"
        )


async def test_the_admin_key_is_asked_for_kept_in_the_tab_and_forgotten(tmp_path: Path) -> None:
    async with page_over(tmp_path, Fleet(2), admin_key=KEY) as page:
        await page.wait_for_selector("#key-form:not([hidden])")
        assert not await page.is_visible("main")
        assert await page.evaluate("document.activeElement.id") == "key"
        await page.fill("#key", "another-key")
        await page.keyboard.press("Enter")
        await says(page, "#key-error", "That is not the admin key.")
        await page.fill("#key", KEY)
        await page.keyboard.press("Enter")
        await page.wait_for_selector(SHOWN)
        await page.reload()
        await page.wait_for_selector(SHOWN)
        assert KEY not in page.url
        assert await page.evaluate("[Object.values(sessionStorage), Object.values(localStorage)]") == [[KEY], []]
        await page.click("#forget")
        await page.wait_for_selector("#key-form:not([hidden])")
        assert await page.evaluate("sessionStorage.length") == 0
        assert not await page.is_visible("main")


async def test_what_the_gateway_says_is_never_markup(tmp_path: Path) -> None:
    class Hostile(Fleet):
        def stats(self, model: str = "") -> KvStats:
            stats = super().stats()
            stats.model = "<img src=x onerror=alert(1)>"
            stats.replicas[0].reason = "<b id=injected>bold</b>"
            return stats

    async with page_over(tmp_path, Hostile(1)) as page:
        await page.wait_for_selector(SHOWN)
        assert await page.text_content("#model") == "<img src=x onerror=alert(1)>"
        assert (await rows(page, "replicas"))[0][-1] == "<b id=injected>bold</b>"
        assert await page.query_selector("#injected, main img, header img") is None


async def test_a_request_is_explained(tmp_path: Path) -> None:
    class Knowing(Fleet):
        def explain(self, request_id: str) -> Explanation | None:
            attempt = begun(1, replica="replica-1", prompt_tokens=96)
            attempt.add(Delivery(tag=1, scheduled_ns=1, first_token_ns=2_000_001, prompt_tokens=96, computed_tokens=96))
            return explain(request_id, [attempt], {}) if request_id == "mine" else None

    async with page_over(tmp_path, Knowing(2)) as page:
        await page.wait_for_selector(SHOWN)
        await page.fill("#request-id", "unknown")
        await page.keyboard.press("Enter")
        await says(page, "#explanation", "does not know unknown")
        await page.fill("#request-id", "mine")
        await page.keyboard.press("Enter")
        await says(page, "#explanation", "Attempt 1: replica-1")
        told = await page.text_content("#explanation")
        assert "0 imported, 96 computed; first token in 2.0 ms" in told
        assert "nobody held any of it" in told


async def test_everything_is_reached_and_worked_by_the_keyboard(tmp_path: Path) -> None:
    async with page_over(tmp_path, Fleet(2)) as page:
        await page.wait_for_selector(SHOWN)
        reached = []
        for _ in range(12):
            await page.keyboard.press("Tab")
            reached.append(
                await page.evaluate("(e => e.id || e.getAttribute('aria-labelledby') || e.className)(document.activeElement)")
            )
            if reached[-1] == "pause":
                await page.keyboard.press("Space")
                assert await page.get_attribute("#pause", "aria-pressed") == "true"
        assert reached[:3] == ["skip", "pause", "sources-title"]
        assert {"replicas-title", "transfers-title", "prefixes-title", "kept-title", "ledger-title", "request-id"} <= set(
            reached
        )


async def test_every_region_table_and_field_has_a_name_that_is_read_out(tmp_path: Path) -> None:
    async with page_over(tmp_path, Fleet(4, host_memory=True, below=True, nodes=2)) as page:
        await page.wait_for_selector(SHOWN)
        unnamed = await page.evaluate(
            "[...document.querySelectorAll('[aria-labelledby]')].filter(e => !document.getElementById("
            "e.getAttribute('aria-labelledby'))?.textContent).length + [...document.querySelectorAll('input')].filter("
            "e => !e.labels.length).length + [...document.querySelectorAll('thead th')].filter(e => e.scope !== 'col').length"
        )
        assert unnamed == 0
        assert await page.evaluate("document.documentElement.lang") == "en"
        assert await page.get_attribute("#connection", "role") == "status"


async def test_a_gateway_that_fails_is_told_and_comes_back(tmp_path: Path) -> None:
    class Failing(Fleet):
        fails = False

        def stats(self, model: str = "") -> KvStats:
            if self.fails:
                raise RuntimeError("as the test wants it")
            return super().stats()

    fleet = Failing(2)
    async with page_over(tmp_path, fleet) as page:
        await page.wait_for_selector(SHOWN)
        fleet.fails = True
        await page.wait_for_selector("#connection.lost")
        assert len(await rows(page, "replicas")) == 2
        fleet.fails = False
        await page.wait_for_selector("#connection:not(.lost)")


async def test_a_page_that_is_paused_asks_nothing(tmp_path: Path) -> None:
    fleet = Fleet(2)
    async with page_over(tmp_path, fleet) as page:
        await page.wait_for_selector(SHOWN)
        await page.clock.install()
        await page.reload()
        await page.wait_for_selector(SHOWN)
        await page.click("#pause")
        looks = fleet.looks
        await page.clock.run_for(30_000)
        assert fleet.looks == looks
        await page.click("#pause")
        await until(lambda: fleet.looks > looks)
