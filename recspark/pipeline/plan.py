"""The plan of a night: its stages, and tonight's tasks with what each of them needs first.

Everything here follows from the configuration alone. Neither Spark nor torch is imported, so that
Airflow can read this module. `recspark nightly`, the jobs, the DAG and `recspark plan` all use this
one plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile

from recspark.config import Config, Mode
from recspark.errors import ConfigError, suggest
from recspark.models.kinds import KINDS, Kind
from recspark.models.registry import kind_of, learns_from_examples, lists_cold_items


@dataclass(frozen=True)
class Stage:
    """One step of the night; `jobs/<name>.py` runs it by spark-submit.

    Parameters
    ----------
    name : also the job's file name
    kinds : the stage runs once for each of the night's models of these kinds; () = it runs once a
        night
    trains : the stage needs the training profile (one slot per executor, speculation off)
    for_learners : the stage runs only for the rankers that learn from examples
    """

    name: str
    kinds: tuple[Kind, ...] = ()
    trains: bool = False
    for_learners: bool = False

    @property
    def per_model(self) -> bool:
        """Whether the stage runs once for each model."""
        return bool(self.kinds)

    def models(self, config: Config, requested: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the models that the stage runs for: those `requested`, or else all models of its
        kinds.

        Returns ("",) for a stage that runs once. Where none are requested, a model comes after the
        models that it needs. Raises ConfigError where a requested model is not one of the night's,
        or of another kind.
        """
        if not self.kinds:
            return ("",)
        # Each model comes after the models that it needs.
        ordered_models = [model for wave in _waves(config) for model in wave]
        models_of_kinds = models_of(config, *self.kinds, among=ordered_models)
        if self.for_learners:
            models_of_kinds = learning_rankers(config, among=ordered_models)
        for model in requested:
            if model not in config.models:
                raise ConfigError(
                    f"model '{model}' is not among this night's.{suggest(model, models_of_kinds)}"
                )
            if model not in models_of_kinds:
                kind = kind_of_model(config, model)
                raise ConfigError(f"stage '{self.name}' has nothing to do for {kind} '{model}'")
        return tuple(requested) or models_of_kinds


# Each kind of model has `train`, and a stage for what its fitted models give: vectors of items, or
# lists. A ranker that learns also has a stage for the examples that it learns from.
STAGES = (
    Stage("ingest"),
    Stage("sessionize"),
    Stage("build_features"),
    Stage("train", kinds=KINDS, trains=True),
    Stage("encode", kinds=("encoder",)),
    Stage("examples", kinds=("ranker",), for_learners=True),
    Stage("recommend", kinds=("retriever", "ranker")),
    Stage("evaluate"),
    Stage("publish"),
)
_BY_NAME = {stage.name: stage for stage in STAGES}
# kind -> the stage that makes what a model of this kind gives to the models that are built on it.
# No model can be built on a ranker.
_STAGE_GIVING = {"retriever": "train", "encoder": "encode"}


@dataclass(frozen=True)
class Task:
    """One stage of tonight, for one model where the stage runs per model.

    Parameters
    ----------
    model : "" for a stage that runs once
    needs : names of the tasks that have to end before this one begins
    may_fail : nothing that is published needs this model, so the night goes on without it
    """

    stage: Stage
    model: str = ""
    needs: tuple[str, ...] = ()
    may_fail: bool = False

    @property
    def name(self) -> str:
        """The task's name, unique in a night and used in the DAG: `ingest`, `train.ease`."""
        return task_name(self.stage.name, self.model)


def task_name(stage: str, model: str = "") -> str:
    """Return the name of the task of a stage, for one model where the stage runs per model."""
    return f"{stage}.{model}" if model else stage


def plan(config: Config) -> tuple[Task, ...]:
    """Return tonight's tasks, each after the tasks that it needs.

    A model is trained after the models that it is built on. For a ranker that learns, stage
    examples comes after its retrievers are trained; a ranker that learns nothing has no such stage.
    The lists of a ranker come after those of its retrievers: it learns from what its retrievers
    propose, and ranks what they list. Raises ConfigError where a model is built on a ranker.

    Example: for the retriever `ease` and the ranker `boost` that needs it, the tasks are ingest,
    sessionize, build_features, train.ease, recommend.ease, examples.boost, train.boost,
    recommend.boost, evaluate, publish.
    """
    published = needed_models(config)
    return tuple(
        replace(task, may_fail=bool(task.model) and task.model not in published)
        for task in _tasks(config)
    )


def _tasks(config: Config) -> tuple[Task, ...]:
    """Return tonight's tasks as `plan` does, with `may_fail` not yet set.

    The settings of `publish` are not read.
    """
    stages_before_models = list(takewhile(lambda stage: not stage.per_model, STAGES))
    stages_after_models = [
        stage for stage in STAGES[len(stages_before_models) :] if not stage.per_model
    ]
    tasks = [
        Task(stage, needs=(previous.name,)) for previous, stage in pairwise(stages_before_models)
    ]
    tasks = [Task(stages_before_models[0]), *tasks]
    last_tasks: list[str] = []  # the name of the last task of each model
    for wave in _waves(config):
        tasks_of_wave: list[Task] = []
        for model in wave:
            tasks_of_model = _tasks_of(config, model, tasks[len(stages_before_models) - 1].name)
            last_tasks.append(tasks_of_model[-1].name)
            tasks_of_wave += tasks_of_model
        tasks += sorted(tasks_of_wave, key=_order_in_wave)
    needs = tuple(last_tasks)
    for stage in stages_after_models:
        tasks.append(Task(stage, needs=needs))
        needs = (stage.name,)
    return tuple(tasks)


def _tasks_of(config: Config, model: str, data_task: str) -> list[Task]:
    """Return the tasks of one model, in order.

    `data_task` : the name of the task that makes the data that a model is fitted on.
    """
    kind, needs = kind_of_model(config, model), config.needs_of(model)
    kinds_of_needs = {name: kind_of_model(config, name) for name in needs}
    if rankers := [
        name for name, kind_of_need in kinds_of_needs.items() if kind_of_need not in _STAGE_GIVING
    ]:
        raise ConfigError(
            f"model '{model}' needs the ranker {rankers[0]}: nothing is built on rankers"
        )
    tasks_of_needs = tuple(
        task_name(_STAGE_GIVING[kind_of_need], name)
        for name, kind_of_need in kinds_of_needs.items()
    ) or (data_task,)
    train_task = task_name("train", model)
    if kind == "encoder":
        return [
            Task(_BY_NAME["train"], model, tasks_of_needs),
            Task(_BY_NAME["encode"], model, (train_task,)),
        ]
    if kind == "retriever":
        return [
            Task(_BY_NAME["train"], model, tasks_of_needs),
            Task(_BY_NAME["recommend"], model, (train_task,)),
        ]
    list_tasks = [
        task_name("recommend", name)
        for name, kind_of_need in kinds_of_needs.items()
        if kind_of_need == "retriever"
    ]
    if not list_tasks:
        raise ConfigError(
            f"model '{model}' is a ranker and needs a retriever, whose lists it ranks: name it in "
            f"models.{model}.needs, which are {list(needs)}"
        )
    lists = Task(_BY_NAME["recommend"], model, (train_task, *list_tasks))
    if model not in learning_rankers(config):
        return [Task(_BY_NAME["train"], model, tasks_of_needs), lists]
    return [
        Task(_BY_NAME["examples"], model, tasks_of_needs),
        Task(_BY_NAME["train"], model, (task_name("examples", model),)),
        lists,
    ]


def _order_in_wave(task: Task) -> int:
    """Return the place of a task among the tasks of one wave, whose models do not need one another.

    They go stage by stage: one process then changes its Spark profile and its code as seldom as
    possible.
    """
    order = ("examples", "train", "encode", "recommend")
    return order.index(task.stage.name)


def _waves(config: Config) -> list[list[str]]:
    """Return the night's models in waves: each model needs only models of earlier waves.

    Example: where `boost` needs `ease` and `words`, the waves are [ease, words] and [boost].
    """
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
    """Return whether one of the night's models is a retriever, a ranker or an encoder."""
    return kind_of(model, config.settings_of(model))


def models_of(config: Config, *kinds: Kind, among: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the models of these kinds, in order: of the night's models, or of those in `among`."""
    models = config.models if among is None else among
    return tuple(model for model in models if kind_of_model(config, model) in kinds)


def vector_models_of(config: Config, ranker: str) -> tuple[str, ...]:
    """Return the models of `examples.vectors` that `ranker` needs, in the order of that setting."""
    needs = config.needs_of(ranker)
    return tuple(name for name in config.examples.vectors if name in needs)


def learning_rankers(config: Config, among: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the rankers that learn from examples, in order: of the night's models, or of those in
    `among`.
    """
    rankers = models_of(config, "ranker", among=among)
    return tuple(name for name in rankers if learns_from_examples(name, config.settings_of(name)))


def models_of_cold_items(config: Config) -> tuple[str, ...]:
    """Return the night's retrievers that may list items without events, in order.

    These are the ones with the tag `cold_items`, and those that are built on an encoder.
    """
    return tuple(
        name
        for name in models_of(config, "retriever")
        if lists_cold_items(name, config.settings_of(name))
        or models_of(config, "encoder", among=config.needs_of(name))
    )


def needed_tasks(tasks: Sequence[Task], stage: Stage, model: str = "") -> tuple[Task, ...]:
    """Return every task that has to end before the task of `stage` and `model`, in order.

    These are the tasks that it needs, the tasks that those need, and so on.
    """
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
    """Return the models that the published lists depend on; any other model may fail alone."""
    names = (*config.publish.steps, config.publish.neighbours_model)
    return frozenset(config.with_needs(name for name in names if name is not None))


def listed_tonight(config: Config) -> dict[str, tuple[Mode, ...]]:
    """Return model -> the modes of its lists of tonight that are read by somebody.

    A published list reads, in its own mode, the lists of its champion, of the models of its ladder,
    and of the models that a ranker among them needs. Of all other models only the backtest is
    looked at.
    """
    modes: dict[str, list[Mode]] = {}
    for published_list in config.publish.published_lists:
        for model in config.with_needs(published_list.steps):
            modes_of_model = modes.setdefault(model, [])
            if published_list.mode not in modes_of_model:
                modes_of_model.append(published_list.mode)
    return {model: tuple(sorted(modes_of_model)) for model, modes_of_model in modes.items()}


def stages_before(config: Config, stage: str | None, model: str = "") -> frozenset[str]:
    """Return the names of the stages that have a task which the task of `stage` and `model` needs.

    Where `stage` is None, return the names of all stages.
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
