"""Threads, which may be short: that passes, so it is an error like those of other nodes."""

import threading
from collections.abc import Callable

from transport.errors import is_shortage
from transport.node.messages import NodeError


def start_thread(name: str, call: Callable[..., None], *args: object) -> None:
    """Have a thread call `call`; it ends with the process. Raises NodeError if none can be started."""
    try:
        threading.Thread(target=call, args=args, name=name, daemon=True).start()
    except RuntimeError as error:
        if not is_shortage(error):
            raise
        raise NodeError(f"this node is short of threads: {error}") from error
