"""One picture an engine: ours beside its peers, and how ours grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.machine import RESULTS

_OURS, _THEIRS, _INK = "#2a6f97", "#a9b4bd", "#333333"


def draw(
    name: str,
    title: str,
    bars: Mapping[str, float],
    curves: Mapping[str, tuple[str, Mapping[float, float]]],
    unit: str = "seconds",
) -> None:
    """Write `results/<name>.png`.

    Parameters
    ----------
    bars : label -> value; those that begin with "recspark" are ours
    curves : title of a panel, which says what is counted -> (label of its x axis, x -> value)
    """
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, 1 + len(curves), figsize=(4.2 + 2.8 * len(curves), 3.2), squeeze=False,
        width_ratios=[1.5, *[1] * len(curves)],
    )  # fmt: skip
    first, *others = axes[0]
    labels = list(bars)[::-1]
    values = [bars[label] for label in labels]
    first.barh(
        labels, values, color=[_OURS if x.startswith("recspark") else _THEIRS for x in labels]
    )
    for at, value in enumerate(values):
        said = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
        first.text(value, at, f" {said}", va="center", color=_INK, fontsize=8)
    first.set_xlim(0, 1.18 * max(values))
    first.set_xlabel(unit)
    for axis, (panel, (label, points)) in zip(others, curves.items(), strict=True):
        xs = sorted(points)
        axis.plot(xs, [points[x] for x in xs], "o-", color=_OURS)
        _ticks(axis, xs)
        axis.set_ylim(0, 1.15 * max(points.values()))
        axis.set_title(panel, fontsize=9, loc="left")
        axis.set_xlabel(label)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=130)
    plt.close(figure)


def _ticks(axis: object, xs: Sequence[float]) -> None:
    if len(xs) > 1 and xs[-1] / max(xs[0], 1e-9) >= 8:
        axis.set_xscale("log", base=2)  # type: ignore[attr-defined]
    if len(xs) > 8:
        xs = [xs[0], xs[len(xs) // 4], xs[len(xs) // 2], xs[-1]]
    axis.set_xticks(xs, [f"{x:g}" for x in xs])  # type: ignore[attr-defined]
    axis.minorticks_off()  # type: ignore[attr-defined]
