"""Reads the settings from `conf/`, environment variables and the command line.

Settings come in layers. Where two layers give the same setting, the later layer wins. An unknown
key is an error. The layers are, in this order:

1. `conf/base.yaml`
2. `conf/env/<env>.yaml`
3. the file that the environment variable `RECSPARK_SETTINGS` names
4. the environment variables `RECSPARK_SOURCE` (setting `source`) and `RECSPARK_ROOT` (`paths.root`)
5. `--set a.b=c`

The layers name a source. Its settings are in `conf/sources/<name>.yaml`; a name that ends with
`.yaml` is the path of a file.

The rules of lists (section `rules`) may be in `conf/rules.yaml`, whose keys are the names of rules.
The layers above override them.

The settings of a model are in `conf/models/<name>.yaml`. The settings that were tuned for the
source, in `conf/tuned/<source>/<name>.yaml`, override them. The settings class of the model
(`recspark.models.registry`) gives their types.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from recspark import masking
from recspark.config import ENCODER_MODELS, NEIGHBOUR_MODELS, Config, Evaluate, Publish
from recspark.config.rules import KINDS_OF_RULES
from recspark.errors import ConfigError, suggest

OWN_FILE, OWN_SOURCE, OWN_ROOT = "RECSPARK_SETTINGS", "RECSPARK_SOURCE", "RECSPARK_ROOT"
_MAX_DEPTH, _MAX_VALUES = 20, 100_000  # limits of a YAML text; settings have five levels
_FREE_SECTIONS = ("spark.conf.", "source.options.")  # names below them are free
# A file that gives one of these settings replaces what the layers below it say of it.
_REPLACED_AS_A_WHOLE = ("publish.lists",)


def load_config(
    env: str = "local",
    overrides: Sequence[str] = (),
    *,
    folder: Path | None = None,
) -> Config:
    """Return the settings of all layers together.

    Parameters
    ----------
    env : name of a file in `conf/env`, without `.yaml`
    overrides : texts `a.b=c`, as `--set` takes them; they win over all other layers
    folder : the folder `conf`; None = that of `conf_dir`

    The settings `publish.model`, `publish.ladder`, those of `publish.lists`,
    `publish.neighbours_model` and `evaluate.baseline` name models. A name that comes from
    `base.yaml` or from a default is replaced where it is not among `models` (`_follow_models` says
    by what). A name that comes from a later layer is never replaced.

    Raises ConfigError, which names the key (with a suggestion), the value, and the file or option
    that it came from. After this call, no error or log of this process shows the secrets among the
    settings.
    """
    folder = folder or conf_dir()
    layers = _read_yaml(folder / "base.yaml")
    env_names = sorted(p.stem for p in (folder / "env").glob("*.yaml"))
    if env not in env_names:
        raise ConfigError(f"unknown environment '{env}'.{suggest(env, env_names)}")
    explicit_layers: dict[str, Any] = _merge(
        _read_yaml(folder / "env" / f"{env}.yaml"), _of_environment()
    )
    layers = _merge(layers, explicit_layers)
    parsed_overrides = [_parse_override(text) for text in overrides]
    for path, value in parsed_overrides:
        if path == ["source"]:
            layers["source"] = value
    layers["env"] = env
    layers["source"] = _source(folder, layers.get("source"))
    layers["model_settings"] = _model_settings(folder, layers)
    if (rules_file := folder / "rules.yaml").is_file():
        layers["rules"] = _merge(_read_yaml(rules_file), layers.get("rules") or {})
    for path, value in parsed_overrides:
        if path != ["source"]:
            _set(layers, path, value)
            _set(explicit_layers, path, value)
    _follow_models(layers, set(_keys(explicit_layers)))
    try:
        config = Config.model_validate(layers)
    except ValidationError as error:
        raise ConfigError(_explain(error, Config)) from None
    for name, secret in config.secrets().items():
        masking.remember_secret(name, secret)
    return config


def tuned_file(source: str, model: str) -> Path:
    """Return the path of the file with the settings of `model` that were tuned for `source`."""
    return conf_dir() / "tuned" / source / f"{model}.yaml"


def _of_environment() -> dict[str, Any]:
    """Return the settings that environment variables give. An empty variable gives none.

    These are layers 3 and 4 of the module's docstring.
    """
    own_file = os.environ.get(OWN_FILE)
    layers = _read_yaml(Path(own_file)) if own_file else {}
    if source := os.environ.get(OWN_SOURCE):
        layers["source"] = source
    if root := os.environ.get(OWN_ROOT):
        layers["paths"] = _merge(layers.get("paths") or {}, {"root": root})
    return layers


def _source(folder: Path, source: Any) -> Any:
    """Return the settings of the source.

    Where `source` is a name or a path, the settings are read from its file. Otherwise `source` is
    returned as it is.
    """
    if not isinstance(source, str):
        return source
    file = Path(source)
    if file.suffix not in (".yaml", ".yml"):
        source_names = sorted(p.stem for p in (folder / "sources").glob("*.yaml"))
        if source not in source_names:
            raise ConfigError(
                f"unknown source '{source}'.{suggest(source, source_names)} Or name a file that ends with .yaml"
            )
        file = folder / "sources" / f"{source}.yaml"
    settings = {"name": file.stem, **_read_yaml(file)}
    # A relative path that does not exist in the working folder may exist beside the folder `conf`.
    # So the data of a checkout are found from any working folder.
    path = settings.get("path")
    if isinstance(path, str) and "://" not in path and "{run_date}" not in path:
        path_beside_conf = folder.parent / path
        if not Path(path).exists() and path_beside_conf.exists():
            settings["path"] = str(path_beside_conf)
    return settings


def _model_settings(folder: Path, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return model -> settings.

    The settings of `conf/models` come first, then those that were tuned for the source, then those
    of `layers`. A later one wins.
    """
    source = layers["source"]
    source_name = source.get("name") if isinstance(source, Mapping) else None
    folders = [folder / "models", *([folder / "tuned" / str(source_name)] if source_name else [])]
    settings_by_model: dict[str, Any] = {}
    for model_folder in folders:
        settings_by_model = _merge(
            settings_by_model, {p.stem: _read_yaml(p) for p in sorted(model_folder.glob("*.yaml"))}
        )
    return _merge(settings_by_model, layers.get("model_settings") or {})


def _follow_models(layers: dict[str, Any], explicit: set[str]) -> None:
    """Replace default names of models that are not among `models`, in `layers` itself.

    Parameters
    ----------
    layers : settings by section; `publish` and `evaluate` are replaced
    explicit : dotted names of the settings that a layer above `base.yaml` gives; they stay

    - `evaluate.baseline` becomes the first of `models` that gives lists (is no encoder).
    - `publish.model` becomes the first of the ladder of `base.yaml`, or else of `models`, that is
      among `models`, gives lists, and is not the baseline.
    - `publish.ladder` loses the names that are not among `models`, and the name of `publish.model`.
    - `model` and `ladder` of a list in `publish.lists`: the model is then that of `publish`, and the
      ladder loses names like `publish.ladder`.
    - `publish.neighbours_model` becomes the first of `models` whose algorithm gives neighbours of
      items, or None.

    Example: with `models: [als, ease]` and nothing else chosen, the baseline is als, the published
    model and the neighbours' model are ease, and the ladder is empty.
    """
    models = layers.get("models")
    publish, evaluate = layers.get("publish") or {}, layers.get("evaluate") or {}
    if not isinstance(models, list) or not models or not all(isinstance(m, str) for m in models):
        return  # the checks of `Config` report this
    if not isinstance(publish, dict) or not isinstance(evaluate, dict):
        return

    def settings_of(name: str) -> Mapping[str, Any]:
        settings = layers["model_settings"]
        own = settings.get(name) if isinstance(settings, Mapping) else None
        return own if isinstance(own, Mapping) else {}

    def algorithm_of(name: str) -> Any:
        return settings_of(name).get("algorithm", name)

    def gives_lists(name: str) -> bool:
        is_encoder = algorithm_of(name) in ENCODER_MODELS
        return not is_encoder and settings_of(name).get("kind") != "encoder"

    listing_models = [name for name in models if gives_lists(name)] or models
    baseline = evaluate.get("baseline", _default(Evaluate, "baseline"))
    if "evaluate.baseline" not in explicit and baseline not in models:
        baseline = listing_models[0]
        evaluate = {**evaluate, "baseline": baseline}
    model = publish.get("model", _default(Publish, "model"))
    ladder = publish.get("ladder", _default(Publish, "ladder"))
    if not isinstance(ladder, list | tuple):
        return  # the checks of `Config` report this
    if "publish.model" not in explicit and model not in models:
        # Whoever chose the ladder did not choose its first step as the champion.
        steps = [] if "publish.ladder" in explicit else [name for name in ladder if name in models]
        successors = [*steps, *listing_models]
        model = next((name for name in successors if name != baseline), listing_models[0])
        publish = {**publish, "model": model}
    if "publish.ladder" not in explicit:
        ladder_within_models = [step for step in ladder if step in models and step != model]
        if ladder_within_models != list(ladder):
            publish = {**publish, "ladder": ladder_within_models}
    if isinstance(lists := publish.get("lists"), Mapping):
        publish = {
            **publish,
            "lists": {
                name: _list_within_models(own, f"publish.lists.{name}", explicit, models, model)
                for name, own in lists.items()
            },
        }
    neighbours_model = publish.get("neighbours_model", _default(Publish, "neighbours_model"))
    if "publish.neighbours_model" not in explicit and neighbours_model not in models:
        models_with_neighbours = [name for name in models if algorithm_of(name) in NEIGHBOUR_MODELS]
        publish = {
            **publish,
            "neighbours_model": models_with_neighbours[0] if models_with_neighbours else None,
        }
    layers["publish"], layers["evaluate"] = publish, evaluate


def _list_within_models(
    own: Any, setting: str, explicit: set[str], models: Sequence[str], published_model: str
) -> Any:
    """Return the settings of one list in `publish.lists`, without models that are not among
    `models`; see `_follow_models`.

    Parameters
    ----------
    own : settings of the list
    setting : its dotted name
    published_model : `publish.model`, which is the champion of a list that names none
    """
    if not isinstance(own, Mapping):
        return own
    own = dict(own)
    if f"{setting}.model" not in explicit and own.get("model") not in models:
        own.pop("model", None)
    champion, ladder = own.get("model", published_model), own.get("ladder")
    if f"{setting}.ladder" not in explicit and isinstance(ladder, list | tuple):
        own["ladder"] = [step for step in ladder if step in models and step != champion]
    return own


def _default(section: type[BaseModel], name: str) -> Any:
    return section.model_fields[name].default


def _keys(layers: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting and section in `layers`."""
    for key, value in layers.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")
        yield f"{prefix}{key}"


def conf_dir() -> Path:
    """Return the folder of the YAML files.

    This is the folder that the environment variable `RECSPARK_CONF` names. Without that variable it
    is `conf` of the checkout, or `_conf` of the installed package.
    """
    folder_of_user = os.environ.get("RECSPARK_CONF")
    package_folder = Path(__file__).resolve().parents[1]
    folders = (
        [Path(folder_of_user)]
        if folder_of_user
        else [package_folder.parent / "conf", package_folder / "_conf"]
    )
    for folder in folders:
        if (folder / "base.yaml").is_file():
            return folder
    raise ConfigError(
        f"no base.yaml in {', '.join(str(c) for c in folders)}; set RECSPARK_CONF to the conf folder"
    )


def explain_settings(error: ValidationError, model: type[BaseModel], where: str) -> ConfigError:
    """Return a ConfigError that says which settings are wrong, and why.

    Parameters
    ----------
    error : what pydantic raised
    model : the class that was to hold the settings
    where : the name of the place that the settings came from; the message begins with it
    """
    return ConfigError(f"{where}: {_explain(error, model)}")


class _Loader(yaml.SafeLoader):
    """Reads YAML, and refuses keys that are no texts and keys that occur twice.

    PyYAML itself takes the last of two equal keys and reports nothing.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        line_of_key: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                key_text = key.value if isinstance(key, yaml.ScalarNode) else "of several values"
                raise _BadYaml(f"line {line}: key {key_text} is no text; put it in quotes")
            if key.value in line_of_key:
                first_line = line_of_key[key.value]
                lines_text = (
                    f"in lines {first_line} and {line}" if first_line != line else f"in line {line}"
                )
                raise _BadYaml(f"key '{key.value}' is there twice, {lines_text}; keep one of them")
            line_of_key[key.value] = line
        return super().construct_mapping(node, deep)


class _BadYaml(Exception):
    """A YAML text is refused; the message says in words what is wrong with a key or a value."""


def _parse_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises _BadYaml or yaml.YAMLError."""
    try:
        data = yaml.load(text, _Loader)  # a SafeLoader
    except ValueError as error:  # such as 2024-02-30, or a number with thousands of digits
        raise _BadYaml(f"a value is none: {error}") from None
    except RecursionError:
        raise _BadYaml("nested too deeply") from None
    _check_size(data)
    return data


def _check_size(data: Any) -> None:
    """Raise _BadYaml where a value is nested too deeply or has too many parts.

    Aliases can make a short YAML text endless: a list that holds itself, or lists of which each
    holds the one before ten times.
    """
    n_values, unchecked_values = 0, [(data, 0)]
    while unchecked_values:
        value, depth = unchecked_values.pop()
        n_values += 1
        if depth > _MAX_DEPTH or n_values > _MAX_VALUES:
            raise _BadYaml("nested too deeply" if depth > _MAX_DEPTH else "too many values")
        elements = value.values() if isinstance(value, dict) else value
        if isinstance(value, dict | list):
            unchecked_values += [(element, depth + 1) for element in elements]


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


def _merge(low: Mapping[str, Any], high: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings of two layers together; those of `high` win.

    `prefix` : dotted name of the section that the two are, with a dot at its end; "" for all settings
    """
    merged = dict(low)
    for key, value in high.items():
        setting = f"{prefix}{key}"
        is_section_in_both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = (
            _merge(merged[key], value, f"{setting}.")
            if is_section_in_both and setting not in _REPLACED_AS_A_WHOLE
            else value
        )
    return merged


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, equals_sign, value = text.partition("=")
    if not equals_sign or not key.strip():
        raise ConfigError(f"--set '{text}': expected a.b=value")
    key = key.strip()
    # A free name (below `spark.conf` or `source.options`) may contain dots, and its value is text.
    free_section = next((section for section in _FREE_SECTIONS if key.startswith(section)), "")
    path = (
        free_section.split(".")[:-1] + [key.removeprefix(free_section)]
        if free_section
        else key.split(".")
    )
    shown_text = f"{key}={masking.HIDDEN}" if masking.is_secret(key) else text
    try:
        parsed = _parse_yaml(value) if value else ""
    except _BadYaml as error:
        raise ConfigError(f"--set '{shown_text}': {error}") from None
    except yaml.YAMLError as error:
        parser_message = "" if masking.is_secret(key) else f": {' '.join(str(error).split())}"
        raise ConfigError(f"--set '{shown_text}': not YAML{parser_message}") from None
    return path, parsed if isinstance(parsed, str) or not free_section else value


def _set(layers: dict[str, Any], path: list[str], value: Any) -> None:
    # On the command line, `models.ease.reg` stands for `model_settings.ease.reg`.
    if path[0] == "models" and len(path) > 1:
        path = ["model_settings", *path[1:]]
    node = layers
    for key in path[:-1]:
        child = node.get(key)
        node[key] = dict(child) if isinstance(child, Mapping) else {}
        node = node[key]
    node[path[-1]] = value


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    messages = []
    for problem in error.errors():
        path, kind = problem["loc"], None
        if (
            path[:1] == ("rules",) and len(path) > 2
        ):  # pydantic puts the kind of the rule in between
            kind, path = str(path[2]), (*path[:2], *path[3:])
        setting = ".".join(str(part) for part in path)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = list(KINDS_OF_RULES[kind].model_fields) if kind else _fields(model, path[:-1])
            messages.append(f"unknown setting '{setting}'.{suggest(str(path[-1]), known)}")
        elif problem["type"] == "union_tag_invalid":
            wrong_kind = str(problem["ctx"]["tag"])
            messages.append(
                f"setting '{setting}.kind' = '{wrong_kind}' is no kind of rule."
                f"{suggest(wrong_kind, KINDS_OF_RULES)}"
            )
        elif problem["type"] == "union_tag_not_found":
            messages.append(
                f"setting '{setting}.kind' is missing: one of {', '.join(KINDS_OF_RULES)}"
            )
        elif problem["type"] == "missing":
            messages.append(f"setting '{setting}' is missing")
        elif setting and not isinstance(problem.get("input"), dict):
            messages.append(
                f"setting '{setting}' = {_shown(setting, problem.get('input'))}: {message}"
            )
        elif kind:
            messages.append(f"{setting}: {message}")
        else:
            messages.append(message)
    return "; ".join(messages)


def _shown(setting: str, value: Any) -> str:
    if setting.startswith(_FREE_SECTIONS) and masking.is_secret(setting):
        return masking.HIDDEN
    return repr(masking.mask_value(value))


def _fields(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Return the names of the settings in the section `path`; [] where it has no fixed names."""
    annotation: Any = model
    for part in path:
        if get_origin(annotation) is dict:  # name -> section, such as `publish.lists`
            annotation = get_args(annotation)[1]
        elif _is_section(annotation) and str(part) in annotation.model_fields:
            annotation = annotation.model_fields[str(part)].annotation
        else:
            return []
    return list(annotation.model_fields) if _is_section(annotation) else []


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
