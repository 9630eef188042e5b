"""Replicas' metrics put together: valid for Prometheus whatever a replica says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Summary, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from gateway.stats.exposition import labelled_families, merged

GAUGE = "# HELP vllm:running Requests that run.\n# TYPE vllm:running gauge\n"


def together(*texts: str) -> str:
    return merged(labelled_families(text.encode(), f"replica-{place}") for place, text in enumerate(texts)).decode()


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def every_kind() -> str:
    """What prometheus_client prints of each kind of metric, with labels that need escapes, and without any."""
    registry = CollectorRegistry()
    odd = 'a "b" \\ {c},replica="d"\ne'
    counter = Counter("vllm:tokens", 'Says "so" \\ and\nso.', ("model_name",), registry=registry)
    counter.labels(odd).inc(3)
    Gauge("vllm:load", "Load.", registry=registry).set(float("nan"))
    Gauge("vllm:limit", "", registry=registry).set(float("-inf"))
    Histogram("vllm:seconds", "Seconds.", ("model_name",), registry=registry).labels("m").observe(1e-7)
    Summary("vllm:bytes", "Bytes.", registry=registry).observe(5)
    Info("vllm:config", "Config.", registry=registry).info({"a": "b"})
    return generate_latest(registry).decode()


def test_each_family_has_one_head_and_the_samples_of_all() -> None:
    text = together(GAUGE + 'vllm:running{engine="0"} 1.0\n', GAUGE + "vllm:running 2.0\n")
    assert text == GAUGE + 'vllm:running{replica="replica-0",engine="0"} 1.0\nvllm:running{replica="replica-1"} 2.0\n'


def test_every_kind_of_metric_keeps_its_samples_and_gets_one_label() -> None:
    text = every_kind()
    given, found = samples(text), samples(together(text))
    expected = {(name, labels | {("replica", "replica-0")}): value for (name, labels), value in given.items()}
    assert found.keys() == expected.keys()
    assert {key: str(value) for key, value in found.items()} == {key: str(value) for key, value in expected.items()}


def test_a_label_of_that_name_is_renamed_as_prometheus_does() -> None:
    text = together(GAUGE + 'vllm:running{replica="x",a="y"} 1\nvllm:running{a="y",replica="z"} 2\n')
    labels = [dict(key[1]) for key in samples(text)]
    assert labels == [
        {"replica": "replica-0", "exported_replica": "x", "a": "y"},
        {"replica": "replica-0", "exported_replica": "z", "a": "y"},
    ]


def test_braces_in_a_labels_value_are_not_taken_for_labels() -> None:
    lines = 'vllm:running 1\nvllm:running{a="{}"} 2\n'
    assert [dict(key[1]).get("a") for key in samples(together(GAUGE + lines))] == [None, "{}"]


@pytest.mark.parametrize(
    "bad",
    [
        "vllm:running{engine=0} 1\n",
        "vllm:running many\n",
        'vllm:running{a="b\n',
        "vllm:other 1\n",
        "vllm:running 1 2 3\n",
        "<html>\n",
        "vllm:running 1.0",
    ],
)
def test_a_family_that_is_not_valid_is_left_out_and_the_others_stay(bad: str) -> None:
    good = GAUGE.replace("running", "waiting") + "vllm:waiting 3\n"
    assert samples(together(good + GAUGE + bad)) == {("vllm:waiting", frozenset({("replica", "replica-0")})): 3}


def test_a_replica_that_has_another_type_for_it_is_left_out_of_that_family() -> None:
    counter = GAUGE.replace("gauge", "counter")
    assert together(GAUGE + "vllm:running 1\n", counter + "vllm:running 2\n") == GAUGE + 'vllm:running{replica="replica-0"} 1\n'


def test_the_gateways_own_names_are_not_taken() -> None:
    assert together(GAUGE.replace("vllm:running", "peerkv_blocks") + "peerkv_blocks 1\n") == ""


@given(st.lists(st.sampled_from([*'{}",= \n\\1a#', "# HELP vllm:running x\n", "# TYPE vllm:running gauge\n", "vllm:running"])))
def test_whatever_a_replica_says_the_result_can_be_parsed(parts: list[str]) -> None:
    samples(together(GAUGE + "vllm:running 1\n" + "".join(parts) + "\n"))
