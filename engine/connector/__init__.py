"""The connector that vLLM loads (`kv_connector_module_path=engine.connector`, `kv_connector=PeerKVConnector`).

Runs inside vLLM: `scheduler` in the engine's core process, `worker` in each of its workers. May import only transport.
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
