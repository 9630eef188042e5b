"""How --help arranges the flags of the settings: in groups, each flag with an example of its value."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping

GROUPS: Mapping[str, Mapping[str, str]] = {
    "replicas": {
        "replicas": "4",
        "replicas_per_gpu": "2",
        "served_model_name": "my-model",
        "model_aliases": '"gpt-4o small"',
        "connector": "no",
        "preload": "no",
        "namespace": "blue",
        "startup_seconds_max": "1800",
        "start_failures_max": "10",
    },
    "where it listens, and for whom": {
        "host": "0.0.0.0",
        "port": "9000",
        "tls_cert": "/etc/peerkv/cert.pem",
        "tls_key": "/etc/peerkv/key.pem",
        "allow_anyone": "yes",
        "reuse_port": "yes",
        "admin_key": '"$ADMIN_KEY"',
        "admin_key_file": "/run/secrets/admin-key",
        "tenants_file": "/run/secrets/tenants.json",
        "keys_file": "/etc/peerkv/keys.toml",
        "salt_secret_file": "/etc/peerkv/salt-secret",
        "cors_origins": "https://chat.example",
    },
    "limits of keys": {
        "limits_file": "/var/lib/peerkv/limits.json",
        "limits_valkey": "valkey://limits.lan:6379",
        "limits_valkey_password_file": "/run/secrets/limits",
        "limits_valkey_ca_file": "/etc/peerkv/limits-ca.pem",
        "limits_valkey_wait_seconds_max": "0.1",
        "cached_token_price": "0.5",
        "generated_token_price": "4",
        "answer_tokens_default": "1024",
    },
    "caches, and steering by them": {
        "imports": "no",
        "host_memory": "16GiB",
        "host_memory_dir": "/dev/shm/kept",
        "host_memory_ttl_seconds": "86400",
        "disk": "/var/cache/peerkv",
        "disk_bytes": "500GiB",
        "disk_ttl_seconds": "604800",
        "vault": "valkey://vault.lan:6379",
        "vault_password_file": "/run/secrets/vault",
        "vault_ca_file": "/etc/peerkv/vault-ca.pem",
        "vault_ttl_seconds": "86400",
        "tier_codec": "raw",
        "lossy": "int8",
        "tier_secret_file": "/etc/peerkv/tier-secret",
        "tier_tenant_share_max": "0.25",
        "tier_staging_bytes": "4GiB",
        "tier_wait_seconds_max": "0.2",
        "pin_share_max": "0.5",
        "prefixes_kept_max": "64",
        "slow_start_seconds": "60",
        "hash_name": "sha256",
    },
    "other nodes": {
        "node_name": "node-a",
        "node_address": "10.0.0.1:7710",
        "node_keys": "/etc/peerkv/node-a",
        "node_peers": "node-b=10.0.0.2:7710",
        "join": "valkeys://10.0.0.9:6379",
        "staging_memory": "4GiB",
        "node_transport": "tcp",
    },
    "limits on requests": {
        "requests_in_flight_max": "4096",
        "replica_requests_max": "64",
        "queue_requests_max": "256",
        "queue_seconds_max": "10",
        "connections_max": "10000",
        "uploads_max": "256",
        "body_bytes_max": "67108864",
        "bodies_bytes_max": "4294967296",
        "answer_bytes_max": "1048576",
        "large_body_workers": "2",
        "response_head_seconds_max": "600",
        "retry_attempts_max": "1",
        "continue_streams": "no",
        "eject_failures_max": "5",
        "drain_seconds": "120",
        "sse_keep_alive_seconds": "15",
    },
    "logs and figures": {
        "log_level": "warning",
        "access_log": "yes",
        "otlp_traces_endpoint": "http://127.0.0.1:4317",
        "audit_log": "/var/log/peerkv/audit.jsonl",
        "request_log": "/var/log/peerkv/requests.jsonl",
        "log_bytes_max": "104857600",
        "replica_metrics": "no",
        "ledger_requests_max": "65536",
        "prefixes_tracked_max": "262144",
        "parity_interval_seconds": "60",
    },
    "directories, created with mode 0700": {
        "run_dir": "/run/peerkv",
        "table_dir": "/dev/shm/peerkv",
        "log_dir": "/var/log/peerkv",
    },
    "memory of the gateway's caches": {
        "key_cache_bytes_max": "134217728",
        "text_cache_bytes_max": "268435456",
        "token_cache_bytes_max": "536870912",
    },
}
"""Names of settings by group, each with an example; that of a switch is "yes" or "no"."""
OF_REPLICAS = frozenset({**GROUPS["replicas"], **GROUPS["other nodes"]}) - {"startup_seconds_max"} | {
    "host_memory",
    "host_memory_dir",
    "host_memory_ttl_seconds",
    "disk",
    "disk_bytes",
    "disk_ttl_seconds",
    "vault",
    "vault_password_file",
    "vault_ca_file",
    "vault_ttl_seconds",
    "tier_codec",
    "tier_secret_file",
    "tier_tenant_share_max",
    "tier_staging_bytes",
    "pin_share_max",
    "hash_name",
    "log_bytes_max",
}
"""Settings of the replicas alone: `peerkv gateway` has no flag for them."""
_OF_BOTH = frozenset({"port", "lossy", "startup_seconds_max", "log_level", "run_dir", "table_dir", "log_dir", "drain_seconds"})
OF_GATEWAY = frozenset(name for names in GROUPS.values() for name in names) - OF_REPLICAS - _OF_BOTH
"""Settings of the gateway alone: `peerkv engine` has no flag for them."""
UNITS = {"seconds": "SECONDS", "bytes": "BYTES", "share": "SHARE", "memory": "SIZE"}
"""What stands for a value in the help, by a word in the setting's name."""
MIB = 1 << 20


class WholeFlags(argparse.HelpFormatter):
    """Help whose lines do not end within a flag, so that it can be copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def example(name: str, value: str) -> str:
    """The flag with this value, as it is typed."""
    flag = name.replace("_", "-")
    if value in ("yes", "no"):
        return f"--{flag}" if value == "yes" else f"--no-{flag}"
    return f"--{flag} {value}"


def unit_of(name: str) -> str | None:
    """What stands for the value of a setting with a unit."""
    return next((unit for word, unit in UNITS.items() if word in name.split("_")), None)


def size_in_words(name: str, value: int) -> str:
    """A number, and for bytes that are whole MiB, how many of those."""
    return f"{value}, {value // MIB} MiB" if unit_of(name) == "BYTES" and value and value % MIB == 0 else str(value)
