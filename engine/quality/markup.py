"""Plain text out of a Wikipedia page: good enough for a model to read, not a parser."""

import re

_NESTED = (re.compile(r"\{\{[^{}]*\}\}"), re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL))
_DEPTH_MAX = 12
_DROPPED = re.compile(
    r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<(math|gallery|timeline|code|pre|nowiki).*?</\1>|\[\[(?:File|Image|Category):[^\[\]]*"
    r"(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]|<[^>]{1,200}>|^[*#:;|!=][^\n]*$",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_OUTSIDE = re.compile(r"\[https?://\S+\s*([^\]]*)\]")
_ENTITIES = {"&nbsp;": " ", "&ndash;": "-", "&mdash;": "-", "&quot;": '"', "&lt;": "<", "&gt;": ">", "&amp;": "&"}


def plain_text(page: str) -> str:
    """Return the running text of a page's wikitext."""
    text = page
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    for _ in range(_DEPTH_MAX):
        shorter = _NESTED[1].sub("", _NESTED[0].sub("", text))
        if shorter == text:
            break
        text = shorter
    text = _OUTSIDE.sub(r"\1", _LINK.sub(r"\1", _DROPPED.sub("", text)))
    text = re.sub(r"'{2,}", "", text)
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return "\n\n".join(line for line in lines if len(line) > 80)
