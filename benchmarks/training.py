"""Training: rows a second fed by Petastorm against tensors in memory, and by two ranks against one.

The same loop and network each time, one torch thread a rank. "kept": the feed reads its share once
and keeps it; "streamed": it may hold an eighth of the share, so that every epoch reads the files
anew. Times of a feed hold everything that it does, the first reading too; those of ranks are the
loop's own, without the start of processes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks import machine, plot
from recspark.config import Train
from recspark.models.autoencoders import multvae
from recspark.models.factors import mf
from recspark.models.neural import Job
from recspark.testing import synth
from recspark.train.comm import Comm
from recspark.train.feed import Batch, Feed, ShardPlan, plan_shards
from recspark.train.launch import Launcher, LocalLauncher, launcher
from recspark.train.loop import LoopOptions


@dataclass(frozen=True)
class Size:
    """Of the largest autoencoder here: as Liang et al. 2018 train it on MovieLens 20M."""

    users: int = 4_000
    items: int = 20_000
    per_user: int = 60
    length: int = 256
    hidden_size: int = 600
    latent_size: int = 200
    batch_size: int = 500
    epochs: int = 2
    light_epochs: int = 20


class Memory:
    """What a feed gives, from tensors in memory: the loop's other side in this comparison."""

    def __init__(self, plan: ShardPlan, columns: tuple[str, ...], batch_size: int) -> None:
        feed = Feed(plan, 0, columns, batch_size, 1, reader="arrow")
        self.steps, self.n_rows_of_all = feed.steps, feed.n_rows_of_all
        batches = list(feed.epoch(0))
        self._weight = torch.cat([batch.weight for batch in batches])
        self._tensors = {
            name: torch.cat([batch.tensors[name] for batch in batches]) for name in columns
        }
        self._size = len(batches[0].weight)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Feed.epoch`."""
        order = torch.randperm(len(self._weight), generator=torch.Generator().manual_seed(epoch))
        for at in order.split(self._size)[start:]:
            yield Batch({k: v[at] for k, v in self._tensors.items()}, self._weight[at])


@dataclass(frozen=True)
class FedJob(Job):
    """A job whose rows come another way; `fed` is memory, kept or streamed."""

    fed: str = "kept"
    allowance: int = 1 << 30

    def feed(self, comm: Comm, columns: Any) -> Any:
        """See `Job`."""
        if self.fed == "memory":
            return _MEMORY[0]
        size, seed = self.settings.batch_size, self.loop.seed
        return Feed(self.training, comm.rank, columns, size, seed, allowance=self.allowance)


_COLUMNS = ("user_idx", "items", "weights")
_MEMORY: list[Memory] = []  # made before the clock starts


def run(*, smoke: bool) -> None:
    """Measure all; about ten minutes on two cores."""
    size = Size(300, 200, 10, 32, 16, 8, 100, 1, 1) if smoke else Size()
    with tempfile.TemporaryDirectory() as folder:
        training = synth.write_training(made_up(size), folder, "training_bags", 8, size.length)
        share = training.n_rows * size.length * 8
        found: dict[str, Any] = {"share_mb": round(share / 1e6, 1)}
        plan = plan_shards(training, 1)
        for name, module, settings, epochs in networks(size):
            job = FedJob(
                settings,
                np.arange(size.items, dtype=np.int32),
                plan,
                None,
                LoopOptions(epochs, 1e-3),
                allowance=share // 8,
            )
            found[name] = fed_by(module, job)
            print(name, found[name], flush=True)
        found["streaming"] = streaming(plan, share // 8, 2 if smoke else 20)
        print(found["streaming"], flush=True)
        ranks = (1,) if smoke else (1, 2)
        found["ranks"] = by_ranks(training, size, ranks, smoke=smoke)
    if not smoke:
        machine.write("training", "python -m benchmarks training", {"sizes": asdict(size), **found})
        picture(found)


def networks(size: Size) -> list[tuple[str, ModuleType, Any, int]]:
    """Return the largest autoencoder, and a light network that asks more of its feed."""
    heavy = multvae.MultVaeSettings(
        hidden_size=size.hidden_size, latent_size=size.latent_size, batch_size=size.batch_size
    )
    light = mf.MfSettings(embedding_size=64, batch_size=size.batch_size, n_negatives=200)
    return [("multvae", multvae, heavy, size.epochs), ("mf", mf, light, size.light_epochs)]


def made_up(size: Size) -> synth.Log:
    """Return events of `users`, popularity falling as a power of the item's place."""
    rng = np.random.default_rng(1)
    n = np.clip(rng.lognormal(-0.5, 1, size.users) * size.per_user, 2, size.length).astype(int)
    user = np.repeat(np.arange(size.users), n)
    item = (size.items * rng.random(len(user)) ** 2.5).astype(np.int32)
    return synth.Log(user, item, rng.uniform(1, 300, len(user)), np.ones(len(user), np.float32))


def fed_by(module: ModuleType, job: FedJob) -> dict[str, Any]:
    """Return rows a second by each way of feeding, each run twice, in turn, the better one."""
    _MEMORY[:] = [Memory(job.training, _COLUMNS, job.settings.batch_size)]
    rows = job.training.n_rows * job.loop.epochs
    best: dict[str, float] = {}
    for fed in ("memory", "kept", "streamed") * 2:
        allowance = job.allowance if fed == "streamed" else 1 << 30
        begun = time.perf_counter()
        quiet(1).run(module.train_rank, replace(job, fed=fed, allowance=allowance))
        best[fed] = max(best.get(fed, 0.0), rows / (time.perf_counter() - begun))
    _MEMORY.clear()
    ratios = {f"{fed}_to_memory": best[fed] / best["memory"] for fed in ("kept", "streamed")}
    return {"rows_per_s": best, **ratios}


def quiet(ranks: int) -> Launcher:
    """Return a launcher of threads of this process that tells nothing."""
    torch.set_num_threads(1)
    return LocalLauncher(ranks, 3600, tell=lambda _: None)


def by_ranks(training: Any, size: Size, ranks: tuple[int, ...], *, smoke: bool) -> dict[str, Any]:
    """Return rows a second of the largest autoencoder, fed by Petastorm, on Spark executors.

    What ranks exchange is the same whatever a step holds, so by rows a step as well, read in parts
    of `batch_size`, and with half of the bytes. One rank exchanges nothing: it is never compressed.
    """
    name, module, settings, epochs = networks(size)[0]
    rows = size.batch_size
    ways: dict[str, dict[str, Any]] = {f"{rows} rows a step": {}}
    if not smoke:
        ways[f"{rows} rows a step, float16"] = {"compression": "float16"}  # of two ranks
        ways |= {f"{n * rows} rows a step": {"accumulate": n} for n in (2, 4)}
    found: dict[str, Any] = {"network": name}
    with machine.session(name, [f"master=local[{max(ranks)}]"], smoke=smoke) as spark:
        for way, changed in ways.items():
            n_parts = changed.get("accumulate", 1)
            speed = {}
            for n in ranks:
                if n == 1 and "compression" in changed:
                    speed[1] = found[f"{rows} rows a step"]["rows_per_s"][1]
                    continue
                train = Train(ranks=n, threads=1, device="cpu")  # type: ignore[call-arg]
                job = Job(
                    settings.model_copy(update={"batch_size": n_parts * rows}),
                    np.arange(size.items, dtype=np.int32),
                    plan_shards(training, n),
                    None,
                    LoopOptions(epochs + 1, 1e-3, **changed),
                )
                told = launcher(spark, train, tell=lambda _: None).run(module.train_rank, job)
                of_epochs = told[0].value.curve.epochs
                speed[n] = statistics.median(epoch.rows_per_s for epoch in of_epochs)
            more = {"two_to_one": speed[2] / speed[1]} if 2 in speed else {}
            found[way] = {"rows_per_s": speed, **more}
            print(way, found[way], flush=True)
    return found


def streaming(plan: ShardPlan, allowance: int, epochs: int) -> dict[str, Any]:
    """Return the memory of a process of its own that streams epoch after epoch."""
    asked = json.dumps([plan.shards[0].files, allowance, epochs])
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.training"],
        input=asked, text=True, capture_output=True, check=True,
    )  # fmt: skip
    peaks = json.loads(told.stdout.splitlines()[-1])
    return {
        "allowance_mb": round(allowance / 1e6, 1),
        "before_mb": peaks[0],
        "peak_mb_by_epoch": peaks[1:],
    }


def stream() -> None:
    """Stream what standard input asks for; print MB held before, and at the peak of each epoch."""
    files, allowance, epochs = json.loads(sys.stdin.read())
    from recspark.train.feed import Shard

    plan = ShardPlan((Shard(tuple((uri, rows) for uri, rows in files)),))
    me = psutil.Process()
    for _ in Feed(plan, 0, _COLUMNS, 100, 1, allowance=allowance).epoch(0):
        break  # imports and the first row groups
    peaks = [me.memory_info().rss / 1e6]
    feed = Feed(plan, 0, _COLUMNS, 100, 1, allowance=allowance)
    peaks += [max(me.memory_info().rss / 1e6 for _ in feed.epoch(n)) for n in range(epochs)]
    print(json.dumps([round(peak, 1) for peak in peaks]))


def picture(found: dict[str, Any]) -> None:
    """Draw rows a second by feed and by ranks, and memory by epoch."""
    bars = {
        f"{'recspark' if fed != 'memory' else 'tensors'}, {name}, {fed}": speed
        for name in ("multvae", "mf")
        for fed, speed in found[name]["rows_per_s"].items()
    }
    peaks = found["streaming"]["peak_mb_by_epoch"]
    panels = {
        "rows/s by ranks": (
            "ranks",
            found["ranks"][f"{Size.batch_size} rows a step"]["rows_per_s"],
        ),
        "MB while streaming": ("epoch", dict(enumerate(peaks, 1))),
    }
    title = f"Training, {found['share_mb']:.0f} MB of bags: rows a second by feed"
    plot.draw("training", title, bars, panels, "rows/s")


if __name__ == "__main__":
    stream()
