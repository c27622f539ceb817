"""The reference page of all settings, made from their classes: `recspark settings --markdown`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from recspark.config import Config
from recspark.config.rules import KINDS_OF_RULES
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
    sections = [_HEAD]
    for title, prefix, section in _sections():
        rows = [
            _row(f"{prefix}{name}", field)
            for name, field in section.model_fields.items()
            if not _is_section(field.annotation)
        ]
        description = " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split())
        sections.append("\n".join([f"## {title}\n", f"{description}\n", _COLUMNS, *rows]) + "\n")
    return "\n".join(sections)


def _sections() -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Yield (title, prefix of the setting names, class) of each section. The sections of rules
    and of models come last.
    """
    yield "The night", "", Config
    yield from _subsections(Config, "")
    for kind, rule in KINDS_OF_RULES.items():
        yield f"Rule `{kind}`", "rules.NAME.", rule
    for name, spec in MODELS.items():
        yield f"Model `{name}`", f"models.{name}.", spec.load().settings_class


def _subsections(
    section: type[BaseModel], prefix: str
) -> Iterator[tuple[str, str, type[BaseModel]]]:
    for name, field in section.model_fields.items():
        kind, path = field.annotation, f"{prefix}{name}"
        if get_origin(kind) is dict:  # name -> section, such as `publish.lists`
            kind, path = get_args(kind)[1], f"{path}.NAME"
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield f"`{path}`", f"{path}.", kind
            yield from _subsections(kind, f"{path}.")


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def setting_description(field: FieldInfo) -> dict[str, str]:
    """Return the `value` that a setting may have, its `default` as YAML, and its `meaning` with
    unit and source.
    """
    default = "needed"
    if not field.is_required():
        default = _yaml(field.get_default(call_default_factory=True))
    return {
        "value": ", ".join([_in_words(field.annotation), *_bounds(field.metadata)]),
        "default": default,
        "meaning": " ".join((field.description or "").split()),
    }


def _row(name: str, field: FieldInfo) -> str:
    description = setting_description(field)
    default = description["default"] if field.is_required() else f"`{description['default']}`"
    return _ROW.format(
        name=name,
        kind=description["value"],
        default=default.replace("|", "\\|"),
        meaning=description["meaning"].replace("|", "\\|"),
    )


def _in_words(annotation: Any) -> str:
    """Return in words what values a type annotation allows.

    >>> _in_words(int | None), _in_words(dict[str, float]), _in_words(Literal["a", "b"])
    ('whole number or null', 'map of text to number', '`a` or `b`')
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        words = ["null" if p is type(None) else _in_words(p) for p in arguments]
        return " or ".join(dict.fromkeys(words))
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in arguments)
    if origin is tuple:
        return f"list of {_in_words(arguments[0])}"
    if origin in (dict, Mapping):
        return f"map of {_in_words(arguments[0])} to {_in_words(arguments[1])}"
    if hasattr(annotation, "__metadata__"):
        return ", ".join([_in_words(arguments[0]), *_bounds(annotation.__metadata__)])
    if _is_section(annotation):
        return "section"
    words_of_types = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true or false",
        Any: "anything",
    }
    return words_of_types.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounds(metadata: Any) -> list[str]:
    """Return the bounds of a value in words, such as `≥ 1` or `at least 1 long`."""
    signs = {
        "ge": "≥ {}",
        "gt": "> {}",
        "le": "≤ {}",
        "lt": "< {}",
        "min_length": "at least {} long",
    }
    bounds = []
    for bound in metadata:
        for name, words in signs.items():
            value = getattr(bound, name, None)
            if value is not None:
                bounds.append(words.format(f"{value:,}" if isinstance(value, int) else value))
    return bounds


def _yaml(value: Any) -> str:
    """Return a default value as YAML.

    >>> _yaml(None), _yaml(True), _yaml((10, 20)), _yaml({"purchase": 1.0}), _yaml("")
    ('null', 'true', '[10, 20]', '{purchase: 1.0}', "''")
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    return str(value) or "''"
