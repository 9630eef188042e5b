"""Options of vLLM's server that are not passed to a replica, each with the reason and what to do instead.

Clients never talk to a replica: options about them concern the front door, and accepting one without effect would be a trap.
tests/unit/engine/replicas/test_vllm_options.py checks every front-end option of the installed vLLM.
"""

from collections.abc import Iterator, Mapping, Sequence

_OURS = "replicas listen on unix sockets only; peerkv has --host and --port"
_TLS = "replicas listen on unix sockets only: the front door speaks TLS with --tls-cert and --tls-key of peerkv"
_CORS = "the front door answers browsers: set cors_origins of peerkv"
_REPLICAS = "peerkv runs the replicas itself, see its number of replicas"
_NOT_SERVED = "it is about an endpoint that the front door does not serve"
_PAGES = "clients never see a replica's own pages; the front door has /openapi.json"
_HEADS = "a replica hears the gateway alone: set header_bytes_max of peerkv"

REFUSED: Mapping[str, str] = {
    "--model": "give the model to peerkv itself",
    "--served-model-name": "give the name to peerkv itself",
    "--config": "what it holds would not be seen here: give the options one by one",
    "--uds": "each replica listens on a socket of its own",
    "--host": _OURS,
    "--port": _OURS,
    "--api-key": "the front door authenticates, replicas are private to it: configure tenants of peerkv",
    "--root-path": "the front door knows vLLM's own paths only: let the proxy take the prefix away",
    "--middleware": "it would see the gateway's requests, not the clients'",
    "--allowed-origins": _CORS,
    "--allowed-methods": _CORS,
    "--allowed-headers": _CORS,
    "--allow-credentials": _CORS,
    "--ssl-keyfile": _TLS,
    "--ssl-certfile": _TLS,
    "--ssl-ca-certs": _TLS,
    "--ssl-cert-reqs": _TLS,
    "--ssl-ciphers": _TLS,
    "--enable-ssl-refresh": _TLS,
    "--h11-max-incomplete-event-size": _HEADS,
    "--h11-max-header-count": _HEADS,
    "--disable-fastapi-docs": _PAGES,
    "--enable-offline-docs": _PAGES,
    "--enable-tokenizer-info-endpoint": _NOT_SERVED,
    "--enable-server-load-tracking": _NOT_SERVED,
    "--enable-scale-out": _NOT_SERVED,
    "--enable-flash-late-interaction": _NOT_SERVED,
    "--tool-server": _NOT_SERVED,
    "--cohere-is-reasoning-model": _NOT_SERVED,
    "--headless": "a replica needs its HTTP server",
    "--tokens-only": "a replica needs its OpenAI endpoints",
    "--grpc": "a replica needs its HTTP server",
    "--grpc-port": "the gateway does not speak gRPC",
    "--api-server-count": "a replica has one HTTP server",
    "-asc": "a replica has one HTTP server",
    "--data-parallel-size": _REPLICAS,
    "-dp": _REPLICAS,
    "--data-parallel-rank": _REPLICAS,
    "-dpn": _REPLICAS,
    "--data-parallel-start-rank": _REPLICAS,
    "-dpr": _REPLICAS,
    "--data-parallel-size-local": _REPLICAS,
    "-dpl": _REPLICAS,
    "--data-parallel-address": _REPLICAS,
    "-dpa": _REPLICAS,
    "--data-parallel-rpc-port": _REPLICAS,
    "-dpp": _REPLICAS,
    "--data-parallel-backend": _REPLICAS,
    "-dpb": _REPLICAS,
    "--data-parallel-hybrid-lb": _REPLICAS,
    "-dph": _REPLICAS,
    "--data-parallel-external-lb": _REPLICAS,
    "-dpe": _REPLICAS,
    "--data-parallel-multi-port-external-lb": _REPLICAS,
    "-dpm": _REPLICAS,
    "--data-parallel-supervisor-port": _REPLICAS,
    "--dp-supervisor-probe-interval-s": _REPLICAS,
    "--dp-supervisor-probe-timeout-s": _REPLICAS,
    "--dp-supervisor-probe-failure-threshold": _REPLICAS,
}
_NEGATION = "--no-"
_LETTERS_MIN = len("--") + 3  # of an abbreviation that is looked at; shorter ones fit several options, and vLLM refuses them


def option_name(word: str) -> str:
    """`word` as vLLM's parser names the option: without its value, underscores as dashes; "" for a value."""
    return word.partition("=")[0].replace("_", "-") if word.startswith("-") else ""


def refusals(words: Sequence[str]) -> Iterator[str]:
    """Say why each refused option among `words` is refused. vLLM takes abbreviations, so these count too."""
    for word in words:
        name = option_name(word)
        name = f"--{name.removeprefix(_NEGATION)}" if name.startswith(_NEGATION) else name
        full = name if name in REFUSED else _abbreviated(name)
        if full:
            said = word.partition("=")[0]
            meant = "" if said.replace("_", "-") == full else f" ({full})"
            yield f"vLLM option {said}{meant} cannot be passed on: {REFUSED[full]}"


def schedules_by_priority(words: Sequence[str]) -> bool:
    """Whether vLLM is told to let requests of a lower priority value go first; the last word on it counts."""
    found = ""
    for at, word in enumerate(words):
        if option_name(word) == "--scheduling-policy":
            found = word.partition("=")[2] if "=" in word else "".join(words[at + 1 : at + 2])
    return found == "priority"


def _abbreviated(name: str) -> str:
    """The refused option that `name` is the beginning of, "" if none."""
    if not name.startswith("--") or len(name) < _LETTERS_MIN:
        return ""
    return next((option for option in REFUSED if option.startswith(name)), "")
