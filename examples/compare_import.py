"""An imported prompt gives the tokens and log-probabilities of a hit in the replica's own cache, and of a cold run.

In bf16, the default, any prefix cache, imported or not, rounds otherwise than a cold run; in float32 all three are the same:

    make serve ARGS='-- --dtype float32'
    python examples/compare_import.py --url http://127.0.0.1:8000
"""

import argparse
import sys
import time

import httpx

TOLERANCE = 1e-3
parser = argparse.ArgumentParser()
parser.add_argument("--url", default="http://127.0.0.1:8000")
parser.add_argument(
    "--admin-key", default="", help="needed to choose the replica, unless there is none and this is its machine"
)
parser.add_argument("--key", default="", help="an API key, where no admin key is set and there are tenants")
given = parser.parse_args()
key = given.admin_key or given.key
gateway = httpx.Client(base_url=given.url, timeout=300, headers={"authorization": f"Bearer {key}"} if key else {})
model = gateway.get("/v1/models").raise_for_status().json()["data"][0]["id"]
replicas = [replica["name"] for replica in gateway.get("/ready").json()["replicas"] if replica["ready"]]
if len(replicas) < 2:
    sys.exit("two replicas are needed")


def ask(replica: str, prompt: str) -> tuple[list[str], list[float], str]:
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0, "logprobs": 1}
    answer = gateway.post("/v1/completions", json=body, headers={"x-peerkv-replica": replica})
    if not answer.is_success:
        sys.exit(f"the gateway answered {answer.status_code}: {answer.text}")
    logprobs = answer.json()["choices"][0]["logprobs"]
    return logprobs["tokens"], logprobs["token_logprobs"], answer.headers["x-peerkv-cache"]


prompt = f"Run {time.time_ns()}. " + " ".join(f"Item {number} of the inventory is blue." for number in range(60))
cold = ask(replicas[0], prompt)
imported = ask(replicas[1], prompt)
local = ask(replicas[0], prompt)
print(f"cold:     {replicas[0]}: {cold[2]}\nimported: {replicas[1]}: {imported[2]}\nlocal:    {replicas[0]}: {local[2]}")


def compare(name: str, other: tuple[list[str], list[float], str]) -> bool:
    """Print how the import differs from another answer; whether they are the same."""
    worst = max(abs(one - another) for one, another in zip(imported[1], other[1], strict=True))
    same = imported[0] == other[0]
    print(f"import and {name}: tokens: {'the same' if same else 'other ones'} | largest difference of a logprob: {worst:.1e}")
    return same and worst <= TOLERANCE


as_cold, as_local = compare("cold run", cold), compare("local hit", local)
if "peer=0" in imported[2]:
    sys.exit("nothing was imported: `peerkv doctor` says why")
if "local=0" in local[2]:
    sys.exit("the replica's own cache had lost the prompt already: run this again when fewer others send")
if not as_cold:
    print("In bf16 a cached prefix rounds otherwise than a cold run. For equal answers: make serve ARGS='-- --dtype float32'")
if not as_cold and not as_local:
    sys.exit("the import differs from the cold run and from a hit in the replica's own cache")
