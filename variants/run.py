"""Train the tiny model with variants of GRPO and rank them by how many answers they need.

    uv run variants/run.py NAME... [key.path=value ...] [--seeds 1 2 3]

NAME is a patch in variants/, or "grpo" for the core as it is. For each name and seed, the tracked
files are copied to a temporary directory, the patch is applied there, and config_tiny.yaml is run
with the given settings. The runs are kept in runs/variants/NAME-SEED, and the mean of their curves
in runs/variants/NAME, for plot.py. A finished run is not repeated, so the command can be stopped
and given again.

The table at the end has one row per name, best first. "to 90 %" is the number of answers sampled
until success on the held-out questions first reaches 90 %, "-" if it never does. Success is only
measured at evaluations, so training.eval_interval sets how precise this is. "to grpo" is the
difference to grpo's success at the end, in points, between runs with the same seed. Values are
means over the seeds with the 95 % interval of the mean (Student's t).
"""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import yaml

ROOT = Path(__file__).resolve().parent.parent
VARIANTS, RUNS = ROOT / "variants", ROOT / "runs" / "variants"
# The 97.5 % quantile of Student's t distribution, by the number of seeds.
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447}
TARGETS = (0.9, 0.8)


@dataclass(frozen=True)
class SeedRun:
    metrics: list[dict]  # the lines of metrics.jsonl
    seconds: float  # of all rollouts and updates
    answers: list[int]  # sampled in each step


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the tiny model with variants of GRPO.")
    what = "a patch in variants/, grpo, or key.path=value for all runs"
    parser.add_argument("names", nargs="+", metavar="NAME", help=what)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    arguments = parser.parse_args(argv)
    settings = [name for name in arguments.names if "=" in name]
    names = [name for name in arguments.names if "=" not in name]
    patches = {"grpo": None} | {path.stem: path for path in sorted(VARIANTS.glob("*.patch"))}
    check_arguments(parser, names, patches, arguments.seeds)
    results = {}
    for name in names:
        results[name] = [
            train(patches[name], seed, settings, RUNS / f"{name}-{seed}")
            for seed in arguments.seeds
        ]
        (RUNS / name).mkdir(exist_ok=True)
        lines = [json.dumps(record) + "\n" for record in mean_curve(results[name])]
        (RUNS / name / "metrics.jsonl").write_text("".join(lines))
    print("\n" + table(results))


def check_arguments(parser: argparse.ArgumentParser, names: list, patches: dict, seeds: list):
    """End the program with a message if a name is unknown or there are too many seeds."""
    for name in names:
        if name not in patches:
            parser.error(f"there is no patch {name!r}; choose from {', '.join(patches)}")
    if len(seeds) > max(T_95):
        parser.error(f"got {len(seeds)} seeds; at most {max(T_95)} are possible")


# ---------------------------------------------------------------- one run


def make_tree(patch: Path | None, directory: Path) -> None:
    """Copy the tracked files as they are now, and apply the patch."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for file in listed.stdout.split("\0"):
        if file and (ROOT / file).is_file():
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, directory / file)
    if patch is not None:
        # Without its own repository, git would resolve paths in one that encloses the directory.
        subprocess.run(["git", "init", "-q"], cwd=directory, check=True)
        subprocess.run(["git", "apply", patch], cwd=directory, check=True)


def train(patch: Path | None, seed: int, settings: list[str], out: Path) -> SeedRun:
    """Train the tiny model in a patched copy of the repository; `out` gets the finished run.

    A run that is there already is used again.
    """
    settings = [f"training.seed={seed}", *settings]
    made_with = "\n".join([*settings, diff_of(patch) if patch else ""])
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as directory:
            tree, run = Path(directory, "tree"), Path(directory, "run")
            make_tree(patch, tree)
            command = [sys.executable, "train.py", "--config", "config_tiny.yaml"]
            command += [f"output_dir={run}", *settings]
            done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{out.name}:\n{done.stdout}{done.stderr}")
            (run / "output.txt").write_text(done.stdout)
            (run / "made_with.txt").write_text(made_with)
            run.rename(out)
    elif (out / "made_with.txt").read_text() != made_with:
        sys.exit(f"{out} was made with another patch or other settings; remove it")
    result = read_run(out)
    before, after = evaluations(result)[0], evaluations(result)[-1]
    shares = f"{before['eval/success']:.1%} to {after['eval/success']:.1%}"
    print(f"{out.name}: {shares}, {result.seconds:.0f} s", flush=True)
    return result


def diff_of(patch: Path) -> str:
    """A patch without its header."""
    _, separator, diff = patch.read_text(encoding="utf-8").partition("\ndiff --git ")
    return separator + diff


def read_run(directory: Path) -> SeedRun:
    metrics = (directory / "metrics.jsonl").read_text().splitlines()
    timings = (directory / "timings.jsonl").read_text().splitlines()
    training = yaml.safe_load((directory / "config.yaml").read_text())["training"]
    return SeedRun(
        metrics=[json.loads(line) for line in metrics],
        seconds=sum(json.loads(line).get("seconds", 0.0) for line in timings),
        answers=answers_sampled((directory / "output.txt").read_text(), training),
    )


def answers_sampled(output: str, training: dict) -> list[int]:
    """The answers sampled in each step. dynamic-sampling prints how many questions it asked."""
    questions = [int(number) for number in re.findall(r"asked (\d+) questions", output)]
    if not questions:
        questions = [training["num_questions_per_batch"]] * training["max_steps"]
    num_answers = training["batch_size"] // training["num_questions_per_batch"]
    return [number * num_answers for number in questions]


# ---------------------------------------------------------------- all seeds of a variant


def evaluations(run: SeedRun) -> list[dict]:
    return [record for record in run.metrics if "eval/success" in record]


def answers_until(target: float, run: SeedRun) -> int | None:
    """Answers sampled until held-out success first reaches the target; None if it never does."""
    for record in evaluations(run):
        if record["eval/success"] >= target:
            return sum(run.answers[: record["step"]])
    return None


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the 95 % interval of the mean from the spread of the values."""
    mean = fmean(values)
    if len(values) == 1:
        return mean, math.nan, math.nan
    half = T_95[len(values)] * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def mean_curve(runs: list[SeedRun]) -> list[dict]:
    """The mean over the seeds of each metric at each step. Success has the interval of its mean."""
    curve = []
    for records in zip(*(run.metrics for run in runs), strict=True):
        mean = {}
        for key in records[0]:
            values = [record.get(key) for record in records]
            if all(isinstance(value, int | float) for value in values):
                mean[key] = fmean(values)
        if "eval/success" in mean and len(runs) > 1:  # one run keeps its own interval
            _, low, high = interval([record["eval/success"] for record in records])
            mean |= {"eval/success_low": max(0.0, low), "eval/success_high": min(1.0, high)}
        curve.append(mean)
    return curve


# ---------------------------------------------------------------- the table


def table(results: dict[str, list[SeedRun]]) -> str:
    """One row per variant, ranked by the mean number of answers to 90 %, then to 80 %."""

    def rank(name: str) -> list[float]:
        return [mean_answers(target, results[name]) for target in TARGETS]

    head = "| variant | lines | to 90 % | to 80 % | before | halfway | after | to grpo | seconds |"
    grpo = results.get("grpo")
    rows = [row(name, results[name], grpo) for name in sorted(results, key=rank)]
    return "\n".join([head, "| --- " * 9 + "|", *rows])


def mean_answers(target: float, runs: list[SeedRun]) -> float:
    """Infinite if a seed never reaches the target."""
    answers = [answers_until(target, run) for run in runs]
    return math.inf if None in answers else fmean(answers)


def row(name: str, runs: list[SeedRun], grpo: list[SeedRun] | None) -> str:
    size = "" if name == "grpo" else patch_size(VARIANTS / f"{name}.patch")
    cells = [name, size, *(speed(target, runs) for target in TARGETS)]
    curve = [record for record in mean_curve(runs) if "eval/success" in record]
    for record in (curve[0], curve[len(curve) // 2], curve[-1]):
        low, high = record["eval/success_low"], record["eval/success_high"]
        cells.append(f"{record['eval/success']:.1%} ({low:.1%} … {high:.1%})")
    cells.append("-" if grpo is None or name == "grpo" else difference(grpo, runs))
    cells.append(f"{fmean(run.seconds for run in runs):.0f}")
    return f"| {' | '.join(cells)} |"


def difference(core: list[SeedRun], other: list[SeedRun]) -> str:
    """How many points more success `other` ends with, from pairs of runs with the same seed."""
    changes = [
        100 * (evaluations(b)[-1]["eval/success"] - evaluations(a)[-1]["eval/success"])
        for a, b in zip(core, other, strict=True)
    ]
    mean, low, high = interval(changes)
    if len(changes) == 1:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} ({low:+.1f} … {high:+.1f})"


def speed(target: float, runs: list[SeedRun]) -> str:
    answers = [answers_until(target, run) for run in runs]
    reached = [number for number in answers if number is not None]
    if not reached:
        return "-"
    if len(reached) < len(runs):
        return f"- ({len(reached)} of {len(runs)} seeds)"
    mean, low, high = interval(reached)
    return f"{mean:,.0f}" if len(runs) == 1 else f"{mean:,.0f} ({max(0.0, low):,.0f} … {high:,.0f})"


def patch_size(patch: Path) -> str:
    """Lines that a patch adds and removes, as in "+5 −5"."""
    diff = diff_of(patch).splitlines()
    added = sum(line.startswith("+") and not line.startswith("+++") for line in diff)
    removed = sum(line.startswith("-") and not line.startswith("---") for line in diff)
    return f"+{added} −{removed}"


if __name__ == "__main__":
    main()
