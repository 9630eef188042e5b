"""What docs/api.md shows of an answer is what the default model really answers: counts, statuses, reasons to stop."""

import json
import shlex
from urllib.parse import urlsplit

import pytest

from tests.unit.packaging.test_api_examples import ANY, examples

GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens")


def asked(command: str) -> tuple[str, dict]:
    """The path and the body of an example's curl."""
    words = shlex.split(command.replace("\\\n", " "))
    path = urlsplit(next(word for word in words if word.startswith("$URL"))).path.removeprefix("$URL")
    return path, json.loads(words[words.index("-d") + 1]) if "-d" in words else {}


def differs(answer, shown, where: str = "") -> str:
    """Where an answer is not exactly what is shown of it, "" for nowhere; ANY is whatever it is."""
    if isinstance(shown, dict):
        return next((why for name in shown if (why := differs(answer.get(name), shown[name], f"{where}.{name}"))), "")
    if isinstance(shown, list):
        return differs(answer[0], shown[0], f"{where}[0]") if shown else ""
    return "" if shown in (answer, ANY) else f"{where} is {answer!r}"


@pytest.mark.parametrize("path", GENERATING)
def test_the_default_model_answers_as_shown(fleet, path):
    [(body, shown)] = [
        (body, shown)
        for command, shown in examples()
        for told, body in [asked(command)]
        if told == path and "error" not in shown and body.get("model")
    ]
    greedy = {} if path.endswith("count_tokens") else {"temperature": 0}
    answer = fleet.client.post(path, json={**body, **greedy, "model": fleet.model}, headers=fleet.headers())
    assert not differs(answer.raise_for_status().json(), shown)
