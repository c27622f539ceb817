"""What a night costs beside the same work in one plain process: CPU seconds, by size of the shop.

The plain process does with pandas, numpy, `implicit` and torch what a night of five models does:
cleaning, sessions, histories, features, two fits of each model (tonight's and the backtest's), lists
of 100 in both modes, metrics with bootstrap intervals, neighbours, and all of it written as Parquet.
It keeps no earlier version, checks nothing and cannot be continued. Night and plain process run one
after the other on the same rows. A shop of n times the size is the bundled year with every customer n
times, a few seconds apart.

CPU seconds are those of all processes, the JVM and the Python workers included: they depend less on
what else the machine does than the clock. `python -m benchmarks plain_night` measures 1, 4 and 16
times the bundled shop; `RECSPARK_TIMES=1,4` names other sizes.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import psutil
import scipy.sparse as sp

from benchmarks import machine
from recspark.config.load import load_config

MODELS = ("popular", "item_knn", "ease", "als", "multvae")
NIGHT = "2010-12-09"
N_CANDIDATES, N_LISTED, N_NEIGHBOURS = 100, 10, 20
DAY = np.timedelta64(1, "D")
STAGE = re.compile(
    r"^\s*[\d.,]+ s  ([a-z_]+(?: [a-z_0-9]+)?) \.\.\.$"
)  # a line of the night's progress
_PR_SET_CHILD_SUBREAPER = 36


def run(*, smoke: bool) -> None:
    """Print and write CPU seconds of the night and of the plain process, for each size."""
    if smoke:
        with tempfile.TemporaryDirectory() as folder:
            from benchmarks.nights import sliced

            print("plain process:", plain_night(sliced(folder), folder))
        return
    sizes = [int(n) for n in os.environ.get("RECSPARK_TIMES", "1,4,16").split(",")]
    rows = []
    for times in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = copied(times, folder)
            here = [sys.executable, "-m", "benchmarks.plain_night", path, f"{folder}/plain"]
            plain = measured(here)
            night = measured(
                [
                    str(Path(sys.executable).with_name("recspark")), "nightly", "--run-date", NIGHT,
                    "--set", f"paths.root={folder}/night", "--set", f"source.path={path}",
                    "--set", f"models=[{', '.join(MODELS)}]", "--set", "publish.lists=null",
                ]
            )  # fmt: skip
        row = {"times": times, "plain": plain, "night": night}
        row["ratio"] = round(night["cpu_seconds"] / plain["cpu_seconds"], 2)
        rows.append(row)
        print(
            f"{times:3d} times: night {night['cpu_seconds']:,.0f} s of CPU, plain process "
            f"{plain['cpu_seconds']:,.0f} s: {row['ratio']} times; stages {night['stages']}",
            flush=True,
        )
    machine.write("plain_night", "python -m benchmarks plain_night", {"sizes": rows})


def copied(times: int, folder: str) -> str:
    """Write the bundled year with every customer `times` times; return the file."""
    source = load_config("local").source.path
    if times == 1:
        return source
    rows = pd.read_parquet(source)
    sold_at = pd.to_datetime(rows["InvoiceDate"])
    copies = []
    for copy in range(times):
        of_copy = rows.copy()
        of_copy["Customer ID"] = rows["Customer ID"] * times + copy
        of_copy["Invoice"] = rows["Invoice"].astype(str) + f"x{copy}"
        of_copy["InvoiceDate"] = (sold_at + pd.Timedelta(seconds=copy)).astype(str)
        copies.append(of_copy)
    path = f"{folder}/shop.parquet"
    pd.concat(copies).to_parquet(path, index=False)
    return path


# --- CPU seconds of a command --------------------------------------------------------------------


def measured(command: list[str]) -> dict[str, Any]:
    """Run `command`; return CPU seconds of it and all below it, seconds, and CPU seconds by stage.

    What its children leave behind is adopted and waited for, so that no process is missed.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    begun, cpu_begun = time.monotonic(), _cpu_seconds()
    stages: dict[str, float] = {}
    stage, since = "start", cpu_begun
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := STAGE.match(line):
            cpu = _cpu_seconds()
            stages[stage] = round(stages.get(stage, 0) + cpu - since, 1)
            stage, since = found[1], cpu
    code = process.wait()
    _wait_for_orphans()
    cpu = _cpu_seconds()
    stages[stage] = round(stages.get(stage, 0) + cpu - since, 1)
    if code:
        raise RuntimeError(f"{command} ended with {code}:\n{''.join(lines[-40:])}")
    return {
        "cpu_seconds": round(cpu - cpu_begun, 1),
        "seconds": round(time.monotonic() - begun, 1),
        "stages": stages,
    }


def _cpu_seconds() -> float:
    """Return the CPU seconds of all processes below this one, those that ended too."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = usage.ru_utime + usage.ru_stime
    for process in psutil.Process().children(recursive=True):
        try:
            total += sum(process.cpu_times()[:4])  # its own, and of its children that ended
        except psutil.Error:
            continue
    return total


def _wait_for_orphans() -> None:
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


# --- the plain process ----------------------------------------------------------------------------


def plain_night(path: str, folder: str) -> dict[str, Any]:
    """Do a night's work in this process; return the number of rows of each file it wrote."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    config = load_config("local", [f"models=[{', '.join(MODELS)}]"])
    n_rows: dict[str, Any] = {}

    def write(name: str, rows: pd.DataFrame) -> None:
        rows.to_parquet(out / f"{name}.parquet", index=False)
        n_rows[name] = len(rows)

    events, refused, names = clean(path)
    write("events", events)
    write("quarantine", refused)
    write("items", names)
    write("sessions", sessions(events))
    tonight = np.datetime64(NIGHT) + DAY
    backtest = tonight - np.timedelta64(config.evaluate.horizon_days, "D")
    users, items = np.unique(events["user"]), np.unique(events["item"])
    row = np.searchsorted(users, events["user"])
    column = np.searchsorted(items, events["item"])
    events = events.assign(row=row, column=column)
    write("histories", histories(events))
    all_lists = []
    for cutoff in (backtest, tonight):
        past = events[events["at"] < cutoff]
        write(f"features_{cutoff}", features(past, cutoff))
        future = events[(events["at"] >= cutoff) & (events["at"] < tonight)]
        # At the backtest's cutoff those who come again, tonight everybody.
        asked = np.unique(future["row"] if cutoff == backtest else past["row"])
        seen = matrix(past, cutoff, None, (len(users), len(items)))
        for model in MODELS:
            scores = score(model, past, cutoff, config.settings_of(model), (len(users), len(items)))
            for mode in ("novel", "repeat"):
                lists = best(scores, asked, seen if mode == "novel" else None)
                all_lists.append(lists.assign(cutoff=cutoff, model=model, mode=mode))
            if model == "item_knn" and cutoff == tonight:
                write("neighbours", neighbours(scores))
        if cutoff == backtest:
            write("metrics", metrics(all_lists, future, seen, config.evaluate))
    candidates = pd.concat(all_lists)
    write("candidates", candidates)
    published = candidates[
        (candidates["cutoff"] == tonight)
        & (candidates["model"] == config.publish.model)
        & (candidates["mode"] == config.publish.mode)
        & (candidates["rank"] <= N_LISTED)
    ]
    named = published.assign(user=users[published["row"]], item=items[published["column"]])
    write("recommendations", named.merge(names, on="item", how="left"))
    return n_rows


def clean(path: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Return events `user, item, at, value`, the refused rows with a reason, and the items' names."""
    rows = pd.read_parquet(path)
    code = rows["StockCode"].astype(str).str.strip()
    reason = np.select(
        [
            rows["Invoice"].astype(str).str.upper().str.startswith("C"),
            ~code.str.match(r"^[0-9]{5}"),
            ~(rows["Quantity"] > 0),
            ~(rows["Price"] > 0),
            rows["Customer ID"].isna(),
        ],
        ["cancelled", "not a product", "quantity", "price", "no user"],
        default="",
    )
    is_clean = reason == ""
    kept = rows[is_clean]
    events = pd.DataFrame(
        {
            "user": kept["Customer ID"].astype(np.int64),
            "item": code[is_clean],
            "at": pd.to_datetime(kept["InvoiceDate"]),
            "value": kept["Quantity"] * kept["Price"],
        }
    ).sort_values(["user", "at"], kind="stable", ignore_index=True)
    last = kept.assign(item=code[is_clean]).sort_values("InvoiceDate").groupby("item").last()
    names = last.reset_index()[["item", "Description", "Price"]]
    refused = rows[~is_clean].astype(str).assign(reason=reason[~is_clean])
    return events, refused, names


def sessions(events: pd.DataFrame) -> pd.DataFrame:
    """Return a row per session: a user's events without a gap above half an hour."""
    gap = events["at"].diff() > pd.Timedelta(minutes=30)
    number = (gap | (events["user"] != events["user"].shift())).cumsum()
    return events.groupby(number).agg(
        user=("user", "first"), start=("at", "min"), end=("at", "max"), items=("item", list)
    )


def histories(events: pd.DataFrame) -> pd.DataFrame:
    """Return a row per user: the items and times of all events."""
    return events.groupby("row").agg(items=("column", list), times=("at", list)).reset_index()


def features(past: pd.DataFrame, cutoff: np.datetime64) -> pd.DataFrame:
    """Return counts and ages of each user at the cutoff."""
    of_user = past.groupby("row").agg(
        n_events=("item", "size"), n_items=("item", "nunique"), value=("value", "sum"),
        last=("at", "max"), first=("at", "min"),
    )  # fmt: skip
    return of_user.assign(age=(cutoff - of_user["last"]) / DAY).reset_index()


def matrix(
    past: pd.DataFrame, cutoff: np.datetime64, half_life_days: float | None, shape: tuple[int, int]
) -> sp.csr_matrix:
    """Return the users' weights of items: counts, or decayed counts."""
    weight = np.ones(len(past), np.float32)
    if half_life_days:
        weight = 0.5 ** ((cutoff - past["at"].to_numpy()) / DAY / half_life_days)
    cells = (weight.astype(np.float32), (past["row"], past["column"]))
    return sp.csr_matrix(cells, shape=shape)


def score(
    model: str, past: pd.DataFrame, cutoff: np.datetime64, s: dict[str, Any], shape: tuple[int, int]
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a model; return what gives the scores of all items for some users, (n, n_items)."""
    x = matrix(past, cutoff, s.get("half_life_days"), shape)
    if model == "popular":
        counts = np.asarray(x.sum(axis=0))
        return lambda rows: np.repeat(counts, len(rows), axis=0)
    if model == "als":
        import implicit

        als = implicit.cpu.als.AlternatingLeastSquares(
            factors=s["embedding_size"], regularization=s["reg"], alpha=s["alpha"],
            iterations=s["iterations"], num_threads=1, random_state=1,
        )  # fmt: skip
        als.fit(x, show_progress=False)
        return lambda rows: als.user_factors[rows] @ als.item_factors.T
    if model == "multvae":
        return multvae(x, s)
    gram = np.asarray((x.T @ x).todense(), np.float64)
    if model == "item_knn":
        norms = np.sqrt(gram.diagonal())
        weights = gram / (np.outer(norms, norms) + s["shrink"])
        np.fill_diagonal(weights, 0)
        below = np.partition(weights, -s["n_neighbours"], axis=1)[:, -s["n_neighbours"]]
        weights[weights < below[:, None]] = 0
    else:
        gram[np.diag_indices(len(gram))] += s["reg"]
        inverse = np.linalg.inv(gram)
        weights = -inverse / inverse.diagonal()
        np.fill_diagonal(weights, 0)
    weights = weights.astype(np.float32)
    return lambda rows: x[rows] @ weights


def multvae(x: sp.csr_matrix, s: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    """Train Mult-VAE as `quality/plain_nets.py` has it, on a matrix of 0 and 1."""
    import torch

    from benchmarks.quality import plain_nets
    from recspark.models.autoencoders.multvae import MultVaeSettings

    torch.set_num_threads(1)
    torch.manual_seed(1)
    known = {name: value for name, value in s.items() if name in MultVaeSettings.model_fields}
    settings = SimpleNamespace(**MultVaeSettings(**known).model_dump())
    scores = plain_nets.multvae(torch.from_numpy((x > 0).toarray().astype(np.float32)), settings)
    return lambda rows: scores[rows].numpy()


def best(
    scores: Callable[[np.ndarray], np.ndarray], asked: np.ndarray, seen: sp.csr_matrix | None
) -> pd.DataFrame:
    """Return `row, column, rank, score` of the best candidates of each user."""
    parts = []
    for begin in range(0, len(asked), 1024):
        rows = asked[begin : begin + 1024]
        block = np.array(scores(rows), np.float32)
        if seen is not None:
            of_user, item = seen[rows].nonzero()
            block[of_user, item] = -np.inf
        top = np.argpartition(-block, N_CANDIDATES, axis=1)[:, :N_CANDIDATES]
        value = np.take_along_axis(block, top, axis=1)
        order = np.argsort(-value, axis=1, kind="stable")
        parts.append(
            pd.DataFrame(
                {
                    "row": np.repeat(rows, N_CANDIDATES),
                    "column": np.take_along_axis(top, order, axis=1).ravel(),
                    "rank": np.tile(np.arange(1, N_CANDIDATES + 1), len(rows)),
                    "score": np.take_along_axis(value, order, axis=1).ravel(),
                }
            )
        )
    return pd.concat(parts)


def neighbours(scores: Callable[[np.ndarray], np.ndarray]) -> pd.DataFrame:
    """Return each item's nearest items, from the model's matrix."""
    weights = scores.__closure__[0].cell_contents  # type: ignore[attr-defined, index]
    top = np.argsort(-weights, axis=1)[:, :N_NEIGHBOURS]
    return pd.DataFrame(
        {
            "column": np.repeat(np.arange(len(weights)), N_NEIGHBOURS),
            "neighbour": top.ravel(),
            "score": np.take_along_axis(weights, top, axis=1).ravel(),
        }
    )


def metrics(
    lists: list[pd.DataFrame], future: pd.DataFrame, seen: sp.csr_matrix, evaluate: Any
) -> pd.DataFrame:
    """Return NDCG and recall of each model, mode and k, with the interval of 1,000 replicates."""
    rng = np.random.default_rng(evaluate.seed)
    truth = future[["row", "column"]].drop_duplicates()
    is_seen = np.asarray(seen[truth["row"], truth["column"]]).ravel() > 0
    rows = []
    for of_model in lists:
        mode, model = of_model["mode"].iloc[0], of_model["model"].iloc[0]
        true_pairs = truth[~is_seen] if mode == "novel" else truth
        n_truth = true_pairs.groupby("row").size()
        hits = of_model.merge(true_pairs, on=["row", "column"])
        weights = rng.poisson(1, (evaluate.n_bootstrap, len(n_truth))).astype(np.float64)
        for k in evaluate.ks:
            top = hits[hits["rank"] <= k]
            gain = (1 / np.log2(top["rank"] + 1)).groupby(top["row"]).sum()
            ideal = np.cumsum(1 / np.log2(np.arange(2, k + 2)))
            ndcg = gain.reindex(n_truth.index).fillna(0) / ideal[np.minimum(n_truth, k) - 1]
            recall = top.groupby("row").size().reindex(n_truth.index).fillna(0) / n_truth
            for metric, values in (("ndcg", ndcg), ("recall", recall)):
                means = weights @ values.to_numpy() / weights.sum(axis=1)
                low, high = np.quantile(means, [0.025, 0.975])
                rows.append((model, mode, metric, k, values.mean(), low, high))
    return pd.DataFrame(rows, columns=["model", "mode", "metric", "k", "value", "low", "high"])


if __name__ == "__main__":
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        assert os.environ.get(_name), f"{_name} is set by `python -m benchmarks`"
    print(plain_night(sys.argv[1], sys.argv[2]))
