"""The OpenAPI document: made from the application itself, kept in openapi/openapi.json, compared by a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

import gateway
from gateway import __version__
from gateway.api.endpoints import ADMIN_PATHS, PATHS
from gateway.errors import GatewayError

KEPT = Path("openapi/openapi.json")
"""Where a checkout keeps it."""
TITLE = "peerkv"
_METHODS = ("get", "post", "delete")
_DESCRIPTION = (
    "OpenAI's API, and what vLLM has beside it, over vLLM replicas that import each other's KV cache. "
    "These endpoints take and give what vLLM does; fields that are not listed are passed on."
)
_FASTAPI_ERRORS = ("HTTPValidationError", "ValidationError")


class DocumentDiffers(GatewayError):
    """The kept document is not what the application serves."""


class NotWritten(GatewayError):
    """The file cannot be written; the message says why."""


class NoCheckout(GatewayError):
    """The directory is not where the document is kept; the message says what to do."""


def kept_in(directory: Path, code: Path = Path(gateway.__file__)) -> Path:
    """The document of the checkout in `directory`, whose gateway `code` is. Raises NoCheckout."""
    if not (directory / KEPT.parent).is_dir():
        raise NoCheckout(f"there is no {KEPT.parent}/ here: go to a checkout of peerkv, or name a file with --output")
    own = directory / "gateway" / "__init__.py"
    if own.exists() and not own.samefile(code):
        raise NoCheckout(
            f"this is the peerkv of {code.parents[1]}, and here is another: "
            "set PYTHONPATH=. to have the document of the one here, or name a file with --output"
        )
    path = directory / KEPT
    if path.exists() and not own.exists() and not _is_ours(path):
        raise NoCheckout(
            f"{path} is not peerkv's: it is left as it is; go to a checkout of peerkv, or name a file with --output"
        )
    return path


def _is_ours(path: Path) -> bool:
    """Whether a file holds a peerkv's document, of whatever version."""
    try:
        return bool(json.loads(path.read_text("utf-8"))["info"]["title"] == TITLE)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def describe(app: FastAPI) -> dict[str, Any]:
    """The application's document. FastAPI's own error form is left out: no answer ever has it."""
    document = get_openapi(title=TITLE, version=__version__, description=_DESCRIPTION, routes=app.routes)
    for path, operations in document["paths"].items():
        for method in _METHODS:
            if method in operations:
                operations[method]["responses"].pop("422", None)
                if path in PATHS or path.startswith("/v1/"):
                    operations[method]["security"] = [{"apiKey": []}, {}]
                elif path.startswith(ADMIN_PATHS):
                    operations[method]["security"] = [{"adminKey": []}, {}]
    components = document["components"]
    for name in _FASTAPI_ERRORS:
        components["schemas"].pop(name, None)
    components["securitySchemes"] = {
        "apiKey": {
            "type": "http",
            "scheme": "bearer",
            "description": "a tenant's key, where tenants or a keys file are configured",
        },
        "adminKey": {"type": "http", "scheme": "bearer", "description": "the admin key; without one: loopback callers"},
    }
    return document


def as_text(document: dict[str, Any]) -> str:
    """The document as the file holds it."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def write(document: dict[str, Any], path: Path) -> None:
    """Replace the file. Raises NotWritten."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_text(document), "utf-8")
    except OSError as error:
        raise NotWritten(f"cannot write {path}: {error.strerror}") from None


def check(document: dict[str, Any], path: Path) -> None:
    """Raises DocumentDiffers when the file holds anything else."""
    try:
        kept = path.read_text("utf-8")
    except OSError as error:
        raise DocumentDiffers(f"cannot read {path}: {error.strerror}; write it with `peerkv openapi`") from None
    except UnicodeDecodeError:
        raise DocumentDiffers(f"{path} is not text") from None
    if kept != as_text(document):
        raise DocumentDiffers(f"{path} is not what the gateway serves; update it with `peerkv openapi`")
