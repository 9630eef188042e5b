"""A system prompt is put into the caches of two replicas, and pinned there, before many ask with it at once.

python examples/pin_before_a_rush.py --url http://127.0.0.1:8000 --admin-key "$ADMIN_KEY" --key "$API_KEY" --tenant NAME
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

parser = argparse.ArgumentParser()
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--admin-key", default="", help="not needed on the gateway's machine if there is none")
parser.add_argument("--key", default="", help="a tenant's API key, where there are tenants")
parser.add_argument("--tenant", default="", help="the name of that key's tenant, where there are tenants: its cache is its own")
given = parser.parse_args()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def checked(answer: httpx.Response, key_flag: str) -> httpx.Response:
    """The answer, if it is a good one; else the program ends with the gateway's message and what to do."""
    if answer.is_success:
        return answer
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError):
        error = {"message": answer.text}
    advice = ""
    if answer.status_code in (401, 403):
        advice = f" Pass {key_flag}."
    elif error.get("param") == "tenant":
        advice = " Pass --tenant NAME, of the tenant that --key is of: `peerkv keys list --keys-file FILE` names them."
    sys.exit(f"the gateway answered {answer.status_code}: {error['message']}{advice}")


gateway = httpx.Client(base_url=given.url, timeout=300)
model = checked(gateway.get("/v1/models", headers=bearer(given.key)), "--key").json()["data"][0]["id"]
rules = " ".join(f"Rule {number}: name prices in euros, and be short." for number in range(40))
system = {"role": "system", "content": f"Shop {time.time_ns()}. {rules}"}

wanted = {"messages": [system], "replicas": 2, "pin": True, "ttl": 600} | ({"tenant": given.tenant} if given.tenant else {})
kept = checked(gateway.post("/kv/prefixes", json=wanted, headers=bearer(given.admin_key)), "--admin-key").json()
print(f"kept: {kept['whole_tokens']} tokens on {len(kept['places'])} replicas, as {kept['id']}")


def ask(number: int) -> dict[str, str]:
    messages = [system, {"role": "user", "content": f"What does bicycle {number} cost?"}]
    body = {"model": model, "messages": messages, "max_tokens": 4}
    answer = checked(gateway.post("/v1/chat/completions", json=body, headers=bearer(given.key)), "--key")
    return dict(pair.split("=") for pair in answer.headers["x-peerkv-cache"].split(", "))


try:
    with ThreadPoolExecutor(8) as rush:
        found = list(rush.map(ask, range(8)))
finally:
    gateway.delete(f"/kv/prefixes/{kept['id']}", headers=bearer(given.admin_key)).raise_for_status()
for number, cache in enumerate(found):
    print(f"request {number}: {cache['local']} tokens from the replica's own cache, {cache['computed']} computed")
if not all(int(cache["local"]) >= kept["whole_tokens"] for cache in found):
    sys.exit("some request did not find the kept prefix where it was served")
