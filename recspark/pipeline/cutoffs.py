"""The cutoffs of a night. Models learn from the events before a cutoff, and are scored on later
events.

A model that is fitted at a cutoff reads the events before the cutoff. The truth, with which the
lists of this cutoff are compared, is what users do in the horizon after the cutoff
(`evaluate.horizon_days`). All cutoffs are midnights UTC. All but `tonight` and `followup` lie on
grids of days, counted from 1970-01-01, so that several nights share a cutoff.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta

from recspark.config import Config, cutoff_of, on_grid
from recspark.pipeline.plan import learning_rankers


@dataclass(frozen=True)
class Cutoffs:
    """The cutoffs of the night `run_date`, as the settings `config` place them."""

    run_date: date
    config: Config

    @property
    def tonight(self) -> datetime:
        """The cutoff of the published lists: the first instant after `run_date`."""
        return cutoff_of(self.run_date)

    @property
    def followup(self) -> datetime:
        """The cutoff of the list that was published one horizon before tonight."""
        return self.tonight - self._horizon

    @property
    def backtest(self) -> datetime:
        """The cutoff of the backtest: the newest on its grid whose horizon has ended by `tonight`.

        The grid has a cutoff every `evaluate.every_days` days.
        """
        return on_grid(self.followup, self.config.evaluate.every_days)

    @property
    def examples(self) -> tuple[datetime, ...]:
        """The cutoffs of the examples of the night's rankers, ascending.

        () where no ranker learns from examples.

        These are the cutoffs for the ranker of the published lists and for that of the backtest
        (see `examples_before`).
        """
        if not learning_rankers(self.config):
            return ()
        ranker_cutoffs = (self.backtest, self.tonight)
        return tuple(sorted({c for cutoff in ranker_cutoffs for c in self.examples_before(cutoff)}))

    def examples_before(self, cutoff: datetime) -> tuple[datetime, ...]:
        """Return the cutoffs of the examples that a ranker of `cutoff` learns from, ascending.

        These are the newest `examples.n_cutoffs` cutoffs on the grid of examples whose horizon has
        ended by `cutoff`. The grid has a cutoff every `examples.every_days` days.

        Example: with a grid of 7 days on Thursdays, a horizon of 7 days and 2 cutoffs, a ranker of
        Saturday 2024-06-01 learns from the cutoffs 2024-05-16 and 2024-05-23. The horizon of
        2024-05-23 ends on 2024-05-30; that of 2024-05-30 would end after 2024-06-01.
        """
        settings = self.config.examples
        newest = on_grid(cutoff - self._horizon, settings.every_days)
        step = timedelta(days=settings.every_days)
        return tuple(
            newest - n_steps_back * step for n_steps_back in reversed(range(settings.n_cutoffs))
        )

    @property
    def all(self) -> tuple[datetime, ...]:
        """All cutoffs that models of the night are fitted at.

        First those of the examples and of the backtest, ascending, then `tonight`.
        """
        return (*sorted({*self.examples, self.backtest}), self.tonight)

    @property
    def _horizon(self) -> timedelta:
        return timedelta(days=self.config.evaluate.horizon_days)
