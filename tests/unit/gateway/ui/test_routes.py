"""The page's files: who gets them, with which rules for the browser, and that an installed wheel has them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from gateway.ui.routes import page_files
from tests.unit.gateway.running_door import running_door
from tests.unit.packaging.files import REPOSITORY

FILES = page_files()
SCRIPTS = [name for name in FILES if name.endswith(".js")]


@pytest.mark.parametrize("path", ["/ui", "/ui/", *(f"/ui/{name}" for name in FILES)])
async def test_the_page_is_served_under_rules_that_let_nothing_foreign_in(tmp_path: Path, path: str) -> None:
    async with running_door(tmp_path) as door, door.session.get(door.url + path) as answer:
        assert answer.status == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        kind = answer.headers["content-type"]
    types = {".css": "text/css", ".js": "text/javascript"}
    assert kind == types.get(Path(path).suffix, "text/html") + "; charset=utf-8"


async def test_there_are_no_other_files(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        for name in ("no-such.js", "..%2froutes.py", "%2e%2e/settings.py"):
            async with door.session.get(f"{door.url}/ui/{name}") as answer:
                assert answer.status == 404


async def test_with_an_admin_key_the_page_is_there_without_it_and_the_figures_are_not(tmp_path: Path) -> None:
    async with running_door(tmp_path, admin_key="the-admin-key") as door:
        statuses = []
        for path in ("/ui", "/kv/stats"):
            async with door.session.get(door.url + path) as answer:
                statuses.append(answer.status)
        assert statuses == [200, 401]


async def test_without_an_admin_key_a_page_of_others_cannot_load_it(tmp_path: Path) -> None:
    foreign = {"sec-fetch-site": "cross-site"}
    async with running_door(tmp_path) as door, door.session.get(door.url + "/ui", headers=foreign) as answer:
        assert answer.status == 403


def test_nothing_is_fetched_from_elsewhere_and_nothing_is_put_in_as_markup() -> None:
    for name, (content, _) in FILES.items():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|style=|\son\w+=", text), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_module_that_is_imported_is_there(name: str) -> None:
    imported = re.findall(rb'from "\./([\w.]+)"', FILES[name][0])
    assert {each.decode() for each in imported} <= FILES.keys()


def test_the_scripts_know_every_reason_of_the_ledger() -> None:
    from gateway.ledger.misses import MissReason

    text = FILES["ledger.js"][0].decode()
    known = set(re.findall(r"^  (\w+): \"", text, re.MULTILINE))
    assert known == {reason.value for reason in MissReason}


def test_an_installed_wheel_has_the_page() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["gateway"]
    packaged = {path.name for pattern in patterns for path in (REPOSITORY / "gateway").glob(pattern)}
    assert packaged >= FILES.keys()
