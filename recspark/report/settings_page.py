"""The reference page of all settings, made from their classes: `recspark settings --markdown`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from recspark.config import Config
from recspark.models.registry import MODELS

_HEAD = """\
# Settings

Every setting, its range, its default and what it means; made from the classes by
`recspark settings --markdown > docs/settings.md`, and tested against them. `recspark settings` prints those
that hold here and now, `recspark doctor` looks at what they point to.

Where a setting may stand; what comes later wins:

| layer | what it is for |
|---|---|
| the defaults below | |
| `conf/base.yaml` | what holds everywhere |
| `conf/env/<env>.yaml` | the machine or cluster, chosen by `--env` |
| the file that `RECSPARK_SETTINGS` names | your own, in the same form, wherever you keep it |
| `RECSPARK_SOURCE`, `RECSPARK_ROOT` | `source` and `paths.root`, for a shell or a scheduler |
| `--set a.b=value` | one command; may be repeated, the value is YAML |

`source` is the name of a file in `conf/sources`, or any file that ends with `.yaml`. Settings of a model are
read from `conf/models/<model>.yaml`, over them from `conf/tuned/<source>/<model>.yaml` (what
`recspark tune --write` found for that source), then from `model_settings` of the layers above; on the command
line `--set models.ease.reg=100`. `RECSPARK_CONF` names another folder in the place of `conf`.

An unknown key, a key that is there twice, a number outside its range, `.nan` and `.inf` are errors before
anything starts. Values of `spark.conf` and `source.options` whose name holds a secret (key, token, password, …)
are neither stored nor shown; keep them in a file of your own, a command line is everybody's to read.
"""
_ROW = "| `{name}` | {kind} | {default} | {meaning} |"
_COLUMNS = "| setting | value | default | meaning |\n|---|---|---|---|"


def settings_page() -> str:
    """Return the page as Markdown. Imports the settings class of every model."""
    parts = [_HEAD]
    for title, prefix, section in _sections():
        rows = [
            _row(f"{prefix}{name}", field)
            for name, field in section.model_fields.items()
            if not _is_section(field.annotation)
        ]
        about = " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split())
        parts.append("\n".join([f"## {title}\n", f"{about}\n", _COLUMNS, *rows]) + "\n")
    return "\n".join(parts)


def _sections() -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Give title, prefix of the names, and class of each section, models last."""
    yield "The night", "", Config
    yield from _below(Config, "")
    for name, spec in MODELS.items():
        yield f"Model `{name}`", f"models.{name}.", spec.load().settings_class


def _below(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, type[BaseModel]]]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield f"`{prefix}{name}`", f"{prefix}{name}.", kind
            yield from _below(kind, f"{prefix}{name}.")


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def described(field: FieldInfo) -> dict[str, str]:
    """Return what a setting may be, its default as YAML, and what it means with unit and source."""
    default = "needed"
    if not field.is_required():
        default = _plain(field.get_default(call_default_factory=True))
    return {
        "value": ", ".join([_kind(field.annotation), *_bounds(field.metadata)]),
        "default": default,
        "meaning": " ".join((field.description or "").split()),
    }


def _row(name: str, field: FieldInfo) -> str:
    about = described(field)
    default = about["default"] if field.is_required() else f"`{about['default']}`"
    return _ROW.format(
        name=name,
        kind=about["value"],
        default=default.replace("|", "\\|"),
        meaning=about["meaning"].replace("|", "\\|"),
    )


def _kind(annotation: Any) -> str:
    """Return what an annotation allows, in words.

    >>> _kind(int | None), _kind(dict[str, float]), _kind(Literal["a", "b"])
    ('whole number or null', 'map of text to number', '`a` or `b`')
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if p is type(None) else _kind(p) for p in parts)
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        return f"list of {_kind(parts[0])}"
    if origin in (dict, Mapping):
        return f"map of {_kind(parts[0])} to {_kind(parts[1])}"
    if hasattr(annotation, "__metadata__"):
        return ", ".join([_kind(parts[0]), *_bounds(annotation.__metadata__)])
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true or false",
        Any: "anything",
    }
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(metadata: Any) -> list[str]:
    """Return the bounds of a value in words: `≥ 1`, `at least 1 long`."""
    signs = {
        "ge": "≥ {}",
        "gt": "> {}",
        "le": "≤ {}",
        "lt": "< {}",
        "min_length": "at least {} long",
    }
    out = []
    for bound in metadata:
        for name, words in signs.items():
            value = getattr(bound, name, None)
            if value is not None:
                out.append(words.format(f"{value:,}" if isinstance(value, int) else value))
    return out


def _plain(value: Any) -> str:
    """Return a default as YAML has it.

    >>> _plain(None), _plain(True), _plain((10, 20)), _plain({"purchase": 1.0}), _plain("")
    ('null', 'true', '[10, 20]', '{purchase: 1.0}', "''")
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
    return str(value) or "''"
