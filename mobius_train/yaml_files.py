"""Reading and writing of YAML that people write: the words of YAML 1.2, and no contents that grow beyond the file.

PyYAML follows YAML 1.1, where no, yes, on and off are false and true, 1e-4 is a text, and 2024-01-01 is a date. In
YAML 1.2 only true and false are switches. The fields that are switches accept the other words too, by their type.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

# Of a recipe: the longest list of captions, and a model's configuration in a stage's options.
MOST_VALUES, MOST_LEVELS = 1_000_000, 32
BOOL, FLOAT, TIME = (f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "timestamp"))


class _Loader(yaml.SafeLoader):
    """See the module. PyYAML takes seconds before it fails at its own limit of levels."""

    level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.level += 1
        _check_level(self.level)
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, words) for tag, words in resolvers if tag not in (BOOL, TIME)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# The whole of a word: PyYAML compares its beginning.
_EXPONENT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+\Z"), list("-+.0123456789")
_Loader.add_implicit_resolver(BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
_Loader.add_implicit_resolver(FLOAT, *_EXPONENT)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or `parse_yaml` would take for another value."""


_Dumper.add_implicit_resolver(FLOAT, *_EXPONENT)


def dump_yaml(values: Any) -> str:
    """YAML from which `parse_yaml` reads the same values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not YAML, is nested too deeply, contains itself, or has aliases that multiply its contents.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}, 0) > MOST_VALUES:
            raise ValueError(f"its aliases (*name) repeat its contents to more than {MOST_VALUES} values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    finally:
        if loader is not None:
            loader.dispose()


def _count(node: yaml.Node, counts: dict[yaml.Node, int | None], level: int) -> int:
    """The number of values below a node, with those of an alias each time that it is used."""
    _check_level(level)
    if node not in counts:
        counts[node] = None
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        counts[node] = 1 + (
            sum(_count(part, counts, level + 1) for part in inner) if isinstance(node, yaml.CollectionNode) else 0
        )
    found = counts[node]
    if found is None:
        raise ValueError("an alias (*name) is inside of what it names")
    return found


def _check_level(level: int) -> None:
    if level > MOST_LEVELS:
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")
