"""Settings read from `conf/`: a few visible layers, later wins, unknown key = error.

The layers: `conf/base.yaml`; `conf/env/<env>.yaml`; a file of one's own, named by `RECSPARK_SETTINGS`;
`RECSPARK_SOURCE` and `RECSPARK_ROOT` (`source` and `paths.root`); `--set a.b=c`. The source that they
name is `conf/sources/<name>.yaml`, or a file where the name ends with `.yaml`. A model's settings live
in `conf/models/<name>.yaml`, over them what was tuned for the source, `conf/tuned/<source>/<name>.yaml`;
they are typed by the model's own settings class (`recspark.models.registry`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from recspark import masking
from recspark.config import NEIGHBOUR_MODELS, Config, Evaluate, Publish
from recspark.errors import ConfigError, suggest

OWN_FILE, OWN_SOURCE, OWN_ROOT = "RECSPARK_SETTINGS", "RECSPARK_SOURCE", "RECSPARK_ROOT"
_MAX_DEPTH, _MAX_VALUES = 20, 100_000  # of a YAML text; settings have five levels
_FREE = ("spark.conf.", "source.options.")  # settings with names of any kind


def load_config(
    env: str = "local",
    overrides: Sequence[str] = (),
    *,
    folder: Path | None = None,
) -> Config:
    """Return the resolved settings for `env`, with `--set a.b=c` strings on top.

    What `publish.model`, `publish.ladder`, `publish.neighbours_model` and `evaluate.baseline` say in
    `base.yaml` holds as far as `models` has them; a later layer is taken at its word. Raises
    ConfigError naming the key (with a suggestion), the value and where it came from. From then on no
    error or log of this process shows the secrets among the settings.
    """
    folder = folder or conf_dir()
    layers = _read_yaml(folder / "base.yaml")
    envs = sorted(p.stem for p in (folder / "env").glob("*.yaml"))
    if env not in envs:
        raise ConfigError(f"unknown environment '{env}'.{suggest(env, envs)}")
    chosen: dict[str, Any] = _merge(_read_yaml(folder / "env" / f"{env}.yaml"), _of_environment())
    layers = _merge(layers, chosen)
    changes = [_parse_override(text) for text in overrides]
    for path, value in changes:
        if path == ["source"]:
            layers["source"] = value
    layers["env"] = env
    layers["source"] = _source(folder, layers.get("source"))
    layers["model_settings"] = _model_settings(folder, layers)
    for path, value in changes:
        if path != ["source"]:
            _set(layers, path, value)
            _set(chosen, path, value)
    _follow_models(layers, set(_keys(chosen)))
    try:
        config = Config.model_validate(layers)
    except ValidationError as error:
        raise ConfigError(_explain(error, Config)) from None
    for name, secret in config.secrets().items():
        masking.remember_secret(name, secret)
    return config


def tuned_file(source: str, model: str) -> Path:
    """Return where the settings of `model` that were tuned for `source` are kept."""
    return conf_dir() / "tuned" / source / f"{model}.yaml"


def _of_environment() -> dict[str, Any]:
    """Return the settings that environment variables give; an empty variable gives none."""
    own = os.environ.get(OWN_FILE)
    layers = _read_yaml(Path(own)) if own else {}
    if source := os.environ.get(OWN_SOURCE):
        layers["source"] = source
    if root := os.environ.get(OWN_ROOT):
        layers["paths"] = _merge(layers.get("paths") or {}, {"root": root})
    return layers


def _source(folder: Path, source: Any) -> Any:
    """Return the settings of the source: of the file that its name stands for, else as they are."""
    if not isinstance(source, str):
        return source
    file = Path(source)
    if file.suffix not in (".yaml", ".yml"):
        known = sorted(p.stem for p in (folder / "sources").glob("*.yaml"))
        if source not in known:
            raise ConfigError(
                f"unknown source '{source}'.{suggest(source, known)} Or name a file that ends with .yaml"
            )
        file = folder / "sources" / f"{source}.yaml"
    settings = {"name": file.stem, **_read_yaml(file)}
    # What a checkout brings is found from any working folder.
    path = settings.get("path")
    if isinstance(path, str) and "://" not in path and "{run_date}" not in path:
        beside = folder.parent / path
        if not Path(path).exists() and beside.exists():
            settings["path"] = str(beside)
    return settings


def _model_settings(folder: Path, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return model -> settings: as shipped, as tuned for the source, as a layer says."""
    source = layers["source"]
    name = source.get("name") if isinstance(source, Mapping) else None
    places = [folder / "models", *([folder / "tuned" / str(name)] if name else [])]
    out: dict[str, Any] = {}
    for place in places:
        out = _merge(out, {p.stem: _read_yaml(p) for p in sorted(place.glob("*.yaml"))})
    return _merge(out, layers.get("model_settings") or {})


def _follow_models(layers: dict[str, Any], explicit: set[str]) -> None:
    """Let what nobody chose follow from `models`: the names in it that are not among them."""
    models = layers.get("models")
    publish, evaluate = layers.get("publish") or {}, layers.get("evaluate") or {}
    if not isinstance(models, list) or not models or not all(isinstance(m, str) for m in models):
        return  # the checks name what is wrong
    if not isinstance(publish, dict) or not isinstance(evaluate, dict):
        return

    def value(section: Mapping[str, Any], name: str, default: Any) -> Any:
        return section.get(name, default)

    def algorithm(name: str) -> Any:
        settings = layers["model_settings"].get(name)
        return settings.get("algorithm", name) if isinstance(settings, Mapping) else name

    baseline = value(evaluate, "baseline", _default(Evaluate, "baseline"))
    if "evaluate.baseline" not in explicit and baseline not in models:
        baseline = models[0]
        evaluate = {**evaluate, "baseline": baseline}
    model = value(publish, "model", _default(Publish, "model"))
    if "publish.model" not in explicit and model not in models:
        model = next((name for name in models if name != baseline), models[0])
        publish = {**publish, "model": model}
    if "publish.ladder" not in explicit:
        ladder = value(publish, "ladder", _default(Publish, "ladder"))
        kept = [step for step in ladder if step in models and step != model]
        if kept != list(ladder):
            publish = {**publish, "ladder": kept}
    neighbours = value(publish, "neighbours_model", _default(Publish, "neighbours_model"))
    if "publish.neighbours_model" not in explicit and neighbours not in models:
        able = [name for name in models if algorithm(name) in NEIGHBOUR_MODELS]
        publish = {**publish, "neighbours_model": able[0] if able else None}
    layers["publish"], layers["evaluate"] = publish, evaluate


def _default(section: type[BaseModel], name: str) -> Any:
    return section.model_fields[name].default


def _keys(layers: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Give the dotted name of every setting in `layers`."""
    for key, value in layers.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{above}{key}.")
        yield f"{above}{key}"


def conf_dir() -> Path:
    """Return the folder of the YAML files: `RECSPARK_CONF`, else the checkout's, else the
    package's.
    """
    named = os.environ.get("RECSPARK_CONF")
    here = Path(__file__).resolve().parents[1]
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


class _Loader(yaml.SafeLoader):
    """YAML whose keys are texts, each there once: PyYAML lets the last of two win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                said = key.value if isinstance(key, yaml.ScalarNode) else "of several values"
                raise _BadYaml(f"line {line}: key {said} is no text; put it in quotes")
            if key.value in lines:
                first = lines[key.value]
                both = f"in lines {first} and {line}" if first != line else f"in line {line}"
                raise _BadYaml(f"key '{key.value}' is there twice, {both}; keep one of them")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


class _BadYaml(Exception):
    """What is wrong with a key or a value, in words."""


def _parse_yaml(text: str) -> Any:
    """Return the value of a YAML text; raises _BadYaml and yaml.YAMLError."""
    try:
        data = yaml.load(text, _Loader)  # a SafeLoader
    except ValueError as error:  # a date that there is not, a number of thousands of digits
        raise _BadYaml(f"a value is none: {error}") from None
    except RecursionError:
        raise _BadYaml("nested too deeply") from None
    _check_size(data)
    return data


def _check_size(data: Any) -> None:
    """Refuse what aliases make endless: a list that holds itself, or ten times the one before."""
    n_values, waiting = 0, [(data, 0)]
    while waiting:
        value, depth = waiting.pop()
        n_values += 1
        if depth > _MAX_DEPTH or n_values > _MAX_VALUES:
            raise _BadYaml("nested too deeply" if depth > _MAX_DEPTH else "too many values")
        inner = value.values() if isinstance(value, dict) else value
        if isinstance(value, dict | list):
            waiting += [(each, depth + 1) for each in inner]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = _parse_yaml(path.read_text(encoding="utf-8"))
    except _BadYaml as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML in UTF-8: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {_reason(error)}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(data).__name__}")
    return data


def _reason(error: OSError) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)


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
    key = key.strip()
    # A free name has dots of its own, and its value is text.
    free = next((section for section in _FREE if key.startswith(section)), "")
    path = free.split(".")[:-1] + [key.removeprefix(free)] if free else key.split(".")
    shown = f"{key}={masking.HIDDEN}" if masking.is_secret(key) else text
    try:
        parsed = _parse_yaml(value) if value else ""
    except _BadYaml as error:
        raise ConfigError(f"--set '{shown}': {error}") from None
    except yaml.YAMLError as error:
        said = "" if masking.is_secret(key) else f": {' '.join(str(error).split())}"
        raise ConfigError(f"--set '{shown}': not YAML{said}") from None
    return path, parsed if isinstance(parsed, str) or not free else value


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
            lines.append(f"setting '{place}' = {_shown(place, item.get('input'))}: {said}")
        else:
            lines.append(said)
    return "; ".join(lines)


def _shown(place: str, value: Any) -> str:
    if place.startswith(_FREE) and masking.is_secret(place):
        return masking.HIDDEN
    return repr(masking.mask_value(value))


def _fields(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return []
        model = kind
    return list(model.model_fields)
