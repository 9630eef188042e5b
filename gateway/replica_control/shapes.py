"""What `/replicas` shows."""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, Field


class Step(StrEnum):
    """What is being done with a replica on request."""

    NONE = ""
    HANDING_OVER = "handing over"  # its hottest prefixes are put into the caches of others
    DRAINING = "draining"  # its requests are waited for
    RESTARTING = "restarting"  # until it is ready again


class ControlledReplica(BaseModel):
    """A replica, and what an admin has had done with it."""

    name: str
    node: str = Field("", description="the other node that runs it and alone changes it, empty for a replica of this node")
    state: str = Field(description="starting, ready, draining, backoff, failed or stopped")
    reason: str
    device: str
    restarts: int
    requests: int = Field(description="requests of this gateway that it has now")
    step: Step = Field(Step.NONE, description="what is being done with it on request, empty for nothing")
    handed_over_tokens: int = Field(0, description="tokens of its prefixes that others took over in the last drain or restart")
    failure: str = Field("", description="why the last restart on request failed, empty if it did not")


class ReplicaList(BaseModel):
    """All replicas. `restartable`: this process runs them, else somebody else does and only draining works here."""

    restartable: bool
    replicas: list[ControlledReplica]
