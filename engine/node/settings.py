"""What an agent has to know."""

from pathlib import Path

import msgspec

from engine.frame_tiers.vault.address import AddressRefused, VaultAddress, parse
from transport.node.keys import check_address, server_context
from transport.node.messages import NodeError
from transport.node.names import HOLDER_OF_A_NODE, NODE_NAME
from transport.node.nixl.ability import Choice

PORT_MAX = 65534


class Peer(msgspec.Struct, frozen=True):
    """Another node, and where it is called; its blocks are on the port after that."""

    name: str
    host: str
    port: int

    @property
    def address(self) -> str:
        """As people write it."""
        return f"{self.host}:{self.port}"


class NodeSettings(msgspec.Struct, frozen=True):
    """`keys` is the directory with this node's keys, "" for none; `join` where nodes find each other, "" for `peers` alone.

    `transport` is how blocks may come, and may be read here.
    """

    name: str
    host: str
    port: int
    table_dir: str
    run_dir: str
    keys: str = ""
    peers: tuple[Peer, ...] = ()
    join: str = ""
    staging_bytes: int = 1 << 30
    release: str = ""
    transport: Choice = "auto"

    def check(self) -> None:
        """Raise NodeError for a name, an address or keys that cannot be used."""
        check_name(self.name)
        check_address(self.host, self.keys_dir)
        server_context(self.keys_dir)
        if self.join:
            read_join(self.join)
        if not self.peers and not self.join:
            raise NodeError("no other node is named: --node-peers names some, --join says where they find each other")

    @property
    def keys_dir(self) -> Path | None:
        """The directory with the keys, None for none."""
        return Path(self.keys) if self.keys else None


def read_join(url: str) -> VaultAddress:
    """Return the address of the server that nodes find each other by. Raises NodeError."""
    try:
        return parse(url)
    except AddressRefused as error:
        raise NodeError(f"join: {str(error).replace('the vault', 'the server')}") from error


def read_address(text: str) -> tuple[str, int]:
    """Return the host and the port of `host:port`. Raises NodeError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) <= PORT_MAX:
        raise NodeError(f"{text!r} is not address:port, with a port of at most {PORT_MAX} (the next one is for blocks)")
    return host, int(port)


def read_peer(text: str) -> Peer:
    """Return the node told by `name=host:port`. Raises NodeError."""
    name, sign, address = text.partition("=")
    check_name(name)
    if not sign:
        raise NodeError(f"{text!r} is not name=address:port")
    return Peer(name, *read_address(address))


def check_name(name: str) -> None:
    """Raise NodeError for what is no name of a node."""
    if not NODE_NAME.fullmatch(name):
        raise NodeError(f"{name!r} is no name of a node: small letters, digits and dashes, at most 32")
    if HOLDER_OF_A_NODE.fullmatch(name):
        raise NodeError(f"{name!r} is what a replica or a store of a node is called: call the node otherwise, such as node-a")
