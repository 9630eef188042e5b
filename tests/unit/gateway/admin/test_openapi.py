"""The OpenAPI document: the file, what is served, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.admin import openapi
from gateway.admin.offline_document import document
from gateway.api.endpoints import PATHS
from gateway.cli.main import main
from tests.unit.gateway.running_door import running_door

KEPT = Path(__file__).parents[4] / "openapi" / "openapi.json"


async def test_the_kept_document_is_what_the_gateway_serves(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        status, served, _ = await door.get("/openapi.json")
    assert status == 200
    assert served == json.loads(KEPT.read_text("utf-8"))


def test_the_kept_document_is_up_to_date_to_the_letter() -> None:
    openapi.check(document(), KEPT)


def test_every_endpoint_is_described() -> None:
    described = {(method, path) for path, operations in document()["paths"].items() for method in operations}
    assert described == {
        *(("post", path) for path in PATHS),
        ("get", "/v1/models"),
        ("get", "/v1/models/{model}"),
        ("get", "/health"),
        ("get", "/ready"),
        ("get", "/metrics"),
        ("get", "/kv/stats"),
        ("get", "/kv/explain/{request_id}"),
        ("get", "/kv/prefixes"),
        ("post", "/kv/prefixes"),
        ("delete", "/kv/prefixes/{prefix_id}"),
        ("post", "/kv/flush"),
        ("get", "/replicas"),
        ("post", "/replicas/{name}/drain"),
        ("post", "/replicas/{name}/resume"),
        ("post", "/replicas/{name}/restart"),
    }


def test_requests_may_have_further_fields() -> None:
    schemas = document()["components"]["schemas"]
    for name in ("CompletionRequest", "ChatCompletionRequest", "EmbeddingRequest"):
        assert schemas[name]["additionalProperties"] is True


def test_every_v1_answer_names_its_request_and_the_errors_are_complete() -> None:
    paths = document()["paths"]
    everywhere = {"200", "401", "429", "431", "500", "503"}
    relayed = everywhere | {"400", "403", "404", "408", "413", "415", "502", "504"}
    wanted = {"/v1/models": everywhere, "/v1/models/{model}": everywhere | {"404"}}
    for path in [path for path in paths if path in PATHS or path.startswith("/v1/")]:
        (operation,) = paths[path].values()
        answers = operation["responses"]
        assert set(answers) == wanted.get(path, relayed), path
        for status in set(answers) - {"431"}:
            assert "x-request-id" in answers[status]["headers"]
            assert ("x-peerkv-replica" in answers[status]["headers"]) is (path not in wanted)


def test_every_reference_leads_somewhere() -> None:
    whole = document()
    references = set(json.dumps(whole).split('"#/components/schemas/')[1:])
    names = {reference.split('"')[0] for reference in references}
    assert names <= whole["components"]["schemas"].keys()
    assert "HTTPValidationError" not in whole["components"]["schemas"]


def test_the_command_writes_and_then_finds_it_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "openapi.json"
    assert main(["openapi", "--check", "--output", str(path)]) == 1
    assert "write it with" in capsys.readouterr().err
    assert main(["openapi", "--output", str(path)]) == 0
    assert main(["openapi", "--check", "--output", str(path)]) == 0
    path.write_text(path.read_text() + " ")
    assert main(["openapi", "--check", "--output", str(path)]) == 1
    assert "update it with" in capsys.readouterr().err


def test_without_a_file_it_is_the_checkouts_and_elsewhere_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["openapi"]) == 1
    assert "there is no openapi/ here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "openapi").mkdir()
    assert main(["openapi"]) == 0
    assert main(["openapi", "--check"]) == 0
    assert capsys.readouterr().out.startswith("wrote openapi/openapi.json")
    openapi.check(document(), tmp_path / "openapi" / "openapi.json")


@pytest.mark.parametrize("strangers", ['{"info": {"title": "their API"}}', "[]", "openapi: 3", "\xff"])
def test_the_document_of_a_stranger_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, strangers: str
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "openapi" / "openapi.json"
    kept.parent.mkdir()
    kept.write_text(strangers, "latin-1")
    assert main(["openapi"]) == 1
    assert "openapi/openapi.json is not peerkv's: it is left as it is" in capsys.readouterr().err
    assert kept.read_text("latin-1") == strangers
    kept.write_text('{"info": {"title": "peerkv", "version": "0"}}')
    assert main(["openapi"]) == 0
    openapi.check(document(), kept)


@pytest.mark.parametrize(("output", "why"), [("{dir}", "Is a directory"), ("/dev/full", "No space left on device")])
def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, why: str
) -> None:
    path = output.format(dir=tmp_path)
    assert main(["openapi", "--output", path]) == 1
    assert capsys.readouterr().err == f"peerkv: error: cannot write {path}: {why}\n"


def test_one_peerkvs_document_is_not_written_into_the_checkout_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("openapi", "gateway"):
        (tmp_path / name).mkdir()
    (tmp_path / "gateway" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["openapi"]) == 1
    assert "here is another: set PYTHONPATH=." in capsys.readouterr().err
    assert list((tmp_path / "openapi").iterdir()) == []
    assert openapi.kept_in(tmp_path, tmp_path / "gateway" / "__init__.py") == tmp_path / "openapi" / "openapi.json"
