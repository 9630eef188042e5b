"""Checks a replica: GET /health on its socket, and how many requests it has."""

import re
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp

from transport.errors import SHORTAGES

_REQUESTS = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{[^}\n]*\})? ([0-9.e+]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Health:
    """One answer. `dead`: the server itself says that its engine is dead. `why` is "" if it is healthy.

    `unknown`: it could not be asked, for a reason on our side.
    """

    why: str
    dead: bool = False
    unknown: bool = False

    @property
    def well(self) -> bool:
        """Whether the replica can take requests."""
        return not self.why


class HealthProbe:
    """Checks one replica. Each check uses a new connection, so that a dead process cannot look alive."""

    def __init__(self, socket: str, timeout_seconds: float) -> None:
        self._socket = socket
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._session: aiohttp.ClientSession | None = None

    async def ask(self) -> Health:
        """Return the replica's health; never raises for anything the replica does."""
        try:
            async with self._opened().get("http://replica/health") as answer:
                if answer.status == HTTPStatus.OK:
                    return Health("")
                if answer.status == HTTPStatus.SERVICE_UNAVAILABLE:
                    return Health("its engine has died", dead=True)
                return Health(f"/health answers {answer.status}")
        except TimeoutError:
            return Health(f"no answer to /health in {self._timeout.total:g} s")
        except (aiohttp.ClientError, OSError) as error:
            return Health(f"cannot ask /health: {error}", unknown=getattr(error, "errno", None) in SHORTAGES)

    async def requests(self) -> int | None:
        """Return how many requests vLLM says that it has; None if it does not say so, or not at all."""
        try:
            async with self._opened().get("http://replica/metrics") as answer:
                return requests_in(await answer.text()) if answer.status == HTTPStatus.OK else None
        except (TimeoutError, aiohttp.ClientError, OSError):
            return None

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.UnixConnector(path=self._socket, force_close=True)
            self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
        return self._session

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


def requests_in(metrics: str) -> int | None:
    """The requests that vLLM's metrics count as running or waiting; None if they do not say."""
    found = _REQUESTS.findall(metrics)
    return round(sum(map(float, found))) if found else None
