"""JODIE's Wikipedia: which page does a user edit next, and when; `coevolve` beside rules without learning.

`python -m benchmarks quality.wikipedia`; data in `../shared/data/jodie_wikipedia` or
`RECSPARK_DATA/jodie_wikipedia` (157,474 edits of 1,000 pages by 8,227 users in one month).

Protocol (Kumar, Zhang, Leskovec 2019, their evaluation script): events in time order; the first 80 %
are trained on, the next 10 % choose settings, the last 10 % are the test. Each test event is asked
with all events before it known, then becomes known itself (streamed; weights stay as trained). Rank of
the true page among all 1,000, nothing masked, ties count against (pessimistic): MRR and recall@10.
Four kinds of events apart: the page that the user edited last; another page of the user; a page that is
new to a known user; an event of a new user. For the test, training takes the first 90 %, settings as
chosen on the tenth before.

The likelihood of the test events, in nats per event (higher is better), is that of the pairs of users
and pages of the training part; events of others change clocks and states, and count for nobody. It is
exact: over all pairs, from the first test event to the last. Beside it, without evolution and fitted
on the same events: one rate for all pairs (homogeneous Poisson), and for each pair a constant rate, a
Rayleigh process (intensity c times the time since the last event of user or page) and a process of the
model's shape, each with one number c a pair, shrunk towards the mean by `PRIOR` events.

MAE of the return: hours between the expected and the true time to a user's next event, after each test
event of a user who acts again in the test part. `median` guesses the median of the model's distribution
instead of the mean (it is the guess with the lowest absolute error, if the distribution is right).

Rows: `coevolve`; `static` never changes a state and has a vector for each user instead; `no time` has
shape 1, an intensity that stands still between events, and cells that read no times; `no places` has no
number for the user's newest pages (the paper's form); `rayleigh` has the paper's shape, 2.

    RECSPARK_WIKIPEDIA='part=validation:rows=coevolve,static:seeds=1,2:epochs=1' \
        python -m benchmarks quality.wikipedia
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks import machine
from recspark.data.blocks import Array
from recspark.engines.event_walk import SHORTEST_GAP_DAYS, Clocks, move_to_front, place_of
from recspark.models.sequences.coevolve import CoevolveSettings
from recspark.models.sequences.event_stream import (
    Events,
    Walker,
    Windows,
    replay,
    start_exponents,
)
from recspark.nets.coevolve import LARGEST_EXPONENT, CoevolveNet, facts
from recspark.train.comm import Meeting, ThreadComm
from recspark.train.loop import LoopOptions, train_network

KINDS = ("same page", "earlier page", "new page", "new user")
TARGET = {"mrr": 0.8192, "recall@10": 0.8912}
PUBLISHED = {  # from memory of the paper's table; both below the first rule
    "DeepCoevolve": {"mrr": 0.515, "recall@10": 0.563},
    "JODIE": {"mrr": 0.746, "recall@10": 0.822},
}


@dataclass(frozen=True)
class Log:
    """Events in time order: users and pages from 0, seconds; (n,) each."""

    user: Array
    page: Array
    seconds: Array

    @property
    def shape(self) -> tuple[int, int]:
        """Number of users and of pages."""
        return int(self.user.max()) + 1, int(self.page.max()) + 1

    def __len__(self) -> int:
        return len(self.user)


def read() -> Log | None:
    """Return the events; None, with a line of text, where the file is not there."""
    root = Path(os.environ.get("RECSPARK_DATA", "../shared/data"))
    path = root / "jodie_wikipedia" / "wikipedia.parquet"
    if not path.exists():
        print(f"no {path}: set RECSPARK_DATA to the folder that holds jodie_wikipedia")
        return None
    rows = pq.read_table(path)
    user, page, seconds = (
        rows.column(name).to_numpy() for name in ("user_id", "item_id", "seconds")
    )
    return Log(user.astype(np.int32) - 1, page.astype(np.int32) - 1, seconds.astype(np.int64))


def kinds(log: Log) -> Array:
    """Return the kind of each event, int (n,): see `KINDS`."""
    last: dict[int, int] = {}
    pages: dict[int, set[int]] = {}
    kind = np.empty(len(log), int)
    for n, (user, page) in enumerate(zip(log.user.tolist(), log.page.tolist(), strict=True)):
        edited = pages.setdefault(user, set())
        if not edited:
            kind[n] = 3
        elif last[user] == page:
            kind[n] = 0
        else:
            kind[n] = 1 if page in edited else 2
        last[user] = page
        edited.add(page)
    return kind


def rule_ranks(log: Log, begin: int, end: int) -> dict[str, Array]:
    """Return the rank of the true page by each rule, float (end - begin,) each."""
    n_users, n_pages = log.shape
    edited_at = np.full(n_pages, -1)  # number of the newest event of each page
    counts = np.zeros(n_pages, int)
    own_at: list[dict[int, int]] = [{} for _ in range(n_users)]  # page -> newest event of the user
    last_page = np.full(n_users, -1)
    followers = np.zeros((n_pages, n_pages), np.int32)
    ranks: dict[str, list[int]] = {name: [] for name in RULES}
    for n, (user, page) in enumerate(zip(log.user[:end], log.page[:end], strict=True)):
        if n >= begin:
            own = np.full(n_pages, -1)
            own[list(own_at[user])] = list(own_at[user].values())
            after = followers[last_page[user]] if last_page[user] >= 0 else np.zeros(n_pages, int)
            keys = {
                "popular": (counts,),
                "recent": (edited_at,),
                "own, recent": (own, edited_at),
                "own, transitions, recent": (own, after, edited_at),
            }
            for name, columns in keys.items():
                ranks[name].append(pessimistic_rank(columns, page))
        counts[page] += 1
        if last_page[user] >= 0:
            followers[last_page[user], page] += 1
        edited_at[page] = own_at[user][int(page)] = n
        last_page[user] = page
    return {name: np.array(values, float) for name, values in ranks.items()}


RULES = ("popular", "recent", "own, recent", "own, transitions, recent")


def pessimistic_rank(columns: tuple[Array, ...], page: int) -> int:
    """Return the number of pages that are not below `page`, by the first column in which two differ.

    >>> pessimistic_rank((np.array([5, 5, 1]), np.array([0, 2, 9])), 0)
    2
    """
    is_above, is_equal = np.zeros(len(columns[0]), bool), np.ones(len(columns[0]), bool)
    for column in columns:
        is_above |= is_equal & (column > column[page])
        is_equal &= column == column[page]
    return int((is_above | is_equal).sum())


def figures(rank: Array, kind: Array) -> dict[str, Any]:
    """Return MRR and recall@10, of all events and of each kind."""
    rows = {"all": np.ones(len(rank), bool)}
    rows |= {name: kind == number for number, name in enumerate(KINDS)}
    return {
        name: {
            "n": int(is_of_kind.sum()),
            "mrr": round(float((1 / rank[is_of_kind]).mean()), 4),
            "recall@10": round(float((rank[is_of_kind] <= 10).mean()), 4),
        }
        for name, is_of_kind in rows.items()
        if is_of_kind.any()
    }


# --- the model ----------------------------------------------------------------------------------

PRIOR = 1.0  # events that the number of each pair is shrunk by
SETTINGS = CoevolveSettings()  # chosen on the validation tenth, each of few: shape, rate, epochs
ROWS: dict[str, dict[str, Any]] = {
    "coevolve": {},
    "static": {"evolves": False},
    "no time": {"shape": 1.0, "reads_time": False},
    "no places": {"n_recent": 0},
    "rayleigh": {"shape": 2.0},
}


def trained(log: Log, end: int, settings: CoevolveSettings, seed: int, **net: Any) -> CoevolveNet:
    """Return the network after training on the first `end` events. Its states are forgotten."""
    events = events_of(log).part(0, end)
    exponents = start_exponents(
        events, clocks_of(log, settings), settings.shape, settings.n_user_samples, seed
    )
    model = CoevolveNet(
        *log.shape,
        settings.embedding_size,
        settings.n_recent,
        settings.shape,
        settings.cell,
        torch.from_numpy(exponents),
        torch.Generator().manual_seed(seed),
        **net,
    )
    walker = Walker(
        model,
        events,
        clocks_of(log, settings),
        settings.n_item_samples,
        settings.n_user_samples,
        settings.mark_weight,
        seed,
    )
    comm = ThreadComm(0, Meeting(1, lambda: None), lambda text: print(f"  {text}", flush=True))
    options = LoopOptions(
        settings.epochs, settings.learning_rate, clip_norm=settings.clip_norm, seed=seed
    )
    train_network(comm, model, walker.loss, Windows(end, settings.batch_size, 0, 1), options)
    model.forget()
    return model


def events_of(log: Log) -> Events:
    return Events(log.user, log.page, log.seconds * 1_000_000)


def clocks_of(log: Log, settings: CoevolveSettings) -> Clocks:
    return Clocks.started(*log.shape, settings.n_recent, int(log.seconds[0]) * 1_000_000)


@dataclass(frozen=True)
class Streamed:
    """What a model says of the events from `begin` on: (n,) each.

    `rank` of the true page; `log_intensity` of the event; `ended` the integrals of the intensities
    whose clocks the event starts anew, over the known pairs; `mean_return`, `median_return` days to
    the user's next event, seen from just after the event. `running` : the integrals of the clocks
    that run at the first and at the last event.
    """

    rank: Array
    log_intensity: Array
    ended: Array
    mean_return: Array
    median_return: Array
    running: tuple[float, float]


@torch.no_grad()
def streamed(
    model: CoevolveNet, log: Log, settings: CoevolveSettings, begin: int, end: int
) -> Streamed:
    """Return what `model` says of the events from `begin` to `end`, one by one.

    Written apart from the windows of the training: states are changed event by event, and the
    intensities of all pages for the user and of all users for the page are computed at each event.
    """
    events, clocks = events_of(log), clocks_of(log, settings)
    replay(model, events.part(0, begin), clocks)
    n_users, n_pages = log.shape
    users = model.user_vectors(model.user_state, torch.arange(n_users)).numpy().astype(np.float32)
    pages = model.item_vectors(model.item_state, torch.arange(n_pages)).numpy().astype(np.float32)
    place = np.append(model.place.numpy(), 0.0)
    shape, n_recent = settings.shape, settings.n_recent
    is_user, is_page = known(log, begin)
    at = [clocks.user_at / 86_400e6, clocks.item_at / 86_400e6]  # days

    def gaps(now: float, last: Array) -> Array:
        return np.maximum(now - last, SHORTEST_GAP_DAYS)

    def meetings(exponent: Array, gap: Array) -> Array:
        return np.asarray(np.exp(exponent) * gap**shape / shape)

    def exponents_of_user(user: int) -> Array:
        s = pages @ users[user]
        own = clocks.recent_items[user]
        s[own[own >= 0]] += place[:n_recent][own >= 0]
        return s.clip(-LARGEST_EXPONENT, LARGEST_EXPONENT)

    def exponents_of_page(page: int) -> Array:
        s = users @ pages[page]
        visitors, places = np.nonzero(clocks.recent_items == page)
        s[visitors] += place[places]
        return s.clip(-LARGEST_EXPONENT, LARGEST_EXPONENT)

    def running(now: float) -> float:
        return sum(
            float(
                meetings(exponents_of_user(user), gaps(now, np.maximum(at[0][user], at[1])))[
                    is_page
                ].sum()
            )
            for user in np.flatnonzero(is_user)
        )

    out = np.zeros((5, end - begin))
    first = running(log.seconds[begin] / 86_400)
    for n in range(begin, end):
        user, page, now = int(log.user[n]), int(log.page[n]), log.seconds[n] / 86_400
        s, gap = exponents_of_user(user), gaps(now, np.maximum(at[0][user], at[1]))
        logs = s + (shape - 1) * np.log(gap)
        ended = 0.0
        if is_user[user]:
            ended += float(meetings(s, gap)[is_page].sum())
        if is_page[page]:
            others = is_user.copy()
            others[user] = False
            gap_of_users = gaps(now, np.maximum(at[0], at[1][page]))
            ended += float(meetings(exponents_of_page(page), gap_of_users)[others].sum())
        out[:3, n - begin] = (logs >= logs[page]).sum(), logs[page], ended

        own, visitors = clocks.recent_items[user], clocks.recent_users[page]
        read = [
            facts(
                torch.tensor(
                    [max(now - at[side][who], SHORTEST_GAP_DAYS) if model.reads_time else 1.0]
                ),
                torch.tensor([place_of(newest, other)]),
                n_recent,
            ).float()
            for side, who, newest, other in ((0, user, own, page), (1, page, visitors, user))
        ]
        if model.evolves:
            of_user, of_page = model.user_state[[user]], model.item_state[[page]]
            user_vector, page_vector = users[user, :-2], pages[page, :-2]
            new_user = model.user_cell(
                torch.cat([torch.from_numpy(page_vector.copy())[None], read[0]], dim=1), of_user
            )
            new_page = model.item_cell(
                torch.cat([torch.from_numpy(user_vector.copy())[None], read[1]], dim=1), of_page
            )
            model.user_state.data[user], model.item_state.data[page] = new_user[0], new_page[0]
            users[user] = model.user_vectors(new_user, torch.tensor([user]))[0].numpy()
            pages[page] = model.item_vectors(new_page, torch.tensor([page]))[0].numpy()
        move_to_front(own, page)
        move_to_front(visitors, user)
        at[0][user] = at[1][page] = now
        total = np.exp(exponents_of_user(user)).sum()
        scale = (shape / total) ** (1 / shape)  # days
        out[3:, n - begin] = math.gamma(1 + 1 / shape) * scale, math.log(2) ** (1 / shape) * scale
    last = running(log.seconds[end - 1] / 86_400)
    return Streamed(*out, (first, last))


def known(log: Log, begin: int) -> tuple[Array, Array]:
    """Return whether each user and each page has an event before `begin`."""
    is_user, is_page = (np.zeros(n, bool) for n in log.shape)
    is_user[log.user[:begin]] = is_page[log.page[:begin]] = True
    return is_user, is_page


def likelihood(said: Streamed, log: Log, begin: int, end: int) -> float:
    """Return the log-likelihood of the known pairs' events, nats per event."""
    is_user, is_page = known(log, begin)
    is_event = is_user[log.user[begin:end]] & is_page[log.page[begin:end]]
    survival = said.ended.sum() + said.running[1] - said.running[0]
    return float((said.log_intensity[is_event].sum() - survival) / is_event.sum())


def likelihoods_without_evolution(log: Log, begin: int, end: int, shape: float) -> dict[str, float]:
    """Return the same for models without evolution; see the docstring of this file."""
    is_user, is_page = known(log, begin)
    day = log.seconds / 86_400
    is_event = is_user[log.user] & is_page[log.page]
    n_pairs, n_test = int(is_user.sum() * is_page.sum()), int(is_event[begin:end].sum())
    rate = begin / (n_pairs * (day[begin] - day[0]))
    found = {
        "homogeneous Poisson": math.log(rate)
        - rate * n_pairs * (day[end - 1] - day[begin]) / n_test
    }
    for name, power in (("Poisson", 1.0), ("Rayleigh", 2.0), (f"shape {shape}", shape)):
        exposure, counts, gap = pair_exposure(log, begin, end, power)
        mean = begin / exposure[0][np.ix_(is_user, is_page)].sum()
        numbers = (counts + PRIOR) / (exposure[0] + PRIOR / mean)
        tested = np.flatnonzero(is_event[begin:end]) + begin
        logs = np.log(numbers[log.user[tested], log.page[tested]])
        logs += (power - 1) * np.log(gap[tested - begin])
        survival = (numbers * exposure[1])[np.ix_(is_user, is_page)].sum()
        found[f"each pair, {name}"] = float((logs.sum() - survival) / n_test)
        if power == 2.0:
            logs = math.log(mean) + np.log(gap[tested - begin])
            survival = mean * exposure[1][np.ix_(is_user, is_page)].sum()
            found["all pairs, Rayleigh"] = float((logs.sum() - survival) / n_test)
    return found


def pair_exposure(log: Log, begin: int, end: int, power: float) -> tuple[list[Array], Array, Array]:
    """Return sums of gap^power / power by pair, before `begin` and from there to the last event;
    events by pair before `begin`; and the gap of each event from `begin` on, in days.
    """
    n_users, n_pages = log.shape
    sums, counts = [np.zeros((n_users, n_pages)) for _ in range(2)], np.zeros((n_users, n_pages))
    day = log.seconds / 86_400
    last_user, last_page = np.full(n_users, day[0]), np.full(n_pages, day[0])
    gap = np.zeros(end - begin)

    def grown(now: float, last: Array) -> Array:
        return np.asarray(np.maximum(now - last, SHORTEST_GAP_DAYS) ** power / power)

    def running(now: float) -> Array:
        return grown(now, np.maximum(last_user[:, None], last_page[None]))

    for n in range(end):
        if n == begin:
            sums[0] += running(day[n])
            sums[1] -= running(day[n])
        user, page, part = log.user[n], log.page[n], sums[n >= begin]
        last = max(last_user[user], last_page[page])
        if n >= begin:
            gap[n - begin] = max(day[n] - last, SHORTEST_GAP_DAYS)
        else:
            counts[user, page] += 1
        part[user] += grown(day[n], np.maximum(last_user[user], last_page))
        part[:, page] += grown(day[n], np.maximum(last_user, last_page[page]))
        part[user, page] -= grown(day[n], last)  # it was added twice
        last_user[user] = last_page[page] = day[n]
    sums[1] += running(day[end - 1])
    return sums, counts, gap


def returns(log: Log, begin: int, end: int) -> tuple[Array, dict[str, Array]]:
    """Return days to the user's next event before `end`, NaN if there is none, and what is guessed
    without a model: means and medians of the gaps of all users, and of the user, before the event.
    """
    day = log.seconds / 86_400
    last: dict[int, int] = {}
    truth, gaps = np.full(end, np.nan), np.full(end, np.nan)
    for n in range(end):
        user = int(log.user[n])
        if user in last:
            truth[last[user]] = gaps[n] = day[n] - day[last[user]]
        last[user] = n
    before = gaps[:begin][~np.isnan(gaps[:begin])]
    total, count = np.zeros(log.shape[0]), np.zeros(log.shape[0])
    own = np.zeros(end)
    for n in range(end):
        user = log.user[n]
        if not np.isnan(gaps[n]):
            total[user] += gaps[n]
            count[user] += 1
        own[n] = (total[user] + before.mean()) / (count[user] + 1)
    guesses = {
        "mean of all gaps": np.full(end - begin, before.mean()),
        "median of all gaps": np.full(end - begin, np.median(before)),
        "mean of the user's gaps": own[begin:],
    }
    return truth[begin:], guesses


def hours_off(guess: Array, truth: Array) -> float:
    return round(float(24 * np.nanmean(np.abs(guess - truth))), 2)


# --- tables -------------------------------------------------------------------------------------


def run(*, smoke: bool) -> None:
    """Print and write the tables."""
    log = read()
    if log is None:
        return
    asked = {"part": "test", "rows": ",".join(ROWS), "seeds": "1"}
    for entry in filter(None, os.environ.get("RECSPARK_WIKIPEDIA", "").split(":")):
        name, _, value = entry.partition("=")
        asked[name] = value
    if smoke:
        log = Log(log.user[:3000], log.page[:3000], log.seconds[:3000])
        asked |= {"rows": "coevolve", "epochs": "1"}
    part, rows, seeds = (asked.pop(name) for name in ("part", "rows", "seeds"))
    changed = CoevolveSettings(**{**SETTINGS.model_dump(), **asked})  # type: ignore[arg-type]
    begin, end = (
        int(len(log) * share) for share in ((0.8, 0.9) if part == "validation" else (0.9, 1))
    )
    kind = kinds(log)[begin:end]
    found: dict[str, Any] = {
        "protocol": __doc__,
        "part": part,
        "target": TARGET,
        "published": PUBLISHED,
    }
    rules = rule_ranks(log, begin, end)
    found["rules"] = {name: figures(rank, kind) for name, rank in rules.items()}
    for name, row in found["rules"].items():
        print(name, row, flush=True)
    truth, guesses = returns(log, begin, end)
    found["return, hours off"] = {name: hours_off(guess, truth) for name, guess in guesses.items()}
    found["nats per event"] = likelihoods_without_evolution(log, begin, end, changed.shape)
    print(found["return, hours off"], found["nats per event"], flush=True)
    found["models"] = {}
    own = rules["own, transitions, recent"]
    for row in rows.split(","):
        for seed in map(int, seeds.split(",")):
            begun = time.monotonic()
            of_net = {k: v for k, v in ROWS[row].items() if k in ("evolves", "reads_time")}
            of_settings = {k: v for k, v in ROWS[row].items() if k not in of_net}
            settings = changed.model_copy(update=of_settings)
            model = trained(log, begin, settings, seed, **of_net)
            seconds = time.monotonic() - begun
            said = streamed(model, log, settings, begin, end)
            difference = 1 / said.rank - 1 / own
            found["models"][f"{row}, seed {seed}"] = {
                "settings": settings.model_dump(),
                "ranks": figures(said.rank, kind),
                "mrr over the rule": interval(difference),
                "nats per event": round(likelihood(said, log, begin, end), 4),
                "hours off": {
                    "mean": hours_off(said.mean_return, truth),
                    "median": hours_off(said.median_return, truth),
                },
                "train_seconds": round(seconds),
                "seconds": round(time.monotonic() - begun),
            }
            print(row, seed, found["models"][f"{row}, seed {seed}"], flush=True)
            if not smoke:
                name = "wikipedia" if part == "test" else f"wikipedia_{part}"
                machine.write(name, "python -m benchmarks quality.wikipedia", found)


def interval(difference: Array) -> list[float]:
    """Return mean and 95 % interval of a paired difference, by 2,000 draws of events."""
    rng = np.random.default_rng(1)
    means = [
        difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(2000)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return [round(float(value), 4) for value in (difference.mean(), low, high)]
