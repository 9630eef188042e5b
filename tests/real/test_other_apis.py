"""Responses, Messages and what else vLLM serves: the same caches, kept apart by tenant, and errors in each API's form."""

import openai
import pytest

from tests.real.conftest import TWO
from tests.real.fleet import REPLICAS

OTHER = {"authorization": f"Bearer {TWO.api_key.get_secret_value()}"}
TOOL = {"name": "weather", "description": "The weather in a city."}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def asked(fleet, api: str, text: str) -> tuple[str, dict]:
    if api == "responses":
        tools = [{"type": "function", "parameters": SCHEMA, **TOOL}]
        items = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "I see."},
            {"role": "user", "content": "So?"},
        ]
        body = {"model": fleet.model, "instructions": "Be short.", "input": items, "max_output_tokens": 4, "tools": tools}
        return "/v1/responses", body | {"tool_choice": "none", "temperature": 0}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": "Do you see?"}]},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": "So?"},
    ]
    body = {"model": fleet.model, "system": "Be short.", "messages": messages, "max_tokens": 4, "temperature": 0}
    return "/v1/messages", body | {"tools": [{"input_schema": SCHEMA, **TOOL}], "tool_choice": {"type": "none"}}


def sources(answer) -> dict[str, int]:
    pairs = (pair.split("=") for pair in answer.raise_for_status().headers["x-peerkv-cache"].split(", "))
    return {name: int(value) for name, value in pairs if value.isdigit()}


@pytest.mark.parametrize("api", ["responses", "messages"])
def test_a_prompt_of_another_api_is_imported_and_by_its_tenant_alone(fleet, words, api):
    path, body = asked(fleet, api, words.text(600))

    def ask(replica: str, **headers: str):
        return fleet.client.post(path, json=body, headers=fleet.headers() | {"x-peerkv-replica": replica} | headers)

    first = sources(ask(REPLICAS[0]))
    assert first["computed"] > 500
    again = sources(ask(REPLICAS[1]))
    assert again["peer"] > 0.9 * first["computed"], again
    for replica in REPLICAS:
        foreign = sources(ask(replica, **OTHER))
        assert foreign["computed"] == first["computed"], "another tenant's request found something in a cache"
        if replica == REPLICAS[0]:
            fleet.client.post("/kv/flush").raise_for_status()
            ask(REPLICAS[0])


def test_a_request_of_another_api_goes_where_its_prompt_is(fleet, words):
    for api in ("responses", "messages"):
        path, body = asked(fleet, api, words.text(700))
        fleet.client.post(path, json=body, headers=fleet.headers() | {"x-peerkv-replica": REPLICAS[1]}).raise_for_status()
        answer = fleet.client.post(path, json=body, headers=fleet.headers())
        assert answer.headers["x-peerkv-replica"] == REPLICAS[1]
        assert sources(answer)["local"] > 500


def test_the_openai_client_streams_a_response(client, fleet):
    whole = client.responses.create(
        model=fleet.model, input="What is the capital of France?", max_output_tokens=8, temperature=0
    )
    assert "Paris" in whole.output_text
    with client.responses.stream(
        model=fleet.model, input="What is the capital of France?", max_output_tokens=8, temperature=0
    ) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == whole.output_text
    assert kinds[-1] in ("response.completed", "response.incomplete")


def test_a_response_that_no_replica_keeps_is_refused_with_what_to_do(client, fleet):
    first = client.responses.create(model=fleet.model, input="Hello.", max_output_tokens=2)
    for former in (first.id, "resp_of_somebody"):
        with pytest.raises(openai.NotFoundError, match="as 'input'") as error:
            client.responses.create(model=fleet.model, input="And?", previous_response_id=former)
        assert (error.value.code, error.value.param) == ("previous_response_not_found", "previous_response_id")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.create(model=fleet.model, input="Hello.", background=True)


def test_tokens_are_counted_and_turned_into_text_again(fleet, words):
    text = words.text(50)
    found = fleet.client.post("/tokenize", json={"prompt": text}, headers=fleet.headers()).raise_for_status().json()
    assert found["tokens"] == words.encode(text)
    back = fleet.client.post("/detokenize", json={"tokens": found["tokens"]}, headers=fleet.headers()).raise_for_status()
    assert back.json()["prompt"] == text
    _, body = asked(fleet, "messages", text)
    counted = {name: body[name] for name in ("model", "messages", "system", "tools", "tool_choice")}
    told = fleet.client.post("/v1/messages/count_tokens", json=counted, headers=fleet.headers()).raise_for_status().json()
    answer = fleet.client.post("/v1/messages", json=body, headers=fleet.headers()).raise_for_status().json()
    used = answer["usage"]
    cached = sum(used.get(f"cache_{what}_input_tokens") or 0 for what in ("read", "creation"))
    assert told["input_tokens"] == used["input_tokens"] + cached


def test_what_the_model_cannot_do_is_a_clear_error(fleet):
    asks: list[tuple[str, dict]] = [
        ("/rerank", {"query": "a", "documents": ["b"]}),
        ("/v1/score", {"text_1": "a", "text_2": "b"}),
        ("/pooling", {"input": "a"}),
    ]
    for path, body in asks:
        answer = fleet.client.post(path, json={"model": fleet.model, **body}, headers=fleet.headers())
        assert answer.status_code == 404, answer.text
        assert answer.json()["error"]["code"] in ("unsupported_endpoint", "not_found")


def test_errors_of_messages_have_anthropics_form(fleet):
    _, body = asked(fleet, "messages", "x")
    for change, status in [({"max_tokens": 0}, 400), ({"model": "nobody/knows-it"}, 404), ({"messages": 7}, 400)]:
        answer = fleet.client.post("/v1/messages", json=body | change, headers={"x-api-key": fleet.key})
        assert answer.status_code == status, answer.text
        found = answer.json()
        assert found["type"] == "error"
        assert found["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
        assert found["error"]["message"]
