"""The admin rule of gateway/tenants/access.py, before every route of a router."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request

from gateway.api.shapes import ErrorAnswer
from gateway.tenants.access import AdminAccess


def admin_router(access: AdminAccess) -> APIRouter:
    """A router whose routes answer admins alone; the document says what others get."""

    async def admin(request: Request) -> None:
        access.check(request.scope)

    return APIRouter(
        tags=["admin"],
        dependencies=[Depends(admin)],
        responses={
            400: {"model": ErrorAnswer, "description": "The request is malformed"},
            401: {"model": ErrorAnswer, "description": "The admin key is missing or wrong"},
            403: {"model": ErrorAnswer, "description": "There is no admin key, and the caller is not on this machine"},
        },
    )
