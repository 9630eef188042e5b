"""What the supervisor and the replica host send each other: one JSON object per line, in both directions."""

import msgspec

LINE_BYTES_MAX = 1 << 20


class Spawn(msgspec.Struct, tag="spawn", tag_field="op", frozen=True):
    """Start a replica. `argv` is a whole command line, or in a preloaded host the server's arguments alone."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]  # the whole environment
    socket: str  # removed before the start and after the end
    scratch: str  # a directory of the replica's own: made for it, removed after it
    log: str
    log_bytes_max: int
    host_memory_bytes: int = 0  # kept for its host-memory tier; 0: none
    host_memory_dir: str = ""  # in files of this directory; empty: without a name
    program: bool = False  # no replica: `argv` is a whole command line in any host


class Terminate(msgspec.Struct, tag="terminate", tag_field="op", frozen=True):
    """Ask a replica to end (SIGTERM to its first process). Unknown names are ignored."""

    name: str


class Kill(msgspec.Struct, tag="kill", tag_field="op", frozen=True):
    """End a replica and all its processes at once. Unknown names are ignored."""

    name: str


class Quit(msgspec.Struct, tag="quit", tag_field="op", frozen=True):
    """Kill all replicas, remove the directories, and end. The end of the input has the same effect."""


class Hello(msgspec.Struct, tag="hello", tag_field="event", frozen=True):
    """The host is running."""

    pid: int


class Preloaded(msgspec.Struct, tag="preloaded", tag_field="event", frozen=True):
    """The host has imported what replicas need, in `seconds`."""

    seconds: float


class Spawned(msgspec.Struct, tag="spawned", tag_field="event", frozen=True):
    """A replica's first process is running (it may still fail to start)."""

    name: str
    pid: int


class Exited(msgspec.Struct, tag="exit", tag_field="event", frozen=True):
    """A replica's first process ended; `code` is negative for a signal. The rest of its group was killed."""

    name: str
    pid: int
    code: int


Command = Spawn | Terminate | Kill | Quit
Event = Hello | Preloaded | Spawned | Exited
_commands: msgspec.json.Decoder[Command] = msgspec.json.Decoder(Command)
_events: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def encode_line(message: Command | Event) -> bytes:
    """Encode `message` as a line."""
    return msgspec.json.encode(message) + b"\n"


def decode_command(line: bytes) -> Command:
    """Decode the command in `line`. Raises msgspec.MsgspecError."""
    return _commands.decode(line)


def decode_event(line: bytes) -> Event:
    """Decode the event in `line`. Raises msgspec.MsgspecError."""
    return _events.decode(line)
