"""`recspark settings`: the settings in effect, or the reference page of all settings."""

from __future__ import annotations

from typing import Annotated

import typer
import yaml

from recspark.cli.common import Env, Set


def settings(
    env: Env = "local",
    set_: Set = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print the reference page of all settings instead")
    ] = False,
) -> None:
    """Print the settings that hold, as YAML: all layers together, secrets hidden."""
    if markdown:
        from recspark.report.settings_page import settings_page

        print(settings_page(), end="")
        return
    from recspark.config.load import load_config
    from recspark.pipeline.checks import check_settings

    config = load_config(env, set_ or [])
    check_settings(config)
    print(yaml.safe_dump(config.masked(), sort_keys=False, allow_unicode=True), end="")
