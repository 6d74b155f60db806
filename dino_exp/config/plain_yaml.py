"""YAML of a stranger, read as plain data: no tags, no anchors, no key twice, bounded before it is built."""

from __future__ import annotations

from typing import Any

import yaml

from dino_exp.fsio import DamagedFileError

MAX_DEPTH = 16
MAX_NODES = 20_000
MAX_NUMBER_CHARS = 100  # YAML knows numbers to the base of 60: a long one takes minutes to build, or overflows


def parse_plain_yaml(data: bytes, what: str) -> Any:
    """The value of one YAML document. Raises DamagedFileError, naming `what`, for anything but plain data."""
    try:
        return yaml.load(data.decode(), _PlainLoader)  # derived from SafeLoader, and stricter
    except (yaml.YAMLError, ValueError) as problem:  # ValueError: bad UTF-8, absurd numbers, impossible dates
        reason = " ".join(str(problem).split())[:300]
        raise DamagedFileError(f"{what}: not plain YAML ({reason})") from problem


class _PlainLoader(yaml.SafeLoader):
    """A safe loader without aliases (a "billion laughs" needs them), merge keys and doubled keys."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = self.num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _problem("anchors and aliases are not read here", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _problem(f"the tag {event.tag} is not read here", event.start_mark)
        self.num_nodes += 1
        if self.depth >= MAX_DEPTH or self.num_nodes > MAX_NODES:
            raise _problem(f"more than {MAX_DEPTH} levels or {MAX_NODES} values", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                raise _problem("a key must be a plain word", key.start_mark)
            if key.value in seen:
                raise _problem(f"the key {key.value!r} comes twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _check_scalar(node: yaml.ScalarNode) -> None:
    if node.tag != "tag:yaml.org,2002:str" and len(node.value) > MAX_NUMBER_CHARS:
        raise _problem(f"a number of more than {MAX_NUMBER_CHARS} characters", node.start_mark)
    if any("\ud800" <= char <= "\udfff" for char in node.value):  # written as an escape; no file could hold it
        raise _problem("half a character", node.start_mark)


def _problem(message: str, mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=message, problem_mark=mark)
