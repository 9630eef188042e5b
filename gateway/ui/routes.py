"""GET /ui and the files of its page.

They hold no figures: the page asks `/kv/*` for those, with the admin key if one is set, which nobody could send with a page's
address. Without an admin key the page itself is for callers on this machine too.
"""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI, Request, Response

from gateway.errors import UnknownPath
from gateway.tenants.access import AdminAccess

INDEX = "index.html"
_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def page_files() -> dict[str, tuple[bytes, str]]:
    """The page's files by name, each with its content type."""
    files = (resources.files("gateway.ui") / "page").iterdir()
    return {file.name: (file.read_bytes(), _TYPES[file.name.rpartition(".")[2]]) for file in files}


def add_page(app: FastAPI, access: AdminAccess) -> None:
    """Add the page to the admin application."""
    files = page_files()

    @app.get("/ui", include_in_schema=False)
    @app.get("/ui/{name}", include_in_schema=False)
    async def page(request: Request, name: str = INDEX) -> Response:
        access.check_page(request.scope)
        if name not in files:
            raise UnknownPath("GET", request.url.path)
        content, kind = files[name]
        return Response(content, headers={**_HEADERS, "content-type": kind})
