"""`recspark plan`: tonight's tasks, and the tasks that each of them waits for."""

from __future__ import annotations

from rich.table import Table

from recspark.cli.common import Env, Json, Set, console, print_json
from recspark.config.load import load_config


def plan(env: Env = "local", set_: Set = None, as_json: Json = False) -> None:
    """List tonight's tasks in an order that they may run in. Starts nothing."""
    from recspark.pipeline.plan import plan as plan_of

    tasks = plan_of(load_config(env, set_ or []))
    if as_json:
        print_json(
            [
                {
                    "task": task.name,
                    "stage": task.stage.name,
                    "model": task.model,
                    "needs": list(task.needs),
                    "may_fail": task.may_fail,
                }
                for task in tasks
            ]
        )
        return
    table = Table(title=f"{len(tasks)} tasks of a night", caption="it may fail: the night goes on")
    for column in ("task", "after", "may fail"):
        table.add_column(column)
    for task in tasks:
        table.add_row(task.name, ", ".join(task.needs), "yes" if task.may_fail else "")
    console.print(table)
