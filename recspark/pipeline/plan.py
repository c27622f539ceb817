"""What a night does: its stages, and tonight's tasks with what each of them needs first.

Everything here follows from the configuration alone: neither Spark nor torch is imported, so that
Airflow can read it. `recspark nightly`, the jobs, the DAG and `recspark plan` walk the same graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile

from recspark.config import Config
from recspark.errors import ConfigError, suggest
from recspark.models.kinds import KINDS, Kind
from recspark.models.registry import kind_of

PUBLISHED = "published"  # the model name of the list that is, or would have been, published


@dataclass(frozen=True)
class Stage:
    """One step of the night; `jobs/<name>.py` runs it by spark-submit.

    Parameters
    ----------
    name : also the job's file name
    kinds : runs once for each of the night's models of these kinds; () = once a night
    trains : needs the training profile (one slot an executor, speculation off)
    """

    name: str
    kinds: tuple[Kind, ...] = ()
    trains: bool = False

    @property
    def per_model(self) -> bool:
        """Whether it runs once for each model."""
        return bool(self.kinds)

    def models(self, config: Config, asked: Sequence[str] = ()) -> tuple[str, ...]:
        """Return what the stage runs for: the models `asked` for, else all of its kinds; ("",) once.

        Raises ConfigError where one that is asked for is not among the night's, or of another kind.
        """
        if not self.kinds:
            return ("",)
        in_order = [model for wave in _waves(config) for model in wave]  # after what they need
        known = models_of(config, *self.kinds, among=in_order)
        for model in asked:
            if model not in config.models:
                raise ConfigError(
                    f"model '{model}' is not among this night's.{suggest(model, known)}"
                )
            if model not in known:
                kind = kind_of_model(config, model)
                raise ConfigError(f"stage '{self.name}' has nothing to do for {kind} '{model}'")
        return tuple(asked) or known


# Beside `train` each kind has a stage of its own: what its fitted model gives.
STAGES = (
    Stage("ingest"),
    Stage("sessionize"),
    Stage("build_features"),
    Stage("train", kinds=KINDS, trains=True),
    Stage("encode", kinds=("encoder",)),
    Stage("examples", kinds=("ranker",)),
    Stage("recommend", kinds=("retriever", "ranker")),
    Stage("evaluate"),
    Stage("publish"),
)
_BY_NAME = {stage.name: stage for stage in STAGES}
# What a model of each kind gives to those that are built on it comes of this stage.
_GIVES = {"retriever": "train", "encoder": "encode"}


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
        return task_name(self.stage.name, self.model)


def task_name(stage: str, model: str = "") -> str:
    """Return the name of the task of a stage, for one model where the stage runs per model."""
    return f"{stage}.{model}" if model else stage


def plan(config: Config) -> tuple[Task, ...]:
    """Return tonight's tasks, each after those that it needs.

    A model is trained after the models that it is built on. A ranker learns from examples, which its
    retrievers, as trained, propose; what it lists is among what they list. Raises ConfigError where
    a model is built on a ranker.
    """
    published = needed_models(config)
    return tuple(
        replace(task, may_fail=bool(task.model) and task.model not in published)
        for task in _tasks(config)
    )


def _tasks(config: Config) -> tuple[Task, ...]:
    """Return tonight's tasks; which of them may fail is not said, and what is published not read."""
    first = list(takewhile(lambda stage: not stage.per_model, STAGES))
    last = [stage for stage in STAGES[len(first) :] if not stage.per_model]
    tasks = [Task(stage, needs=(before.name,)) for before, stage in pairwise(first)]
    tasks = [Task(first[0]), *tasks]
    ends: list[str] = []  # the last task of each model
    for wave in _waves(config):
        of_wave: list[Task] = []
        for model in wave:
            of_model = _tasks_of(config, model, tasks[len(first) - 1].name)
            ends.append(of_model[-1].name)
            of_wave += of_model
        tasks += sorted(of_wave, key=_order)
    needs = tuple(ends)
    for stage in last:
        tasks.append(Task(stage, needs=needs))
        needs = (stage.name,)
    return tuple(tasks)


def _tasks_of(config: Config, model: str, data: str) -> list[Task]:
    """Return the tasks of one model, in order; `data` is the task that makes what it is fitted on."""
    kind, needs = kind_of_model(config, model), config.needs_of(model)
    kinds = {name: kind_of_model(config, name) for name in needs}
    if rankers := [name for name, its_kind in kinds.items() if its_kind not in _GIVES]:
        raise ConfigError(
            f"model '{model}' needs the ranker {rankers[0]}: nothing is built on rankers"
        )
    given = tuple(task_name(_GIVES[its_kind], name) for name, its_kind in kinds.items()) or (data,)
    train = task_name("train", model)
    if kind == "encoder":
        return [Task(_BY_NAME["train"], model, given), Task(_BY_NAME["encode"], model, (train,))]
    if kind == "retriever":
        return [Task(_BY_NAME["train"], model, given), Task(_BY_NAME["recommend"], model, (train,))]
    lists = [task_name("recommend", name) for name, k in kinds.items() if k == "retriever"]
    if not lists:
        raise ConfigError(
            f"model '{model}' is a ranker and needs a retriever, whose lists it ranks: name it in "
            f"models.{model}.needs, which are {list(needs)}"
        )
    return [
        Task(_BY_NAME["examples"], model, given),
        Task(_BY_NAME["train"], model, (task_name("examples", model),)),
        Task(_BY_NAME["recommend"], model, (train, *lists)),
    ]


def _order(task: Task) -> int:
    """Tasks of models that do not need one another go stage by stage: one process changes its
    profile, and its code, as seldom as possible.
    """
    order = ("examples", "train", "encode", "recommend")
    return order.index(task.stage.name)


def _waves(config: Config) -> list[list[str]]:
    """Return the night's models in waves, each built on models of the waves before it alone."""
    waves: list[list[str]] = []
    waiting = list(config.models)
    done: set[str] = set()
    while waiting:
        wave = [model for model in waiting if done.issuperset(config.needs_of(model))]
        waves.append(wave)
        done.update(wave)
        waiting = [model for model in waiting if model not in done]
    return waves


def kind_of_model(config: Config, model: str) -> Kind:
    """Return what one of the night's models is: retriever, ranker or encoder."""
    return kind_of(model, config.settings_of(model))


def models_of(config: Config, *kinds: Kind, among: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the models of these kinds, of the night's or of those `among`, in their order."""
    models = config.models if among is None else among
    return tuple(model for model in models if kind_of_model(config, model) in kinds)


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
    return frozenset(config.with_needs(name for name in names if name is not None))


def listed_tonight(config: Config) -> frozenset[str]:
    """Return the models whose lists of tonight somebody reads: the champion, the ladder, and what a
    ranker among them ranks. Of the others only the backtest is looked at.
    """
    return frozenset(config.with_needs(config.publish.steps))


def stages_before(config: Config, stage: str | None, model: str = "") -> frozenset[str]:
    """Return the names of the stages of which the task of `stage` and `model` needs a task; of all
    stages where it is None.
    """
    if stage is None:
        return frozenset(_BY_NAME)
    tasks = needed_tasks(_tasks(config), _BY_NAME[stage], model)
    return frozenset(task.stage.name for task in tasks)


def find_stage(name: str) -> Stage:
    """Return the stage called `name`; ConfigError with a suggestion where there is none."""
    stages = {stage.name: stage for stage in STAGES}
    if name not in stages:
        raise ConfigError(f"no stage is called '{name}'.{suggest(name, stages)}")
    return stages[name]
