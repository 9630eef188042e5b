"""Turn two on the other replica: what the first one computed while it answered is imported too."""

BLOCK = 32


def shared_tokens(first: list[int], second: list[int]) -> int:
    """How many leading tokens two sequences share."""
    return next((place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), len(first))


def test_turn_two_of_a_completion_imports_prompt_and_answer(fleet, words):
    prompt = words.ids(1200)  # long enough that an import is sooner than computing on any machine, however busy
    body = fleet.body(prompt, max_tokens=100, return_token_ids=True)
    pinned = fleet.headers() | {"x-peerkv-replica": "replica-0"}
    answer = (
        fleet.client.post("/v1/completions", json=body, headers=pinned).raise_for_status().json()["choices"][0]["token_ids"]
    )
    assert len(answer) == 100
    turn = prompt + answer + words.ids(40)
    with fleet.counting("replica-1") as counted:
        imported = fleet.answer(turn, replica="replica-1")
    # the newest token's KV is never computed, so the last full block of 1,299 tokens is the last that can come
    assert counted.peer == 1299 // BLOCK * BLOCK > 1200
    fleet.flush()
    assert imported.close_to(fleet.answer(turn, replica="replica-1"))


def test_turn_two_of_a_chat_imports_prompt_and_answer(fleet, client, words):
    def turn(messages, replica, tokens):
        body = {"model": fleet.model, "messages": messages, "temperature": 0, "max_tokens": tokens, "logprobs": True}
        return client.chat.completions.create(
            **body, extra_headers={"x-peerkv-replica": replica}, extra_body={"return_token_ids": True}
        )

    messages = [
        {"role": "system", "content": f"You are a helpful assistant. Words of the day: {words.text(900)}."},
        {"role": "user", "content": "Why is the sky blue? Explain at length."},
    ]
    first = turn(messages, "replica-0", 120)
    answered = first.choices[0].message.content
    messages += [{"role": "assistant", "content": answered}, {"role": "user", "content": "Say it in one sentence."}]
    with fleet.counting("replica-1") as counted:
        second = turn(messages, "replica-1", 20)

    prompt = first.model_extra["prompt_token_ids"]
    computed = (prompt + first.choices[0].model_extra["token_ids"])[:-1]
    shared = shared_tokens(computed, second.model_extra["prompt_token_ids"])
    assert counted.peer == shared // BLOCK * BLOCK
    assert counted.peer >= len(prompt) // BLOCK * BLOCK + 2 * BLOCK  # blocks of the answer are among them
    assert second.usage.prompt_tokens_details.cached_tokens == counted.peer
    fleet.flush()
    cold = turn(messages, "replica-1", 20)
    assert second.choices[0].message.content == cold.choices[0].message.content


def test_a_chats_token_ids_stand_for_its_messages_in_the_engine(fleet, words):
    asked, other = ({"role": "user", "content": words.text(200)} for _ in range(2))
    body = {"model": fleet.model, "temperature": 0, "max_tokens": 12}

    def told(client, message, headers=None, **more) -> tuple[str, int]:
        answer = client.post("/v1/chat/completions", json=body | {"messages": [message]} | more, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"], answer.json()["usage"]["prompt_tokens"]

    with fleet.socket_client("replica-0") as engine:
        ids = engine.post("/tokenize", json={"model": fleet.model, "messages": [asked]}).json()["tokens"]
        plain = told(engine, asked)
        by_ids = told(engine, other, kv_transfer_params={"prompt_token_ids": ids})
    through = told(fleet.client, asked, fleet.headers() | {"x-peerkv-replica": "replica-0"})
    assert plain[1] == len(ids)
    assert by_ids == plain
    assert through == plain
