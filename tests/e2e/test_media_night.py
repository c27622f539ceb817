"""Nights of a shop with pictures and sounds: encoders trained by two ranks, broken files refused."""

from __future__ import annotations

import json
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession

from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import load_model
from recspark.pipeline.run import night as run_stages
from recspark.pipeline.run import open_night
from tests.broken_media import broken_images, broken_sounds, write
from tests.contract.documented import documented
from tests.models.content.planted import N_CLASSES, ndcg, pictures, sounds

pytestmark = [
    pytest.mark.spark,
    pytest.mark.horovod,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]
FIRST = date(2024, 5, 1)
N_USERS, N_WARM, N_COLD = 120, 200, 60
CLASSES = np.arange(N_WARM + N_COLD) % N_CLASSES
MODELS = "[popular, als, colours, image, audio, near]"


class Shop:
    """Users like the items of one class. The last items are in the catalogue, but nobody has them."""

    def __init__(self, root: Path) -> None:
        self.root, self.media = root, root / "media"
        shown = pictures(CLASSES, self.media / "shown", 7)
        heard = sounds(CLASSES, self.media / "heard", 7)
        self.items = [
            {"item": f"i{n:03}", "name": f"thing {n}", "media": [self.address(p), self.address(s)]}
            for n, (p, s) in enumerate(zip(shown, heard, strict=True))
        ]
        broken = {**broken_images(), **broken_sounds()}
        write(self.media / "broken", broken)
        self.items += [
            {"item": f"b{n:03}", "name": name, "media": [f"broken/{name}"]}
            for n, name in enumerate(broken)
        ]

    def address(self, path: str) -> str:
        """An address below the folder of the media, as catalogues have them."""
        return str(Path(path).relative_to(self.media))

    def deliver(self, run_date: date) -> None:
        """Two weeks of orders up to a night, a new draw for each day; and the catalogue."""
        folder = self.root / "inbox" / str(run_date)
        folder.mkdir(parents=True, exist_ok=True)
        events = []
        for ago in range(14):
            day = run_date - timedelta(days=ago)
            rng = np.random.default_rng(day.toordinal())
            for user in rng.permutation(N_USERS)[: N_USERS // 2].tolist():
                liked = np.flatnonzero(CLASSES[:N_WARM] == user % N_CLASSES)
                for item in rng.choice(liked, 2, replace=False).tolist():
                    at = datetime.combine(day, datetime.min.time()) + timedelta(minutes=user)
                    row = {
                        "id": f"{day}-{user}-{item}",
                        "user": f"u{user:03}",
                        "item": f"i{item:03}",
                    }
                    events.append({**row, "at": at.isoformat(), "n": 1})
        for name, rows in (("events", events), ("items", self.items)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    def night(self, run_date: date) -> RunContext:
        self.deliver(run_date)
        inbox = f"{self.root}/inbox/{{run_date}}"
        context = open_night(
            "test",
            run_date,
            [
                f"source={{name: shop, kind: mapping, path: '{inbox}/events.jsonl', archive: false, "
                f"format: jsonl, items_path: '{inbox}/items.jsonl', items_columns: {{item_id: item, "
                "item_name: name, media: media}, columns: {event_id: id, user_id: user, item_id: item, "
                "event_at: at, quantity: n}, constants: {event_type: purchase}}",
                f"paths.root={self.root}/lake",
                f"models={MODELS}",
                f"models.colours.folder={self.media}",
                f"models.image={{needs: [als], folder: '{self.media}', image_size: 32, width: 8, epochs: 16, "
                "batch_size: 16, max_megapixels: 1, max_file_mb: 1}",
                f"models.audio={{needs: [als], folder: '{self.media}', excerpt_seconds: 0.5, hidden_size: 24, "
                "epochs: 16, batch_size: 16, learning_rate: 0.01, max_minutes: 0.08, max_file_mb: 1}",
                "models.als={embedding_size: 8, iterations: 6, n_blocks: 2}",
                "models.near={algorithm: 'near_of_media0:Near', needs: [image]}",
                "publish={model: als, ladder: [popular], neighbours_model: null}",
                "evaluate.horizon_days=3",
                "evaluate.n_bootstrap=20",
                "train.ranks=2",
            ],
        )
        run_stages(context)
        return context


@pytest.fixture(scope="module")
def shop(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("media")
    assert documented(spark, folder, "near") == "near_of_media0:Near"
    return Shop(folder)


@pytest.fixture(scope="module")
def night(shop: Shop) -> RunContext:
    return shop.night(FIRST)


def vectors(night: RunContext, encoder: str) -> pd.DataFrame:
    """The rows of `item_vectors` by one encoder that the night has of tonight, with item_id."""
    row = night.runlog.find("encode", encoder)
    assert row is not None
    rows = night.catalog.read("item_vectors", row.outputs["item_vectors"]).toPandas()
    ids = night.catalog.read("item_ids", night.version("item_ids")).toPandas()
    rows = rows[rows["encoder"] == encoder].merge(ids[["item_id", "item_idx"]])
    if encoder != "colours":
        rows = rows[rows["artifact"].str.contains(f"{night.cutoffs.tonight:%Y-%m-%d}")]
    return rows.set_index("item_id")


@pytest.mark.parametrize("encoder", ["image", "audio"])
def test_cold_items_have_vectors_that_rank_them(night: RunContext, encoder: str) -> None:
    """A user's factor is the mean of the factors of the class; the cold items of the class are first."""
    rows = vectors(night, encoder)
    als = load_model(night, "als", night.cutoffs.tonight)
    factor_of = dict(zip(als.items.tolist(), als.arrays()["factors"], strict=True))  # type: ignore[attr-defined]
    warm = {f"i{n:03}": CLASSES[n] for n in range(N_WARM)}
    factors = {item: factor_of.get(rows["item_idx"][item]) for item in warm}
    liked = np.stack(
        [
            np.mean([f for i, f in factors.items() if warm[i] == k and f is not None], axis=0)
            for k in range(N_CLASSES)
        ]
    )
    cold = [f"i{n:03}" for n in range(N_WARM, N_WARM + N_COLD)]
    assert ndcg(liked @ np.stack(rows["vector"][cold]).T, CLASSES[N_WARM:]) >= 0.9


def test_each_broken_file_is_refused_by_name_and_counted(night: RunContext) -> None:
    for encoder, files in (("image", broken_images()), ("audio", broken_sounds())):
        problems = vectors(night, encoder)["problem"]
        names = [*broken_images(), *broken_sounds()]
        for name, (_, problem) in files.items():
            assert problems[f"b{names.index(name):03}"] == problem, name
        row = night.runlog.find("encode", encoder)
        assert row is not None
        assert row.status == "ok"
        assert row.detail["problems"] == problems.value_counts().to_dict()


def test_a_retriever_lists_cold_items_by_their_pictures(night: RunContext) -> None:
    near = load_model(night, "near", night.cutoffs.tonight)
    rows = vectors(night, "image")
    cold = rows.loc[[f"i{n:03}" for n in range(N_WARM, N_WARM + N_COLD)], "item_idx"]
    assert set(cold) <= set(near.items.tolist())  # type: ignore[attr-defined]


def test_the_second_night_encodes_what_is_new(shop: Shop, night: RunContext) -> None:
    """`colours` learns nothing: one new item, and files that were missing, of which one is there now."""
    before = vectors(night, "colours")
    assert before["problem"]["b000"] == "missing file"
    (shop.media / "broken" / "missing.png").write_bytes(
        (shop.media / "shown" / "0.png").read_bytes()
    )
    shop.items.append({"item": "new", "name": "new", "media": ["shown/1.png"]})
    following = shop.night(FIRST + timedelta(days=1))
    rows = vectors(following, "colours")
    n_missing = int((before["problem"] == "missing file").sum())
    row = following.runlog.find("encode", "colours")
    assert row is not None
    assert row.detail["encoded"] == n_missing + 1
    assert np.array_equal(rows["vector"]["b000"], rows["vector"]["i000"])
    assert np.array_equal(rows["vector"]["new"], rows["vector"]["i001"])
    same = before.index.difference(["b000", "new"])
    assert (rows["encoded_date"][same] == before["encoded_date"][same]).mean() > 0.95
