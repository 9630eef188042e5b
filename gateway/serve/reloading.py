"""SIGHUP: the settings are read again, those that can take effect do, and the others are named."""

from __future__ import annotations

import logging
from collections.abc import Callable

from gateway.errors import SettingsError
from gateway.serve.banner import say
from gateway.settings import Settings

RELOADED = frozenset(
    {
        "admin_key",
        "admin_key_file",
        "answer_bytes_max",
        "answer_tokens_default",
        "bodies_bytes_max",
        "body_seconds_max",
        "cached_token_price",
        "connect_seconds",
        "control_seconds",
        "drain_seconds",
        "generated_token_price",
        "log_level",
        "requests_in_flight_max",
        "response_head_seconds_max",
        "retry_attempts_max",
        "slow_start_seconds",
        "tenants",
        "tenants_file",
        "upstream_idle_seconds",
    }
)
"""The settings that take effect while the gateway runs."""
OF_ENGINE = frozenset({"drain_seconds", "log_level"})
"""Those of `peerkv engine` that do."""

Again = Callable[[], Settings]


class Reloading:
    """What is in force, as loaded; `again` loads the settings as at the start, `use` takes over those that changed.

    `use` may raise SettingsError, and has taken over nothing then. The values are never told: they may be secrets.
    """

    def __init__(
        self, settings: Settings, again: Again | None, use: Callable[[Settings], None], takes: frozenset[str] = RELOADED
    ) -> None:
        self.settings = settings
        self._again = again
        self._use = use
        self._takes = takes

    def __call__(self) -> None:
        """Read them again. What is wrong with them is said, and then nothing changes."""
        if self._again is None:
            return
        try:
            found = self._again()
        except SettingsError as error:
            say(f"the settings stay as they are: {error}")
            return
        if gone := [name for name in ("admin_key", "tenants") if getattr(self.settings, name) and not getattr(found, name)]:
            # a file that is empty may be one that is being written
            say(
                f"the settings stay as they are: without {' and '.join(gone)} more callers would be let in; a restart does that"
            )
            return
        changed = {name for name in Settings.model_fields if getattr(found, name) != getattr(self.settings, name)}
        taken, later = sorted(changed & self._takes), sorted(changed - self._takes)
        if taken:
            fresh = self.settings.model_copy(update={name: getattr(found, name) for name in taken})
            try:
                self._use(fresh)
            except SettingsError as error:
                say(f"the settings stay as they are: {error}")
                return
            self.settings = fresh
            logging.getLogger().setLevel(self.settings.log_level.upper())
            say(f"changed from now on: {', '.join(taken)}")
        if later:
            say(f"changed by a restart alone: {', '.join(later)}")
        if not changed:
            say("no setting was changed")
