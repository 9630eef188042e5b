"""From a request to keep a prefix to its tenant and token ids, or a clear refusal."""

from __future__ import annotations

from typing import Protocol

from gateway.errors import InvalidRequest, Unavailable
from gateway.kept_prefixes.shapes import PrefixRequest
from gateway.planner.planner import Planner
from gateway.prompts.parity import Parity
from gateway.prompts.prompt_reader import characters_in
from gateway.prompts.tokenizer.service import NoTokenIds, TextTooLong, TokenService
from gateway.tenants.tenants import TenantContext
from gateway.token_ids import TokenIds
from gateway.upstream.served_models import ModelsCache


class Callers(Protocol):
    """The part of gateway.tenants.Tenants that is needed here."""

    def named(self, name: str) -> TenantContext | None: ...
    @property
    def open(self) -> bool: ...


class PrefixReader:
    """Belongs to the event loop's thread; texts are tokenised in another thread."""

    def __init__(self, planner: Planner, tokens: TokenService, tenants: Callers, models: ModelsCache) -> None:
        self._planner = planner
        self._tokens = tokens
        self._tenants = tenants
        self._models = models

    async def read(self, wanted: PrefixRequest) -> tuple[TenantContext, TokenIds, int]:
        """Return whose prefix it is, its ids, and the size of the blocks that are kept of it. Raises ApiError."""
        tenant = self._tenant(wanted.tenant)
        if wanted.model:
            await self._models.card(wanted.model)
        ids = await self._ids(wanted, tenant)
        sizes = [table.block_size for table in self._planner.fleet.now().tables.values()]
        if not sizes:
            raise Unavailable("No replica has a block table, so prefixes cannot be kept.")
        if len(ids) < min(sizes):
            why = f"The prefix has {len(ids)} tokens, and only whole blocks of {min(sizes)} are kept."
            raise InvalidRequest(why, code="prefix_too_short")
        return tenant, ids, min(sizes)

    def _tenant(self, name: str) -> TenantContext:
        if not name and not self._tenants.open:
            raise InvalidRequest("'tenant' is missing: each tenant has a cache of its own.", param="tenant")
        found = self._tenants.named(name)
        if found is None:
            raise InvalidRequest(f"There is no tenant '{name}'.", param="tenant", code="unknown_tenant")
        return found

    async def _ids(self, wanted: PrefixRequest, tenant: TenantContext) -> TokenIds:
        if wanted.ids is not None:
            return TokenIds.of(wanted.ids)
        verdict = self._planner.prompts.parity.chat if wanted.messages is not None else self._planner.prompts.parity.completions
        if verdict.parity is not Parity.EXACT:
            why = (
                f"The gateway's token ids are not proven to be the engine's ({verdict.parity.value}). Give the prefix as 'ids'."
            )
            raise InvalidRequest(why, code="token_ids_unknown", status=409)
        characters = characters_in([wanted.text, wanted.messages, wanted.tools])
        try:
            return await self._planner.prompts.in_thread(characters, self._encode, wanted, tenant.salt)
        except TextTooLong as long:
            raise InvalidRequest(f"The prefix has at least {long.tokens_min} tokens.", code="prefix_too_long") from long
        except NoTokenIds as unknown:
            raise InvalidRequest(f"The prefix cannot be tokenised: {unknown}.", code="token_ids_unknown") from unknown

    def _encode(self, wanted: PrefixRequest, salt: str) -> TokenIds:
        limit = self._planner.prompts.parity.context_tokens
        if wanted.messages is None:
            return self._tokens.encode(wanted.text or "", tokens_max=limit, tenant=salt)
        body = {"messages": wanted.messages, "tools": wanted.tools, "chat_template_kwargs": wanted.chat_template_kwargs}
        given = {name: value for name, value in body.items() if value is not None}
        return self._tokens.encode_chat({**given, "add_generation_prompt": False}, limit, tenant=salt)
