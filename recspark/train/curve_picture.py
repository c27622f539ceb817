"""Draws the curve of a training as a picture."""

from __future__ import annotations

import io

from recspark import storage
from recspark.train.curve import Curve


def draw(curve: Curve, title: str, uri: str) -> None:
    """Write a PNG to `uri`: loss and validation value by epoch, and a mark at the best epoch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    epochs = [e.epoch for e in curve.epochs]
    axes.plot(
        epochs, [e.loss for e in curve.epochs], color="tab:blue", label="training", marker="."
    )
    axes.set(title=title, xlabel="epoch", ylabel="loss of a training row")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines = axes.get_lines()
    if curve.epochs[0].validation is not None:
        validation_values = [
            float("nan") if e.validation is None else e.validation for e in curve.epochs
        ]
        validation_axes = axes.twinx()
        validation_axes.plot(
            epochs, validation_values, color="tab:orange", label="validation", marker="."
        )
        validation_axes.axvline(
            curve.best, color="gray", linestyle=":", label=f"best: epoch {curve.best}"
        )
        validation_axes.set(ylabel="value of a validation row")
        lines += validation_axes.get_lines()
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="best")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    storage.write_bytes(uri, png.getvalue())
