"""Alternating least squares on Spark: a task solves one block of rows with one compiled call.

Users and items are the two sides. Each is cut into `n_blocks` blocks (`als_blocks`), which are
cached once. A half-step solves all blocks of one side while the factors of the other side stay
fixed. Item factors are broadcast while they fit into `broadcast_bytes`. Larger item factors, and
user factors always, go through one shuffle that sends to each block the rows that it needs. The
driver receives Gramians, losses and item factors, and nothing that grows with the number of users.

Runs with equal seed and block count give the same bits: rows are in a fixed order, Gramians are
summed in the order of blocks, and random numbers depend on (seed, block) only. When an executor is
lost, its blocks are computed again, starting from the newest checkpoint.
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
from recspark.engines.als_blocks import (
    LEVEL,
    Block,
    Order,
    item_blocks,
    partition_of_block,
    user_blocks,
)
from recspark.engines.als_kernels import Method, eigenbasis, solve
from recspark.engines.als_objective import Objective, gramian
from recspark.errors import EmptyDataError, ModelError

_FAN = 32  # most partial sums that one task adds up


@dataclass(frozen=True)
class Plan:
    """How a factorisation runs.

    Parameters
    ----------
    rank : length of a factor
    iterations : each iteration solves all items, then all users
    n_blocks : number of blocks of users and of items; a task holds one block, the factors of its
        rows and the factors of the other side that it needs
    seed : decides the users' first factors
    method, cg_steps : see `als_kernels.solve`
    broadcast_bytes : item factors up to this size are broadcast
    scratch : URI of a folder for checkpoints that all executors can reach. "" = no checkpoints: an
        executor lost after `checkpoint_every` iterations then ends the run
    checkpoint_every : iterations between two checkpoints
    progress : called with a line of text after each iteration
    prior : called before each half-step that solves the items, with the current item factors
        (n_items, d), or with None the first time. Returns the vectors that the penalty draws the
        item factors to, float32 (n_items, d); see `als_kernels.solve`; method `cholesky` only.
        Checkpoints do not save the prior, so leave `scratch` empty with one. None = the penalty
        draws to 0
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
class SolvedBlock:
    """The factors of a block, float32 (n, d), and the sums over it that the driver needs."""

    factors: Array
    sums: Array  # float64 (d * d + 2,): Gramian, objective, penalty (see `als_kernels.solve`)


@dataclass(frozen=True)
class _SentFactors:
    """Factors of block `block` that another block needs, float32 (m, d)."""

    block: int
    factors: Array


@dataclass
class _Side:
    """One side, users or items: its RDDs, keyed by block, and what the driver knows of it."""

    name: str
    blocks: RDD[tuple[int, Block]]
    routes: RDD[tuple[int, list[Array]]]
    n_rows: int = 0
    solved: RDD[tuple[int, SolvedBlock]] | None = None
    sums: Array | None = None  # `SolvedBlock.sums`, added up over all blocks
    broadcast_factors: Broadcast[Array] | None = None  # all, in their basis, by block


class BlockedAls:
    """One factorisation: `with BlockedAls(...) as als: als.run()`, then read its factors.

    Parameters
    ----------
    pairs : user bigint, items array<int> (in [0, n_items), distinct), weights array<float>; one row
        per user. Read once
    n_items : length of the catalogue; an item that nobody acted on gets factors 0
    objective : the loss that is minimised
    plan : how the factorisation runs

    The constructor builds and caches the blocks: one job, two shuffles. Leaving the `with` block
    frees them. Raises EmptyDataError if there is no pair.
    """

    def __init__(self, pairs: DataFrame, n_items: int, objective: Objective, plan: Plan) -> None:
        self._plan, self._objective = plan, objective
        self._order = order = Order(n_items, plan.n_blocks)
        self._context = pairs.sparkSession.sparkContext
        self._persisted: list[RDD[Any]] = []
        self._broadcasts: list[Broadcast[Array]] = []
        blocks = self._persist(user_blocks(pairs, order))
        self._users = self._new_side("users", blocks)
        self._items = self._new_side("items", self._persist(item_blocks(blocks, order)))
        n_pairs, checksums = 0, []
        for side in (self._items, self._users):  # the first job builds and caches both sides
            summaries = side.blocks.mapValues(
                lambda block: (len(block.ids), len(block.indices), block.checksum)
            ).collect()
            side.n_rows = sum(n_rows for _, (n_rows, _, _) in summaries)
            n_pairs = sum(n_entries for _, (_, n_entries, _) in summaries)
            checksums.append([checksum for _, (_, _, checksum) in sorted(summaries)])
        if n_pairs == 0:
            self.close()
            raise EmptyDataError("als: no user has an item with a weight above 0 before the cutoff")
        self.losses: list[float] = []  # one per finished iteration
        # A checkpoint is used only if it was written with the same identity.
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
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def run(self) -> None:
        """Run the remaining iterations: all of them, or those after the newest checkpoint.

        Cost: two or three jobs per half-step. Raises ModelError when the loss is not a finite
        number.
        """
        plan, users, items = self._plan, self._users, self._items
        if not self._resume():
            users.solved = self._persist(users.blocks.mapPartitions(self._first_factors(), True))
            users.sums = self._sum_over_blocks(users.solved)
        for iteration in range(len(self.losses) + 1, plan.iterations + 1):
            started_at = time.perf_counter()
            is_checkpoint_due = (
                iteration % plan.checkpoint_every == 0 and iteration < plan.iterations
            )
            self._half_step(items, users, is_checkpoint_due, self._broadcast_prior())
            self._broadcast_items()
            self._half_step(users, items, is_checkpoint_due)
            assert users.sums is not None
            assert items.sums is not None
            # The users' objective is the loss without the items' penalty.
            loss = float(users.sums[-2] + items.sums[-1])
            if not math.isfinite(loss):
                raise ModelError(
                    f"als: the loss is {loss} after iteration {iteration}; is a weight infinite, or "
                    "reg 0? The newest checkpoint is kept"
                )
            self.losses.append(loss)
            plan.progress(
                f"  als: iteration {iteration} of {plan.iterations}, loss {loss:.7g}, "
                f"{time.perf_counter() - started_at:.1f} s"
            )
            if is_checkpoint_due and plan.scratch:
                self._checkpoint()

    def item_factors(self) -> Array:
        """Return the factors of all items, float32 (n_items, d), on the driver: item-sized."""
        assert self._items.solved is not None, "run() comes first"
        return np.asarray(self._collect_items(None)[self._order.position])

    def user_factors(self) -> RDD[tuple[Array, Array]]:
        """Return the users' factors as pairs of user_idx int64 (n,) and factors float32 (n, d).

        Each partition is one block of users and has one such pair.
        """
        assert self._users.solved is not None, "run() comes first"

        def ids_with_factors(records: Iterable[tuple[int, Any]]) -> Iterator[tuple[Array, Array]]:
            value_by_type = {type(value): value for _, value in records}
            yield value_by_type[Block].ids, value_by_type[SolvedBlock].factors

        return self._union_by_block(self._users.blocks, self._users.solved).mapPartitions(
            ids_with_factors
        )

    def close(self) -> None:
        """Free all cached blocks, factors and broadcasts in the executors."""
        for rdd in self._persisted:
            rdd.unpersist()
        for broadcast in self._broadcasts:
            broadcast.destroy()
        self._persisted, self._broadcasts = [], []

    def _half_step(
        self,
        target: _Side,
        source: _Side,
        is_checkpoint_due: bool,
        prior: Broadcast[Array] | None = None,
    ) -> None:
        """Solve all blocks of `target` with the factors of `source` fixed.

        Parameters
        ----------
        is_checkpoint_due : this half-step belongs to an iteration after which a checkpoint is due.
            With an empty `scratch` there is no checkpoint; a local checkpoint cuts the lineage
            instead
        prior : what the penalty draws the factors of `target` to, by id; None = 0
        """
        plan, objective, n_source_rows = self._plan, self._objective, source.n_rows
        gram, basis = self._basis(source)
        broadcast_factors = source.broadcast_factors
        rank, method, cg_steps = plan.rank, plan.method, plan.cg_steps

        def solve_block(records: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, SolvedBlock]]:
            keyed_values = list(records)
            block: Block = next(value for _, value in keyed_values if isinstance(value, Block))
            old_factors = next(
                (value.factors for _, value in keyed_values if isinstance(value, SolvedBlock)), None
            )
            factors = (
                np.zeros((len(block.ids), rank), np.float32)
                if old_factors is None
                else old_factors @ basis
            )
            if broadcast_factors is not None:
                other_factors = broadcast_factors.value[block.columns]  # (m, d)
            else:
                sent_factors = sorted(
                    (value for _, value in keyed_values if isinstance(value, _SentFactors)),
                    key=lambda sent: sent.block,
                )
                other_factors = np.concatenate([sent.factors for sent in sent_factors])  # (m, d)
            prior_of_block = None if prior is None else prior.value[block.ids]  # (n, d)
            sums = solve(
                block.start, block.indices, block.weight, other_factors, gram, objective,
                n_source_rows, factors, method, cg_steps, prior_of_block,
            )  # fmt: skip
            factors = factors @ basis.T
            yield keyed_values[0][0], SolvedBlock(factors, np.append(gramian(factors), sums))

        inputs: list[RDD[Any]] = [target.blocks]
        if target.solved is not None:
            inputs.append(target.solved)
        if broadcast_factors is None:
            inputs.append(self._send_factors(source))
        solved = self._persist(self._union_by_block(*inputs).mapPartitions(solve_block, True))
        if is_checkpoint_due and not plan.scratch:
            solved.localCheckpoint()
        target.sums = self._sum_over_blocks(solved)
        if not np.isfinite(target.sums).all():
            raise ModelError(
                f"als: the factors of {target.name} are not finite after iteration "
                f"{len(self.losses) + 1}: the loss is nan; is a weight infinite, or reg 0? The newest "
                "checkpoint is kept"
            )
        self._unpersist(target.solved)
        target.solved = solved

    def _basis(self, side: _Side) -> tuple[Array, Array]:
        """Return (Gramian, basis) of `side`, with which the other side is solved.

        For `cg` the basis is the Gramian's eigenbasis, in which the Gramian is diagonal. Exact
        solves need no change of basis: theirs is the identity.
        """
        assert side.sums is not None
        gram = side.sums[:-2].reshape(self._plan.rank, self._plan.rank)
        if self._plan.method == "cg":
            return eigenbasis(gram)
        return gram, np.eye(self._plan.rank, dtype=np.float32)

    def _send_factors(self, source: _Side) -> RDD[tuple[int, _SentFactors]]:
        """Return the factors of `source`, in their basis, in the partitions that need them.

        Partition b receives, from each block of `source`, the rows that block b of the other side
        needs.
        """
        assert source.solved is not None
        _, basis = self._basis(source)

        def send(records: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, _SentFactors]]:
            # A union keeps the order of its parts: the routes come first.
            (source_block, routes), (_, solved) = records
            rotated = solved.factors @ basis
            for block, rows in enumerate(routes):
                yield block, _SentFactors(source_block, rotated[rows])

        routes_with_factors = self._union_by_block(source.routes, source.solved)
        return routes_with_factors.mapPartitions(send).partitionBy(
            self._plan.n_blocks, partition_of_block
        )

    def _broadcast_items(self) -> None:
        """Broadcast the item factors, in their basis, if they fit into `broadcast_bytes`."""
        plan = self._plan
        if 4 * plan.rank * self._items.n_rows > plan.broadcast_bytes:
            return
        _, basis = self._basis(self._items)
        self._items.broadcast_factors = self._context.broadcast(self._collect_items(basis))
        # Older broadcasts are kept: recomputing a lost block reads them.
        self._broadcasts.append(self._items.broadcast_factors)

    def _broadcast_prior(self) -> Broadcast[Array] | None:
        """Broadcast the vectors that the penalty draws the items to; None without a prior."""
        if self._plan.prior is None:
            return None
        prior = self._plan.prior(None if self._items.solved is None else self.item_factors())
        self._broadcasts.append(self._context.broadcast(prior))
        return self._broadcasts[-1]

    def _collect_items(self, basis: Array | None) -> Array:
        """Return the item factors, in the order of blocks; times `basis` if there is one."""
        assert self._items.solved is not None
        rotated = self._items.solved.mapValues(
            lambda solved: solved.factors if basis is None else solved.factors @ basis
        )
        factors_by_block = dict(rotated.collect())
        return np.concatenate([factors_by_block[block] for block in range(self._plan.n_blocks)])

    def _first_factors(
        self,
    ) -> Callable[[Iterable[tuple[int, Block]]], Iterator[tuple[int, SolvedBlock]]]:
        """Return the function that draws the users' first factors.

        They are random directions of length 1, as in MLlib.
        """
        seed, rank = self._plan.seed, self._plan.rank

        def draw_factors(records: Iterable[tuple[int, Block]]) -> Iterator[tuple[int, SolvedBlock]]:
            for block_index, block in records:
                rng = np.random.default_rng([seed, block_index])
                factors = rng.standard_normal((len(block.ids), rank), np.float32)
                factors /= np.linalg.norm(factors, axis=1, keepdims=True)
                # Objective and penalty are 0: nobody reads them before the next half-step.
                yield block_index, SolvedBlock(factors, np.append(gramian(factors), [0, 0]))

        return draw_factors

    def _sum_over_blocks(self, solved: RDD[tuple[int, SolvedBlock]]) -> Array:
        """Return `SolvedBlock.sums`, added up over all blocks.

        The sums are added in a tree of fixed order, so that the bits are the same every time. While
        there are more than `_FAN` partial sums, each task adds up to `_FAN` neighbouring ones: 100
        blocks become 4 partial sums, which the driver adds.
        """
        fan = _FAN

        def parent_of(block: int) -> int:
            return block // fan

        def add(records: Iterable[tuple[int, Array]]) -> Iterator[tuple[int, Array]]:
            sorted_sums = sorted(records, key=lambda record: record[0])
            yield parent_of(sorted_sums[0][0]), np.sum([sums for _, sums in sorted_sums], axis=0)

        sums = solved.mapValues(lambda solved_block: solved_block.sums)
        n_partial_sums = self._plan.n_blocks
        while n_partial_sums > fan:
            n_partial_sums = math.ceil(n_partial_sums / fan)
            sums = sums.partitionBy(n_partial_sums, parent_of).mapPartitions(add)
        partial_sums = sorted(sums.collect(), key=lambda record: record[0])
        return np.asarray(np.sum([partial_sum for _, partial_sum in partial_sums], axis=0))

    def _checkpoint(self) -> None:
        """Write the factors of both sides, and read them from the checkpoint from now on.

        An executor that is lost later then costs no recomputation of the iterations before.
        """
        plan, sides = self._plan, (self._users, self._items)
        factors = {
            side.name: side.solved.mapValues(lambda solved: solved.factors)
            for side in sides
            if side.solved is not None
        }
        folder = als_checkpoint.save(plan.scratch, self.losses, factors, self._identity)
        self._restore(folder)
        for broadcast in self._broadcasts[:-1]:
            broadcast.destroy()
        self._broadcasts = self._broadcasts[-1:]

    def _resume(self) -> bool:
        """Restore the newest checkpoint of this factorisation; return False if there is none."""
        plan = self._plan
        folder, self.losses = als_checkpoint.latest(
            self._context, plan.scratch, plan.iterations, self._identity, plan.progress
        )
        if not folder:
            return False
        self._restore(folder)
        for side in (self._users, self._items):
            assert side.solved is not None
            side.sums = self._sum_over_blocks(side.solved)
        self._broadcast_items()
        self._plan.progress(f"  als: goes on after iteration {len(self.losses)}, from {folder}")
        return True

    def _restore(self, folder: str) -> None:
        """Replace the factors of both sides by those of the checkpoint in `folder`."""
        for side in (self._users, self._items):
            files = als_checkpoint.files(folder, side.name)

            def read(
                records: Iterable[tuple[int, Any]], files: dict[int, als_checkpoint.File] = files
            ) -> Iterator[tuple[int, SolvedBlock]]:
                for block_index, _ in records:
                    factors = als_checkpoint.read(files[block_index])
                    # Objective and penalty are 0: nobody reads them before the next half-step.
                    yield block_index, SolvedBlock(factors, np.append(gramian(factors), [0, 0]))

            previous, side.solved = (
                side.solved,
                self._persist(side.routes.mapPartitions(read, True)),
            )
            self._unpersist(previous)

    def _new_side(self, name: str, blocks: RDD[tuple[int, Block]]) -> _Side:
        return _Side(name, blocks, self._persist(blocks.mapValues(lambda block: block.routes())))

    def _union_by_block(self, *rdds: RDD[Any]) -> RDD[Any]:
        """Return the records of all `rdds` in one RDD. Those of block b are in partition b: nothing
        moves.
        """
        union = self._context.union(list(rdds))
        if union.getNumPartitions() != self._plan.n_blocks:
            raise ModelError("als: blocks are not where they should be; this is a bug of recspark")
        return union

    def _persist(self, rdd: RDD[Any]) -> RDD[Any]:
        self._persisted.append(rdd.persist(LEVEL))
        return rdd

    def _unpersist(self, rdd: RDD[Any] | None) -> None:
        if rdd is not None:
            rdd.unpersist()
            self._persisted.remove(rdd)
