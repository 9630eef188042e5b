"""Where the files of the images and of those who run them are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[3]
DOCKER = REPOSITORY / "docker"
DOCKERFILES = ("gateway.Dockerfile", "engine.Dockerfile")


def read_yaml(path: str) -> Any:
    """The one document of a file below docker/."""
    return yaml.safe_load((DOCKER / path).read_text())


def read_manifests(path: str) -> list[dict[str, Any]]:
    """All documents of a file below docker/."""
    return [document for document in yaml.safe_load_all((DOCKER / path).read_text()) if document]
