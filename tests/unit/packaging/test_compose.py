"""compose.yaml: what the containers share, what they may do, that their commands are real ones and settings reach them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from engine.host_process.host import SHUTDOWN_SECONDS_MAX
from engine.replicas.launch import CPU_KV_BYTES
from gateway.cli.main import build_parser
from gateway.settings import Settings, load
from tests.unit.packaging.files import DOCKER, REPOSITORY, read_yaml

COMPOSE: dict[str, Any] = read_yaml("compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ENGINES = ("engine-cpu", "engine-gpu")
WORKERS = (*ENGINES, "gateway")
COMMANDS = (*WORKERS, "vault")
OBSERVERS = ("prometheus", "grafana")
# Where the gateway listens and where files are is compose.yaml's own.
FIXED = {"host", "port", "run_dir", "table_dir", "log_dir"}
SECRETS = {"admin_key", "admin_key_file", "tenants", "tenants_file"}
VERSION = (2, 20, 2)
# The first version of Compose that knows a key.
SINCE = {"depends_on required": (2, 20, 2), "profiles": (1, 28, 0), "create_host_path": (2, 0, 0)}
OF_ITS_OWN = {
    "PEERKV_ALLOW_ANYONE": "${PEERKV_ALLOW_ANYONE:-true}",  # whoever reaches what is published on loopback
    "PEERKV_LIMITS_FILE": "${PEERKV_LIMITS_FILE:-/var/lib/peerkv/limits.json}",
}
"""What has another default in a container."""


def environment(service: str) -> dict[str, str | None]:
    return SERVICES[service].get("environment", {})


def started(profile: str) -> set[str]:
    return {name for name, service in SERVICES.items() if profile in service.get("profiles", [profile])}


def test_a_plain_up_runs_the_cpu_profile() -> None:
    lines = (DOCKER / ".env").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == ["COMPOSE_PROFILES=cpu"]
    assert started("cpu") == {"engine-cpu", "gateway"}
    assert started("gpu") == {"engine-gpu", "gateway"}
    assert started("observability") == {"gateway", *OBSERVERS}
    assert started("vault") == {"gateway", "vault"}


@pytest.mark.parametrize("name", SERVICES)
def test_no_container_lives_in_the_namespaces_of_another(name: str) -> None:
    assert not {"ipc", "pid", "network_mode"} & SERVICES[name].keys()
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_sockets_and_tables_are_in_one_volume_in_memory() -> None:
    options = COMPOSE["volumes"]["run"]["driver_opts"]
    assert (options["type"], options["device"]) == ("tmpfs", "tmpfs")
    assert {"mode=0700", "uid=10001", "gid=10001"} <= set(options["o"].split(","))
    for name in WORKERS:
        assert "run:/run/peerkv" in SERVICES[name]["volumes"]
        for variable in ("PEERKV_RUN_DIR", "PEERKV_TABLE_DIR"):
            path = environment(name)[variable]
            assert path == environment("gateway")[variable]
            assert Path(str(path)).parent == Path("/run/peerkv")


def test_what_was_used_of_limits_outlives_the_gateways_container() -> None:
    assert environment("gateway").items() >= OF_ITS_OWN.items()
    assert "state:/var/lib/peerkv" in SERVICES["gateway"]["volumes"]
    assert " /var/lib/peerkv " in (DOCKER / "gateway.Dockerfile").read_text()  # else the volume would be root's


@pytest.mark.parametrize("engine", ENGINES)
def test_gateway_and_engine_host_read_the_same_models_and_settings_file(engine: str) -> None:
    assert "models:/models" in SERVICES[engine]["volumes"]
    assert "models:/models:ro" in SERVICES["gateway"]["volumes"]
    for name in (engine, "gateway"):
        (config,) = [volume for volume in SERVICES[name]["volumes"] if isinstance(volume, dict)]
        assert config["target"] == environment(name)["PEERKV_CONFIG"]
        assert config["read_only"] is True
        assert config["bind"] == {"create_host_path": False}
    default = re.fullmatch(r"\$\{CONFIG_FILE:-\./(.+)\}", config["source"])
    assert default
    assert tomllib.loads((DOCKER / default[1]).read_text()) == {}


@pytest.mark.parametrize("name", SERVICES)
def test_no_container_has_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "user"} & set(service)


def test_the_gateway_is_published_where_the_user_says_and_on_loopback_else() -> None:
    (port,) = SERVICES["gateway"]["ports"]
    assert port == "${BIND_ADDRESS:-127.0.0.1}:${HOST_PORT:-8000}:8000"
    for name in ENGINES:
        assert "ports" not in SERVICES[name]
    for name in OBSERVERS:
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


def test_the_vault_is_published_on_loopback_unless_the_user_says_where_and_needs_a_password() -> None:
    vault = SERVICES["vault"]
    assert vault["ports"] == ["${VAULT_BIND_ADDRESS:-127.0.0.1}:${VAULT_PORT:-6379}:6379"]
    assert "--password-file=/run/secrets/peerkv_vault_password" in vault["command"]
    assert "python docker/requirements.py pyproject.toml vault " in (DOCKER / "gateway.Dockerfile").read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_disk_is_a_volume_that_the_engine_may_write_to(engine: str) -> None:
    assert "disk:/var/cache/peerkv" in SERVICES[engine]["volumes"]
    assert (DOCKER / "engine.Dockerfile").read_text().count(" /var/cache/peerkv ") == 2  # else the volume would be root's


def test_the_gpu_engine_sees_all_gpus() -> None:
    (device,) = SERVICES["engine-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in SERVICES["engine-cpu"]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_one_that_peerkv_knows(name: str) -> None:
    assert callable(build_parser().parse_args(SERVICES[name]["command"]).run)


@pytest.mark.parametrize("name", WORKERS)
def test_every_setting_reaches_the_containers(name: str) -> None:
    wanted = Settings.model_fields.keys() - FIXED - (SECRETS if name != "gateway" else set())
    variables = {f"PEERKV_{setting.upper()}" for setting in wanted}
    passed = {variable: value for variable, value in environment(name).items() if str(value).startswith("$")}
    lines = "\n".join(f"  {variable}: ${{{variable}:-}}" for variable in sorted(variables - passed.keys()))
    assert not lines, f"add to x-settings in docker/compose.yaml:\n{lines}"
    empty = {variable: f"${{{variable}:-}}" for variable in variables}
    assert {**passed, **OF_ITS_OWN} == {**empty, **OF_ITS_OWN}


def test_an_empty_variable_means_that_it_is_not_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable, value in environment("gateway").items():
        monkeypatch.setenv(variable, "" if str(value).startswith("$") else str(value))
    monkeypatch.setenv("PEERKV_CONFIG", str(DOCKER / "peerkv.toml"))
    monkeypatch.setenv("PEERKV_SECRETS_DIR", str(tmp_path))
    for name in COMPOSE["secrets"]:
        (tmp_path / name).write_bytes((DOCKER / "no-secret").read_bytes())
    fixed = {"host", "run_dir", "table_dir"}
    assert load().model_dump(exclude=fixed) == Settings.model_construct().model_dump(exclude=fixed)
    assert load().host == "0.0.0.0"


def test_secrets_are_files_that_only_those_who_need_them_get() -> None:
    assert all(re.fullmatch(r"\$\{\w+_FILE:-\./no-secret\}", secret["file"]) for secret in COMPOSE["secrets"].values())
    assert (DOCKER / "no-secret").read_bytes() == b""
    given = {name: SERVICES[name].get("secrets", []) for name in SERVICES}
    assert given == {
        "engine-cpu": ["hf_token", "peerkv_vault_password"],
        "engine-gpu": ["hf_token", "peerkv_vault_password"],
        "gateway": ["peerkv_admin_key", "peerkv_tenants", "peerkv_salt_secret", "peerkv_limits_valkey_password"],
        "vault": ["peerkv_vault_password"],
        "prometheus": ["peerkv_admin_key"],
        "grafana": [],
    }
    for engine in ENGINES:
        assert not {"PEERKV_ADMIN_KEY", "PEERKV_TENANTS"} & environment(engine).keys()
        assert environment(engine)["HF_TOKEN_PATH"] == "/run/secrets/hf_token"


@pytest.mark.parametrize("name", SERVICES)
def test_a_stop_waits_for_the_drain_and_the_end_of_the_replicas(name: str) -> None:
    found = re.fullmatch(r"\$\{STOP_GRACE_PERIOD:-(\d+)s\}", SERVICES[name]["stop_grace_period"])
    assert found
    settings = Settings()
    assert int(found[1]) > settings.drain_seconds + settings.terminate_seconds + SHUTDOWN_SECONDS_MAX


@pytest.mark.parametrize("name", ENGINES)
def test_the_shared_memory_of_an_engine_has_room_for_the_default_replicas(name: str) -> None:
    found = re.fullmatch(r"\$\{SHM_SIZE:-(\d+)gb\}", SERVICES[name]["shm_size"])
    assert found
    assert int(found[1]) << 30 > 2 * CPU_KV_BYTES


def test_every_volume_is_declared() -> None:
    volumes = [volume for service in SERVICES.values() for volume in service.get("volumes", []) if isinstance(volume, str)]
    named = {volume.split(":")[0] for volume in volumes if not volume.startswith("./")}
    assert named == set(COMPOSE["volumes"])
    for directory in {volume.split(":")[0] for volume in volumes} - named:
        assert (DOCKER / directory).is_dir()


def test_the_version_of_compose_that_is_needed_is_said() -> None:
    used = ["profiles", "create_host_path"]
    needs = SERVICES["gateway"]["depends_on"].values()
    used += ["depends_on required"] if any("required" in need for need in needs) else []
    assert max(SINCE[key] for key in used) == VERSION
    words = f"Compose {'.'.join(map(str, VERSION))} or later"
    assert words in (DOCKER / "compose.yaml").read_text()
    assert words in (REPOSITORY / "docs" / "operating.md").read_text()


def test_images_have_the_projects_version() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    for name in WORKERS:
        assert re.fullmatch(rf"peerkv-(gateway|engine):{re.escape(version)}(-cpu|-gpu)?", SERVICES[name]["image"])
    for name in OBSERVERS:
        assert re.fullmatch(r"\$\{\w+_IMAGE:-[\w/.-]+:v?\d+\.\d+\.\d+@sha256:[0-9a-f]{64}\}", SERVICES[name]["image"])
