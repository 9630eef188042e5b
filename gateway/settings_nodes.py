"""The settings of a node among others, which belong to its agent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import ByteSize, Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode

from engine.node.settings import NodeSettings, check_name, read_address, read_join, read_peer
from gateway.settings_types import AbsolutePath
from transport.node.messages import NodeError
from transport.node.nixl.ability import Choice


class OtherNodes(BaseSettings):
    """Of the settings, those that concern other nodes."""

    node_name: str = Field("", description="what other nodes call this one, such as node-a; empty: this node is alone")
    node_address: str = Field(
        "", description="address:port that other nodes reach this one by; it takes the next port too, for blocks"
    )
    node_keys: AbsolutePath | None = Field(
        None, description="directory with this node's ca.pem and node.pem, of `peerkv node-keys`; unset: loopback only"
    )
    node_peers: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="other nodes as name=address:port, separated by spaces"
    )
    node_transport: Choice = Field(
        "auto",
        description="how blocks come from other nodes, and may be read here: tcp; nixl, over whatever it finds, unencrypted TCP"
        " too; or auto: nixl where both nodes have it and RDMA, and it was measured to be sooner",
    )
    join: str = Field("", description="where nodes find each other: the URL of a Valkey or Redis server")
    staging_memory: ByteSize = Field(
        ByteSize(1 << 30), ge=1 << 20, description="memory for blocks that are fetched from other nodes, as far as it is used"
    )

    @field_validator("node_peers", mode="before")
    @classmethod
    def _split_peers(cls, value: Any) -> Any:
        return tuple(value.split()) if isinstance(value, str) else value

    @field_validator("node_name", "node_address", "node_peers", "join")
    @classmethod
    def _check_words(cls, value: Any, info: ValidationInfo) -> Any:
        try:
            for each in value if isinstance(value, tuple) else (value,) if value else ():
                _READ[info.field_name or ""](each)
        except NodeError as error:
            raise ValueError(str(error)) from error
        return value


_READ: dict[str, Callable[[str], object]] = {
    "node_name": check_name,
    "node_address": read_address,
    "node_peers": read_peer,
    "join": read_join,
}


class Directories(Protocol):
    """What else an agent needs of the settings."""

    @property
    def run_dir(self) -> Path: ...
    @property
    def table_dir(self) -> Path: ...


def node_settings(nodes: OtherNodes, directories: Directories, release: str) -> NodeSettings:
    """Return what the node's agent has to know. Raises NodeError if that is not enough, or the keys cannot be used."""
    if not nodes.node_address:
        raise NodeError("node_address: say where other nodes reach this one, such as --node-address 10.0.0.1:7710")
    host, port = read_address(nodes.node_address)
    told = NodeSettings(
        name=nodes.node_name,
        host=host,
        port=port,
        table_dir=str(directories.table_dir),
        run_dir=str(directories.run_dir),
        keys=str(nodes.node_keys or ""),
        peers=tuple(read_peer(each) for each in nodes.node_peers),
        join=nodes.join,
        staging_bytes=int(nodes.staging_memory),
        release=release,
        transport=nodes.node_transport,
    )
    told.check()
    return told
