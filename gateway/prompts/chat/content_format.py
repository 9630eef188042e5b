"""Whether a chat template wants a message's content as one string or as a list of parts, found as vLLM finds it.

vLLM looks in the template's syntax tree for a loop over a message's content. Ours has to come to the same answer, so this
follows vllm/renderers/hf.py (0.32) step by step.
"""

from collections import deque
from collections.abc import Iterator
from typing import Literal

from jinja2 import Environment, TemplateError, nodes

ContentFormat = Literal["string", "openai"]


class _UnknownShape(Exception):
    """The tree has a shape that vLLM gives up on."""


def detect_content_format(environment: Environment, template: str) -> ContentFormat:
    """Return "openai" if `template` loops over the parts of a message's content, else "string"."""
    try:
        tree = environment.parse(template)
        for _ in _content_loops(tree):
            return "openai"
    except (TemplateError, _UnknownShape):
        return "string"
    return "string"


def _name(node: nodes.Node) -> str:
    if not isinstance(node, nodes.Name):
        raise _UnknownShape
    return node.name


def _is_variable(node: nodes.Node | None, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name


def _is_attribute(node: nodes.Node, name: str, key: str) -> bool:
    if isinstance(node, nodes.Getitem):
        return _is_variable(node.node, name) and isinstance(node.arg, nodes.Const) and node.arg.value == key
    return isinstance(node, nodes.Getattr) and _is_variable(node.node, name) and node.attr == key


def _refers(node: nodes.Node, name: str, key: str | None = None) -> bool:
    """Tell whether `node` is the variable `name`, or its `key`, seen through filters, tests and slices."""
    if isinstance(node, nodes.Filter):
        return node.node is not None and _refers(node.node, name, key)
    if isinstance(node, nodes.Test):
        return _refers(node.node, name, key)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _refers(node.node, name, key)
    return _is_attribute(node, name, key) if key else _is_variable(node, name)


def _aliases(tree: nodes.Template, name: str) -> Iterator[str]:
    yield name
    waiting = deque([name])
    while waiting:
        known = waiting.popleft()
        for assignment in tree.find_all(nodes.Assign):
            if _refers(assignment.node, known):
                alias = _name(assignment.target)
                yield alias
                if alias != known:
                    waiting.append(alias)


def _message_names(tree: nodes.Template) -> Iterator[str]:
    aliases = list(_aliases(tree, "messages"))
    for loop in tree.find_all(nodes.For):
        if any(_refers(loop.iter, alias) for alias in aliases):
            yield _name(loop.target)


def _content_parameters(tree: nodes.Template, macro: nodes.Macro, messages: list[str]) -> set[str]:
    """Return the parameters of `macro` that receive a message's content in some call."""
    found: set[str] = set()
    names = [argument.name for argument in macro.args]
    for call in tree.find_all(nodes.Call):
        if not isinstance(call.node, nodes.Name) or call.node.name != macro.name:
            continue
        given = [*zip(names, call.args, strict=False), *((word.key, word.value) for word in call.kwargs)]
        for name, value in given:
            if name in names and any(_refers(value, message, "content") for message in messages):
                found.add(name)
    return found


def _content_loops(tree: nodes.Template) -> Iterator[str]:
    messages = list(_message_names(tree))
    in_macros: set[int] = set()
    parameters: dict[int, set[str]] = {}
    for macro in tree.find_all(nodes.Macro):
        received = _content_parameters(tree, macro, messages)
        for loop in macro.find_all(nodes.For):
            in_macros.add(id(loop))
            if received:
                parameters[id(loop)] = received
    for loop in tree.find_all(nodes.For):
        over = loop.iter.name if isinstance(loop.iter, nodes.Name) else None
        if (
            any(_refers(loop.iter, message, "content") for message in messages)
            or over in parameters.get(id(loop), ())
            or (over == "content" and id(loop) not in in_macros)
        ):
            yield _name(loop.target)
