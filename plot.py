"""Draw the curves of one or more runs.

    uv run plot.py RUN [RUN ...] [--out FILE.png|FILE.svg]

Reads metrics.jsonl of each run and draws reward, success on the held-out questions with its 95 %
interval, answer length and entropy; docs/metrics.md explains them. Without --out the picture is
curves.png in the first run's directory.
"""

import argparse
import itertools
import math
import os
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from harness.console import with_exit_code
from harness.log import MetricsLine, read_log

SIZE_INCHES, DOTS_PER_INCH = (9.0, 6.0), 200
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",  # not transparent: black text must be readable on a dark page
    "svg.hashsalt": "grpo",  # makes the SVG file of a run reproducible
}


@with_exit_code
def main(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        description="Draw reward, held-out success, answer length and entropy of runs."
    )
    add, path = parser.add_argument, os.path.expanduser
    add("runs", nargs="+", type=path, metavar="RUN", help="directories with a metrics.jsonl")
    text = ".png or .svg (default: curves.png in the first run)"
    add("--out", type=path, metavar="FILE", help=text)
    arguments = parser.parse_args(argv)
    out = Path(arguments.out or Path(arguments.runs[0]) / "curves.png")
    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"--out {out}: wanted a file name that ends in .png or .svg")
    figure = draw({run: read_metrics(Path(run)) for run in arguments.runs})
    with rc_context(STYLE):
        figure.savefig(out, dpi=DOTS_PER_INCH, metadata={"Date": None})
    print(out)


def read_metrics(run: Path) -> list[dict]:
    """Records of a run's metrics.jsonl.

    Raises FileNotFoundError if there is none, ValueError if it is empty or a line is damaged.
    """
    records = [line.model_dump() for line in read_log(run / "metrics.jsonl", MetricsLine)]
    if not records:
        raise ValueError(f"{run / 'metrics.jsonl'} is empty; wait for the first step")
    return records


def series(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric. None, logged for a value that is not finite, becomes NaN."""
    records = [record for record in records if name in record]
    steps = [record["step"] for record in records]
    values = [math.nan if record[name] is None else record[name] for record in records]
    return steps, values


def draw(runs: dict[str, list[dict]]) -> Figure:
    """One panel per metric over the steps, one colour per run. runs: name -> records."""
    with rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        (reward, success), (length, entropy) = figure.subplots(2, 2, sharex=True)
        for (name, records), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):
            reward.plot(*series(records, "reward"), color=colour, label=name)
            success.plot(*series(records, "eval/success"), color=colour, marker="o", markersize=4)
            steps, low = series(records, "eval/success_low")
            _, high = series(records, "eval/success_high")
            success.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
            length.plot(*series(records, "completions/mean_length"), color=colour)
            finished = series(records, "completions/mean_terminated_length")
            length.plot(*finished, color=colour, linestyle="dashed")
            entropy.plot(*series(records, "entropy"), color=colour)
        reward.set(title="Reward in training", ylabel="mean per answer")
        success.set(title="Success on held-out questions", ylabel="share, 95 % interval")
        success.set(ylim=(0, 1))
        success.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        length.set(title="Answer length", ylabel="mean, tokens")
        kinds = ["all answers", "finished answers"]
        length.legend(length.lines[:2], kinds, loc="lower right", fontsize=9)
        entropy.set(title="Entropy of the sampling distribution", ylabel="mean, nats per token")
        for panel in (length, entropy):
            panel.set(ylim=(0, 1.1 * panel.get_ylim()[1]), xlabel="step")
        for panel in figure.axes:
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        handles, names = reward.get_legend_handles_labels()
        columns = min(3, len(runs))
        figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
