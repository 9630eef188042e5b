"""What clients use: the official openai package and curl."""

import json
import subprocess

import httpx
import openai
import pytest

from tests.real.fleet import ANSWER_SECONDS_MAX

FRANCE = "The capital of France is"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather in a city.", "parameters": CITY}}


def complete(client, fleet, **more):
    fixed = {"model": fleet.model, "prompt": FRANCE, "max_tokens": 8, "temperature": 0}
    return client.completions.create(**fixed | more)


def chat(client, fleet, **more):
    fixed = {"model": fleet.model, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    return client.chat.completions.create(**fixed | more)


def curl(fleet, path: str, *arguments: str) -> tuple[int, str]:
    """HTTP status and body."""
    command = ["curl", "--silent", "--show-error", "--max-time", str(ANSWER_SECONDS_MAX), "--write-out", "\n%{http_code}"]
    command += ["-H", f"Authorization: Bearer {fleet.key}", "-H", "Content-Type: application/json", fleet.url + path]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=ANSWER_SECONDS_MAX + 5, check=True)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def test_the_openai_client_gets_a_completion(client, fleet):
    answer = complete(client, fleet)
    assert "Paris" in answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 8)
    assert answer.model == fleet.model


def test_a_streamed_completion_is_the_same_and_ends_with_its_usage(client, fleet):
    whole = complete(client, fleet)
    chunks = list(complete(client, fleet, stream=True, logprobs=1, stream_options={"include_usage": True}))
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(part.text for part in parts) == whole.choices[0].text
    assert sum(len(part.logprobs.tokens) for part in parts if part.logprobs) == 8
    assert len(parts) >= 2  # a busy server sends together what it has at a time, but not all of it
    assert chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_openai_client_gets_a_chat_answer(client, fleet):
    answer = chat(client, fleet)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"


def test_a_streamed_chat_answer_is_the_same(client, fleet):
    whole = chat(client, fleet).choices[0].message.content
    chunks = list(chat(client, fleet, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-1].usage.total_tokens > 0


def test_completions_have_logprobs(client, fleet):
    logprobs = complete(client, fleet, logprobs=3).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 8
    assert all(len(top) >= 3 and value <= 0 for top, value in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True))


def test_chat_answers_have_logprobs(client, fleet):
    found = chat(client, fleet, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(item.logprob <= 0 and len(item.top_logprobs) == 2 for item in found)


def test_echo_gives_the_prompt_back(client, fleet):
    plain = complete(client, fleet).choices[0].text
    echoed = complete(client, fleet, echo=True, logprobs=1).choices[0]
    assert echoed.text == FRANCE + plain
    assert echoed.logprobs.token_logprobs[0] is None
    assert len(echoed.logprobs.tokens) == 5 + 8


def test_n_gives_several_choices(client, fleet):
    answer = complete(client, fleet, n=2, temperature=1.0, seed=3, max_tokens=12)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text != answer.choices[1].text


def test_a_list_of_prompts_gets_an_answer_each(client, fleet):
    prompts = [FRANCE, "One, two, three, four,"]
    together = complete(client, fleet, prompt=prompts)
    alone = [complete(client, fleet, prompt=prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together.choices] == alone


def test_token_ids_are_the_same_prompt_as_their_text(client, fleet, words):
    ids = words.encode(FRANCE)
    assert complete(client, fleet, prompt=ids).choices[0].text == complete(client, fleet).choices[0].text
    both = complete(client, fleet, prompt=[ids, ids])
    assert {choice.text for choice in both.choices} == {complete(client, fleet).choices[0].text}


def test_stop_ends_an_answer_before_the_word(client, fleet):
    choice = complete(client, fleet, prompt="One, two, three, four,", max_tokens=20, stop=["seven"]).choices[0]
    assert choice.finish_reason == "stop"
    assert "six" in choice.text
    assert "seven" not in choice.text


def test_a_seed_makes_a_random_answer_repeatable(client, fleet):
    first, again, other = (
        complete(client, fleet, temperature=1.0, seed=seed, max_tokens=16).choices[0].text for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other


def test_a_json_schema_is_kept(client, fleet):
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    answer = chat(client, fleet, max_tokens=60, response_format=form)
    assert set(json.loads(answer.choices[0].message.content)) == {"city"}


def test_a_tool_that_must_be_called_is_called(client, fleet):
    choice = {"type": "function", "function": {"name": "weather"}}
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = chat(client, fleet, messages=messages, max_tokens=60, tools=[WEATHER], tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert "Paris" in json.dumps(json.loads(call.function.arguments))


def test_the_models_are_listed(client, fleet):
    assert [model.id for model in client.models.list()] == [fleet.model]
    assert client.models.retrieve(fleet.model).id == fleet.model
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("nobody/knows-it")


def test_an_unknown_model_is_not_found(client, fleet):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        complete(client, fleet, model="nobody/knows-it")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        chat(client, fleet, model="nobody/knows-it")


def test_too_long_a_prompt_is_refused_with_the_limit(client, fleet, words):
    long = words.text(8300)
    for refused in (
        lambda: complete(client, fleet, prompt=long),
        lambda: complete(client, fleet, prompt=words.encode(long)),
        lambda: chat(client, fleet, messages=[{"role": "user", "content": long}]),
    ):
        with pytest.raises(openai.BadRequestError, match="8192 tokens") as error:
            refused()
        assert error.value.code == "context_length_exceeded"


def test_more_answer_than_the_context_holds_is_refused(client, fleet):
    with pytest.raises(openai.BadRequestError, match="8192") as error:
        complete(client, fleet, max_tokens=9000)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "max_tokens")


def test_embeddings_of_a_model_that_has_none_are_a_clear_error(client, fleet):
    with pytest.raises(openai.APIStatusError) as error:
        client.embeddings.create(model=fleet.model, input="words")
    assert error.value.status_code in (400, 404)
    assert "embed" in error.value.message.lower()


def test_nobody_gets_in_without_a_key(fleet):
    body = {"model": fleet.model, "prompt": FRANCE}
    for headers in ({}, {"authorization": "Bearer wrong-key-of-nobody"}):
        answer = httpx.post(f"{fleet.url}/v1/completions", json=body, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("field", "value"),
    [("cache_salt", "another tenant's"), ("kv_transfer_params", {"peerkv": {"source": "replica-0"}}), ("priority", -1)],
)
@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_can_not_reach_the_cache_from_a_body(fleet, endpoint, field, value):
    body = {"model": fleet.model, "prompt": FRANCE, "messages": QUESTION, field: value}
    answer = fleet.client.post(endpoint, json=body, headers=fleet.headers())
    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("unsupported_parameter", field)


def test_curl_gets_a_completion(fleet):
    status, body = curl(fleet, "/v1/completions", "-d", json.dumps(fleet.body(FRANCE)))
    assert status == 200
    assert "Paris" in json.loads(body)["choices"][0]["text"]


def test_curl_gets_a_chat_answer(fleet):
    body = {"model": fleet.model, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    status, answer = curl(fleet, "/v1/chat/completions", "-d", json.dumps(body))
    assert status == 200
    assert "Paris" in json.loads(answer)["choices"][0]["message"]["content"]


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_curl_gets_a_stream_of_events(fleet, endpoint):
    prompt = {"messages": QUESTION} if "chat" in endpoint else {"prompt": FRANCE}
    body = {"model": fleet.model, "max_tokens": 8, "temperature": 0, "stream": True} | prompt
    status, answer = curl(fleet, endpoint, "--no-buffer", "-d", json.dumps(body))
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line]
    assert status == 200
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["choices"] for event in events[:-1])


def test_curl_sees_errors_as_json_with_their_status(fleet):
    for path, arguments, wanted in [
        ("/v1/completions", ("-d", "{"), 400),
        ("/v1/completions", ("-X", "GET"), 405),
        ("/v1/nothing", (), 404),
        ("/v1/completions", ("-d", json.dumps({"model": "nobody/knows-it", "prompt": "x"})), 404),
    ]:
        status, body = curl(fleet, path, *arguments)
        assert status == wanted
        assert json.loads(body)["error"]["message"]
