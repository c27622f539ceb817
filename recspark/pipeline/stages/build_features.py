"""Stage build_features: update `histories`, then features and training sets as of each cutoff."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial, reduce
from typing import Any

from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.config import digest
from recspark.data import features, histories, sessions
from recspark.data.interactions import before
from recspark.errors import VersionNotFoundError
from recspark.pipeline.changes import (
    changed_events,
    reflected_version,
    reflecting_note,
    reopened_events,
)
from recspark.pipeline.context import RunContext
from recspark.pipeline.runlog import StageResult
from recspark.pipeline.training_sets import (
    TRAINING,
    USERS_WITH_TRUTH,
    n_files_of,
    rows_of_training_set,
    training_tables,
    with_truth,
)
from recspark.session import together
from recspark.tables.catalog import TableCatalog


def build_features(context: RunContext) -> StageResult:
    """Update `histories`, then write the features and the training sets as of each cutoff of the
    night.

    A training set is written only where a model of tonight reads it, with the settings of that
    model.
    """
    catalog, config = context.catalog, context.config
    outputs = _update_histories(context)
    all_histories = catalog.read("histories", outputs["histories"])
    read_tonight = training_tables(config)
    tables = [*_FEATURE_ROWS, *(table for table in TRAINING if table in read_tonight)]
    # `recommend` needs the number of users who act after the backtest's cutoff. It is counted here,
    # beside the writes, once for all models.
    users_tested = with_truth(context, all_histories, context.cutoffs.backtest)
    (_, n_tested), *versions_and_rows = together(
        context.spark,
        lambda: (0, users_tested.count()),
        *[partial(_write_all_cutoffs, context, all_histories, table) for table in tables],
    )
    outputs.update(
        {table: version for table, (version, _) in zip(tables, versions_and_rows, strict=True)}
    )
    return StageResult(
        outputs,
        catalog.count("histories", outputs["histories"]),
        sum(n_rows for _, n_rows in versions_and_rows),
        {USERS_WITH_TRUTH: n_tested},
    )


def _write_all_cutoffs(
    context: RunContext, all_histories: DataFrame, table: str
) -> tuple[int, int]:
    """Write one table as of all cutoffs of the night; return its version and the number of rows.

    All cutoffs go into one commit. With a commit for each cutoff, another run could commit in
    between, and this run would then read rows of that other run.
    """
    cutoffs = context.cutoffs.all
    rows_at_cutoff = _FEATURE_ROWS.get(table, partial(rows_of_training_set, table=table))
    ratings = context.config.features.explicit
    rows_by_cutoff = [
        rows_at_cutoff(context, before(all_histories, cutoff, ratings=ratings), cutoff)
        for cutoff in cutoffs
    ]
    # A training set has a fixed number of files for each cutoff: every rank reads equally many.
    n_files = None if table in _FEATURE_ROWS else len(cutoffs) * n_files_of(context)
    table_version = context.catalog.replace_slice(
        table, reduce(DataFrame.unionByName, rows_by_cutoff), {"cutoff": cutoffs}, n_files=n_files
    )
    context.progress(f"  {table}")
    return table_version.version, table_version.rows


def _user_features(context: RunContext, histories: DataFrame, cutoff: datetime) -> DataFrame:
    return features.user_features(histories, cutoff)


def _item_features(context: RunContext, histories: DataFrame, cutoff: datetime) -> DataFrame:
    items, older_items = features.catalogues_as_of(context.read("items"), cutoff)
    return features.item_features(histories, items, cutoff, older_items)


# table -> the function that returns its rows as of a cutoff, from the histories before that
# cutoff. `rows_of_training_set` returns those of the training sets.
_FEATURE_ROWS: dict[str, Callable[[RunContext, DataFrame, datetime], DataFrame]] = {
    "user_features": _user_features,
    "item_features": _item_features,
}


_DICTIONARIES = ("user_ids", "item_ids")


def _update_histories(context: RunContext) -> dict[str, int]:
    """Bring `histories` up to date with `events`.

    Return table -> version: of `histories`, and of the dictionaries (`user_ids`, `item_ids`) that
    exist.

    `histories` has one row per user. The row holds all acts of the user (events that are no
    impressions), oldest first. A night changes the histories of few users only, so only the slices
    that hold these users are written again. The steps:

    1. Read the note of the last commit of `histories`. The note says which version of `events` the
       table reflects, with which settings, and with which versions of the dictionaries.
    2. Check that the dictionaries have only grown since then (`_check_dictionaries`): `histories`
       holds the integers that the dictionaries gave to users and items.
    3. Find the version of `events` that the table reflects: `base_version`. It is None where the
       settings changed, or `events` was restored or replaced; every history is then built again.
    4. If `events` has changed since `base_version`, let `_write_changed_histories` replace the
       histories whose events changed. Otherwise nothing is written.

    Example: the last commit reflects version 7 of `events`, and ingest of tonight wrote version 8.
    The difference is the events of yesterday, and one late event of user A from three days ago.
    Only user A and the users with an event yesterday get a new history.

    The dictionaries are read at their newest version, not at the version that ingest of this run
    left. `events` may already hold the landing of another night that runs at the same time, and the
    ids of that landing were written before its events. Dictionaries only grow, so every user and
    item that was in one before keeps its integer.
    """
    catalog, config = context.catalog, context.config
    events_version = context.version("events")
    assert events_version is not None
    # Step 1. These settings decide the content of a history: with other settings no row can stay.
    settings = digest(
        {
            "features": config.features.model_dump(
                include={"event_weights", "other_weight", "explicit", "history_buckets"}
            ),
            "sessions": config.sessions.model_dump(),
        }
    )
    current = catalog.version("histories")
    note_of_current = catalog.note("histories", current)
    dictionary_identities = {
        table: catalog.identity(table, catalog.version(table)) for table in _DICTIONARIES
    }
    outputs = {
        table: version
        for table, (version, _) in dictionary_identities.items()
        if version is not None
    }
    # Steps 2 to 4.
    _check_dictionaries(catalog, note_of_current)
    base_version = reflected_version(catalog, note_of_current, settings)
    if base_version is None or base_version < events_version:
        note = {
            **reflecting_note(catalog, events_version),
            **dictionary_identities,
            "settings": settings,
        }
        current = _write_changed_histories(
            context, current, base_version, events_version, note, outputs
        )
    if current is None:  # there are no events yet: create an empty table
        catalog.create("histories")
        current = 0
    return {"histories": current, **outputs}


def _check_dictionaries(catalog: TableCatalog, note_of_histories: Mapping[str, Any]) -> None:
    """Raise VersionNotFoundError where a dictionary is not the one that `histories` were made with.

    A dictionary may have grown since. It must not have been restored or made again: an integer in
    `histories` could then stand for another user or item.
    """
    for table in _DICTIONARIES:
        recorded = note_of_histories.get(table, [None, None])
        if not catalog.extends(table, catalog.version(table), recorded):
            raise VersionNotFoundError(
                f"table '{table}': histories were made with its version {recorded[0]}, and what is "
                "there now has not come about from that (restored, or made again): its integers "
                f"may stand for others. RESTORE it to version {recorded[0]}: ids without events do "
                "no harm; or restore histories and items too, to what they were at that time"
            )


def _write_changed_histories(
    context: RunContext,
    current: int | None,
    base_version: int | None,
    events_version: int,
    note: dict[str, Any],
    dictionary_versions: Mapping[str, int],
) -> int | None:
    """Write the histories whose events changed between two versions of `events`.

    Return the new version of `histories`, or `current` where nothing had to be written.

    Parameters
    ----------
    current : the version of `histories` to start from; None = there is no table yet
    base_version : the version of `events` that `current` reflects; None = build every history again
    events_version : the version of `events` that the new histories reflect
    note : stored with the commit
    dictionary_versions : table -> version of `user_ids` and `item_ids`

    Steps:

    1. Find the events that changed, and for each user with such an event the time of the first one
       (`changed_at`). An earlier event may be in the same session, so the user's sessions are made
       again from `anchor` on: the start of the earliest session chain that reaches `changed_at`.
    2. Read the events of these users again from `anchor` on, and give each event its session.
    3. Build the new ending of each history: the user's acts from `changed_at` on.
    4. Find the buckets that hold these users. A bucket is a slice of the table; a user's bucket
       follows from a hash of `user_idx`.
    5. Replace these buckets in one commit. In a changed row the acts before `changed_at` stay, and
       the new ending follows; the other rows of the bucket are copied.

    Example: the history of user A is [Mon, Tue, Thu], and a late event of Wednesday arrives. Then
    `changed_at` is Wednesday, the new ending is [Wed, Thu], and the new history is [Mon, Tue, Wed,
    Thu]. The Thursday event is part of the ending because its session may now begin with the
    Wednesday event.
    """
    catalog, config = context.catalog, context.config
    # Step 1. `base_version` becomes None where the old files of `events` are gone. Every history is
    # then built again, and no earlier session counts.
    changes, base_version = changed_events(catalog, base_version, events_version)
    earlier_sessions = (
        context.read("sessions") if base_version is not None else context.read("sessions").limit(0)
    )
    reopened_owners = sessions.reopened(
        changes.where("user_id IS NOT NULL"), earlier_sessions, config.sessions
    ).persist(StorageLevel.MEMORY_AND_DISK)
    user_ids, item_ids = (
        catalog.read(table, dictionary_versions.get(table)) for table in _DICTIONARIES
    )
    # Steps 2 and 3.
    events_in_sessions = reopened_events(context, reopened_owners, events_version)
    new_endings = histories.suffixes(
        events_in_sessions, user_ids, context.item_sized(item_ids), config.features
    ).persist(StorageLevel.MEMORY_AND_DISK)
    # Events without a user id were left out in step 1, so each owner is a user id.
    changed_users = (
        reopened_owners.join(
            user_ids.select(F.col("user_id").alias("owner"), "user_idx"), on="owner", how="inner"
        )
        .select("user_idx", "changed_at")
        .persist(StorageLevel.MEMORY_AND_DISK)
    )
    try:
        # Step 4.
        n_buckets = config.features.history_buckets
        old_histories = catalog.read("histories", current)
        if base_version is not None:
            bucket_rows = (
                changed_users.select(histories.bucket(n_buckets).alias("b")).distinct().collect()
            )
            buckets = sorted(row[0] for row in bucket_rows)
        else:
            # Write all buckets. Where the setting was larger before, the table has buckets beyond
            # `n_buckets`. They are written too, and left empty: their users moved to other buckets.
            buckets_written = {
                row[0] for row in old_histories.select("bucket").distinct().collect()
            }
            old_histories, buckets = (
                old_histories.limit(0),
                sorted(buckets_written | set(range(n_buckets))),
            )
        if not buckets:
            return current
        # Step 5.
        rows = histories.merged(
            old_histories.where(F.col("bucket").isin(buckets)),
            changed_users,
            new_endings.drop("changed_at"),
            n_buckets,
        )
        return catalog.replace_slice(
            "histories", rows, {"bucket": buckets}, note=note, expected=current
        ).version
    finally:
        for frame in (reopened_owners, new_endings, changed_users):
            frame.unpersist()
