"""The curves of a training as a picture."""

from __future__ import annotations

import io

from recspark import storage
from recspark.train.curve import Curve


def draw(curve: Curve, title: str, uri: str) -> None:
    """Draw loss and validation by epoch, and mark the best one; write a PNG to `uri`."""
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
        values = [float("nan") if e.validation is None else e.validation for e in curve.epochs]
        other = axes.twinx()
        other.plot(epochs, values, color="tab:orange", label="validation", marker=".")
        other.axvline(curve.best, color="gray", linestyle=":", label=f"best: epoch {curve.best}")
        other.set(ylabel="value of a validation row")
        lines += other.get_lines()
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="best")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    storage.write_bytes(uri, picture.getvalue())
