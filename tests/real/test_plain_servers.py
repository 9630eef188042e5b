"""vLLM servers with our connector and no gateway: they find each other's blocks by themselves."""

LENGTH = 400
WHOLE = (LENGTH - 1) // 32 * 32


def test_a_plain_server_imports_what_another_one_computed(fleet, words):
    prompt = words.text(LENGTH)
    cold = fleet.direct("replica-0", prompt)
    with fleet.counting("replica-1") as counted:
        imported = fleet.direct("replica-1", prompt)
    assert (counted.local, counted.peer) == (0, WHOLE)
    assert imported.close_to(cold)
    assert imported.same_as(fleet.direct("replica-1", prompt))


def test_a_plain_server_keeps_salts_apart(fleet, words):
    prompt = words.text(LENGTH)
    cold = fleet.direct("replica-0", prompt, cache_salt="a")
    with fleet.counting("replica-1") as counted:
        others = [fleet.direct("replica-1", prompt, cache_salt="b"), fleet.direct("replica-1", prompt)]
    assert (counted.local, counted.peer, counted.computed) == (0, 0, 2 * LENGTH)
    assert all(answer.close_to(cold) for answer in others)
    with fleet.counting("replica-1") as counted:
        assert fleet.direct("replica-1", prompt, cache_salt="a").close_to(cold)
    assert (counted.local, counted.peer) == (0, WHOLE)


def test_a_hint_to_import_nothing_is_obeyed(fleet, words):
    prompt = words.text(LENGTH)
    cold = fleet.direct("replica-0", prompt)
    with fleet.counting("replica-1") as counted:
        answer = fleet.direct("replica-1", prompt, kv_transfer_params={"peerkv": {"source": ""}})
    assert (counted.peer, counted.computed) == (0, LENGTH)
    assert answer.close_to(cold)
