"""One real fleet for all tests here: two replicas, float32 so that import and cold run can be compared, several tenants."""

import contextlib
from collections.abc import Generator, Iterator

import openai
import pytest

from gateway.settings import Tenant
from gateway.tenants.salts import tenant_salt
from tests.real.fleet import MARK, RESTART_SECONDS_MAX, SALT_SECRET, Fleet, until
from tests.real.leftovers import leaked_files, marked_processes, shared_files
from tests.real.prompts import Words

ONE = Tenant(name="one", api_key="key-of-tenant-one")
TWO = Tenant(name="two", api_key="key-of-tenant-two")
FRIENDS = tuple(Tenant(name=name, api_key=f"key-of-tenant-{name}", group="friends") for name in ("three", "four"))
"""Two that share a prefix cache."""
LAST_FILES = ("test_kills.py", "test_the_end.py")
END_SECONDS_MAX = 15.0

CONFIG = f"""
backoff_seconds_max = 2.0
parity_interval_seconds = 0

[[tenants]]
name = "one"
api_key = "{ONE.api_key.get_secret_value()}"

[[tenants]]
name = "two"
api_key = "{TWO.api_key.get_secret_value()}"
accepts_loss = true
"""
CONFIG_OF_FRIENDS = "".join(
    f'[[tenants]]\nname = "{each.name}"\napi_key = "{each.api_key.get_secret_value()}"\ngroup = "{each.group}"\n'
    for each in FRIENDS
)
VLLM_ARGS = (
    *("--dtype", "float32"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)

_running: list[Fleet] = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What kills replicas comes last. With `-n 2 --dist loadgroup` one process has the fleet, another what starts its own."""
    items.sort(key=lambda item: LAST_FILES.index(item.path.name) if item.path.name in LAST_FILES else -1)
    if config.getoption("loadgroup", default=False) and not all(hasattr(item, "_nodeid") for item in items):
        raise pytest.UsageError("this version of pytest makes xdist's groups void: pip install 'pytest<9.2'")
    for item in items:
        shared = "running_fleet" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("fleet" if shared else item.path.name))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure comes with the logs of the gateway and the replicas."""
    report = yield
    if report.failed and _running and "tests/real" in str(item.path):
        report.sections.append(("logs of the real fleet", _running[-1].logs()))
    return report


@contextlib.contextmanager
def running(fleet: Fleet) -> Iterator[Fleet]:
    """Run a fleet until the block ends; it must end without a trace."""
    before = shared_files()
    _running.append(fleet)
    try:
        fleet.start()
        fleet.wait_ready()
        yield fleet
        ended_before = fleet.process.poll() is not None  # test_the_end.py ends it
        assert fleet.stop() == 0 or ended_before, fleet.logs()
        assert_no_trace(fleet, before)
    finally:
        fleet.stop()
        fleet.remove()
        _running.remove(fleet)


@pytest.fixture(scope="session")
def shared_memory_before() -> frozenset:
    """The files in shared memory before the fleet came."""
    return shared_files()


@pytest.fixture(scope="session")
def running_fleet(shared_memory_before) -> Iterator[Fleet]:
    """The fleet, started once."""
    config, key = CONFIG + CONFIG_OF_FRIENDS, ONE.api_key.get_secret_value()
    with running(Fleet(config, vllm_args=VLLM_ARGS, key=key)) as fleet:
        yield fleet


@pytest.fixture
def fleet(running_fleet) -> Fleet:
    """The fleet with both replicas ready."""
    running_fleet.wait_ready(RESTART_SECONDS_MAX)
    return running_fleet


@pytest.fixture(scope="session")
def words(running_fleet) -> Words:
    return Words(running_fleet.model_dir)


@pytest.fixture
def client(fleet) -> Iterator[openai.OpenAI]:
    """The official client, as tenant one."""
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key=fleet.key, max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def salt() -> str:
    """What keeps tenant one's cache its own."""
    return tenant_salt(SALT_SECRET.encode(), ONE.name)


def assert_no_trace(fleet: Fleet, before: frozenset) -> None:
    """No process of the fleet lives, and its sockets, tables and shared memory are gone, END_SECONDS_MAX from now at most."""
    until(lambda: not marked_processes(MARK, fleet.mark), END_SECONDS_MAX, "no process of the fleet lives")
    until(lambda: not leaked_files(before), END_SECONDS_MAX, "no shared memory is left")
    assert not fleet.table_dir.exists()
    assert not fleet.run_dir.exists()
