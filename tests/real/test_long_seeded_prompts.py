"""vLLM's engine on the CPU ended on a seeded request whose prompt takes more than one step (2,048 tokens)."""

LENGTH = 2_100


def test_a_long_prompt_with_a_seed_is_answered_and_by_the_seed_alone(fleet, words):
    ids = words.ids(LENGTH)
    pids = {replica: fleet.pid(replica) for replica in ("replica-0", "replica-1")}
    sampled = {"seed": 5, "temperature": 0.8, "max_tokens": 6}
    in_two_steps = fleet.answer(ids, replica="replica-0", **sampled)
    in_one_step = fleet.answer(ids, replica="replica-0", **sampled)
    assert in_two_steps.cached_tokens < LENGTH // 2 < in_one_step.cached_tokens
    assert in_one_step.tokens == in_two_steps.tokens
    assert {replica: fleet.pid(replica) for replica in pids} == pids
