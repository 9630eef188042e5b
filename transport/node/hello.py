"""How a connection between nodes begins, whatever carries its frames: who may call whom, and what is answered to a Hello."""

import ipaddress
import ssl

from transport.node.keys import caller
from transport.node.messages import Hello, Message, NodeError, Refused, Welcome, agreed
from transport.node.nixl.ability import NO_NIXL, Ability, agreed_with


def check_reached(address: str, context: ssl.SSLContext | None) -> None:
    """Raise NodeError if a node without keys has reached another host, at an IP address: anybody may have answered there.

    Before anything is sent: names of nodes may come from a registry, and what is sent without keys everybody can read.
    """
    if context is None and not ipaddress.ip_address(address).is_loopback:
        raise NodeError(f"without keys a node calls those on loopback alone, not {address}: `peerkv node-keys` makes some")


def answer_to(
    message: Message,
    tls: ssl.SSLSocket | ssl.SSLObject | None,
    here: str,
    release: str,
    nixl: Ability = NO_NIXL,
) -> tuple[Hello, Welcome | Refused]:
    """Return what a caller said first, and the answer; `tls` is what its connection runs through, None without keys.

    `nixl` is what we can do with NIXL.

    Raises NodeError for what is no Hello: that is not answered.
    """
    if not isinstance(message, Hello):
        raise NodeError("it does not say hello")
    try:
        version = agreed(message)
        if tls is not None and caller(tls.getpeercert()) != message.node:
            raise NodeError(f"the certificate is not {message.node}'s")
    except NodeError as error:
        return message, Refused(str(error))
    both = agreed_with(nixl, message.nixl)
    return message, Welcome(here, version, release, both.version, both.reason)


def check_welcome(answer: Message, node: str) -> Welcome:
    """Return how `node` welcomes us. Raises NodeError for any other answer."""
    if isinstance(answer, Refused):
        raise NodeError(f"it refuses us: {answer.reason}")
    if not isinstance(answer, Welcome) or answer.node != node:
        raise NodeError(f"who answers there is not {node}")
    return answer
