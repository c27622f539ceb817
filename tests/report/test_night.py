"""What the night says of models that do not earn their place."""

from __future__ import annotations

from recspark.report.night import below_baseline


def row(low: float | None, high: float | None) -> dict[str, dict[str, float | None]]:
    return {"ndcg": {"ci_low": low, "ci_high": high}}


def test_models_below_the_baseline_are_named() -> None:
    found = {
        "popular": row(-0.1, -0.05),  # the baseline itself
        "ease": row(0.01, 0.03),
        "mf": row(-0.01, 0.02),
        "cdl": row(-0.03, -0.01),
        "als": row(None, None),  # no bootstrap
        "item_knn": {},
        "published": row(-0.1, -0.05),  # the list, not a model
    }
    lines = below_baseline(found, "popular")
    assert [line.split(" here:")[0] for line in lines] == [
        "mf is no better than popular",
        "cdl is below popular",
    ]
    assert "recspark tune mf" in lines[0]
    assert below_baseline({"ease": row(0.01, 0.03)}, "popular") == []
