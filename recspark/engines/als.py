"""Alternating least squares on Spark: blocks of rows in the executors, one compiled solve a block.

Both sides are cut into `n_blocks` blocks (`als_blocks`), cached once. A half-step solves every
block of one side given the factors of the other: item factors come as one broadcast while they fit
`broadcast_bytes`; beyond that, and user factors always, each block is sent the rows that it needs,
in one shuffle. The driver sees Gramians, losses and item factors, nothing user-sized.

Equal seed and block count give the same bits: rows are in a fixed order, Gramians are summed in the
order of blocks, randomness is that of (seed, block). A lost executor costs the recomputation of its
blocks, from the newest checkpoint on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from pyspark import RDD, Broadcast
from pyspark.sql import DataFrame

from recspark.data.blocks import Array
from recspark.engines import als_checkpoint
from recspark.engines.als_blocks import LEVEL, Block, Order, item_blocks, same, user_blocks
from recspark.engines.als_kernels import Method, eigenbasis, solve
from recspark.engines.als_objective import Objective, gramian
from recspark.errors import EmptyDataError, ModelError

_FAN = 32  # partial sums that one task adds up


@dataclass(frozen=True)
class Plan:
    """How a factorisation runs.

    Parameters
    ----------
    rank : length of a factor
    iterations : each solves all items, then all users
    n_blocks : of users and of items; a task holds one block, its factors and those it needs
    seed : of the users' first factors
    method, cg_steps : see `als_kernels.solve`
    broadcast_bytes : item factors up to this size are broadcast
    scratch : URI of a folder for checkpoints, seen by all executors; "" = none: an executor lost after
        `checkpoint_every` iterations then ends the run
    checkpoint_every : iterations between two checkpoints
    progress : told of each iteration
    prior : called before items are solved, with their factors (n_items, d), or None the first time;
        returns what the penalty draws them to, float32 (n_items, d) (`als_kernels.solve`; cholesky).
        Checkpoints know nothing of it: leave `scratch` empty. None = 0
    """

    rank: int
    iterations: int
    n_blocks: int = 4
    seed: int = 1
    method: Method = "cg"
    cg_steps: int = 4
    broadcast_bytes: int = 256 << 20
    scratch: str = ""
    checkpoint_every: int = 5
    progress: Callable[[str], None] = lambda _text: None
    prior: Callable[[Array | None], Array] | None = None


@dataclass(frozen=True)
class Solved:
    """Factors of a block, float32 (n, d), and sums over it that the driver needs."""

    x: Array
    sums: Array  # float64 (d * d + 2,): Gramian, objective, penalty (see `als_kernels.solve`)


@dataclass(frozen=True)
class _Sent:
    """Factors that block `block` sends, float32 (m, d)."""

    block: int
    x: Array


@dataclass
class _Side:
    """Users or items. What is in the executors (RDDs by block), and what the driver knows."""

    name: str
    blocks: RDD[tuple[int, Block]]
    routes: RDD[tuple[int, list[Array]]]
    n_rows: int = 0
    solved: RDD[tuple[int, Solved]] | None = None
    sums: Array | None = None  # those of `Solved`, over all blocks
    shared: Broadcast[Array] | None = None  # all factors in their basis, by block


class BlockedAls:
    """One factorisation: `with BlockedAls(...) as als: als.run()`, then ask it for the factors.

    Parameters
    ----------
    pairs : user bigint, items array<int> (in [0, n_items), distinct), weights array<float>; one row
        a user. Read once
    n_items : length of the catalogue; an item that nobody acted on gets factors 0
    objective : what is minimised
    plan : how

    Making it builds and caches the blocks: one job, two shuffles. Leaving it frees them.
    Raises EmptyDataError where there is no pair.
    """

    def __init__(self, pairs: DataFrame, n_items: int, objective: Objective, plan: Plan) -> None:
        self._plan, self._objective = plan, objective
        self._order = order = Order(n_items, plan.n_blocks)
        self._context = pairs.sparkSession.sparkContext
        self._held: list[RDD[Any]] = []
        self._broadcasts: list[Broadcast[Array]] = []
        blocks = self._hold(user_blocks(pairs, order))
        self._users = self._side("users", blocks)
        self._items = self._side("items", self._hold(item_blocks(blocks, order)))
        n_pairs, checksums = 0, []
        for side in (self._items, self._users):  # the first makes both
            about = side.blocks.mapValues(lambda b: (len(b.ids), len(b.at), b.checksum)).collect()
            side.n_rows = sum(rows for _, (rows, _, _) in about)
            n_pairs = sum(pairs for _, (_, pairs, _) in about)
            checksums.append([value for _, (_, _, value) in sorted(about)])
        if n_pairs == 0:
            self.close()
            raise EmptyDataError("als: no user has an item with a weight above 0 before the cutoff")
        self.losses: list[float] = []  # after each iteration
        self._identity = {
            "objective": asdict(objective),
            "rank": plan.rank,
            "solver": [plan.method, plan.cg_steps],
            "blocks": plan.n_blocks,
            "seed": plan.seed,
            "items": n_items,
            "data": checksums,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def run(self) -> None:
        """Do what is left of the iterations: all of them, or those after the newest checkpoint.

        Two or three jobs a half-step. Raises ModelError when the loss is not a number.
        """
        plan, users, items = self._plan, self._users, self._items
        if not self._resume():
            users.solved = self._hold(users.blocks.mapPartitions(self._first(), True))
            users.sums = self._total(users.solved)
        for iteration in range(len(self.losses) + 1, plan.iterations + 1):
            begun = time.perf_counter()
            cut = iteration % plan.checkpoint_every == 0 and iteration < plan.iterations
            self._half_step(items, users, cut, self._share_prior())
            self._share_items()
            self._half_step(users, items, cut)
            assert users.sums is not None
            assert items.sums is not None
            loss = float(users.sums[-2] + items.sums[-1])
            if not math.isfinite(loss):
                raise ModelError(
                    f"als: the loss is {loss} after iteration {iteration}; is a weight infinite, or "
                    "reg 0? The newest checkpoint is kept"
                )
            self.losses.append(loss)
            plan.progress(
                f"  als: iteration {iteration} of {plan.iterations}, loss {loss:.7g}, "
                f"{time.perf_counter() - begun:.1f} s"
            )
            if cut and plan.scratch:
                self._checkpoint()

    def item_factors(self) -> Array:
        """Return all factors of items, float32 (n_items, d). Driver: item-sized."""
        assert self._items.solved is not None, "run() comes first"
        return np.asarray(self._collect_items(None)[self._order.position])

    def user_factors(self) -> RDD[tuple[Array, Array]]:
        """Return, a block a partition, user_idx int64 (n,) and factors float32 (n, d)."""
        assert self._users.solved is not None, "run() comes first"

        def pair(records: Iterable[tuple[int, Any]]) -> Iterator[tuple[Array, Array]]:
            found = {type(value): value for _, value in records}
            yield found[Block].ids, found[Solved].x

        return self._together(self._users.blocks, self._users.solved).mapPartitions(pair)

    def close(self) -> None:
        """Free everything in the executors."""
        for rdd in self._held:
            rdd.unpersist()
        for shared in self._broadcasts:
            shared.destroy()
        self._held, self._broadcasts = [], []

    def _half_step(
        self, target: _Side, source: _Side, cut: bool, prior: Broadcast[Array] | None = None
    ) -> None:
        """Solve `target` given `source`; `cut` = its lineage may end here, if nothing else ends it."""
        plan, objective, n_others = self._plan, self._objective, source.n_rows
        gram, basis = self._basis(source)
        shared = source.shared
        size, method, cg_steps = plan.rank, plan.method, plan.cg_steps

        def solve_block(records: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Solved]]:
            found = list(records)
            block: Block = next(v for _, v in found if isinstance(v, Block))
            old = next((v.x for _, v in found if isinstance(v, Solved)), None)
            x = np.zeros((len(block.ids), size), np.float32) if old is None else old @ basis
            if shared is not None:
                others = shared.value[block.columns]  # (m, d)
            else:
                sent = sorted((v for _, v in found if isinstance(v, _Sent)), key=lambda s: s.block)
                others = np.concatenate([s.x for s in sent])
            drawn = None if prior is None else prior.value[block.ids]  # (n, d)
            sums = solve(
                block.start, block.at, block.weight, others, gram, objective, n_others, x, method,
                cg_steps, drawn,
            )  # fmt: skip
            x = x @ basis.T
            yield found[0][0], Solved(x, np.append(gramian(x), sums))

        inputs: list[RDD[Any]] = [target.blocks]
        if target.solved is not None:
            inputs.append(target.solved)
        if shared is None:
            inputs.append(self._sent(source))
        solved = self._hold(self._together(*inputs).mapPartitions(solve_block, True))
        if cut and not plan.scratch:
            solved.localCheckpoint()
        target.sums = self._total(solved)
        if not np.isfinite(target.sums).all():
            raise ModelError(
                f"als: the factors of {target.name} are not finite after iteration "
                f"{len(self.losses) + 1}: the loss is nan; is a weight infinite, or reg 0? The newest "
                "checkpoint is kept"
            )
        self._drop(target.solved)
        target.solved = solved

    def _basis(self, side: _Side) -> tuple[Array, Array]:
        """Return Gramian and basis that the other side is solved with; exact solves need no basis."""
        assert side.sums is not None
        gram = side.sums[:-2].reshape(self._plan.rank, self._plan.rank)
        if self._plan.method == "cg":
            return eigenbasis(gram)
        return gram, np.eye(self._plan.rank, dtype=np.float32)

    def _sent(self, source: _Side) -> RDD[tuple[int, _Sent]]:
        """Return the factors of `source`, in their basis, at the blocks that need them."""
        assert source.solved is not None
        _, basis = self._basis(source)

        def send(records: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, _Sent]]:
            (key, routes), (_, solved) = records  # in this order: a union keeps that of its parts
            x = solved.x @ basis
            for block, rows in enumerate(routes):
                yield block, _Sent(key, x[rows])

        both = self._together(source.routes, source.solved)
        return both.mapPartitions(send).partitionBy(self._plan.n_blocks, same)

    def _share_items(self) -> None:
        """Broadcast the item factors in their basis, if they fit."""
        plan = self._plan
        if 4 * plan.rank * self._items.n_rows > plan.broadcast_bytes:
            return
        _, basis = self._basis(self._items)
        self._items.shared = self._context.broadcast(self._collect_items(basis))
        self._broadcasts.append(self._items.shared)  # an older one serves a recomputation

    def _share_prior(self) -> Broadcast[Array] | None:
        """Broadcast what the items' penalty draws them to, if anything."""
        if self._plan.prior is None:
            return None
        found = self._plan.prior(None if self._items.solved is None else self.item_factors())
        self._broadcasts.append(self._context.broadcast(found))
        return self._broadcasts[-1]

    def _collect_items(self, basis: Array | None) -> Array:
        """Return the item factors, in the order of blocks."""
        assert self._items.solved is not None
        turned = self._items.solved.mapValues(lambda s: s.x if basis is None else s.x @ basis)
        parts = dict(turned.collect())
        return np.concatenate([parts[b] for b in range(self._plan.n_blocks)])

    def _first(self) -> Callable[[Iterable[tuple[int, Block]]], Iterator[tuple[int, Solved]]]:
        """Return what gives users their first factors: random directions of length 1, as MLlib."""
        seed, size = self._plan.seed, self._plan.rank

        def first(records: Iterable[tuple[int, Block]]) -> Iterator[tuple[int, Solved]]:
            for key, block in records:
                rng = np.random.default_rng([seed, key])
                x = rng.standard_normal((len(block.ids), size), np.float32)
                x /= np.linalg.norm(x, axis=1, keepdims=True)
                yield key, Solved(x, np.append(gramian(x), [0, 0]))

        return first

    def _total(self, solved: RDD[tuple[int, Solved]]) -> Array:
        """Return the sums over all blocks. A tree in a fixed order: the same bits every time."""
        fan = _FAN

        def parent(key: int) -> int:
            return key // fan

        def add(records: Iterable[tuple[int, Array]]) -> Iterator[tuple[int, Array]]:
            found = sorted(records, key=lambda record: record[0])
            yield parent(found[0][0]), np.sum([sums for _, sums in found], axis=0)

        sums = solved.mapValues(lambda s: s.sums)
        n = self._plan.n_blocks
        while n > fan:
            n = math.ceil(n / fan)
            sums = sums.partitionBy(n, parent).mapPartitions(add)
        parts = sorted(sums.collect(), key=lambda record: record[0])
        return np.asarray(np.sum([part for _, part in parts], axis=0))

    def _checkpoint(self) -> None:
        """Write the factors; from here on they are read from there, whatever is lost."""
        plan, sides = self._plan, (self._users, self._items)
        factors = {s.name: s.solved.mapValues(lambda v: v.x) for s in sides if s.solved is not None}
        place = als_checkpoint.save(plan.scratch, self.losses, factors, self._identity)
        self._restore(place)
        for shared in self._broadcasts[:-1]:
            shared.destroy()
        self._broadcasts = self._broadcasts[-1:]

    def _resume(self) -> bool:
        """Take the newest checkpoint of the same factorisation; False where there is none."""
        plan = self._plan
        place, self.losses = als_checkpoint.latest(
            self._context, plan.scratch, plan.iterations, self._identity, plan.progress
        )
        if not place:
            return False
        self._restore(place)
        for side in (self._users, self._items):
            assert side.solved is not None
            side.sums = self._total(side.solved)
        self._share_items()
        self._plan.progress(f"  als: goes on after iteration {len(self.losses)}, from {place}")
        return True

    def _restore(self, place: str) -> None:
        """Let the factors be those of a checkpoint."""
        for side in (self._users, self._items):
            files = als_checkpoint.files(place, side.name)

            def read(
                records: Iterable[tuple[int, Any]], files: dict[int, als_checkpoint.File] = files
            ) -> Iterator[tuple[int, Solved]]:
                for key, _ in records:
                    x = als_checkpoint.read(files[key])
                    yield key, Solved(x, np.append(gramian(x), [0, 0]))

            old, side.solved = side.solved, self._hold(side.routes.mapPartitions(read, True))
            self._drop(old)

    def _side(self, name: str, blocks: RDD[tuple[int, Block]]) -> _Side:
        return _Side(name, blocks, self._hold(blocks.mapValues(lambda block: block.routes())))

    def _together(self, *rdds: RDD[Any]) -> RDD[Any]:
        """Return the records of `rdds`, those of block b in partition b: nothing moves."""
        union = self._context.union(list(rdds))
        if union.getNumPartitions() != self._plan.n_blocks:
            raise ModelError("als: blocks are not where they should be; this is a bug of recspark")
        return union

    def _hold(self, rdd: RDD[Any]) -> RDD[Any]:
        self._held.append(rdd.persist(LEVEL))
        return rdd

    def _drop(self, rdd: RDD[Any] | None) -> None:
        if rdd is not None:
            rdd.unpersist()
            self._held.remove(rdd)
