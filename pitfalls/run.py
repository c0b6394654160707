"""Train the tiny model with each pitfall and without it, and print the table of README.md.

    uv run pitfalls/run.py [NAME ...] [--seeds 1 2 3] [--steps 20]

NAME is a patch in pitfalls/; without any name, all of them. Both runs, "core" and "with the bug",
have the settings of config_tiny.yaml and those in the header of the patch. They are kept in
runs/pitfalls. A finished run is not repeated, so the command can be stopped and given again, or
given for one name at a time and at the end without names.

Success is that on the held-out questions, before the first step and after the last: the mean over
the seeds, and for the last the 95 % interval of the mean (Student's t). "difference" is that of the
last values of the two runs with the same seed, in percentage points, with its interval. The metric
of a pitfall is a mean over the seeds.
"""

import argparse
import re
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from variants.run import ROOT, SeedRun, check_arguments, difference, mean_curve, train

PITFALLS, RUNS = ROOT / "pitfalls", ROOT / "runs" / "pitfalls"
HEAD = (
    "| pitfall | reported | success, core | success, with the bug | difference | what shows it "
    "| its value, core → bug | caught by |"
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure what each pitfall does to the tiny run.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a patch in pitfalls/")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=20, help="training steps (default: 20)")
    arguments = parser.parse_args(argv)
    patches = {path.stem: path for path in sorted(PITFALLS.glob("*.patch"))}
    check_arguments(parser, arguments.names, patches, arguments.seeds)
    rows, cores = [], {}  # pitfalls without settings of their own share one core
    for name in arguments.names or patches:
        own_settings = fields(patches[name]).get("Settings", "").split()
        settings = [f"training.max_steps={arguments.steps}", *own_settings]
        core = f"core-{name}" if own_settings else "core"
        if core not in cores:
            cores[core] = [train(None, n, settings, RUNS / f"{core}-{n}") for n in arguments.seeds]
        bug = [train(patches[name], n, settings, RUNS / f"{name}-{n}") for n in arguments.seeds]
        rows.append(row(patches[name], cores[core], bug))
    print("\n" + table(rows))


def fields(patch: Path) -> dict[str, str]:
    """The last paragraph of a patch's header, which has lines such as "Metric: reward"."""
    header = patch.read_text().partition("\ndiff --git ")[0]
    paragraph = header.strip().split("\n\n")[-1].replace("\n  ", " ")
    return dict(line.split(": ", 1) for line in paragraph.splitlines())


def table(rows: list[str]) -> str:
    return "\n".join([HEAD, "| --- " * 8 + "|", *rows])


def row(patch: Path, core: list[SeedRun], bug: list[SeedRun]) -> str:
    """One row of the table, with "–" for what has not been measured."""
    field = fields(patch)
    metric, caught_by = field["Metric"], field["Caught by"].partition("::")[2]
    cells = [f"[`{patch.stem}`](#{patch.stem})", links(field["Reported"])]
    cells += [success(core), success(bug), difference(core, bug) if core else "–"]
    cells += [f"`{metric}`: {field['Symptom']}", values(metric, core, bug), f"`{caught_by}`"]
    return f"| {' | '.join(cells)} |"


def links(reported: str) -> str:
    """owner/name#1 and arXiv:1 as Markdown links."""
    issue = r"[\g<0>](https://github.com/\1/issues/\2)"
    linked = re.sub(r"([\w.-]+/[\w.-]+)#(\d+)", issue, reported)
    return re.sub(r"arXiv:([\d.]+)", r"[\g<0>](https://arxiv.org/abs/\1)", linked)


def success(runs: list[SeedRun]) -> str:
    if not runs:
        return "–"
    curve = [record for record in mean_curve(runs) if "eval/success" in record]
    before, after, low, high = (
        100 * curve[i][f"eval/{name}"]
        for i, name in ((0, "success"), (-1, "success"), (-1, "success_low"), (-1, "success_high"))
    )
    return f"{before:.1f} → {after:.1f} % ({low:.1f} … {high:.1f})"


def values(metric: str, core: list[SeedRun], bug: list[SeedRun]) -> str:
    """The metric of a training step without and with the bug: in the first step, and on average."""
    if not core:
        return "–"
    cells = []
    for runs in (core, bug):
        steps = [[r[metric] for r in run.metrics if metric in r] for run in runs]
        cells += [fmean(step[0] for step in steps), fmean(x for step in steps for x in step)]
    first, mean, bug_first, bug_mean = (
        f"{cell:,.0f}" if cell >= 1000 else f"{cell:.3g}" for cell in cells
    )
    return f"first step {first} → {bug_first}, mean {mean} → {bug_mean}"


if __name__ == "__main__":
    main()
