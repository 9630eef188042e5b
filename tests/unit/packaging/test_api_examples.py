"""Every example of docs/api.md is run, and its answer has what is shown; links and other claims of the documents hold."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.unit.gateway.running_door import running_door

ROOT = Path(__file__).parents[3]
DOCS = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
KEY, ADMIN_KEY = "key-of-an-example", "admin-key-of-an-example"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
ANY = "…"


def examples() -> list[tuple[str, Any]]:
    """Each command with what is shown of its answer."""
    blocks = BLOCK.findall((ROOT / "docs" / "api.md").read_text("utf-8"))[1:]  # the first one sets the variables
    assert [kind for kind, _ in blocks] == ["sh", "json"] * (len(blocks) // 2)
    return [(command, json.loads(shown)) for (_, command), (_, shown) in zip(blocks[::2], blocks[1::2], strict=True)]


def lacks(answer: Any, shown: Any, where: str = "") -> str:
    """What the answer has not that is shown, "" for nothing: numbers are examples, texts are meant unless they are ANY."""
    if isinstance(shown, dict):
        if not isinstance(answer, dict):
            return f"{where} is no object"
        return next((why for name in shown if (why := lacks(answer.get(name), shown[name], f"{where}.{name}"))), "")
    if isinstance(shown, list):
        if not isinstance(answer, list) or len(answer) < min(1, len(shown)):
            return f"{where} is no list of as much"
        return lacks(answer[0], shown[0], f"{where}[0]") if shown else ""
    if type(answer) is not type(shown) and {type(answer), type(shown)} != {int, float}:
        return f"{where} is {answer!r}"
    return f"{where} is {answer!r}" if isinstance(shown, str | bool) and shown not in (ANY, answer) else ""


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_every_example_is_answered_as_shown(tmp_path: Path) -> None:
    tenants = [{"name": "acme", "api_key": KEY}]
    async with running_door(tmp_path, tenants=tenants, admin_key=ADMIN_KEY) as door:
        await door.add_engine("replica-0", "--served-model-name", "SmolLM2-135M-Instruct")
        variables = {**os.environ, "URL": door.url, "KEY": KEY, "ADMIN_KEY": ADMIN_KEY}
        found = examples()
        assert len(found) > 10
        for command, shown in found:
            process = await asyncio.create_subprocess_shell(
                command, env=variables, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            answer, complaint = await process.communicate()
            assert process.returncode == 0, complaint
            assert not lacks(json.loads(answer), shown), (command, answer)


def test_what_is_not_as_shown_is_noticed() -> None:
    assert lacks({"a": [{"b": "x"}]}, {"a": [{"b": "y"}]}) == ".a[0].b is 'x'"
    assert lacks({}, {"a": 1})
    assert not lacks({"a": 2.5, "b": "x", "c": True}, {"a": 1, "b": ANY})


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


SOURCES = [path for package in ("gateway", "engine", "transport") for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", [*DOCS, *(ROOT / "examples").glob("*.py")], ids=lambda path: path.name)
def test_nobody_is_told_to_install_peerkv_from_an_index(path: Path) -> None:
    text = path.read_text("utf-8")
    assert not re.search(r"pip install '?peerkv", text)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert set(re.findall(r"pip install -e '\.\[(\w+)\]'", text)) <= extras.keys()


def test_no_message_tells_it_either() -> None:
    assert len(SOURCES) > 100
    assert [path for path in SOURCES if re.search(r"pip install '?peerkv|peerkv\[", path.read_text("utf-8"))] == []


def test_the_architecture_fits_two_pages() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text("utf-8")) <= 12_000


def test_every_measurement_says_how_where_and_when_it_was_made() -> None:
    text = (ROOT / "BENCHMARKS.md").read_text("utf-8")
    titles = set(re.findall(r"^## (.+)$", text, re.MULTILINE)) - {"What a user gains", "Method"}
    method = text.split("\n## Method\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in method.splitlines() if line.startswith("| ")][1:]
    assert titles <= {row[0] for row in rows}
    assert all(len(row) == 4 and re.search(r"20\d\d-\d\d-\d\d", row[3]) for row in rows)


def test_known_gaps_of_containers_are_told_wherever_their_commands_are() -> None:
    for path in (ROOT / "README.md", ROOT / "docs" / "operating.md", ROOT / "ARCHITECTURE.md"):
        text = " ".join(path.read_text("utf-8").split())
        assert all(words in text for words in ("podman-compose", "Docker and its Compose")), path.name
