"""Inside vLLM: the connector that it loads (`kv_connector_module_path=engine.connector`, `kv_connector=PeerKVConnector`).

`scheduler` runs in the engine's core process, `worker` in each of its workers. A new source of KV is opened in
`import_sources`. May import tiers, host_process.kept_memory and transport; never gateway.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.connector.peerkv_connector import PeerKVConnector

__all__ = ["PeerKVConnector"]


def __getattr__(name: str) -> Any:
    """Import the connector, and vLLM with it, only when it is asked for by name."""
    if name == "PeerKVConnector":
        from engine.connector.peerkv_connector import PeerKVConnector

        return PeerKVConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
