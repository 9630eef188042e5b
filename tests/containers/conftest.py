"""One run of the compose file for all tests here. tests/containers/run.sh builds the images and sets the environment."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.containers.stack import SERVICES, START_SECONDS_MAX, Stack, podman

_running: list[Stack] = []


@pytest.fixture(scope="session")
def clone() -> Path:
    """The clone that the images were built from."""
    if "PEERKV_CLONE" not in os.environ:
        pytest.skip("`make containers` builds the images and runs these")
    return Path(os.environ["PEERKV_CLONE"])


@pytest.fixture(scope="session")
def stack(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The containers of the profiles cpu and observability, ready."""
    found = Stack(clone, tmp_path_factory.mktemp("trial"))
    _running.append(found)
    try:
        found.client.headers["authorization"] = f"Bearer {found.add_key('trial', '--requests-per-minute', '100000')}"
        found.up()
        found.wait_ready(START_SECONDS_MAX)
        yield found
    finally:
        found.down()  # volumes stay: they go with run.sh's directory, or save the next run the model's download


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure comes with what the containers said last."""
    report = yield
    if report.failed and _running:
        states = podman("ps", "--all", "--format", "{{.Names}} {{.Status}}", check=False)
        report.sections.append(("containers", states))
        for service in SERVICES:
            report.sections.append((f"logs of {service}", _running[-1].logs(service)))
    return report
