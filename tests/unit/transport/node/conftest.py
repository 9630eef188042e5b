"""NIXL's processes are started once for all tests: that takes a second."""

from collections.abc import Iterator

import pytest

from tests.unit.transport.node.nixl_nodes import NixlPair, nixl_pair


@pytest.fixture(scope="package")
def nixl() -> Iterator[NixlPair]:
    with nixl_pair() as pair:
        yield pair


@pytest.fixture(scope="package")
def nixl_apart() -> Iterator[NixlPair]:
    with nixl_pair(apart=True) as pair:
        yield pair
