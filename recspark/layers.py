"""Settings read from `conf/`: at most four visible layers, later wins, unknown key = error.

The layers: `conf/base.yaml`, `conf/env/<env>.yaml`, the source named there
(`conf/sources/<name>.yaml`), `--set a.b=c`. A model's settings live in `conf/models/<name>.yaml`
and are typed by the model's own settings class (`recspark.models.registry`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from recspark.config import Config
from recspark.errors import ConfigError, suggest


def load_config(
    env: str = "local",
    overrides: Sequence[str] = (),
    *,
    folder: Path | None = None,
) -> Config:
    """Return the resolved settings for `env`, with `--set a.b=c` strings on top.

    Raises ConfigError naming the key (with a suggestion), the value and where it came from.
    """
    folder = folder or conf_dir()
    layers = _read_yaml(folder / "base.yaml")
    layers["env"] = env
    envs = sorted(p.stem for p in (folder / "env").glob("*.yaml"))
    if env not in envs:
        raise ConfigError(f"unknown environment '{env}'.{suggest(env, envs)}")
    layers = _merge(layers, _read_yaml(folder / "env" / f"{env}.yaml"))
    changes = [_parse_override(text) for text in overrides]
    for path, value in changes:
        if path == ["source"]:
            layers["source"] = value
    source = layers.get("source")
    if isinstance(source, str):
        sources = sorted(p.stem for p in (folder / "sources").glob("*.yaml"))
        if source not in sources:
            raise ConfigError(f"unknown source '{source}'.{suggest(source, sources)}")
        layers["source"] = {"name": source, **_read_yaml(folder / "sources" / f"{source}.yaml")}
    settings = {p.stem: _read_yaml(p) for p in sorted((folder / "models").glob("*.yaml"))}
    layers["model_settings"] = _merge(settings, layers.get("model_settings") or {})
    for path, value in changes:
        if path != ["source"]:
            _set(layers, path, value)
    try:
        return Config.model_validate(layers)
    except ValidationError as error:
        raise ConfigError(_explain(error, Config)) from None


def conf_dir() -> Path:
    """Return the folder of the YAML files: `RECSPARK_CONF`, else the checkout's, else the
    package's.
    """
    named = os.environ.get("RECSPARK_CONF")
    here = Path(__file__).resolve().parent
    choices = [Path(named)] if named else [here.parent / "conf", here / "_conf"]
    for choice in choices:
        if (choice / "base.yaml").is_file():
            return choice
    raise ConfigError(
        f"no base.yaml in {', '.join(str(c) for c in choices)}; set RECSPARK_CONF to the conf folder"
    )


def explain_settings(error: ValidationError, model: type[BaseModel], where: str) -> ConfigError:
    """Return a ConfigError that says which setting of `where` is wrong."""
    return ConfigError(f"{where}: {_explain(error, model)}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML in UTF-8: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(data).__name__}")
    return data


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merge(out[key], value) if both else value
    return out


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, sep, value = text.partition("=")
    if not sep or not key.strip():
        raise ConfigError(f"--set '{text}': expected a.b=value")
    try:
        parsed = yaml.safe_load(value) if value else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"--set '{text}': not YAML: {' '.join(str(error).split())}") from None
    return key.strip().split("."), parsed


def _set(layers: dict[str, Any], path: list[str], value: Any) -> None:
    if (
        path[0] == "models" and len(path) > 1
    ):  # `models.ease.reg` reads better than `model_settings.ease.reg`
        path = ["model_settings", *path[1:]]
    node = layers
    for key in path[:-1]:
        child = node.get(key)
        node[key] = dict(child) if isinstance(child, Mapping) else {}
        node = node[key]
    node[path[-1]] = value


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        said = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            lines.append(
                f"unknown setting '{place}'.{suggest(str(item['loc'][-1]), _fields(model, item['loc'][:-1]))}"
            )
        elif item["type"] == "missing":
            lines.append(f"setting '{place}' is missing")
        elif place and not isinstance(item.get("input"), dict):
            lines.append(f"setting '{place}' = {item.get('input')!r}: {said}")
        else:
            lines.append(said)
    return "; ".join(lines)


def _fields(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        model = kind
    return list(model.model_fields)
