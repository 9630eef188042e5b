"""The OpenAI client against the gateway: a chat, a stream, and where the prompt's tokens came from.

pip install openai
python examples/openai_client.py --url http://127.0.0.1:8000 --key "$API_KEY"
"""

import argparse

from openai import OpenAI

parser = argparse.ArgumentParser()
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--key", default="unused", help="any text where no keys are configured")
given = parser.parse_args()

client = OpenAI(base_url=f"{given.url}/v1", api_key=given.key)
model = client.models.list().data[0].id

question = [{"role": "user", "content": "What is the capital of France?"}]
answer = client.chat.completions.with_raw_response.create(model=model, messages=question, max_tokens=16, temperature=0)
print("answer:", answer.parse().choices[0].message.content)
print("cache: ", answer.headers.get("x-peerkv-cache"))  # local, peer, computed
print("id:    ", answer.headers["x-request-id"])  # for `peerkv kv explain ID`

print("stream: ", end="")
for chunk in client.chat.completions.create(model=model, messages=question, max_tokens=16, temperature=0, stream=True):
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
