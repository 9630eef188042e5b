"""[[models]]: what may stand beside what, and what is made of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.replicas import shared_memory_check
from engine.replicas.devices import NotEnoughDevices
from gateway.errors import SettingsError
from gateway.serve.fleets import each_fleet, engine_fleets, shared_out, with_host_memory
from gateway.settings import Settings, load

EXAMPLE = Path(__file__).parents[3] / "examples" / "several_models.toml"
TWO = """
[[models]]
model = "org/Large-8B"
model_aliases = ["gpt-4o"]
replicas = 2
vllm_args = ["--max-model-len", "4096"]

[[models]]
model = "/models/small"
served_model_name = "small"
replicas = 1
"""


def loaded(tmp_path: Path, text: str, **flags: object) -> Settings:
    file = tmp_path / "peerkv.toml"
    file.write_text(text)
    return load({"run_dir": tmp_path / "run", "table_dir": tmp_path / "tables", "log_dir": tmp_path / "logs", **flags}, file)


def refusal(tmp_path: Path, text: str, **flags: object) -> str:
    with pytest.raises(SettingsError) as raised:
        loaded(tmp_path, text, **flags)
    return str(raised.value)


def test_each_model_has_settings_and_directories_of_its_own(tmp_path: Path) -> None:
    settings = loaded(tmp_path, "imports = false\n" + TWO)
    large, small = each_fleet(settings)
    assert (large.model, large.served_model_name, large.model_aliases) == ("org/Large-8B", "org/Large-8B", ("gpt-4o",))
    assert (small.model, small.served_model_name, small.vllm_args) == ("/models/small", "small", ())
    assert (large.run_dir, small.run_dir) == (tmp_path / "run-large-8b", tmp_path / "run-small")
    assert (large.table_dir, large.log_dir) == (tmp_path / "tables-large-8b", tmp_path / "logs" / "large-8b")
    assert not large.imports
    assert not small.imports


def test_the_replicas_names_are_unique_and_share_the_cores(tmp_path: Path) -> None:
    settings = loaded(tmp_path, TWO)
    engines = engine_fleets(settings, each_fleet(settings), ())
    assert [(each.name, each.replicas, each.replicas_beside) for each in engines] == [("large-8b", 2, 1), ("small", 1, 2)]


def test_one_model_is_one_fleet_with_the_settings_as_they_are(tmp_path: Path) -> None:
    settings = loaded(tmp_path, 'model = "m"\nreplicas = 3\n')
    assert each_fleet(settings) == (settings,)
    (engine,) = engine_fleets(settings, (settings,), ())
    assert (engine.name, engine.replicas, engine.replicas_beside, engine.run_dir) == ("", 3, 0, settings.run_dir)


def test_models_share_the_host_memory_that_is_safe_less_what_others_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory_check, "free_bytes", lambda: 40 << 30)
    text = "".join(
        f'[[models]]\nmodel = "{name}"\nreplicas = 1\nhost_memory = "{size}"\nvllm_args = ["--kv-cache-memory-bytes", "1G"]\n'
        for name, size in (("a", "auto"), ("b", "3GiB"), ("c", "auto"), ("d", "0"))
    )
    settings = loaded(tmp_path, text)
    engines = engine_fleets(settings, each_fleet(settings), ())
    assert [each.host_memory for each in engines] == [0, 3 << 30, 0, 0]
    share = (9 - 3) << 29  # a quarter of what the KV of four replicas leaves of 40 GiB, less b's, by two
    assert [each.host_memory for each in with_host_memory(each_fleet(settings), engines)] == [share, 3 << 30, share, 0]
    monkeypatch.setattr(shared_memory_check, "free_bytes", lambda: 10 << 30)
    assert [each.host_memory for each in with_host_memory(each_fleet(settings), engines)] == [0, 3 << 30, 0, 0]


@pytest.mark.parametrize("word", ["model", "served_model_name", "model_aliases", "vllm_args", "disk"])
def test_what_belongs_to_a_model_is_not_given_for_all(tmp_path: Path, word: str) -> None:
    assert refusal(tmp_path, TWO, **{word: "x"}).startswith(f"{word}: beside [[models]]")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('model = "gpt-4o"', "models: two models are called 'gpt-4o'"),
        ('model = "x"\nserved_model_name = "small"', "models: two models are called 'small'"),
        ('model = "x"\nmodel_aliases = ["small"]', "models: two models are called 'small'"),
        ('model = "other/small"', "models: two models have the name 'small'"),
        ('model = "x"\nname = "large-8b"', "models: two models have the name 'large-8b'"),
        ('model = "org/…"', "needs a name"),
        ('model = "x"\nname = "Not Good"', "peerkv.toml: [[models]] number 3 ('Not Good'): name: lower-case letters"),
        ("replicas = 1", "[[models]] number 3: the key 'model' is missing"),
        ('model = "x"\nreplicas = 0', "[[models]] number 3 ('x'): replicas: must be 'auto' or a whole number"),
        ('model = "x"\nport = 1', "[[models]] number 3 ('x'): the key 'port' belongs before the first [[…]]"),
        ('modle = "x"', "[[models]] number 3: unknown key 'modle'; did you mean 'model'?"),
        (
            'model = "x"\nvllm_args = ["--port", "1"]',
            "[[models]] number 3 ('x'): vllm_args: vLLM option --port cannot be",
        ),
    ],
)
def test_models_that_cannot_be_beside_each_other_are_refused(tmp_path: Path, table: str, words: str) -> None:
    assert words in refusal(tmp_path, f"{TWO}\n[[models]]\n{table}\n")


def test_a_gpu_or_a_disk_belongs_to_one_model(tmp_path: Path) -> None:
    for what, value in (("devices", '["0", "1"]'), ("disk", '"/cache"')):
        tables = "".join(f'[[models]]\nmodel = "{name}"\n{what} = {value}\n' for name in ("a", "b"))
        assert refusal(tmp_path, tables).startswith("models: two models are given the ")


def test_a_node_among_others_serves_one_model(tmp_path: Path) -> None:
    given = {"node_name": "node-a", "node_address": "127.0.0.1:7710"}
    assert refusal(tmp_path, TWO, **given).startswith("node_name: a node among others serves one model")


def test_gpus_are_those_that_are_named_or_the_next_ones(tmp_path: Path) -> None:
    text = """
[[models]]
model = "a"
replicas = 1
vllm_args = ["--tensor-parallel-size", "2"]
[[models]]
model = "b"
devices = [0]
[[models]]
model = "c"
replicas = 2
replicas_per_gpu = 2
"""
    settings = loaded(tmp_path, text)
    assert shared_out(settings.models, ("0", "1", "2", "3")) == (("1", "2"), ("0",), ("3",))
    engines = engine_fleets(settings, each_fleet(settings), ("0", "1", "2", "3"))
    assert [(each.replicas, each.devices) for each in engines] == [(1, ("1", "2")), (1, ("0",)), (2, ("3",))]
    for visible, words in (
        (("0", "1"), "a needs 2 GPUs, and 1 are left"),
        (("1", "2", "3"), "there is no GPU 0"),
        ((), "given GPUs"),
    ):
        with pytest.raises(NotEnoughDevices, match=words):
            shared_out(settings.models, visible)


def test_on_gpus_it_must_be_known_how_many_a_model_takes(tmp_path: Path) -> None:
    settings = loaded(tmp_path, '[[models]]\nmodel = "a"\n')
    assert shared_out(settings.models, ()) == ((),)
    with pytest.raises(NotEnoughDevices, match="say how many replicas"):
        shared_out(settings.models, ("0", "1"))


def test_the_example_can_be_loaded() -> None:
    chat, embedding = load({}, EXAMPLE).models
    assert shared_out((chat, embedding), ("0", "1", "2", "3")) == (("0", "1", "2"), ("3",))
    assert (chat.client_name, embedding.fleet_name, chat.host_memory) == ("chat", "embedding", 64 << 30)


def test_models_may_come_as_json_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_MODELS", '[{"model": "a"}, {"model": "b", "replicas": 1}]')
    assert [one.model for one in loaded(tmp_path, "").models] == ["a", "b"]


def test_what_is_wrong_with_a_table_is_told_with_its_file_and_what_may_have_been_meant(tmp_path: Path) -> None:
    tenant = '[[tenants]]\nname = "acme"\napi_key = "a-secret-word"\n'
    path = tmp_path / "peerkv.toml"
    for table, words in (
        ("accept_loss = true", "unknown key 'accept_loss'; did you mean 'accepts_loss'?"),
        ("host = 'x'", "the key 'host' belongs before the first [[…]]"),
        ("quite = 'else'", "unknown key 'quite'"),
        ("group = 5", "group: must be a text"),
    ):
        found = refusal(tmp_path, f"{tenant}{table}\n")
        assert found.startswith(f"{path}: [[tenants]] number 1 ('acme'): {words}")
        assert "a-secret-word" not in found
    assert refusal(tmp_path, '[models]\nmodel = "x"\n') == "models: write [[models]], with two brackets, for each"
    assert refusal(tmp_path, 'api_key = "a-secret-word"\n').endswith(f"in {path}: it belongs into a table [[tenants]]")
    assert refusal(tmp_path, "devices = [0]\n").endswith(f"in {path}: it belongs into a table [[models]]")
