"""The fields of a chat's body, weighed one by one: what its prompt depends on, and what it does not.

vLLM's POST /tokenize knows few of them, so that only a look into its source tells. A field that is not here, of a newer vLLM
say, may do anything: the request goes as text then. The tests compare with the installed vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENDERED = frozenset(
    (
        *("messages", "tools", "tool_choice", "chat_template_kwargs", "reasoning_effort", "documents"),
        *("add_generation_prompt", "continue_final_message", "add_special_tokens"),
    )
)
"""What a template is rendered with, here and in the engine."""

ENGINES = ("chat_template", "truncate_prompt_tokens", "truncation_side", "mm_processor_kwargs", "media_io_kwargs")
"""With any of these, the prompt is not known here."""

_ANSWERED_FROM_TEXT = frozenset(("echo", "return_prompt_text"))
"""The prompt is the same, but its text comes back in the answer, and ids bring none."""

_INERT = frozenset(
    (
        *("model", "stream", "stream_options", "stream_interval", "user", "n", "seed"),
        *("max_tokens", "max_completion_tokens", "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output"),
        *("ignore_eos", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty"),
        *("repetition_penalty", "length_penalty", "repetition_detection", "logit_bias", "allowed_token_ids", "bad_words"),
        *("logprobs", "top_logprobs", "prompt_logprobs", "logprob_token_ids", "return_tokens_as_token_ids"),
        *("return_token_ids", "return_token_offsets", "skip_special_tokens", "spaces_between_special_tokens"),
        *("response_format", "structured_outputs", "parallel_tool_calls", "include_reasoning", "thinking_token_budget"),
        *("use_beam_search", "watermarking"),
        # OpenAI's, which vLLM passes over.
        *("metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"),
    )
)
"""About the answer alone. (One renderer of vLLM's puts response_format into the prompt: it is not followed here at all.)"""

KNOWN = RENDERED | _INERT | _ANSWERED_FROM_TEXT | frozenset(ENGINES)
_IDS_SUFFICE = RENDERED | _INERT


def all_known(body: Mapping[str, Any]) -> bool:
    """Tell whether it is known of every field what it does to the prompt."""
    return KNOWN.issuperset(body)


def ids_suffice(body: Mapping[str, Any]) -> bool:
    """Tell whether the engine can answer from the prompt's ids alone."""
    return _IDS_SUFFICE.issuperset(body) or (all_known(body) and not any(body.get(name) for name in _ANSWERED_FROM_TEXT))
