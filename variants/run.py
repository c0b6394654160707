"""Train the tiny model by relatives of GRPO: uv run variants/run.py NAME… [key.path=value…] [--seeds 1 2 3]

For each NAME and seed the tracked files are copied to a temporary directory, variants/NAME.patch is applied there ("grpo": no
patch), and config_tiny.yaml is run. Prints a line a run and, at the end, a row of the table a NAME. The runs are kept in
runs/variants/NAME-SEED, the mean of their curves in runs/variants/NAME, for plot.py.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
T_95 = [
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
]  # Student's t for a 95 % interval, by the number of seeds less 2


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the tiny model by relatives of GRPO.")
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="of a patch in variants/, grpo, or key.path=value for all runs",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    arguments = parser.parse_args(argv)
    settings = [name for name in arguments.names if "=" in name]
    rows = [row(name, arguments.seeds, settings) for name in arguments.names if "=" not in name]
    print(
        "\n| variant | lines | before | halfway | after | seconds |\n| --- | --- | --- | --- | --- | --- |",
        *rows,
        sep="\n",
    )


def make_tree(name: str, directory: Path) -> None:
    """The tracked files as they are now, with the patch of that name."""
    for line in subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0"):
        if line and (ROOT / line).is_file():
            (directory / line).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / line, directory / line)
    if name != "grpo":
        subprocess.run(
            ["git", "init", "-q"], cwd=directory, check=True
        )  # or git looks for the files in a repository around it
        subprocess.run(
            ["git", "apply", ROOT / "variants" / f"{name}.patch"], cwd=directory, check=True
        )


def row(name: str, seeds: list[int], settings: list[str]) -> str:
    runs, seconds = [], []
    for seed in seeds:
        out = ROOT / "runs" / "variants" / f"{name}-{seed}"
        with tempfile.TemporaryDirectory() as directory:
            make_tree(name, Path(directory))
            command = [
                sys.executable,
                "train.py",
                "--config",
                "config_tiny.yaml",
                f"output_dir={out}",
                f"training.seed={seed}",
            ]
            done = subprocess.run(
                [*command, *settings], cwd=directory, capture_output=True, text=True
            )
        if done.returncode:
            sys.exit(f"{name}, seed {seed}:\n{done.stdout}{done.stderr}")
        runs.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
        seconds.append(
            sum(
                json.loads(line).get("seconds", 0.0)
                for line in (out / "timings.jsonl").read_text().splitlines()
            )
        )
        before, after = ([r for r in runs[-1] if "eval/success" in r][i] for i in (0, -1))
        print(
            f"{name}, seed {seed}: {_share(before)} to {_share(after)}, {seconds[-1]:.0f} s",
            flush=True,
        )
    keys = [key for key in runs[0][0] | runs[0][1] if not key.startswith("skipped")]
    mean = [
        {key: fmean(r[key] for r in same) for key in keys if key in same[0]}
        for same in zip(*runs, strict=True)
    ]
    cells = []
    for i, record in enumerate(mean):
        if "eval/success" in record:
            rates = [run[i]["eval/success"] for run in runs]
            if len(rates) > 1:  # else the interval is that of the run's own questions
                half = T_95[len(rates) - 2] * stdev(rates) / sqrt(len(rates))
                low, high = (
                    max(0.0, record["eval/success"] - half),
                    min(1.0, record["eval/success"] + half),
                )
                mean[i] |= {"eval/success_low": low, "eval/success_high": high}
            cells.append(_share(mean[i]))
    (ROOT / "runs" / "variants" / name).mkdir(exist_ok=True)
    (ROOT / "runs" / "variants" / name / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in mean)
    )
    patch = (
        (ROOT / "variants" / f"{name}.patch").read_text().split("\ndiff --git ", 1)[1]
        if name != "grpo"
        else ""
    )
    lines = [
        sum(line[:1] == sign and line[:3] != 3 * sign for line in patch.splitlines())
        for sign in "+-"
    ]
    return f"| {name} | +{lines[0]} −{lines[1]} | {cells[0]} | {cells[len(cells) // 2]} | {cells[-1]} | {fmean(seconds):.0f} |"


def _share(record: dict) -> str:
    return f"{record['eval/success']:.1%} ({record['eval/success_low']:.1%} … {record['eval/success_high']:.1%})"


if __name__ == "__main__":
    main()
