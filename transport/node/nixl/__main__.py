"""`python -m transport.node.nixl PACKAGE NAME FD PARENT`: a process with NIXL, which serves the channel behind FD."""

import ctypes
import logging
import os
import signal
import socket
import sys

from transport.node.nixl.binding import NixlAgent
from transport.node.nixl.child import Child
from transport.node.nixl.orders import Channel, Failed

_PR_SET_PDEATHSIG = 1


def main(package: str, name: str, descriptor: str, parent: str) -> None:
    """Serve, then end at once: what NIXL would still have to do, it need not."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        return
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal's or a service's: the agent ends us itself
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s {name}: %(message)s")
    channel = Channel(socket.socket(fileno=int(descriptor)))
    try:
        agent = NixlAgent(package, name)
    except Exception as error:  # noqa: BLE001 - whatever it is that NIXL lacks here, the agent says so and goes on without
        channel.send(Failed(0, f"{type(error).__name__}: {error}"[:1000]))
        return
    Child(agent, channel).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(0)
