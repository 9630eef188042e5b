"""What the relay counts: shown in /kv/stats and named for Prometheus in the same shape."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field


@dataclass(slots=True)
class RelayCounters:
    """Events since the start."""

    requests: Annotated[int, Field(description="requests taken")] = 0
    refused: Annotated[int, Field(description="answered with an error that the client can fix, status below 500")] = 0
    retries: Annotated[int, Field(description="requests sent again to another replica")] = 0
    replicas_lost: Annotated[int, Field(description="connections to replicas that failed or broke")] = 0
    streams_continued: Annotated[int, Field(description="event streams that another replica went on with")] = 0
    streams_broken: Annotated[int, Field(description="event streams that ended with an error")] = 0
    clients_left: Annotated[int, Field(description="requests whose client left")] = 0
    internal_errors: Annotated[int, Field(description="defects of the gateway")] = 0
