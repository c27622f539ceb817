"""Which parts of the features of pairs are computed for the features that a ranker reads."""

from __future__ import annotations

import pytest

from recspark.data.pair_features import FEATURES, names
from recspark.pipeline.pairs import Parts, parts_read

SOURCES = ("user_knn", "ease", "item_knn")
GROUPS = tuple(FEATURES)
VECTORS = ("item_knn", "words")
NOTHING = Parts((), (), (), users=False, items=False)


def parts(**more: object) -> Parts:
    return Parts(**{**vars(NOTHING), **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (None, Parts(SOURCES, GROUPS, VECTORS, users=True, items=True)),
        ([], NOTHING),
        (["n_sources", "mode"], NOTHING),
        # Their names begin like those of the features of users and items.
        (["user_knn_rank", "item_knn_rank"], NOTHING),
        (["user_knn_score"], parts(scores=("user_knn",))),
        (["ease_relative", "user_knn_relative"], parts(scores=("user_knn", "ease"))),
        (["user_activity"], parts(users=True)),
        (["item_age_days"], parts(items=True)),
        ([names(["orders"])[0]], parts(groups=("orders",))),
        (names(GROUPS), parts(groups=GROUPS)),
        (["item_knn_similar_max"], parts(vectors=("item_knn",))),
        (["words_similar_sum", "ease_score"], parts(scores=("ease",), vectors=("words",))),
    ],
)
def test_what_is_computed(read: list[str] | None, expected: Parts) -> None:
    assert parts_read(read, SOURCES, GROUPS, VECTORS) == expected
