"""Typed settings of a night; `recspark.layers` reads them from `conf/`."""

from __future__ import annotations

import hashlib
import json
import zoneinfo
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from recspark.errors import suggest

Mode = Literal["novel", "repeat"]


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Paths(Section):
    """Where things are kept. Every value is a URI or a path; a relative one starts at the working
    folder.
    """

    root: str = Field("build/recspark", description="everything of one installation lives below it")

    @property
    def tables(self) -> str:
        return f"{self.root}/tables"

    @property
    def artifacts(self) -> str:
        return f"{self.root}/artifacts"

    @property
    def checkpoints(self) -> str:
        return f"{self.root}/checkpoints"

    @property
    def reports(self) -> str:
        return f"{self.root}/reports"


class Spark(Section):
    """What the machine or cluster decides; never part of a run's identity."""

    master: str | None = Field(None, description="null: whatever spark-submit says")
    shuffle_partitions: int = Field(8, ge=1, description="upper bound; AQE coalesces below it")
    driver_memory: str = Field(
        "2g", description="only for a session started by the recspark command"
    )
    conf: dict[str, str] = Field(default_factory=dict, description="any further Spark conf")


class MadeUpTimes(Section):
    """Times for a source that has an order but no times (kind `session_files`)."""

    start: date | None = Field(
        None, description="of the first session; null: midnight of the night"
    )
    session_seconds: float = Field(
        0.01, gt=0, description="from one session's start to the next: 8.6 million a day. Guess"
    )
    event_seconds: float = Field(
        1.0, gt=0, description="from one event of a session to the next. Guess"
    )


# What a mapping may name, and what it must; `event_id` is made from the row where it is not named.
EVENT_COLUMNS = (
    "event_id", "user_id", "session_key", "order_id", "item_id", "event_type", "event_at", "value",
    "quantity",
)  # fmt: skip
ITEM_COLUMNS = ("item_id", "item_name", "category", "price", "text", "media", "valid_from")


class Source(Section):
    """Where raw events come from and how their columns map to the event schema."""

    name: str
    kind: Literal["online_retail", "movielens", "session_files", "mapping"]
    path: str = Field(description="file, folder or URI; `{run_date}` is replaced by the night")
    archive: bool = Field(
        True, description="one file with everything; false: one landing per night at `path`"
    )
    timezone: str = Field("UTC", description="time zone of times that carry none")
    format: Literal["csv", "jsonl", "parquet", "delta"] = "parquet"
    options: dict[str, str] = Field(default_factory=dict, description="reader options, as Spark's")
    columns: dict[str, str] = Field(
        default_factory=dict, description="mapping: event column -> raw column"
    )
    constants: dict[str, str] = Field(
        default_factory=dict, description="mapping: event column -> constant text"
    )
    attributes: dict[str, str] = Field(
        default_factory=dict, description="mapping: attribute -> raw column"
    )
    min_value: float | None = Field(
        None, description="mapping: a smaller `value` is quarantined; null = any value is fine"
    )
    items_path: str | None = Field(None, description="mapping: catalogue, where there is one")
    items_format: Literal["csv", "jsonl", "parquet", "delta"] | None = Field(
        None, description="mapping: of the catalogue; null = as the events"
    )
    items_columns: dict[str, str] = Field(
        default_factory=dict, description="mapping: item column -> raw column of the catalogue"
    )
    list_separator: str = Field(
        "|",
        min_length=1,
        description="mapping: between the parts of `category` and `media` as text",
    )
    files: tuple[str, ...] = Field(
        (), description="session_files: names below `path` in reading order; () = all, by name"
    )
    made_up: MadeUpTimes = Field(MadeUpTimes(), description="session_files: the times it lacks")  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _can_be_read(self) -> Source:
        zones = (
            zoneinfo.available_timezones()
        )  # empty on a machine without tzdata: Spark has its own
        if zones and self.timezone not in zones:
            near = suggest(self.timezone, zones)
            hint = near if near.startswith(" Did") else " Use an IANA name such as Europe/London."
            raise ValueError(f"source.timezone = '{self.timezone}' is no time zone.{hint}")
        if not self.archive and "{run_date}" not in self.path:
            raise ValueError(
                f"source.path = '{self.path}' names no {{run_date}}, so every night would read the same; "
                "put it in, or say archive: true"
            )
        if self.kind == "session_files" and self.archive and self.made_up.start is None:
            raise ValueError(
                "source.made_up.start is missing: an archive without times needs a first day"
            )
        if self.kind == "mapping":
            self._check_mapping()
        else:
            named = ("columns", "constants", "attributes", "items_path", "min_value")
            if given := [f"source.{name}" for name in named if getattr(self, name)]:
                raise ValueError(f"{', '.join(given)}: for kind 'mapping' only, not '{self.kind}'")
        return self

    def _check_mapping(self) -> None:
        for setting, named, known in [
            ("columns", self.columns, EVENT_COLUMNS),
            ("constants", self.constants, EVENT_COLUMNS),
            ("items_columns", self.items_columns, ITEM_COLUMNS),
        ]:
            for name in named:
                if name not in known:
                    raise ValueError(
                        f"source.{setting}.{name} is no column here.{suggest(name, known)}"
                    )
        given = {*self.columns, *self.constants}
        for name in ("event_id", "item_id", "event_at"):
            if name in self.constants:
                raise ValueError(f"source.constants.{name}: it differs by row, name its raw column")
        for name in ("value", "quantity"):
            if name in self.constants and not _is_number(self.constants[name]):
                raise ValueError(f"source.constants.{name} = '{self.constants[name]}' is no number")
        if self.min_value is not None and "value" not in given:
            raise ValueError("source.min_value is set, but source.columns gives no value")
        twice = sorted(set(self.columns) & set(self.constants))
        if twice:
            raise ValueError(f"source.columns and source.constants both give {twice}")
        lacking = [name for name in ("item_id", "event_type", "event_at") if name not in given]
        if not given & {"user_id", "session_key"}:
            lacking.append("user_id or session_key")
        if lacking:
            raise ValueError(
                f"source.columns gives no {', no '.join(lacking)}: name a raw column there, or a constant"
            )
        if (self.items_path is None) != (not self.items_columns):
            raise ValueError("source.items_path and source.items_columns go together")
        if self.items_columns and "item_id" not in self.items_columns:
            raise ValueError("source.items_columns gives no item_id")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Ingest(Section):
    """Which rows enter `events`."""

    max_late_days: int = Field(
        7,
        ge=0,
        description="days; an older event goes to quarantine, but for a first landing. Guess",
    )
    min_clean_fraction: float = Field(
        0.2,
        ge=0,
        le=1,
        description="clean ÷ (clean + quarantined) of the rows that did not come before, of events "
        "and of the catalogue; below it the landing is refused before any write. Guess",
    )


class Sessions(Section):
    """When one session of a user ends and the next begins."""

    gap_minutes: float = Field(
        30, gt=0, description="inactivity; exactly the gap stays in. Industry habit"
    )
    max_minutes: float | None = Field(
        24 * 60,
        gt=0,
        description="longest session, null = no limit. Guess: a day ends a bot's session",
    )
    impression_types: tuple[str, ...] = Field(
        ("impression",),
        description="types of events that say what a user was shown, not what the user did: they "
        "belong to a session and keep it open, but enter no history",
    )


class Features(Section):
    """How events become histories, weights and features."""

    event_weights: dict[str, float] = Field(
        default_factory=lambda: {"purchase": 1.0},
        description="weight of one event by type; a type not named here weighs `other_weight`",
    )
    other_weight: float = Field(1.0, ge=0)
    explicit: bool = Field(
        False,
        description="events are ratings: one weighs its `value` times the weight of its type, the "
        "newest of a user and item stands for it, and one without a value is none; the backtest has "
        "rmse and mae of models that predict ratings. Wants half_life_days null",
    )
    half_life_days: float | None = Field(
        None, gt=0, description="decay of interaction weights, days; null = none"
    )
    history_buckets: int = Field(
        16, ge=1, description="slices of `histories`; fixed at its first write"
    )
    max_training_items: int = Field(
        512,
        ge=1,
        description="newest distinct items of a user in a training set (of sequences: newest "
        "events); thins training only",
    )
    sequence_length: int = Field(
        51,
        ge=2,
        description="items of a row of training_sessions and training_histories: those that a "
        "network reads, and the one after them. Source: Kang & McAuley 2018 (50 for sparse data)",
    )
    max_training_users: int = Field(
        2048,
        ge=1,
        description="newest users of an item in training_item_bags; thins training only. Guess: few "
        "items have more",
    )
    max_words: int = Field(
        8000,
        ge=1,
        description="words that training_texts knows, those of the most items. Source: Wang, Wang & "
        "Yeung 2015, section 5.1 (of CiteULike-a)",
    )
    max_item_words: int = Field(
        128,
        ge=1,
        description="known words of an item in training_texts, those of the most items. Guess: a "
        "name and some sentences",
    )
    max_shown: int = Field(
        100,
        ge=1,
        description="impressions, the newest, of a row of the training tables that have them; thins "
        "training only. Guess: a few pages of results",
    )

    @model_validator(mode="after")
    def _ratings_do_not_decay(self) -> Self:
        if self.explicit and self.half_life_days is not None:
            raise ValueError("explicit: ratings do not decay; set half_life_days to null")
        return self


class Train(Section):
    """What the machine decides about training; the model's own settings are not here."""

    ranks: int = Field(2, ge=1, description="Horovod ranks; 1 needs no Horovod")
    threads: int = Field(1, ge=1, description="torch threads per rank")
    start_timeout_s: int = Field(120, ge=1, description="seconds to find a slot for every rank")
    timeout_s: int = Field(
        1800,
        ge=1,
        description="seconds without an exchange between ranks, of which a step has one or more, "
        "until a training counts as hung and is ended. Guess",
    )
    seed: int = Field(1, ge=1, description="of initial weights and of the order of rows")
    accumulate: int = Field(
        1,
        ge=1,
        description="parts in which a rank reads its share of a step: more need less memory",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of a network's products; parameters stay float32"
    )
    compression: Literal["none", "float16"] = Field(
        "none",
        description="of dense gradients between ranks: float16 sends half as much, and rounds",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where networks train; auto = a GPU where the rank sees one"
    )
    checkpoint_every_s: float = Field(30, ge=0, description="seconds between two checkpoints")

    def arithmetic(self) -> dict[str, Any]:
        """Return the settings that change a trained weight; the others change only where and when
        it is computed.
        """
        return self.model_dump(
            include={"ranks", "seed", "accumulate", "precision", "compression"}, mode="json"
        )


class Evaluate(Section):
    """The backtest."""

    horizon_days: int = Field(14, ge=1, description="truth = events in [cutoff, cutoff + horizon)")
    ks: tuple[PositiveInt, ...] = Field(
        (10, 20), min_length=1, description="list lengths that are scored"
    )
    metric: str = Field(
        "ndcg", description="the metric that tune and the gate look at, at k = ks[0]"
    )
    baseline: str = Field("popular", description="every interval is a difference to this model")
    n_bootstrap: int = Field(1000, ge=0, description="Poisson replicates of the users")
    max_eval_users: int = Field(
        1_000_000, ge=1, description="above it a seeded hash sample of users"
    )
    seed: int = Field(1, description="of the bootstrap and of the sample of users")


class Publish(Section):
    """Which list is published, and what refuses it."""

    model: str = Field("ease", description="the champion")
    ladder: tuple[str, ...] = Field(
        ("item_knn", "popular"),
        description="models that fill what the champion leaves open, in order",
    )
    mode: Mode = "novel"
    k: int = Field(10, ge=1)
    active_days: int = Field(400, ge=1, description="a user with an event in them gets a list")
    rescore_days: int | None = Field(
        None,
        ge=1,
        description="days; of the active users only those with an event in them, or whose history or "
        "list changed, are scored anew, the others keep the list of the night before; null = everyone",
    )
    neighbours_model: str = "item_knn"
    n_neighbours: int = Field(20, ge=1)
    min_coverage: float = Field(
        0.999, ge=0, le=1, description="gate: share of active users with a list"
    )
    min_full_lists: float = Field(0.99, ge=0, le=1, description="gate: share of lists with k items")


class Tune(Section):
    """How `recspark tune` searches."""

    n_trials: int = Field(30, ge=1)
    seed: int = 1


class Config(Section):
    """Everything one night needs to know, resolved."""

    env: str = "local"
    paths: Paths = Paths()  # type: ignore[call-arg]
    spark: Spark = Spark()  # type: ignore[call-arg]
    source: Source
    ingest: Ingest = Ingest()  # type: ignore[call-arg]
    sessions: Sessions = Sessions()  # type: ignore[call-arg]
    features: Features = Features()  # type: ignore[call-arg]
    models: tuple[str, ...] = Field(description="trained and compared every night, in this order")
    model_settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    train: Train = Train()  # type: ignore[call-arg]
    evaluate: Evaluate = Evaluate()  # type: ignore[call-arg]
    publish: Publish = Publish()  # type: ignore[call-arg]
    tune: Tune = Tune()  # type: ignore[call-arg]
    keep_nights: int = Field(
        30,
        ge=1,
        description="nights whose candidates, features, training sets and artifacts are kept",
    )
    n_candidates: int = Field(100, ge=1, description="k of the candidate lists of each model")

    @model_validator(mode="after")
    def _names_fit_together(self) -> Config:
        for field, name in [
            ("publish.model", self.publish.model),
            ("evaluate.baseline", self.evaluate.baseline),
            ("publish.neighbours_model", self.publish.neighbours_model),
            *[("publish.ladder", step) for step in self.publish.ladder],
        ]:
            if name not in self.models:
                raise ValueError(
                    f"{field} = '{name}' is not among models {list(self.models)}.{suggest(name, self.models)}"
                )
        weighed = sorted({*self.sessions.impression_types} & {*self.features.event_weights})
        if weighed:
            raise ValueError(
                f"features.event_weights names {weighed}, which sessions.impression_types says are "
                "impressions: they enter no history, so they have no weight"
            )
        twice = sorted({name for name in self.models if self.models.count(name) > 1})
        if twice:
            raise ValueError(f"models names {twice} twice")
        if self.n_candidates < max(self.publish.k, *self.evaluate.ks):
            raise ValueError("n_candidates must be at least publish.k and every evaluate.ks")
        return self

    def resolved(self) -> str:
        """Return the whole configuration as JSON with sorted keys, as stored in `runs`."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    def fingerprint(self) -> str:
        """Return 16 hex digits over every setting that can change a table; paths and machine left
        out.
        """
        data = self.model_dump(mode="json", exclude={"paths", "spark", "env", "tune"})
        data["train"] = self.train.arithmetic()
        for place in ("path", "items_path"):
            data["source"].pop(place)
        return digest(data)


def digest(data: object, length: int = 16) -> str:
    """Return the first `length` hex digits of the SHA-256 of `data` as canonical JSON.

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def cutoff_of(run_date: date) -> datetime:
    """Return the first instant that is not in training: midnight UTC after `run_date`.

    >>> cutoff_of(date(2010, 12, 9)).isoformat()
    '2010-12-10T00:00:00+00:00'
    """
    return datetime.combine(run_date + timedelta(days=1), datetime.min.time(), UTC)
