"""YAML of plain values, bounded before work: what a file of kilobytes could expand to is refused.

YAML 1.1 reads `no` as false, `1:30` as 90 and `1e-4` as text. Here the first two are text and the last is a number.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode
from yaml.composer import Composer
from yaml.constructor import ConstructorError

from vqgen.errors import UserError

from .read import read_text

MAX_YAML = 2**18
"""Largest YAML text, in characters; a configuration has a few thousand."""
MAX_VALUES = 20_000
"""Most values in a YAML text, those of aliases counted wherever they are used."""
_TAG, _PLAIN = "tag:yaml.org,2002:", ("str", "int", "float", "bool", "null", "seq", "map")


class _Checked(Composer):
    """Checks the composed text before any value is made of it."""

    def get_single_node(self) -> Node | None:
        try:
            node = super().get_single_node()
            if node is not None:
                self._count(node, {})
        except RecursionError:
            raise ConstructorError(None, None, "nested too deeply", None) from None
        return node

    def _count(self, node: Node, known: dict[Node, int]) -> int:
        """Check a node and what it holds, each node once; return the number of values with aliases expanded."""
        if node not in known:
            known[node] = 0  # until its own are counted: found again before, it holds itself
            inner = self._inner(node)
            known[node] = 1 + sum(self._count(each, known) for each in inner)
        elif not known[node]:
            raise ConstructorError(None, None, "an alias holds itself", node.start_mark)
        if known[node] > MAX_VALUES:
            raise ConstructorError(None, None, f"more than {MAX_VALUES} values, aliases expanded", node.start_mark)
        return known[node]

    def _inner(self, node: Node) -> list[Node]:
        """The nodes that a node holds. Raises `ConstructorError` where it is no plain value, or has a key twice."""
        kind = node.tag.removeprefix(_TAG)
        if kind not in _PLAIN:
            raise ConstructorError(None, None, f"{node.tag} is no tag of a plain value", node.start_mark)
        if isinstance(node, SequenceNode):
            return node.value
        if isinstance(node, MappingNode):
            keys = [key.value for key, _ in node.value]
            if odd := next((key for key, _ in node.value if not isinstance(key, ScalarNode)), None):
                raise ConstructorError(None, None, "a key is no text", odd.start_mark)
            key, times = Counter(keys).most_common(1)[0] if keys else ("", 1)
            if times > 1:
                raise ConstructorError(None, None, f"{key} is given twice", node.start_mark)
            plain = [key for key, _ in node.value if key.tag != f"{_TAG}merge"]
            return [*plain, *(value for _, value in node.value)]
        implicit = self.resolve(ScalarNode, node.value, (True, False)).removeprefix(_TAG)  # type: ignore[attr-defined]
        if kind not in ("str", implicit) and (kind, implicit) != ("float", "int"):
            raise ConstructorError(None, None, f"{node.value[:40]!r} is no {kind}", node.start_mark)
        return []


class YamlLoader(_Checked, yaml.SafeLoader):
    """YAML where `no` and `1:30` are text and 1e-4 is a number."""


YamlLoader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0].rpartition(":")[2] in ("null", "merge")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _first, _pattern in (
    ("bool", "tTfF", r"true|True|TRUE|false|False|FALSE"),
    ("int", "-+0123456789", r"[-+]?(0|[1-9][0-9]*)"),
    ("float", "-+.0123456789", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"),
    ("float", "-+.", r"[-+]?\.inf|\.nan"),
):
    YamlLoader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), list(_first))


class _TextLoader(_Checked, yaml.BaseLoader):
    """YAML whose scalars are all text."""


class YamlDumper(yaml.SafeDumper):
    """Quotes text that `YamlLoader` or another YAML reader would read as something else."""


YamlDumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + YamlLoader.yaml_implicit_resolvers.get(first, [])
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *YamlLoader.yaml_implicit_resolvers}
}


def parse_yaml(text: str, as_text: bool = False) -> Any:
    """The value of a YAML text; every scalar is a string where `as_text` is set. Raises `yaml.YAMLError`.

    Refused: more than `MAX_YAML` characters or `MAX_VALUES` values, aliases that hold themselves, tags of other than
    plain values, keys given twice, numbers that Python does not convert.
    """
    if len(text) > MAX_YAML:
        raise yaml.YAMLError(f"it has {len(text)} characters, at most {MAX_YAML} are read")
    try:
        return yaml.load(text, _TextLoader if as_text else YamlLoader)
    except ValueError as error:  # an int of thousands of digits
        raise yaml.YAMLError(str(error)) from error


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. Raises `UserError` where it is missing, unreadable or refused by `parse_yaml`."""
    try:
        return parse_yaml(read_text(path, MAX_YAML))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def dump_yaml(tree: Any) -> str:
    """YAML of plain values, in their order, that `parse_yaml` reads back the same."""
    return yaml.dump(tree, Dumper=YamlDumper, sort_keys=False)
