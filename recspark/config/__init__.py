"""Typed settings of a night; `recspark.layers` reads them from `conf/`."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import zoneinfo
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)

from recspark import masking
from recspark.errors import suggest

Mode = Literal["novel", "repeat"]
_MODEL_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,99}$")
# Algorithms that give neighbours of items, as the registry tags them (a test compares).
NEIGHBOUR_MODELS = ("item_knn", "ease", "item2vec", "rp3beta")
_INT_MAX = 2**31 - 1


class Section(BaseModel):
    """Base of every section: frozen, an unknown key is an error, and numbers are finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` where a number stands: it would count as 1."""
        field = cls.model_fields[info.field_name or ""]
        kinds = _kinds(field.annotation)
        if kinds & {int, float} and not kinds & {bool, Any} and _holds_bool(value):
            raise ValueError("expected a number, not true or false")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _counts_fit_an_int(cls, value: Any) -> Any:
        """Refuse a whole number that Spark's int does not hold."""
        if any(abs(number) > _INT_MAX for number in _whole_numbers(value)):
            raise ValueError(f"a whole number is at most {_INT_MAX:,}")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """Return the types that an annotation is made of."""
    parts = get_args(annotation)
    return {annotation}.union(*map(_kinds, parts)) if parts else {annotation}


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _whole_numbers(inner)


def _holds_bool(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_bool, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_bool, value))
    return isinstance(value, bool)


_NO_FOLDER = frozenset("[]{}*?\\")  # Hadoop's patterns


class Paths(Section):
    """Where things are kept. Every value is a URI or a path; a relative one starts at the working
    folder.
    """

    root: str = Field(
        "build/recspark",
        description="folder or URI; everything of one installation lives below it. A relative one "
        "starts at the working folder",
    )

    @field_validator("root")
    @classmethod
    def _is_a_folder_for_all(cls, root: str) -> str:
        """Return the root without a `/` at its end; refuse what Spark, Delta or fsspec read as
        something else than a folder's name.
        """
        folder = root.rstrip("/")
        if root != root.strip() or not folder.removeprefix("file:").removesuffix(":"):
            raise ValueError(
                "name a folder: nothing, blanks around it or the root of the machine are none"
            )
        if re.fullmatch(r"[A-Za-z][\w+.-]*:", folder):
            raise ValueError("a URI of nothing: name a bucket or a folder")
        if odd := sorted({c for c in folder if c in _NO_FOLDER or ord(c) < 32}):
            raise ValueError(
                f"{' '.join(map(repr, odd))} cannot stand in it: Spark reads it as a pattern"
            )
        if "::" in folder:
            raise ValueError("'::' cannot stand in it: it chains file systems")
        if folder.startswith("~"):
            raise ValueError("'~' is no folder here: write the home folder out")
        return folder

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

    master: str | None = Field(
        None, description="such as local[*] or spark://host:7077; null = whatever spark-submit says"
    )
    shuffle_partitions: int = Field(
        8, ge=1, le=1_000_000, description="upper bound; AQE coalesces below it. Guess: few cores"
    )
    driver_memory: str = Field(
        "2g",
        pattern=r"^[1-9]\d*[kKmMgGtT]$",
        description="of the JVM; only for a session started by the recspark command. Guess: enough for "
        "the bundled data",
    )
    conf: dict[str, str] = Field(
        default_factory=dict,
        description="any further Spark conf, name to text. Values of secrets are never stored or shown",
    )


class MadeUpTimes(Section):
    """Times for a source that has an order but no times (kind `session_files`)."""

    start: date | None = Field(
        None, description="of the first session; null: midnight of the night"
    )
    session_seconds: float = Field(
        0.01,
        gt=0,
        le=86_400,
        description="seconds from one session's start to the next: 8.6 million a day. Guess",
    )
    event_seconds: float = Field(
        1.0,
        gt=0,
        le=86_400,
        description="seconds from one event of a session to the next. Guess",
    )


# What a mapping may name, and what it must; `event_id` is made from the row where it is not named.
EVENT_COLUMNS = (
    "event_id", "user_id", "session_key", "order_id", "item_id", "event_type", "event_at", "value",
    "quantity",
)  # fmt: skip
NUMBER_COLUMNS = ("value", "quantity")
ID_COLUMNS = ("event_id", "user_id", "session_key", "order_id", "item_id", "event_type")
# Texts that stand for a missing id: of SQL, Hive, Python, pandas, JavaScript.
NULL_IDS = ("NULL", "\\N", "nan", "None", "undefined", "<NA>", "(null)")
ITEM_COLUMNS = ("item_id", "item_name", "category", "price", "text", "media", "valid_from")


class Source(Section):
    """Where raw events come from and how their columns map to the event schema."""

    name: str = Field(
        pattern=r"^\w[\w.-]*$", description="of its file in conf/sources, without .yaml"
    )
    kind: Literal["online_retail", "movielens", "session_files", "mapping"] = Field(
        description="which reader; mapping = columns as named here"
    )
    path: str = Field(description="file, folder or URI; `{run_date}` is replaced by the night")
    archive: bool = Field(
        True, description="one file with everything; false: one landing per night at `path`"
    )
    timezone: str = Field("UTC", description="time zone of times that carry none")
    format: Literal["csv", "jsonl", "parquet", "delta"] = Field(
        "parquet", description="mapping: of the events' files"
    )
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
    expressions: dict[str, str] = Field(
        default_factory=dict,
        description="mapping: event column -> Spark SQL of raw columns, `price * pieces`",
    )
    where: dict[str, str] = Field(
        default_factory=dict,
        description="mapping: Spark SQL condition of raw columns -> the reason with which a row goes to "
        "quarantine where it does not hold, the first that does not; a condition that is null fails",
    )
    min_value: float | None = Field(
        None, description="mapping: a smaller `value` is quarantined; null = any value is fine"
    )
    max_value: float = Field(
        1e12,
        gt=0,
        description="a `value` or `quantity` farther from 0 is quarantined. Guess: no shop's amount; "
        "far below what float32, which models compute in, can square",
    )
    bounds: dict[str, tuple[float | None, float | None]] = Field(
        default_factory=dict,
        description="mapping: `value` or `quantity` -> [least, most]; beyond them a row is "
        "quarantined; null = no bound",
    )
    decimal: str = Field(
        ".", min_length=1, max_length=1, description="sign before a number's fraction, in text"
    )
    thousands: str = Field(
        "",
        max_length=1,
        description='sign between groups of three digits; "" = none; " " = any blank',
    )
    currency: tuple[str, ...] = Field(
        (), description="signs that may stand before or after a number: €, EUR; else it is none"
    )
    null_ids: tuple[str, ...] = Field(
        NULL_IDS, description="texts that are no id, in capitals or not, in any id column"
    )
    null_values: dict[str, tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...]] = Field(
        default_factory=dict,
        description="event or item column -> what stands there for 'not known': the number of a guest",
    )
    whole_number_ids: tuple[str, ...] = Field(
        (), description="id columns whose text 13085.0 (a float, once) means the id 13085"
    )
    earliest: date = Field(
        date(1990, 1, 1),
        description="a number (of seconds, milliseconds, microseconds) before this day is no time. "
        "Guess: no shop logged events then",
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
        self._check_numbers()
        if self.kind == "mapping":
            self._check_mapping()
        else:
            named = (
                "columns", "constants", "attributes", "items_path", "min_value", "expressions",
                "where", "bounds", "null_values", "whole_number_ids",
            )  # fmt: skip
            if given := [f"source.{name}" for name in named if getattr(self, name)]:
                raise ValueError(f"{', '.join(given)}: for kind 'mapping' only, not '{self.kind}'")
        return self

    def _check_numbers(self) -> None:
        signs = {"decimal": self.decimal, "thousands": self.thousands}
        for setting, sign in signs.items():
            if sign and (sign.isalnum() or sign in "+-"):
                raise ValueError(f"source.{setting} = '{sign}' can be a part of a number itself")
        if self.decimal == self.thousands or self.decimal.isspace():
            raise ValueError(
                f"source.decimal = '{self.decimal}' and source.thousands = '{self.thousands}': "
                "12,345 has to be one number"
            )
        if wrong := [text for text in self.currency if not text or any(map(str.isdigit, text))]:
            raise ValueError(f"source.currency: {wrong} is no sign of a currency")

    def _check_mapping(self) -> None:
        checked: list[tuple[str, Iterable[str], Iterable[str]]] = [
            ("columns", self.columns, EVENT_COLUMNS),
            ("expressions", self.expressions, EVENT_COLUMNS),
            ("bounds", self.bounds, NUMBER_COLUMNS),
            ("null_values", self.null_values, (*EVENT_COLUMNS, *ITEM_COLUMNS)),
            ("whole_number_ids", self.whole_number_ids, ID_COLUMNS),
            ("constants", self.constants, EVENT_COLUMNS),
            ("items_columns", self.items_columns, ITEM_COLUMNS),
        ]
        for setting, named, known in checked:
            for name in named:
                if name not in known:
                    raise ValueError(
                        f"source.{setting}.{name} is no column here.{suggest(name, known)}"
                    )
        given = {*self.columns, *self.constants, *self.expressions}
        for name in ("event_id", "item_id", "event_at"):
            if name in self.constants:
                raise ValueError(f"source.constants.{name}: it differs by row, name its raw column")
        for name in ("value", "quantity"):
            if name in self.constants and not _is_number(self.constants[name]):
                raise ValueError(f"source.constants.{name} = '{self.constants[name]}' is no number")
        if self.min_value is not None and "value" not in given:
            raise ValueError("source.min_value is set, but source.columns gives no value")
        for name in self.bounds:
            if name not in given:
                raise ValueError(f"source.bounds.{name}: source.columns gives no {name}")
        if self.min_value is not None and "value" in self.bounds:
            raise ValueError("source.min_value and source.bounds.value: keep one of them")
        sets = {
            "columns": self.columns,
            "constants": self.constants,
            "expressions": self.expressions,
        }
        for one, other in itertools.combinations(sets, 2):
            if twice := sorted(set(sets[one]) & set(sets[other])):
                raise ValueError(f"source.{one} and source.{other} both give {twice}")
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
        le=36_500,
        description="days; an older event goes to quarantine, but for a first landing. Guess",
    )
    min_clean_fraction: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of rows; clean ÷ (clean + quarantined) of those that did not come before, "
        "of events and of the catalogue; below it the landing is refused before any write. Guess",
    )


class Sessions(Section):
    """When one session of a user ends and the next begins."""

    gap_minutes: float = Field(
        30,
        gt=0,
        le=525_600,
        description="minutes without an act; exactly the gap stays in. Industry habit",
    )
    max_minutes: float | None = Field(
        24 * 60,
        gt=0,
        le=525_600,
        description="minutes, longest session; null = no limit. Guess: a day ends a bot's session",
    )
    impression_types: tuple[str, ...] = Field(
        ("impression",),
        description="types of events that say what a user was shown, not what the user did: they "
        "belong to a session and keep it open, but enter no history",
    )


class Features(Section):
    """How events become histories, weights and features."""

    event_weights: dict[str, NonNegativeFloat] = Field(
        default_factory=lambda: {"purchase": 1.0},
        description="weight of one event by type, 0 or more; a type not named here weighs "
        "`other_weight`. The unit of all weights",
    )
    other_weight: float = Field(
        1.0, ge=0, description="weight of one event of any other type. Guess: as a purchase"
    )
    explicit: bool = Field(
        False,
        description="events are ratings: one weighs its `value` times the weight of its type, the "
        "newest of a user and item stands for it, and one without a value is none; the backtest has "
        "rmse and mae of models that predict ratings. Wants half_life_days null",
    )
    half_life_days: float | None = Field(
        None,
        gt=0,
        le=36_500,
        description="days, decay of the weights in training sets; null = none",
    )
    history_buckets: int = Field(
        16,
        ge=1,
        le=1_000_000,
        description="slices of `histories`; fixed at its first write. Guess: one machine",
    )
    max_training_items: int = Field(
        512,
        ge=1,
        description="newest distinct items of a user in a training set (of sequences: newest "
        "events); thins training only. Guess: few users have more",
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

    ranks: int = Field(
        2, ge=1, le=100_000, description="Horovod ranks; 1 needs no Horovod. Guess: two cores"
    )
    threads: int = Field(
        1, ge=1, le=1024, description="torch threads per rank. A task owns one core"
    )
    start_timeout_s: int = Field(
        120, ge=1, le=86_400, description="seconds to find a slot for every rank. Guess"
    )
    timeout_s: int = Field(
        1800,
        ge=1,
        le=604_800,
        description="seconds without an exchange between ranks, of which a step has one or more, "
        "until a training counts as hung and is ended. Guess",
    )
    seed: int = Field(
        1, ge=1, lt=2**31, description="of initial weights and of the order of rows; any number"
    )
    accumulate: int = Field(
        1,
        ge=1,
        le=100_000,
        description="parts in which a rank reads its share of a step: more need less memory. Source: "
        "none is needed for the models here",
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
    checkpoint_every_s: float = Field(
        30, ge=0, le=604_800, description="seconds between two checkpoints; 0 = each epoch. Guess"
    )

    def arithmetic(self) -> dict[str, Any]:
        """Return the settings that change a trained weight; the others change only where and when
        it is computed.
        """
        return self.model_dump(
            include={"ranks", "seed", "accumulate", "precision", "compression"}, mode="json"
        )


class Evaluate(Section):
    """The backtest."""

    horizon_days: int = Field(
        14,
        ge=1,
        le=3650,
        description="days; truth = events in [cutoff, cutoff + horizon). Guess: two weeks of a shop",
    )
    every_days: int = Field(
        1,
        ge=1,
        le=3650,
        description="days between the cutoffs of backtests, counted from 1970-01-01; the backtest has the "
        "newest whose horizon has ended. 1: every night its own; 7: nights of a week share one",
    )
    ks: tuple[Annotated[int, Field(ge=1, le=10_000)], ...] = Field(
        (10, 20), min_length=1, description="list lengths that are scored. Habit of the papers"
    )
    metric: str = Field(
        "ndcg", description="the metric that tune and the gate look at, at k = ks[0]"
    )
    baseline: str = Field(
        "popular",
        description="every interval is a difference to this model; where it is not among `models` and "
        "nobody set it, the first of them",
    )
    n_bootstrap: int = Field(
        1000,
        ge=0,
        le=100_000,
        description="Poisson replicates of the users; 0 = no interval. Habit",
    )
    max_eval_users: int = Field(
        1_000_000, ge=1, description="users; above it a seeded hash sample of them. Guess"
    )
    seed: int = Field(
        1, ge=0, lt=2**31, description="of the bootstrap and of the sample of users; any number"
    )


class Examples(Section):
    """What rankers learn from: the candidates of earlier cutoffs, and what their users did then."""

    every_days: int = Field(
        7,
        ge=1,
        le=3650,
        description="days between the cutoffs of the grid, counted from 1970-01-01: 7 gives Thursdays. "
        "Habit: a week",
    )
    n_cutoffs: int = Field(
        2,
        ge=1,
        le=100,
        description="newest cutoffs of the grid whose horizon has ended before the lists' cutoff. Guess",
    )
    n_negatives: int = Field(
        30,
        ge=1,
        le=10_000,
        description="candidates kept of each user and cutoff that were not acted on, a seeded hash "
        "sample. Guess",
    )
    max_users: int = Field(
        200_000, ge=1, description="users of a cutoff; above it a seeded hash sample of them. Guess"
    )


class Publish(Section):
    """Which list is published, and what refuses it."""

    model: str = Field(
        "ease",
        description="the champion; where it is not among `models` and nobody set it, the first of them "
        "that is not evaluate.baseline. Best on the bundled data",
    )
    ladder: tuple[str, ...] = Field(
        ("item_knn", "popular"),
        description="models that fill what the champion leaves open, in order; where nobody set it, "
        "without those that are not among `models`",
    )
    mode: Mode = Field(
        "novel",
        description="novel leaves out what the user acted on before, repeat leaves out nothing",
    )
    k: int = Field(10, ge=1, le=10_000, description="items of a list. Habit")
    active_days: int = Field(
        400, ge=1, le=36_500, description="days; a user with an event in them gets a list. Guess"
    )
    rescore_days: int | None = Field(
        None,
        ge=1,
        le=36_500,
        description="days; of the active users only those with an event in them, or whose history or "
        "list changed, are scored anew, the others keep the list of the night before; null = everyone",
    )
    neighbours_model: str | None = Field(
        "item_knn",
        description="whose neighbours `item_neighbours` holds; null = none. Where it is not among "
        f"`models` and nobody set it, the first of them among {', '.join(NEIGHBOUR_MODELS)}, else null",
    )
    n_neighbours: int = Field(20, ge=1, le=10_000, description="of each item. Guess")
    min_coverage: float = Field(
        0.999, ge=0, le=1, description="gate: share of active users with a list. Guess"
    )
    min_full_lists: float = Field(
        0.99, ge=0, le=1, description="gate: share of lists with k items. Guess"
    )

    @property
    def steps(self) -> tuple[str, ...]:
        """The champion and what fills its lists, in the ladder's order, each once."""
        return tuple(dict.fromkeys((self.model, *self.ladder)))


class Tune(Section):
    """How `recspark tune` searches."""

    n_trials: int = Field(30, ge=1, le=100_000, description="trials of a search. Guess")
    seed: int = Field(1, ge=0, lt=2**31, description="of the search; any number")


class Config(Section):
    """Everything one night needs to know, resolved."""

    env: str = Field("local", description="conf/env/<name>.yaml; the option --env")
    paths: Paths = Paths()  # type: ignore[call-arg]
    spark: Spark = Spark()  # type: ignore[call-arg]
    source: Source
    ingest: Ingest = Ingest()  # type: ignore[call-arg]
    sessions: Sessions = Sessions()  # type: ignore[call-arg]
    features: Features = Features()  # type: ignore[call-arg]
    models: tuple[str, ...] = Field(
        min_length=1, description="trained and compared every night, in this order"
    )
    model_settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="model to its settings, over conf/models and conf/tuned; in --set `models.<name>.`. "
        "`algorithm` among them names what it is, where that is not the model's own name; `needs` lists the "
        "night's models that it is built on; `kind` says what a class from outside is",
    )
    train: Train = Train()  # type: ignore[call-arg]
    evaluate: Evaluate = Evaluate()  # type: ignore[call-arg]
    examples: Examples = Examples()  # type: ignore[call-arg]
    publish: Publish = Publish()  # type: ignore[call-arg]
    tune: Tune = Tune()  # type: ignore[call-arg]
    keep_nights: int = Field(
        30,
        ge=1,
        le=36_500,
        description="nights whose candidates, features, training sets and artifacts are kept. Guess",
    )
    n_candidates: int = Field(
        100, ge=1, le=100_000, description="k of the candidate lists of each model. Guess"
    )

    @model_validator(mode="after")
    def _names_fit_together(self) -> Config:
        """Say everything at once: who corrects one name wants to know the others."""
        # A name without settings may be misspelt itself: it is not offered as known.
        known = [name for name in self.models if name in self.model_settings] or self.models
        wrong = [
            f"{field} = '{name}' is not among models {list(self.models)}.{suggest(name, known)}"
            for field, name in [
                ("publish.model", self.publish.model),
                ("evaluate.baseline", self.evaluate.baseline),
                ("publish.neighbours_model", self.publish.neighbours_model),
                *[("publish.ladder", step) for step in self.publish.ladder],
            ]
            if name is not None and name not in self.models
        ]
        weighed = sorted({*self.sessions.impression_types} & {*self.features.event_weights})
        if weighed:
            wrong.append(
                f"features.event_weights names {weighed}, which sessions.impression_types says are "
                "impressions: they enter no history, so they have no weight"
            )
        # They are names of files, folders, slices and Airflow's tasks.
        unfit = [name for name in self.models if not _MODEL_NAME.match(name)]
        if unfit or "published" in self.models:
            wrong.append(
                f"models: {unfit or ['published']}: a name is of letters, digits, _ and -, up to 100, and "
                "not 'published', which is the list itself"
            )
        twice = sorted({name for name in self.models if self.models.count(name) > 1})
        if twice:
            wrong.append(f"models names {twice} twice")
        wrong += self._wrong_needs()
        if self.n_candidates < max(self.publish.k, *self.evaluate.ks):
            wrong.append("n_candidates must be at least publish.k and every evaluate.ks")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _wrong_needs(self) -> list[str]:
        """Return what is wrong with what the night's models say they are built on."""
        wrong = []
        for model in self.models:
            needs = self.settings_of(model).get("needs", [])
            if not isinstance(needs, list) or not all(isinstance(name, str) for name in needs):
                wrong.append(f"models.{model}.needs = {needs!r} is no list of names")
                return wrong
            wrong += [
                f"models.{model}.needs names '{name}', which is not among models {list(self.models)}."
                f"{suggest(name, self.models)}"
                for name in needs
                if name not in self.models
            ]
            if len({*needs}) < len(needs):
                wrong.append(f"models.{model}.needs names a model twice: {needs}")
        if not wrong and (circle := self._circle_of_needs()):
            wrong.append(f"models need one another in a circle: {' -> '.join(circle)}")
        return wrong

    def _circle_of_needs(self) -> list[str]:
        """Return models of which each needs the next, and the last the first; [] where none do."""
        checked: set[str] = set()

        def walk(model: str, path: list[str]) -> list[str]:
            if model in path:
                return [*path[path.index(model) :], model]
            if model in checked:
                return []
            found: list[str] = []
            for name in self.needs_of(model):
                found = found or walk(name, [*path, model])
            checked.add(model)
            return found

        return next((found for model in self.models if (found := walk(model, []))), [])

    def settings_of(self, model: str) -> dict[str, Any]:
        """Return the settings of one of the night's models, as the layers give them."""
        return self.model_settings.get(model, {})

    def needs_of(self, model: str) -> tuple[str, ...]:
        """Return the night's models that one of them is built on, as its settings name them."""
        return tuple(self.settings_of(model).get("needs", ()))

    def with_needs(self, models: Iterable[str]) -> tuple[str, ...]:
        """Return `models`, and all that they are built on, in the night's order."""
        wanted: set[str] = set()
        waiting = list(models)
        while waiting:
            model = waiting.pop()
            if model not in wanted:
                wanted.add(model)
                waiting += self.needs_of(model)
        return tuple(model for model in self.models if model in wanted)

    def secrets(self) -> dict[str, str]:
        """Return the free settings whose name says that they hold a secret, name to value."""
        free = {**self.source.options, **self.spark.conf}
        return {name: value for name, value in free.items() if masking.is_secret(name)}

    def masked(self) -> dict[str, Any]:
        """Return the whole configuration as plain values, its secrets hidden."""
        data = self.model_dump(mode="json")
        data["spark"]["conf"] = masking.mask_free(data["spark"]["conf"])
        data["source"]["options"] = masking.mask_free(data["source"]["options"])
        for section, field in (("paths", "root"), ("source", "path"), ("source", "items_path")):
            data[section][field] = masking.mask_value(data[section][field])
        data["model_settings"] = masking.mask_value(data["model_settings"])
        return data

    def resolved(self) -> str:
        """Return the whole configuration as JSON with sorted keys, as stored in `runs`: secrets are
        hidden.
        """
        return json.dumps(self.masked(), sort_keys=True)

    def fingerprint(self) -> str:
        """Return 16 hex digits over every setting that can change a table."""
        return digest(self.comparable())

    def comparable(self) -> dict[str, Any]:
        """Return every setting that can change a table, as plain values.

        Paths, machine and secrets are left out: a new password is the same night, and a digest of one
        could be guessed.
        """
        data = self.model_dump(mode="json", exclude={"paths", "spark", "env", "tune"})
        data["train"] = self.train.arithmetic()
        for place in ("path", "items_path"):
            data["source"].pop(place)
        data["source"]["options"] = {
            name: masking.HIDDEN if masking.is_secret(name) else value
            for name, value in self.source.options.items()
        }
        return data


def digest(data: object, length: int = 16) -> str:
    """Return the first `length` hex digits of the SHA-256 of `data` as canonical JSON.

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def on_grid(moment: datetime, every_days: int) -> datetime:
    """Return the newest midnight UTC, not after `moment`, of those `every_days` apart since 1970-01-01.

    >>> on_grid(datetime(2010, 11, 30, 12, tzinfo=UTC), 7).isoformat()
    '2010-11-25T00:00:00+00:00'
    """
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    days = (moment - epoch).days
    return epoch + timedelta(days=days - days % every_days)


def cutoff_of(run_date: date) -> datetime:
    """Return the first instant that is not in training: midnight UTC after `run_date`.

    >>> cutoff_of(date(2010, 12, 9)).isoformat()
    '2010-12-10T00:00:00+00:00'
    """
    return datetime.combine(run_date + timedelta(days=1), datetime.min.time(), UTC)
