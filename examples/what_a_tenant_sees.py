"""Two tenants ask the same: each finds only what it computed itself, and neither can reach the other's cache.

python examples/what_a_tenant_sees.py --url http://127.0.0.1:8000 --keys "$KEY_OF_ONE" "$KEY_OF_ANOTHER"
"""

import argparse
import sys
import time

import httpx

parser = argparse.ArgumentParser()
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument("--keys", nargs=2, required=True, metavar="KEY", help="API keys of two tenants")
given = parser.parse_args()
one, other = (httpx.Client(base_url=given.url, timeout=300, headers={"authorization": f"Bearer {key}"}) for key in given.keys)
wrong = httpx.get(f"{given.url}/v1/models", headers={"authorization": "Bearer of-nobody"})
if wrong.status_code == 200:
    sys.exit(
        "this gateway asks nobody for a key, so it has no tenants to keep apart: make keys of two with "
        "`peerkv keys add NAME --keys-file FILE`, and start it with --keys-file FILE"
    )
for client, key in zip((one, other), given.keys, strict=True):
    if (known := client.get("/v1/models")).status_code != 200:
        sys.exit(f"the gateway answered {known.status_code} to the key that begins with {key[:4]}: {known.text}")
model = one.get("/v1/models").json()["data"][0]["id"]
secret = f"Run {time.time_ns()}. " + " ".join(f"Item {number} of the inventory is blue." for number in range(60))


def cached(tenant: httpx.Client) -> int:
    """How many tokens of the prompt came from a cache, by the answer's usage."""
    answer = tenant.post("/v1/completions", json={"model": model, "prompt": secret, "max_tokens": 1}).raise_for_status()
    print(f"  {answer.headers['x-peerkv-cache']}")
    return (answer.json()["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0


print("the first tenant, twice:")
first, again = cached(one), cached(one)
print("the other tenant, with the same prompt:")
foreign = cached(other)
refused = other.post("/v1/completions", json={"model": model, "prompt": secret, "cache_salt": "of the first one"})
print(f"a salt in the body: {refused.status_code} {refused.json()['error']['message']}")
print(f"a wrong key: {wrong.status_code} {wrong.json()['error']['message']}")
if foreign:
    print("the other key finds what the first one computed; that is right only if both are keys of one tenant")
if not (first == 0 < again and foreign == 0 and refused.status_code == 400 and wrong.status_code == 401):
    sys.exit("tenants are not kept apart")
