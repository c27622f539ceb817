"""A result's code is what it imports: no more, and no less."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recspark.config.load import load_config
from recspark.models.registry import MODELS
from recspark.pipeline import code_digest as code
from recspark.pipeline.code_digest import algorithm_code, code_digest, imported
from recspark.pipeline.plan import STAGES
from recspark.pipeline.reuse import SETTINGS_READ, TABLES_READ, stage_code
from recspark.pipeline.run import FUNCTIONS

FILES = {
    "__init__.py": "",
    "model.py": (
        "from typing import TYPE_CHECKING\n"
        "from . import beside\n"
        "if TYPE_CHECKING:\n    from shop_models import typed\n"
        "def fit():\n    import shop_models.lazy\n"
    ),
    "beside.py": "from shop_models.inner.net import Net\nimport json\n",
    "lazy.py": "from recspark.models.scoring.topk import Scorer\n",
    "typed.py": "",
    "stranger.py": "",
    "inner/__init__.py": "from shop_models.inner import loss\n",
    "inner/net.py": "class Net: ...\n",
    "inner/loss.py": "",
}
READ = {"model.py", "beside.py", "lazy.py", "inner/__init__.py", "inner/net.py", "inner/loss.py"}


def forget_modules() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "shop_models"]:
        del sys.modules[name]
    for cached in (code.imported, code._imports, code._spec, code._source):
        cached.cache_clear()


@pytest.fixture
def change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Append a line to a file of a package; return the digest of its module `model` afterwards."""
    for name, text in FILES.items():
        file = tmp_path / "shop_models" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))

    def of(name: str) -> str:
        if name:
            file = tmp_path / "shop_models" / name
            file.write_text(file.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
        forget_modules()
        return code_digest("shop_models.model")

    yield of
    forget_modules()


@pytest.mark.parametrize("name", sorted(FILES))
def test_what_is_imported_counts_and_nothing_else(change: Callable[[str], str], name: str) -> None:
    before = change("")
    assert change("") == before
    assert (change(name) != before) == (name in READ or name == "__init__.py")


def test_the_closure_goes_on_into_recspark(change: Callable[[str], str]) -> None:
    change("")
    assert {"shop_models.lazy", "recspark.models.scoring.topk", "recspark.schema"} <= imported(
        "shop_models.model"
    )


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_model_is_made_by_its_own_modules(name: str) -> None:
    modules = imported(*MODELS[name].modules)
    assert modules.issuperset(MODELS[name].modules)
    for far in ("cli", "report", "pipeline", "eval", "hybrid", "sources", "testing"):
        assert not [m for m in modules if m.split(".")[1:2] == [far]], far
    assert "recspark.models.registry" not in modules  # a model more trains no other again
    others = {other for other, spec in MODELS.items() if spec.modules[0] in modules} - {name}
    made_of = {"cdl": {"als", "sdae"}, "meta_prod2vec": {"prod2vec"}}
    assert others == made_of.get(name, set())


def test_every_net_belongs_to_a_model_and_no_stage_runs_the_command_line() -> None:
    nets = {m for spec in MODELS.values() for m in imported(*spec.modules) if ".nets." in m}
    folder = Path(code.__file__).parents[1] / "nets"
    files = {f"recspark.nets.{f.stem}" for f in folder.glob("*.py") if f.stem != "__init__"}
    assert nets == files
    names = [stage.name for stage in STAGES]
    assert list(FUNCTIONS) == list(TABLES_READ) == names
    assert set(SETTINGS_READ) < set(names)
    for stage in STAGES:
        modules = imported(FUNCTIONS[stage.name].__module__)
        assert not [m for m in modules if m.startswith(("recspark.cli", "recspark.report"))]


def test_another_algorithm_is_other_code_for_the_stages_that_run_it() -> None:
    one = load_config("test", ["models=[ease, popular]"])
    other = load_config(
        "test", ["models=[ease, popular]", "models.ease={algorithm: popular, half_life_days: 3}"]
    )
    assert algorithm_code(one, "ease") != algorithm_code(one, "popular")
    assert algorithm_code(other, "ease") == algorithm_code(other, "popular")
    for stage in STAGES:
        model = "ease" if stage.per_model else ""
        same = stage_code(one, stage, model) == stage_code(other, stage, model)
        assert same == (stage.name in ("ingest", "sessionize", "build_features"))
