"""The plots of docs/scaling.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure

from tests.support.paths import ROOT

FOLDER = ROOT / "docs/pictures"
SIZE = (6.0, 3.4)  # inches

Points = Sequence[tuple[float, float]]

# Text stays text, and the same figure gives the same file.
mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "lightwell", "font.size": 9, "font.family": "sans-serif"}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of lines."""

    name: str  # of the file
    x_label: str
    y_label: str
    lines: Mapping[str, Points]
    log_x: bool = False
    percent: bool = False  # y is a share
    limit: float | None = None  # a value of y that is marked

    def save(self) -> None:
        """Write the chart to docs/pictures."""
        figure = Figure(SIZE, layout="constrained")
        axes = figure.add_subplot()
        for name, points in self.lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.5, label=name)
        if self.limit is not None:
            axes.axhline(self.limit, color="grey", linewidth=0.8, linestyle="--")
        if self.log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        if self.percent:
            axes.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(self.lines) > 1:
            axes.legend(frameon=False)
        figure.savefig(FOLDER / f"{self.name}.svg", metadata={"Date": None})
