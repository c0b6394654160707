"""Draw the curves of one or more runs: uv run plot.py RUN [RUN…] [--out FILE.png|.svg]

Reward, success on the held-out questions with its 95 % interval, answer length and entropy, from metrics.jsonl;
docs/metrics.md says what each means. Without --out the picture goes to RUN/curves.png of the first run.
"""

import argparse
import itertools
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from harness.console import with_exit_code
from harness.logs import MetricsLine, read_log

WIDTH, HEIGHT, DOTS_PER_INCH = (
    9.0,
    6.0,
    200,
)  # inches; shown 900 pixels wide, sharp on dense screens too
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito: told apart by colour-blind eyes
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",  # opaque, or dark pages would swallow the letters
    "svg.hashsalt": "grpo",  # the same run gives the same file
}


@with_exit_code
def main(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        description="Draw reward, held-out success, answer length and entropy of runs."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories with a metrics.jsonl")
    parser.add_argument(
        "--out", metavar="FILE", help=".png or .svg (default: curves.png in the first run)"
    )
    arguments = parser.parse_args(argv)
    out = Path(arguments.out or Path(arguments.runs[0]) / "curves.png")
    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"--out {out}: wanted a name that ends in .png or .svg")
    figure = draw({run: read_metrics(Path(run)) for run in arguments.runs})
    with rc_context(STYLE):
        figure.savefig(out, dpi=DOTS_PER_INCH, metadata={"Date": None})
    print(out)


def read_metrics(run: Path) -> list[dict]:
    """The records of a run's metrics.jsonl. Raises ValueError or FileNotFoundError if there is none, or a line is damaged."""
    records = [line.model_dump() for line in read_log(run / "metrics.jsonl", MetricsLine)]
    if not records:
        raise ValueError(f"{run / 'metrics.jsonl'} is empty; wait for the first step")
    return records


def series(records: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; None, for a number that was not finite, leaves a gap."""
    points = [(r["step"], float("nan") if r[key] is None else r[key]) for r in records if key in r]
    return [step for step, _ in points], [value for _, value in points]


def draw(runs: dict[str, list[dict]]) -> Figure:
    """Four panels over the steps, one colour a run."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        (reward, success), (length, entropy) = figure.subplots(2, 2, sharex=True)
        for (name, records), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):
            reward.plot(*series(records, "reward"), color=colour, label=name)
            success.plot(*series(records, "eval/success"), color=colour, marker="o", markersize=4)
            steps, low = series(records, "eval/success_low")
            success.fill_between(
                steps,
                low,
                series(records, "eval/success_high")[1],
                color=colour,
                alpha=0.18,
                linewidth=0,
            )
            length.plot(*series(records, "completions/mean_length"), color=colour)
            length.plot(
                *series(records, "completions/mean_terminated_length"),
                color=colour,
                linestyle=(0, (2, 2)),
            )
            entropy.plot(*series(records, "entropy"), color=colour)
        reward.set(title="Reward in training", ylabel="mean per answer")
        success.set(
            title="Success on held-out questions", ylabel="share, 95 % interval", ylim=(0, 1)
        )
        length.set(title="Answer length", ylabel="mean, tokens")
        entropy.set(title="Entropy of the sampling distribution", ylabel="mean, nats per token")
        for panel in (length, entropy):
            panel.set(ylim=(0, 1.1 * panel.get_ylim()[1]), xlabel="step")
        for panel in figure.axes:
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        success.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        length.legend(
            length.lines[:2], ["all answers", "finished answers"], loc="lower right", fontsize=9
        )
        figure.legend(
            *reward.get_legend_handles_labels(),
            loc="outside upper center",
            ncols=min(3, len(runs)),
            frameon=False,
        )
    return figure


if __name__ == "__main__":
    sys.exit(main())
