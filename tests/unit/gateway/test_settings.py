"""Settings: precedence, unknown keys, bounds, and what the engines get."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.replicas.devices import CPU_REPLICAS_DEFAULT
from gateway.errors import SettingsError
from gateway.settings import RUN_DIR_BYTES_MAX, Settings, engine_settings, load

KEY = "a-secret-key-1"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.upper().startswith("PEERKV_")]:
        monkeypatch.delenv(name)


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "peerkv.toml"
    path.write_text(text)
    return path


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toml(tmp_path, 'port = 1001\nhost = "0.0.0.0"\nmodel = "from-file"\n')
    monkeypatch.setenv("PEERKV_PORT", "1002")
    monkeypatch.setenv("PEERKV_HOST", "127.0.0.2")
    settings = load({"port": "1003", "replicas": None}, path)
    assert (settings.port, settings.host, settings.model, settings.replicas) == (1003, "127.0.0.2", "from-file", "auto")


def test_the_environment_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_CONFIG", str(toml(tmp_path, "port = 1004")))
    assert load().port == 1004


@pytest.mark.parametrize("codec", ["mix", "rot2", "raw-z"])
def test_lossy_takes_the_codecs_that_are_worth_their_loss_and_names_them(codec: str) -> None:
    assert [load({"lossy": known}).lossy for known in ("", "int8", "rot4", "rot3")] == ["", "int8", "rot4", "rot3"]
    with pytest.raises(SettingsError, match=r"^lossy: .*'int8', 'rot4' or 'rot3'"):
        load({"lossy": codec})


@pytest.mark.parametrize("codec", ["mix", "neurokv"])
def test_lossy_says_why_it_takes_no_codec_that_goes_by_what_comes_behind_a_block(codec: str) -> None:
    with pytest.raises(SettingsError, match=rf"^lossy: .*{codec} goes by how much of a sequence comes behind a block"):
        load({"lossy": codec})


def test_an_unknown_key_in_the_file_is_named_with_the_one_meant(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"unknown setting 'prot' in .*peerkv\.toml; did you mean 'port'\?"):
        load(config=toml(tmp_path, "prot = 1"))


def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_BOGUS", "1")
    with pytest.raises(SettingsError, match="unknown setting 'bogus' in the environment"):
        load()


@pytest.mark.parametrize("name", ["PEERKV_CACHE_DIR", "PEERKV_CONFIG_FILE", "PEERKV_TEST_X"])
def test_a_variable_that_only_begins_like_another_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(SettingsError, match=rf"unknown setting .* in the environment \({name}\)"):
        load()


@pytest.mark.parametrize("name", ["PEERKV_CACHE", "PEERKV_SERVICE_HOST", "PEERKV_PORT_8000_TCP"])
def test_variables_of_others_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    assert load().port == 8000


def test_it_starts_with_what_kubernetes_sets_for_services_named_peerkv(monkeypatch: pytest.MonkeyPatch) -> None:
    for service in ("PEERKV", "PEERKV_PODS"):
        monkeypatch.setenv(f"{service}_SERVICE_HOST", "10.0.0.1")
        monkeypatch.setenv(f"{service}_SERVICE_PORT", "8000")
        monkeypatch.setenv(f"{service}_SERVICE_PORT_HTTP", "8000")
        monkeypatch.setenv(f"{service}_PORT", "tcp://10.0.0.1:8000")
        monkeypatch.setenv(f"{service}_PORT_8000_TCP", "tcp://10.0.0.1:8000")
        monkeypatch.setenv(f"{service}_PORT_8000_TCP_PROTO", "tcp")
        monkeypatch.setenv(f"{service}_PORT_8000_TCP_PORT", "8000")
        monkeypatch.setenv(f"{service}_PORT_8000_TCP_ADDR", "10.0.0.1")
    assert load().port == 8000
    assert load({"port": 9000}).port == 9000


@pytest.mark.parametrize(("name", "value"), [("PEERKV_PORT", "http"), ("PEERKV_METRICS_PORT", "9000")])
def test_a_port_that_is_no_services_address_is_taken_as_meant(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="port"):
        load()


def test_an_empty_variable_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_ADMIN_KEY", "")
    monkeypatch.setenv("PEERKV_PORT", "")
    settings = load(config=toml(tmp_path, "port = 1006"))
    assert (settings.admin_key, settings.port) == (None, 1006)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("port", "http", "must be a whole number from 1 to 65535, not 'http'"),
        ("port", 99999, "must be a whole number from 1 to 65535, not 99999"),
        ("retry_attempts_max", 1.5, "must be a whole number from 0 to 16, not 1.5"),
        ("drain_seconds", "long", "must be a number of at least 0, not 'long'"),
        ("drain_seconds", "-3", "must be a number of at least 0, not '-3'"),
        ("imports", "perhaps", "must be true or false, not 'perhaps'"),
        ("imports", 7, "must be true or false, not 7"),
        ("log_level", "loud", "must be 'debug', 'info', 'warning' or 'error', not 'loud'"),
        ("host", 5, "must be a text"),
        ("run_dir", 5, "must be a path, as a text"),
        ("port", "x" * 100, "must be a whole number from 1 to 65535"),
        ("port", 10**400, "must be a whole number from 1 to 65535"),
    ],
)
def test_what_a_setting_must_be_is_said_in_plain_words(name: str, value: object, words: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(f'{name}: {words}')}$"):
        load({name: value})


def refusal(given: dict[str, object]) -> str:
    """What is said of these settings, "" if nothing."""
    try:
        load(given)
    except SettingsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_no_setting_is_told_in_the_words_of_pydantic(name: str, tmp_path: Path) -> None:
    for value in ("§", -1.5, True, [7], {"key": 7}):
        told = refusal({name: value})
        assert not re.search(r"Input|pydantic|<class|should be", told), told


def test_a_key_of_a_table_is_told_in_plain_words_too(tmp_path: Path) -> None:
    path = toml(tmp_path, '[[models]]\nname = "a"\nmodel = "m"\nreplicas_per_gpu = 99\n')
    with pytest.raises(SettingsError, match=r"number 1 \('a'\): replicas_per_gpu: must be a whole number from 1 to 16, not 99"):
        load(config=path)


def test_a_value_of_the_file_is_told_with_the_file_and_others_without(tmp_path: Path) -> None:
    path = toml(tmp_path, "requests_in_flight_max = 0")
    with pytest.raises(SettingsError) as refused:
        load({"queue_requests_max": -1}, path)
    of_flag, of_file = sorted(str(refused.value).split("; "), key=len)
    assert of_flag.startswith("queue_requests_max: must be ")
    assert of_file.startswith(f"{path}: requests_in_flight_max: must be ")


def test_an_unknown_flag_is_named() -> None:
    with pytest.raises(SettingsError, match="bogus"):
        load({"bogus": 1})


@pytest.mark.parametrize("value", ["two", "0", "-1", "1.5", 0, True, "257"])
def test_replicas_are_a_number_or_auto(value: object) -> None:
    with pytest.raises(SettingsError, match=r"^replicas: must be 'auto' or a whole number from 1 to 256$"):
        load({"replicas": value})


def test_a_wrong_value_is_one_line_that_names_the_key_and_what_it_must_be() -> None:
    with pytest.raises(SettingsError) as raised:
        load({"port": 0})
    assert str(raised.value) == "port: must be a whole number from 1 to 65535, not 0"


def test_a_secret_is_not_in_the_error_nor_in_what_is_printed() -> None:
    with pytest.raises(SettingsError) as raised:
        load({"tenants": [{"name": "", "api_key": KEY}]})
    assert KEY not in str(raised.value)
    assert KEY not in repr(load({"admin_key": KEY, "tenants": [{"name": "a", "api_key": "another-key-1"}]}))


@pytest.mark.parametrize("what", ["name", "api_key"])
def test_two_tenants_may_not_share(what: str) -> None:
    tenants = [{"name": "a", "api_key": "key-number-1"}, {"name": "b", "api_key": "key-number-2"}]
    tenants[1][what] = tenants[0][what]
    with pytest.raises(SettingsError, match=f"same {what}"):
        load({"tenants": tenants})


def test_a_tenant_may_not_have_the_admin_key() -> None:
    with pytest.raises(SettingsError, match="admin key"):
        load({"tenants": [{"name": "a", "api_key": KEY}], "admin_key": KEY})


def test_tenants_come_from_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, '[[tenants]]\nname = "a"\napi_key = "key-number-1"\n')
    assert [tenant.name for tenant in load(config=path).tenants] == ["a"]


@pytest.mark.parametrize("text", ["--a 'b c'", '["--a", "b c"]'])
def test_arguments_in_the_environment_are_words_or_a_json_list(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_VLLM_ARGS", text)
    assert load().vllm_args == ("--a", "b c")


@pytest.mark.parametrize("text", ["--a 'b", '["--a"'])
def test_arguments_that_cannot_be_read_are_an_error_that_names_the_key(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_VLLM_ARGS", text)
    with pytest.raises(SettingsError, match="vllm_args"):
        load()


def test_a_file_that_is_not_there_or_not_toml_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read the settings file"):
        load(config=tmp_path / "none.toml")
    with pytest.raises(SettingsError, match="is not a TOML file"):
        load(config=toml(tmp_path, "port ="))


def test_directories_follow_the_port(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    settings = load({"port": 1005})
    assert settings.run_dir == tmp_path / "peerkv" / "1005"
    assert settings.log_dir == tmp_path / "state" / "peerkv" / "logs" / "1005"
    assert settings.table_dir.name == "1005"


def test_a_run_dir_too_long_for_a_socket_is_refused() -> None:
    with pytest.raises(SettingsError, match="run_dir: longer than"):
        load({"run_dir": "/" + "x" * RUN_DIR_BYTES_MAX})


@pytest.mark.parametrize(
    "name", [name for name, field in Settings.model_fields.items() if field.annotation in (Path, Path | None)]
)
def test_every_path_in_the_file_may_begin_with_the_home_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    both = ("tls_cert", "tls_key")
    found = load({}, toml(tmp_path, "".join(f'{each} = "~/x"\n' for each in (both if name in both else (name,)))))
    assert getattr(found, name) == Path("/home/somebody/x")


def test_a_relative_directory_becomes_absolute() -> None:
    assert load({"log_dir": "logs"}).log_dir == Path.cwd() / "logs"


def test_engines_on_the_cpu_are_forked_and_two_by_default() -> None:
    engines = engine_settings(load(), model="m", devices=())
    assert (engines.replicas, engines.preload, engines.served_model_name) == (CPU_REPLICAS_DEFAULT, True, "m")


def test_there_is_one_engine_a_gpu_by_default() -> None:
    engines = engine_settings(load({"served_model_name": "s"}), model="m", devices=("0", "1", "2"))
    assert (engines.replicas, engines.preload, engines.served_model_name) == (3, False, "s")


@pytest.mark.parametrize(
    ("words", "replicas"),
    [("--tensor-parallel-size 2", 2), ("-tp 2 --pipeline-parallel-size 2", 1), ("--tensor-parallel-size=4", 1), ("", 4)],
)
def test_engines_that_need_several_gpus_are_fewer(words: str, replicas: int) -> None:
    engines = engine_settings(load({"vllm_args": words}), model="m", devices=("0", "1", "2", "3"))
    assert engines.replicas == replicas


def test_every_bound_of_the_engines_is_a_setting() -> None:
    import dataclasses

    from engine.replicas.launch import EngineSettings

    assert {field.name for field in dataclasses.fields(EngineSettings)} - set(Settings.model_fields) == {
        *("devices", "name", "replicas_beside"),  # as the models and the machine have it
    }


@pytest.mark.parametrize(("given", "size"), [("16GiB", 16 << 30), ("512MB", 512_000_000), (4 << 20, 4 << 20), ("0", 0)])
def test_host_memory_is_given_with_its_unit(given: object, size: int) -> None:
    assert engine_settings(load({"host_memory": given}), model="m", devices=()).host_memory == size


def test_host_memory_is_what_is_safe_if_nothing_is_said() -> None:
    assert (load({}).host_memory, engine_settings(load({}), model="m", devices=()).host_memory) == ("auto", 0)


def test_what_disk_and_vault_bring_up_has_more_room_on_gpus() -> None:
    at = [engine_settings(load({}), model="m", devices=devices).staging_bytes for devices in ((), ("0", "1"))]
    assert at == [256 << 20, 4 << 30]
    given = engine_settings(load({"tier_staging_bytes": "1GiB"}), model="m", devices=("0", "1"))
    assert given.staging_bytes == 1 << 30
    with pytest.raises(SettingsError, match="tier_staging_bytes: 1000 bytes hold nothing"):
        load({"tier_staging_bytes": 1000})


def test_files_of_host_memory_need_a_size_that_stays() -> None:
    kept = engine_settings(load({"host_memory": "1GiB", "host_memory_dir": "/dev/shm/kept"}), model="m", devices=())
    assert kept.host_memory_dir == Path("/dev/shm/kept")
    with pytest.raises(SettingsError, match="host_memory_dir: give host_memory a size"):
        load({"host_memory": "auto", "host_memory_dir": "/dev/shm/kept"})


@pytest.mark.parametrize("given", [{"host_memory": 256}, {"disk_bytes": 1000}])
def test_a_size_whose_unit_was_forgotten_is_refused(given: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match="bytes hold nothing: write a unit, such as 16GiB"):
        load(given)


@pytest.mark.parametrize("given", ["-1", "-1GiB", "much", "16 elephants", True])
def test_host_memory_that_is_no_size_is_refused(given: object) -> None:
    with pytest.raises(SettingsError) as raised:
        load({"host_memory": given})
    assert str(raised.value) == f"host_memory: '{given}' is neither auto nor a size: write bytes, or such as 512MiB, 4GiB"


def test_a_key_that_is_too_short_is_told_in_characters_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as raised:
        load({"admin_key": "hidden"})
    assert str(raised.value) == "admin_key: must have at least 8 characters, has 6"
    monkeypatch.setenv("PEERKV_TENANTS", '[{"name": "a", "api_key": "tiny"}]')
    with pytest.raises(SettingsError) as raised:
        load()
    assert str(raised.value) == "PEERKV_TENANTS: number 1: api_key: must have at least 8 characters, has 4"
    monkeypatch.delenv("PEERKV_TENANTS")
    monkeypatch.setenv("PEERKV_SECRETS_DIR", str(tmp_path))
    (tmp_path / "peerkv_tenants").write_text('[{"name": "a", "api_key": "tiny"}]')
    with pytest.raises(SettingsError) as raised:
        load(config=toml(tmp_path, "port = 1"))
    assert str(raised.value) == "the file peerkv_tenants: number 1 ('a'): api_key: must have at least 8 characters, has 4"


@pytest.mark.parametrize(("text", "words"), [("acme:secret", "PEERKV_TENANTS is not JSON;"), ("{}", "must be a list,")])
def test_tenants_in_another_form_get_an_example(text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_TENANTS", text)
    with pytest.raises(SettingsError) as raised:
        load()
    assert f'{words} for example [{{"name": "acme", "api_key": "…"}}]' in str(raised.value)
    assert "secret" not in str(raised.value)


def test_words_that_begin_as_a_json_list_and_are_none_are_told_what_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEERKV_CORS_ORIGINS", "[https://a.example]")
    with pytest.raises(SettingsError, match=r'^cors_origins: begins with \[ but is not a JSON list, such as \["one", "two"\]$'):
        load()
