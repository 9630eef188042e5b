"""What stock clients do with a gateway: each function uses one of them as its own documentation does, and returns what it got.

Run by `python -m tests.clients` in an environment that has the clients; nothing of peerkv is imported here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

QUESTION = "What is the capital of France?"
BEGUN = "The capital of France is"
CHAT: list[Any] = [{"role": "user", "content": QUESTION}]


def openai_package(url: str, key: str, model: str) -> dict[str, Any]:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
    chat = client.chat.completions.create(model=model, messages=CHAT, max_tokens=4)
    with client.chat.completions.create(model=model, messages=CHAT, max_tokens=4, stream=True) as stream:
        streamed = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    response = client.responses.create(model=model, input=QUESTION, max_output_tokens=4)
    with client.responses.stream(model=model, input=QUESTION, max_output_tokens=4) as events:
        kinds = [event.type for event in events]
    try:
        client.chat.completions.create(model="nobody/knows-it", messages=CHAT)
        refused = ""
    except openai.NotFoundError as error:
        refused = str(error.code)
    return {
        "chat": chat.choices[0].message.content,
        "streamed": "".join(streamed),
        "completion": client.completions.create(model=model, prompt=BEGUN, max_tokens=4, temperature=0).choices[0].text,
        "response": response.output_text,
        "response streamed": kinds[-1],
        "models": [each.id for each in client.models.list()],
        "refused": refused,
    }


def anthropic_package(url: str, key: str, model: str) -> dict[str, Any]:
    import anthropic

    client = anthropic.Anthropic(base_url=url, api_key=key)
    message = client.messages.create(model=model, max_tokens=4, messages=CHAT, system="Be short.")
    with client.messages.stream(model=model, max_tokens=4, messages=CHAT) as stream:
        streamed = "".join(stream.text_stream)
    try:
        client.messages.create(model="nobody/knows-it", max_tokens=4, messages=CHAT)
        refused = ""
    except anthropic.NotFoundError as error:
        refused = str(error.body["error"]["type"])  # type: ignore[index,call-overload]
    return {
        "message": message.content[0].text,  # type: ignore[union-attr]
        "streamed": streamed,
        "counted": client.messages.count_tokens(model=model, messages=CHAT).input_tokens,
        "refused": refused,
    }


def litellm(url: str, key: str, model: str) -> dict[str, Any]:
    import litellm

    told: dict[str, Any] = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": key, "max_tokens": 4}
    chat = litellm.completion(messages=CHAT, **told)
    streamed = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(messages=CHAT, stream=True, **told)]
    return {"chat": chat.choices[0].message.content, "streamed": "".join(streamed)}


def langchain(url: str, key: str, model: str) -> dict[str, Any]:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{url}/v1", api_key=key, model=model, max_tokens=4)  # type: ignore[call-arg,arg-type]
    return {"chat": chat.invoke(QUESTION).content, "streamed": "".join(str(part.content) for part in chat.stream(QUESTION))}


def langchain_anthropic(url: str, key: str, model: str) -> dict[str, Any]:
    from langchain_anthropic import ChatAnthropic

    chat = ChatAnthropic(base_url=url, api_key=key, model=model, max_tokens=4)  # type: ignore[call-arg,arg-type]
    return {"chat": chat.invoke(QUESTION).text}


def llama_index(url: str, key: str, model: str) -> dict[str, Any]:
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(model=model, api_base=f"{url}/v1", api_key=key, max_tokens=4, is_chat_model=True)
    return {
        "completed": str(llm.complete(QUESTION)),
        "streamed": str([part.delta for part in llm.stream_complete(QUESTION)][-1]),
    }


PROGRAMS: dict[str, Callable[[str, str, str], dict[str, Any]]] = {
    "openai": openai_package,
    "anthropic": anthropic_package,
    "litellm": litellm,
    "langchain": langchain,
    "langchain-anthropic": langchain_anthropic,
    "llama-index": llama_index,
}


if __name__ == "__main__":
    name, url, key, model = sys.argv[1:]
    print(json.dumps(PROGRAMS[name](url, key, model)))
