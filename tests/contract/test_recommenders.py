"""Every registered model passes every check of `recspark.testing.contract` that its tags ask for."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession

import recspark.models
from recspark import storage
from recspark.config import Train
from recspark.data.vector_files import folder_sha256
from recspark.models.base import Algorithm, FitOptions
from recspark.models.registry import MODELS
from recspark.testing.case import BaseCase
from recspark.testing.contract import CHECKS, Check, case_class, checks_for

_PROD2VEC = {
    "window": 5,
    "embedding_size": 16,
    "epochs": 4,
    "n_rotations": 1,
    "learning_rate": 0.3,
    "subsample": None,
    "half_life_days": None,
}
# Only to keep fits short; everything else is the default.
SHORT: dict[str, dict[str, Any]] = {
    "als": {"embedding_size": 8, "iterations": 4, "n_blocks": 2, "half_life_days": None},
    "ease": {"reg": 5.0, "half_life_days": None},
    "item2vec": {
        "sentence": "history",
        "window": 3,
        "embedding_size": 16,
        "epochs": 4,
        "n_rotations": 1,
        "learning_rate": 0.3,
        "subsample": None,
        "half_life_days": None,
    },
    "prod2vec": _PROD2VEC,
    "meta_prod2vec": _PROD2VEC,
    # In a wider window, the items around tell a planted group as well as the user does.
    "user2vec": {"window": 1, "embedding_size": 16, "learning_rate": 0.05, "n_blocks": 1},
    "item_knn": {"shrink": 1.0, "half_life_days": None},
    "rp3beta": {"half_life_days": None},
    "transitions": {"last_n": 30, "window": 5},  # the planted data have no order in time
    "own_items": {"order_decay": 1.0},  # the check of `decay` turns the half-life off and on
    "user_knn": {"n_neighbours": 50},  # fewer than the planted data have users
    "autorec": {
        "hidden_size": 16,
        "unobserved": 0.5,
        "half_life_days": None,
        "epochs": 40,
        "batch_size": 32,
        "learning_rate": 0.01,
    },
    "mf": {"embedding_size": 8, "epochs": 20, "batch_size": 32, "n_negatives": 20},
    "sdae": {"hidden_sizes": [32, 16], "epochs": 40, "batch_size": 32, "learning_rate": 0.01},
    "cdl": {
        "hidden_sizes": [8, 4],
        "rounds": 2,
        "sweeps": 1,
        "epochs": 2,
        "pretraining_epochs": 1,
        "n_blocks": 2,
        "reg_items": 1.0,
    },
    "content2vec": {
        "min_users": 3,
        "min_lift": 1.2,
        "hidden_size": 8,
        "n_matched": 20,
        "n_neighbours": 10,
        "epochs": 8,
        "batch_size": 64,
        "learning_rate": 0.02,
    },
    "image": {"image_size": 32, "width": 4, "epochs": 2},
    "audio": {"hidden_size": 8, "excerpt_seconds": 0.2, "epochs": 2},
    "lambdamart": {"n_trees": 30, "learning_rate": 0.3},
    "wide_deep": {
        "hidden_sizes": [32],
        "cross_rows": 1024,
        "epochs": 8,
        "batch_size": 64,
        "learning_rate": 0.01,
    },
    "pnn": {"hidden_sizes": [32], "epochs": 8, "batch_size": 64, "learning_rate": 0.01},
    "youtube_rank": {"hidden_sizes": [32], "epochs": 8, "batch_size": 64, "learning_rate": 0.01},
    "multvae": {"hidden_size": 32, "latent_size": 8, "epochs": 20, "batch_size": 32},
    # Sessions of the planted data hold hardly more than one event.
    "session_knn": {"train_on": "history", "context": "history"},
    "gru4rec": {
        "train_on": "history",
        "context": "history",
        "hidden_size": 32,
        "dropout": 0.2,
        "epochs": 12,
        "batch_size": 16,
        "learning_rate": 0.01,
    },
    "coevolve": {"embedding_size": 8, "epochs": 12, "batch_size": 32, "learning_rate": 0.02},
    # A number is the only word of a planted item that another item lacks.
    "tfidf": {"min_items": 1},
    "word_vectors": {"min_items": 1, "embedding_size": 16, "epochs": 2, "n_rotations": 1},
    "paragraph_vectors": {"min_items": 1, "embedding_size": 16, "epochs": 3},
    "sasrec": {
        "length": 31,  # the training rows of these checks have 32 items
        "embedding_size": 32,
        "epochs": 12,
        "batch_size": 16,
        "learning_rate": 0.01,
        "n_samples": None,
    },
    "tdssm": {
        "embedding_size": 16,
        "hidden_size": 16,
        "n_fast": 7,
        "n_slow": 8,
        "length": 64,
        "epochs": 25,
        "batch_size": 16,
        "learning_rate": 0.01,
        "n_samples": None,
    },
    "mvdnn": {
        "embedding_size": 16,
        "hidden_sizes": [32, 16],
        "n_buckets": 2048,
        "epochs": 25,
        "batch_size": 16,
        "learning_rate": 0.01,
        "n_samples": None,
    },
    "youtube_dnn": {
        "embedding_size": 16,
        "hidden_sizes": [32, 16],
        "epochs": 30,
        "batch_size": 16,
        "learning_rate": 0.01,
        "n_samples": None,
    },
}


def image_features(folder: str) -> dict[str, Any]:
    """A file of random weights, and small pictures."""
    import torch

    from recspark.nets.images import untrained

    path = f"{folder}/resnet18.pth"
    torch.save(untrained("resnet18", 1).state_dict(), path)
    return {"weights": path, "sha256": storage.sha256(path), "resize": 32, "crop": 32}


def file_vectors(folder: str) -> dict[str, Any]:
    """Random vectors of all words of the planted items."""
    words = ["item", "words", "of", *map(str, range(60))]
    path = Path(folder) / "vectors.txt"
    rng = np.random.default_rng(1)
    lines = [f"{word} {' '.join(map(str, rng.normal(size=8)))}" for word in words]
    path.write_text("\n".join([f"{len(words)} 8", *lines, ""]), encoding="utf-8")
    return {"file": str(path), "sha256": storage.sha256(str(path))}


# The package of `sentences` is not installed: this module stands for it in the executors too.
STUB = """
import numpy as np

class SentenceTransformer:
    def __init__(self, folder, **settings):
        pass

    def get_sentence_embedding_dimension(self):
        return 3

    def encode(self, texts, **settings):
        return np.array([[len(t), sum(map(ord, t)) % 101, 1] for t in texts], np.float32)
"""


def sentences(folder: str) -> dict[str, Any]:
    """A folder that the stub takes for a sentence encoder."""
    stub = Path(folder) / "sentence_transformers.py"
    stub.write_text(STUB, encoding="utf-8")
    SparkSession.active().sparkContext.addPyFile(str(stub))
    encoder = Path(folder) / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text("{}", encoding="utf-8")
    return {"folder": str(encoder), "sha256": folder_sha256(str(encoder))}


# Settings that name a file, by the folder that it is written to.
WITH_FILES: dict[str, Callable[[str], dict[str, Any]]] = {
    "image_features": image_features,
    "file_vectors": file_vectors,
    "sentences": sentences,
}

# What is checked: a model with its short settings, and heads that change what it learns and answers.
CASES = {name: (name, SHORT.get(name, {})) for name in sorted(MODELS)}
CASES["paragraph_vectors, dm"] = (
    "paragraph_vectors",
    {**SHORT["paragraph_vectors"], "method": "dm_concat", "window": 2},
)
CASES["file_vectors, plain"] = ("file_vectors", {"weighting": "plain"})
CASES["content2vec, linear"] = (
    "content2vec",
    {**SHORT["content2vec"], "merger": "linear", "n_neighbours": None},
)
CASES["tfidf, projected"] = ("tfidf", {"min_items": 1, "embedding_size": 32})
CASES["gru4rec, clicks"] = (
    "gru4rec",
    # BPR-max leaves 2 to 5 of 40 users with another first item, after 12 and after 30 epochs.
    {**SHORT["gru4rec"], "head": "click_through", "loss": "cross_entropy"},
)


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> BaseCase:
    name, settings = CASES[request.param]
    options = FitOptions(in_process=True, train=Train(ranks=1))
    folder = str(tmp_path_factory.mktemp(name))
    if name in WITH_FILES:
        settings = {**settings, **WITH_FILES[name](folder)}
    spec = MODELS[name]
    return case_class(spec)(spark, spec, settings, folder, options)


@pytest.mark.spark
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_contract(case: BaseCase, check: Check) -> None:
    if check not in checks_for(case.spec):
        pytest.skip(f"{case.spec.name} lacks the tags {sorted(check.tags - case.spec.tags)}")
    check.run(case)


def test_every_check_applies_to_some_model() -> None:
    kinds = {spec.kind for spec in MODELS.values()}
    used = {check.name for spec in MODELS.values() for check in checks_for(spec)}
    assert used == {check.name for check in CHECKS if kinds & {*check.kinds}}
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_every_model_is_registered() -> None:
    found = set()
    for module in pkgutil.walk_packages(recspark.models.__path__, "recspark.models."):
        for name, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            is_model = issubclass(kind, Algorithm) and not inspect.isabstract(kind)
            if is_model and kind.__module__ == module.name:
                found.add(f"{module.name}:{name}")
    assert found == {spec.algorithm_class for spec in MODELS.values()}


def test_the_registry_says_who_learns() -> None:
    for spec in MODELS.values():
        assert spec.learns == spec.load().learns, spec.name


def test_tags_are_known() -> None:
    known = {
        "personal",
        "neural",
        "ranks",
        "threads",
        "neighbours",
        "cold_users",
        "decay",
        "own_items",
        "sources",
        "reasons",
        "encoders",
        "factors",
        "cold_items",
    }
    assert set().union(*(spec.tags for spec in MODELS.values())) == known
