"""What a night does: its stages, and tonight's tasks with what each of them needs first.

Everything here follows from the configuration alone: neither Spark nor torch is imported, so that
Airflow can read it. `recspark nightly`, the jobs, the DAG and `recspark plan` walk the same graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recspark.config import Config
from recspark.errors import ConfigError, suggest

PUBLISHED = "published"  # the model name of the list that is, or would have been, published


@dataclass(frozen=True)
class Stage:
    """One step of the night; `jobs/<name>.py` runs it by spark-submit.

    Parameters
    ----------
    name : also the job's file name
    per_model : runs once for each model of the configuration
    trains : needs the training profile (one slot an executor, speculation off)
    """

    name: str
    per_model: bool = False
    trains: bool = False

    def models(self, known: Sequence[str], asked: Sequence[str] = ()) -> tuple[str, ...]:
        """Return what the stage runs for: the models `asked` for, else all `known`; ("",) once.

        Raises ConfigError where one that is asked for is not known.
        """
        for model in asked:
            if model not in known:
                raise ConfigError(
                    f"model '{model}' is not among this night's.{suggest(model, known)}"
                )
        return tuple(asked or known) if self.per_model else ("",)


STAGES = (
    Stage("ingest"),
    Stage("sessionize"),
    Stage("build_features"),
    Stage("train", per_model=True, trains=True),
    Stage("recommend", per_model=True),
    Stage("evaluate"),
    Stage("publish"),
)


@dataclass(frozen=True)
class Task:
    """One stage of tonight, for one model where the stage runs per model.

    Parameters
    ----------
    model : "" of a stage that runs once
    needs : names of the tasks that have to end before this one begins
    may_fail : nothing published needs its model: the night goes on without it
    """

    stage: Stage
    model: str = ""
    needs: tuple[str, ...] = ()
    may_fail: bool = False

    @property
    def name(self) -> str:
        """`ingest`, `train.ease`: unique in a night, and the task's name in the DAG."""
        return f"{self.stage.name}.{self.model}" if self.model else self.stage.name


def plan(config: Config) -> tuple[Task, ...]:
    """Return tonight's tasks, each after those that it needs.

    A stage that runs once needs all tasks of the stage before it. A model's task needs the model's
    own task of the stage before, or what ran once before the models' stages began.
    """
    published = needed_models(config)
    tasks: list[Task] = []
    latest: dict[str, str] = {}  # model -> its newest task; "" -> the newest that runs once
    for stage in STAGES:
        if stage.per_model:
            for model in config.models:
                task = Task(stage, model, (latest.get(model, latest[""]),), model not in published)
                tasks.append(task)
                latest[model] = task.name
        else:
            needs = tuple(name for model, name in latest.items() if model) or tuple(latest.values())
            tasks.append(Task(stage, needs=needs))
            latest = {"": stage.name}
    return tuple(tasks)


def needed_tasks(tasks: Sequence[Task], stage: Stage, model: str = "") -> tuple[Task, ...]:
    """Return all that the task of `stage` and `model` needs, and what that needs, in order."""
    by_name = {task.name: task for task in tasks}
    needed: set[str] = set()
    waiting = [Task(stage, model).name]
    while waiting:
        for name in by_name[waiting.pop()].needs:
            if name not in needed:
                needed.add(name)
                waiting.append(name)
    return tuple(task for task in tasks if task.name in needed)


def needed_models(config: Config) -> frozenset[str]:
    """Return the models without which nothing is published; any other may fail alone."""
    names = (*config.publish.steps, config.publish.neighbours_model)
    return frozenset(name for name in names if name is not None)


def stages_before(stage: str | None) -> tuple[str, ...]:
    """Return the names of the stages before `stage`, in order; of all where it is None."""
    names = [each.name for each in STAGES]
    return tuple(names if stage is None else names[: names.index(stage)])


def find_stage(name: str) -> Stage:
    """Return the stage called `name`; ConfigError with a suggestion where there is none."""
    stages = {stage.name: stage for stage in STAGES}
    if name not in stages:
        raise ConfigError(f"no stage is called '{name}'.{suggest(name, stages)}")
    return stages[name]
