"""All settings in one model: flags > `PEERKV_*` variables > files of secrets > TOML file > defaults. The leftmost wins.

An unknown key is an error that names it, wherever it comes from. `load` is the only way in.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import SettingsConfigDict
from pydantic_settings import SettingsError as PydanticSettingsError

from engine.replicas.devices import CPU_REPLICAS_DEFAULT, resolve_replicas
from engine.replicas.launch import EngineSettings, devices_each
from gateway.errors import SettingsError
from gateway.secret_files import SECRETS_DIR_VARIABLE, read_secret_files
from gateway.settings_errors import in_words, is_of_a_service, not_json
from gateway.settings_limits import SharedLimitSettings
from gateway.settings_models import ModelSettings, SeveralModels, check_models
from gateway.settings_nodes import OtherNodes
from gateway.settings_secrets import SecretsInFiles, from_files
from gateway.settings_tiers import Tiers
from gateway.settings_types import AbsolutePath, ReplicaCount, VllmArgs, Words
from gateway.table_errors import Tables
from transport.table.quality import is_lossy_salt

ENV_PREFIX = "PEERKV_"
CONFIG_VARIABLE = "PEERKV_CONFIG"
# Variables with our prefix that are not settings, and are read elsewhere.
OTHER_VARIABLES = frozenset({CONFIG_VARIABLE, SECRETS_DIR_VARIABLE, "PEERKV_CACHE"})
# sun_path holds 108 bytes with the final zero; "/replica-999.sock" needs 17 of them.
TIER_BYTES_MIN = 1 << 20
RUN_DIR_BYTES_MAX = 90
# As browsers send it: no path, lower case, a port only where it is not the scheme's own.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}

_ENGINE: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(EngineSettings)}
"""The defaults of what the supervisor is given, stated there."""


def default_run_dir(port: int) -> Path:
    """Sockets and fleet.json: `$XDG_RUNTIME_DIR/peerkv/<port>`, or `/tmp/peerkv-<uid>/<port>`."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) / "peerkv" if runtime and os.path.isdir(runtime) else Path(f"/tmp/peerkv-{os.getuid()}")
    return base / str(port)


def default_table_dir(port: int) -> Path:
    """Block tables: `/dev/shm/peerkv-<uid>/<port>`."""
    return Path(f"/dev/shm/peerkv-{os.getuid()}") / str(port)


def default_log_dir(port: int) -> Path:
    """Replica logs: `$XDG_STATE_HOME/peerkv/logs/<port>`, usually under `~/.local/state`."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "peerkv" / "logs" / str(port)


def default_limits_file(port: int) -> Path:
    """What was used up of limits: `$XDG_STATE_HOME/peerkv/limits/<port>.json`, beside the logs."""
    return default_log_dir(port).parent.parent / "limits" / f"{port}.json"


SSE_KEEP_ALIVE_SECONDS_MIN = 0.01
"""A wait is looked at four times in an interval."""


class Tenant(BaseModel):
    """One configured tenant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=128)
    api_key: SecretStr = Field(min_length=8, max_length=512)
    salt: SecretStr | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="Isolates the tenant's prefix cache; by default made of its name with the server's secret.",
    )
    group: str | None = Field(
        default=None, min_length=1, max_length=128, description="Tenants of one group share a prefix cache."
    )
    accepts_loss: bool = Field(False, description="Its prompts may be served with KV that disk or vault kept with loss.")

    @field_validator("salt")
    @classmethod
    def _check_salt(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and is_lossy_salt(value.get_secret_value()):
            raise ValueError("ends as those do that peerkv makes for callers who accept loss")
        return value


class Settings(OtherNodes, Tiers, SharedLimitSettings, SecretsInFiles, SeveralModels):
    """Every setting with its default; sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    # What is served.
    model: str = Field("", description="directory or hub id of the model that vLLM loads; empty: the default model")
    served_model_name: str = Field("", description="model name that clients use; empty: the model as given")
    model_aliases: Words = Field(
        _ENGINE["model_aliases"], description="further names of the model, separated by spaces; /v1/models lists them all"
    )
    replicas: ReplicaCount = Field(
        "auto", description=f"number of replicas; auto: one per GPU, or {CPU_REPLICAS_DEFAULT} on the CPU"
    )
    replicas_per_gpu: int = Field(
        _ENGINE["replicas_per_gpu"], ge=1, le=16, description="replicas that share a GPU and its memory, for small models"
    )
    vllm_args: VllmArgs = Field(
        _ENGINE["vllm_args"], description="additional arguments for each vLLM server; they override ours"
    )
    preload: bool | None = Field(
        None, description="import vLLM once and fork the replicas from that process; unset: on the CPU only"
    )
    launcher: Words | None = Field(None, description="command to start instead of a vLLM server")
    namespace: str = Field(
        _ENGINE["namespace"], max_length=128, description="replicas in different namespaces never exchange KV"
    )
    hash_name: Literal["xxh3_128", "sha256"] = Field(_ENGINE["hash_name"], description="hash function for block keys")

    pin_share_max: float = Field(
        _ENGINE["pin_share_max"],
        ge=0,
        lt=1,
        description="share of a replica's KV cache that pinned prefixes may take; 0 disables pinning",
    )

    # The front door.
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    tls_cert: AbsolutePath | None = Field(
        None, description="certificate in PEM, with its chain: the gateway speaks HTTPS; read again whenever the file changes"
    )
    tls_key: AbsolutePath | None = Field(None, description="the certificate's private key in PEM, without a password")
    allow_anyone: bool = Field(
        False,
        description="where no tenants or keys are configured, answer callers on other machines too, and not this one's only",
    )
    reuse_port: bool = Field(False, description="share the port with other gateways that also set this")
    admin_key: SecretStr | None = Field(
        None,
        min_length=8,
        description="protects /metrics, /kv/*, /replicas and the choice of a replica, 8 characters at least; "
        "unset: callers on this machine only",
    )
    tenants: tuple[Tenant, ...] = Field(
        (), description="who may call, each with an API key of 8 characters at least; none: open to all"
    )
    keys_file: AbsolutePath | None = Field(
        None, description="file of API keys, which `peerkv keys` writes; changes are taken up while the gateway runs"
    )
    limits_file: AbsolutePath = Field(
        default_factory=lambda data: default_limits_file(data.get("port", 0)),
        description="file that keeps what was used up of the keys' limits across restarts; one gateway's alone",
    )
    cached_token_price: float = Field(
        0.1, ge=0, le=1, description="what a prompt token from a cache counts towards limits; a computed one counts 1"
    )
    generated_token_price: float = Field(1.0, ge=0, le=1000, description="what a generated token counts towards limits")
    answer_tokens_default: int = Field(
        4096, ge=1, description="max_tokens of chats that name none, where their key has limits on tokens"
    )
    reservation_seconds_max: float = Field(
        86400.0, gt=0, description="a request that is under way for longer is charged what it may come to"
    )
    cors_origins: Words = Field(
        (), description="web pages that may call /v1 from a browser, such as https://chat.example; *: all pages; none: none"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")
    access_log: bool = Field(False, description="log one line per request")
    otlp_traces_endpoint: str = Field(
        "",
        description="OpenTelemetry collector that gets a span of each request, parent of vLLM's (the extra otel); empty: none",
    )
    audit_log: AbsolutePath | None = Field(
        None, description="file of what admins did, a line of JSON each, chained by hashes (`peerkv audit verify`)"
    )
    request_log: str = Field(
        "", description="file that gets a line of JSON for each request, without prompts, answers and keys; -: standard output"
    )

    # Where things are; created with mode 0700.
    run_dir: AbsolutePath = Field(
        default_factory=lambda data: default_run_dir(data.get("port", 0)), description="directory for sockets and fleet.json"
    )
    table_dir: AbsolutePath = Field(
        default_factory=lambda data: default_table_dir(data.get("port", 0)), description="directory for block tables"
    )
    log_dir: AbsolutePath = Field(
        default_factory=lambda data: default_log_dir(data.get("port", 0)), description="directory for replica logs"
    )

    # Bounds of the front door.
    body_bytes_max: int = Field(32 << 20, ge=1024, description="largest request body")
    body_inline_bytes_max: int = Field(
        256 << 10, ge=1024, description="larger bodies are decoded, rendered and tokenised in a separate process"
    )
    large_body_workers: int = Field(
        1, ge=1, le=64, description="number of processes that read large bodies; further large bodies wait"
    )
    bodies_bytes_max: int = Field(
        1 << 30,
        ge=1024,
        description="total size of all request bodies held at once, and of their token ids; slow uploads make room for others",
    )
    body_seconds_max: float = Field(60.0, gt=0, description="time allowed for receiving a request body")
    header_bytes_max: int = Field(64 << 10, ge=4096, description="largest request head")
    answer_bytes_max: int = Field(
        8 << 20, ge=1024, description="largest answer held back so that it can be retried; larger ones are streamed"
    )
    requests_in_flight_max: int = Field(
        1024, ge=1, description="concurrent requests whose bodies have arrived; beyond that clients get 429"
    )
    replica_requests_max: int = Field(
        0,
        ge=0,
        description="requests that each ready replica gets at once; others wait, tenants in equal shares; 0: all go on at once",
    )
    queue_requests_max: int = Field(
        512, ge=1, description="requests that wait so; beyond that the tenant with most of them gets 503"
    )
    queue_seconds_max: float = Field(
        60.0, gt=0, description="how long a request waits so, before it gets 503; x-request-timeout may say less"
    )
    uploads_max: int = Field(
        1024, ge=1, description="concurrent requests whose bodies are still arriving; beyond that the stalest is ended"
    )
    retry_attempts_max: int = Field(2, ge=0, le=16, description="other replicas to try when one dies while serving a request")
    continue_streams: bool = Field(
        True,
        description="go on with a stream whose replica died on another one, from the tokens sent; greedy streams alone",
    )
    eject_failures_max: int = Field(
        3,
        ge=0,
        le=16,
        description="failed answers of a replica in a row (429, 5xx) before it is ejected for a while; 0: never",
    )
    eject_seconds_min: float = Field(1.0, gt=0, description="first ejection of a replica; each further one lasts twice as long")
    eject_seconds_max: float = Field(30.0, gt=0, description="longest ejection of a replica")
    slow_start_seconds: float = Field(
        10.0, ge=0, description="time in which the share of requests of a replica that was restarted grows; 0: at once"
    )
    overdue_seconds_min: float = Field(
        5.0, gt=0, description="requests that wait this long, and far beyond their expected time, make a silent replica suspect"
    )
    connect_seconds: float = Field(5.0, gt=0, description="time allowed for connecting to a replica")
    response_head_seconds_max: float | None = Field(
        None,
        gt=0,
        description="time until a replica must begin its answer; unset: no limit, since a long prompt may take minutes",
    )
    control_seconds: float = Field(10.0, gt=0, description="time allowed for a control call to a replica, such as /v1/models")
    connections_max: int = Field(4096, ge=1, description="concurrent client connections; beyond that clients get 503")
    client_stall_seconds_max: float = Field(
        120.0, gt=0, description="disconnect a client that has read nothing of its answer for this long"
    )
    keep_alive_seconds: float = Field(75.0, gt=0, description="how long an idle client connection is kept open")
    sse_keep_alive_seconds: float = Field(
        0.0,
        ge=0,
        description="interval of comments to clients that wait for a stream's first event, at least 0.01; 0: none. With the "
        "first one the answer's head leaves, and x-peerkv-cache is not in it",
    )
    upstream_idle_seconds: float = Field(
        3.0, gt=0, description="how long an idle connection to a replica is kept open; vLLM closes it after 5 s"
    )
    drain_seconds: float = Field(
        30.0,
        ge=0,
        description="time for running requests to finish after a stop signal, and before a replica is restarted on request",
    )

    # Steering and figures.
    replica_metrics: bool = Field(
        True, description="show vLLM's own metrics of all replicas on /metrics, each with a label for its replica"
    )
    imports: bool = Field(
        True, description="let replicas import from each other; requests go where their prefixes are either way"
    )
    parity_interval_seconds: float = Field(
        300.0, ge=0, description="interval between comparisons of our token ids with an engine's; 0: only when replicas start"
    )
    ledger_requests_max: int = Field(4096, ge=1, description="number of past requests that /kv/explain knows")
    prefixes_kept_max: int = Field(256, ge=0, description="prefixes kept at once by POST /kv/prefixes")
    prefixes_kept_tokens_max: int = Field(4_000_000, ge=0, description="total tokens of all kept prefixes, 4 bytes each")
    prefix_seconds_max: float = Field(600.0, gt=0, description="time for a replica to compute a prefix that is to be kept")
    prefixes_tracked_max: int = Field(65536, ge=1, description="number of prefixes that GET /kv/prefixes counts")
    tokenize_inline_chars_max: int = Field(
        8192, ge=0, description="longer unseen text is tokenised in a thread, off the event loop"
    )
    send_chat_ids: bool = Field(
        True,
        description="send a chat's token ids along, so that the engine need not render or tokenise it",
    )
    key_cache_bytes_max: int = Field(
        32 << 20, ge=0, description="cache of block keys of earlier prompts; a million keys take 19 MB"
    )
    text_cache_bytes_max: int = Field(
        64 << 20,
        ge=0,
        description="cache of earlier texts (words and long prompts), kept verbatim to recognise them; tenants have equal"
        " shares, of which there are 1, 2, 4, 8 or 16; a long prompt that does not fit into one is tokenised anew",
    )
    token_cache_bytes_max: int = Field(
        128 << 20, ge=0, description="cache of token ids of earlier texts; a million ids take 11 MB"
    )

    # The supervisor.
    connector: bool = Field(
        _ENGINE["connector"], description="load the KV connector; off: plain vLLM replicas that share nothing"
    )
    startup_seconds_max: float = Field(
        _ENGINE["startup_seconds_max"], gt=0, description="time within which a replica must be ready"
    )
    health_interval_seconds: float = Field(
        _ENGINE["health_interval_seconds"], gt=0, description="interval between health checks of a replica"
    )
    health_timeout_seconds: float = Field(
        _ENGINE["health_timeout_seconds"], gt=0, description="time allowed for the answer to a health check"
    )
    health_failures_max: int = Field(
        _ENGINE["health_failures_max"], ge=1, description="consecutive failed health checks before a replica is restarted"
    )
    miss_seconds_apart: float = Field(
        _ENGINE["miss_seconds_apart"], ge=0, description="failed health checks closer together than this count as one"
    )
    core_frozen_seconds_max: float = Field(
        _ENGINE["core_frozen_seconds_max"],
        gt=0,
        description="restart an engine that has requests but makes no step and uses no CPU time for this long",
    )
    core_silent_seconds_max: float = Field(
        _ENGINE["core_silent_seconds_max"],
        gt=0,
        description="restart an engine that has requests but makes no step for this long, even if it uses CPU time",
    )
    backoff_seconds_min: float = Field(
        _ENGINE["backoff_seconds_min"], gt=0, description="pause before the first restart of a replica"
    )
    backoff_seconds_max: float = Field(_ENGINE["backoff_seconds_max"], gt=0, description="longest pause before a restart")
    healthy_seconds_reset: float = Field(
        _ENGINE["healthy_seconds_reset"], gt=0, description="once ready for this long, the pauses start over"
    )
    start_failures_max: int = Field(
        _ENGINE["start_failures_max"], ge=1, description="consecutive failed starts before a replica is given up"
    )
    terminate_seconds: float = Field(
        _ENGINE["terminate_seconds"], gt=0, description="time between SIGTERM and SIGKILL when a replica is stopped"
    )
    claim_seconds_max: float = Field(
        _ENGINE["claim_seconds_max"], gt=0, description="time to wait for a previous peerkv to release run_dir and table_dir"
    )
    log_bytes_max: int = Field(
        _ENGINE["log_bytes_max"], ge=4096, description="a replica log larger than this is rotated, even while the replica runs"
    )

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"'{origin}' is neither an origin, such as https://chat.example or http://localhost:3000, nor *"
                )
        return value

    @field_validator("request_log")
    @classmethod
    def _make_path_absolute(cls, value: str) -> str:
        return value if value in ("", "-") else os.path.abspath(os.path.expanduser(value))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(os.fsencode(self.run_dir)) > RUN_DIR_BYTES_MAX:
            raise ValueError(f"run_dir: longer than the {RUN_DIR_BYTES_MAX} bytes that fit into the path of a unix socket")
        sizes = [self.host_memory, *(one.host_memory for one in self.models)]
        if self.host_memory_dir is not None and "auto" in sizes:
            raise ValueError("host_memory_dir: give host_memory a size, as files of another size are begun anew")
        for what, given in (*(("host_memory", size) for size in sizes), ("disk_bytes", self.disk_bytes)):
            if isinstance(given, int) and 0 < given < TIER_BYTES_MIN:
                raise ValueError(f"{what}: {int(given)} bytes hold nothing: write a unit, such as 16GiB")
        if (self.tls_cert is None) is not (self.tls_key is None):
            raise ValueError("tls_cert, tls_key (--tls-cert, --tls-key): give both or none")
        for what in ("name", "api_key"):
            seen = [getattr(tenant, what) for tenant in self.tenants]
            if len(set(seen)) != len(seen):
                raise ValueError(f"tenants: two have the same {what}")
        if both := next((tenant.name for tenant in self.tenants if tenant.salt and tenant.group), None):
            raise ValueError(f"tenants: '{both}' has a salt and a group: give one of them")
        if 0 < self.sse_keep_alive_seconds < SSE_KEEP_ALIVE_SECONDS_MIN:
            raise ValueError(f"sse_keep_alive_seconds: 0, or at least {SSE_KEEP_ALIVE_SECONDS_MIN}")
        if self.admin_key is not None and any(tenant.api_key == self.admin_key for tenant in self.tenants):
            raise ValueError("tenants: one has the admin key as its api_key")
        check_models(self.models, frozenset(self.model_fields_set), self.node_name)
        return self


def load(flags: Mapping[str, Any] | None = None, config: Path | None = None) -> Settings:
    """The settings from `flags` (None values are left out), the environment, files of secrets, the TOML file and the defaults.

    `config` defaults to `$PEERKV_CONFIG`. Raises SettingsError with one line that names the key.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    in_environment = _environment_names()
    if config is None and os.environ.get(CONFIG_VARIABLE):
        config = Path(os.environ[CONFIG_VARIABLE])
    secrets, of_toml = read_secret_files(), read_config(config) if config is not None else {}
    variables = {name: os.environ.get(f"{ENV_PREFIX}{name.upper()}") for name in in_environment}
    from_their_files, named = from_files((given, variables, secrets, of_toml))
    given |= from_their_files
    in_file = {**of_toml, **secrets}
    if "port" not in in_environment:  # else PEERKV_PORT of an orchestrator were taken for it
        in_file.setdefault("port", Settings.model_fields["port"].default)
    # A constructor's values beat the environment, so of the file only what nobody else says is handed in.
    rest = {name: value for name, value in in_file.items() if name not in given and name not in in_environment}
    try:
        return Settings(**given, **rest)
    except ValidationError as error:
        places = {name: f"the file {ENV_PREFIX.lower()}{name}:" for name in secrets}
        places |= {name: f"{ENV_PREFIX}{name.upper()}:" for name in in_environment} | named
        tables = _tables({**given, **rest}, config, places)
        raise SettingsError(in_words(error, tables, Settings.model_fields, rest.keys() - secrets.keys())) from None
    except PydanticSettingsError as error:
        raise SettingsError(not_json(error, ENV_PREFIX)) from None


def engine_settings(settings: Settings, *, model: str, devices: tuple[str, ...]) -> EngineSettings:
    """What the supervisor gets: `model` is resolved, `devices` are the GPUs' ids (none: CPU).

    `replicas="auto"` becomes as many as the GPUs allow, or CPU_REPLICAS_DEFAULT; `host_memory="auto"` is for
    serve.fleets.with_host_memory. Raises engine.fleet.FleetError.
    """
    same = {field.name for field in dataclasses.fields(EngineSettings)} & set(Settings.model_fields)
    values: dict[str, Any] = {name: getattr(settings, name) for name in same}
    values |= {
        "model": model,
        "devices": devices,
        "replicas": resolve_replicas(settings.replicas, devices, devices_each(settings.vllm_args), settings.replicas_per_gpu),
        **{name: 0 for name in ("host_memory", "tier_staging_bytes") if values[name] == "auto"},
        "preload": not devices if settings.preload is None else settings.preload,
        "served_model_name": settings.served_model_name or model,
        "vault": settings.vault.get_secret_value() if settings.vault is not None else "",
    }
    return EngineSettings(**values)


def read_config(path: Path) -> dict[str, Any]:
    """The TOML file's top-level table. Raises SettingsError when it cannot be read or has an unknown key."""
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not a TOML file: {error}") from None
    for name in values:
        _must_be_known(name, f"in {path}")
    return values


def _environment_names() -> frozenset[str]:
    """Settings that the environment sets. Raises SettingsError for an unknown `PEERKV_*` variable."""
    names = set()
    for variable in os.environ:
        upper = variable.upper()
        if not upper.startswith(ENV_PREFIX) or upper in OTHER_VARIABLES or is_of_a_service(upper, os.environ[variable]):
            continue
        name = upper.removeprefix(ENV_PREFIX).lower()
        _must_be_known(name, f"in the environment ({variable})")
        if os.environ[variable]:  # compose files and .env set empty ones for "not set"
            names.add(name)
    return frozenset(names)


def _must_be_known(name: str, where: str) -> None:
    if name not in Settings.model_fields:
        raise SettingsError(f"unknown setting '{name}' {where}{_tables().hint(name)}")


def _tables(values: Mapping[str, Any] = {}, config: Path | None = None, places: Mapping[str, str] = {}) -> Tables:
    """What can be said of tables that are wrong."""
    kinds = {"tenants": Tenant.model_fields, "models": ModelSettings.model_fields}
    return Tables(kinds, Settings.model_fields, values, str(config or ""), places)


def address(settings: Settings) -> str:
    """The URL under which this machine reaches the gateway."""
    host = _EVERYWHERE.get(settings.host, settings.host)
    scheme = "http" if settings.tls_cert is None else "https"
    return f"{scheme}://[{host}]:{settings.port}" if ":" in host else f"{scheme}://{host}:{settings.port}"
