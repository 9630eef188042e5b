"""Several gateways before the same replicas: nothing is shared but the tables, and that is enough to agree."""

import httpx

from tests.real.faults.gateways import Gateway, another_gateway
from tests.real.fleet import free_port

LENGTH = 400
WHOLE = (LENGTH - 1) // 32 * 32
ROUNDS = 4


def config_of(fleet) -> str:
    """The fleet's settings: the same tenants, so the same salts."""
    return (fleet.home / "peerkv.toml").read_text()


def ask(fleet, client: httpx.Client, prompt: str) -> tuple[str, int]:
    """The replica that answered, and how many tokens it had."""
    answer = client.post("/v1/completions", json=fleet.body(prompt, max_tokens=1), headers=fleet.headers())
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    return answer.headers["x-peerkv-replica"], (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0


def held_blocks(stats) -> dict[str, int]:
    return {replica["name"]: replica["cached_blocks"] for replica in stats["replicas"]}


def test_what_one_gateway_had_computed_is_not_computed_again_through_the_other(fleet, words, tmp_path):
    with another_gateway(fleet, tmp_path, config_of(fleet)) as other:
        doors = (fleet.client, other.client)
        prompts = [words.text(LENGTH) for _ in range(ROUNDS)]
        first = [ask(fleet, doors[turn % 2], prompt) for turn, prompt in enumerate(prompts)]
        second = [ask(fleet, doors[(turn + 1) % 2], f"{prompt} and more") for turn, prompt in enumerate(prompts)]
        assert held_blocks(other.stats()) == held_blocks(fleet.stats())
    assert [cached for _, cached in first] == [0] * ROUNDS
    assert [cached for _, cached in second] == [WHOLE] * ROUNDS


def test_of_two_gateways_on_one_port_each_serves_when_the_other_is_killed(fleet, words, tmp_path):
    shared, port = "reuse_port = true\n" + config_of(fleet), free_port()
    prompt = words.text(LENGTH)

    def all_served(gateway: Gateway) -> list[tuple[str, int]]:
        return [ask(fleet, gateway.client, prompt) for _ in range(ROUNDS)]

    with another_gateway(fleet, tmp_path / "second", shared, port) as second:
        with another_gateway(fleet, tmp_path / "first", shared, port) as first:
            computed, *hits = all_served(first)
            first.process.kill()
            first.process.wait()
            hits += all_served(second)
        with another_gateway(fleet, tmp_path / "third", shared, port) as third:
            second.process.kill()
            second.process.wait()
            hits += all_served(third)
    assert computed[1] == 0
    assert {cached for _, cached in hits} == {WHOLE}
