"""A YAML file as plain values: no object is ever made, no key is said twice, nothing refers to anything else."""

from __future__ import annotations

from pathlib import Path

import yaml

from fluxedu.errors import SweepError

MOST_BYTES = 4 << 20
_DEEPEST = 20
_Safe = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Strict(_Safe):
    """YAML lets a key come twice, and the last one wins in silence."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
                raise SweepError(f"{key.value!r} is there twice, the second time in line {key.start_mark.line + 1}.")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path):
    """What the file says; raises SweepError where it is no YAML, too large, too deep, or uses anchors."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        written = data.decode("utf-8")
    except UnicodeDecodeError:
        raise SweepError("it is not text in UTF-8.") from None
    except OSError as error:
        raise SweepError(f"it cannot be read ({error.strerror}).") from None
    if len(data) > MOST_BYTES:
        raise SweepError(f"it has more than {MOST_BYTES:,} bytes.")
    try:
        _plain(written)
        return yaml.load(written, _Strict)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        where = f" (line {mark.line + 1})" if mark else ""
        raise SweepError(f"it is no YAML{where}: {' '.join(str(problem).split())}.") from None
    except SweepError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:  # 2020-99-99, 0x, !!float a
        raise SweepError(f"it has a value that is none: {' '.join(str(error).split())}.") from None


def _plain(written: str) -> None:
    """Refuse what could make a small file a large thing: aliases, and depth."""
    depth = 0
    for event in yaml.parse(written, _Safe):
        if isinstance(event, yaml.AliasEvent):
            raise SweepError(f"it uses the alias *{event.anchor}; write the value out.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise SweepError(f"it is nested more than {_DEEPEST} deep.")
