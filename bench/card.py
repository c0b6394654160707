"""What only a card can tell, in one unattended run of at most 25 minutes, as one report.

    uv run bench/card.py                                 on a card; writes card.md
    uv run bench/card.py --device cpu --shape tiny       the script itself, without a card, in a few minutes

Nothing needs to be downloaded. Where the environment variable GRPO_ZERO holds a shell command that runs the seed system on the
same work, its output stands in the report, too. About 50 GB of disk are needed in --scratch.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import SHAPES, named_shape

from harness.config import load_config
from harness.made_up import random_model
from harness.plan import GIB, make_plan
from warm_start import make_tokenizer

ROOT = Path(__file__).parent.parent
PYTHON = shlex.quote(sys.executable)
SHOWN = 40  # lines of a part's output, its last ones


class Report:
    """One part after another; what is known stands in the file at any time."""

    def __init__(self, path: Path, minutes: float):
        self.path, self.deadline, self.rows, self.parts = (
            path,
            time.monotonic() + 60 * minutes,
            [],
            [],
        )

    def run(self, title: str, command: str, *, minutes: float, kill_at: Path | None = None) -> None:
        """command: of a shell. kill_at: end it by SIGKILL, as a power cut would, when this path is there."""
        clock, limit = time.monotonic(), min(60 * minutes, self.deadline - time.monotonic())
        if limit < 10:
            return self.add(title, command, "not run: the time is up", 0.0, "")
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command, shell=True, cwd=ROOT, start_new_session=True, stdout=output, stderr=output
            )
            killed = ""
            while process.poll() is None and not killed:
                time.sleep(0.2)
                if kill_at and kill_at.exists():
                    killed = "killed, as planned"
                elif time.monotonic() - clock > limit:
                    killed = "killed: it took too long"
            if killed:
                os.killpg(process.pid, signal.SIGKILL)
            outcome = killed or f"exit code {process.returncode}"
            process.wait()
            output.seek(0)
            self.add(title, command, outcome, time.monotonic() - clock, output.read())

    def add(self, title: str, command: str, outcome: str, seconds: float, output: str) -> None:
        lines = output.strip().splitlines() or [""]
        last = "\n".join(lines[-SHOWN:])
        self.rows.append(
            f"| {title} | {outcome} | {seconds:.0f} s | {lines[-1][:200].replace('|', '/')} |"
        )
        self.parts.append(
            f"## {title}\n\n    {command}\n\n{outcome}, {seconds:.0f} s\n\n```\n{last}\n```\n"
        )
        print(self.rows[-1], flush=True)
        heading = [
            "# What a card says\n",
            "| part | outcome | time | its last line |",
            "| --- | --- | --- | --- |",
        ]
        self.path.write_text("\n".join([*heading, *self.rows, "", *self.parts]))


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure everything that only a card can tell.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="3B", choices=SHAPES)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--out", type=Path, default=Path("card.md"))
    parser.add_argument(
        "--scratch", type=Path, help="directory for models and runs (default: a temporary one)"
    )
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_model(args.make, args.shape, args.device)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is here; --device cpu --shape tiny tries the script itself")
    report = Report(args.out.absolute(), args.minutes)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        measure(report, args, Path(scratch))
    failed = [row for row in report.rows if "exit code 0" not in row and "as planned" not in row]
    print(f"{args.out}: {len(report.rows)} parts, {len(failed)} of them not as they should be")
    return int(bool(failed))


def measure(report: Report, args: argparse.Namespace, scratch: Path) -> None:
    here, small = shlex.quote(str(scratch)), args.shape == "tiny"
    train, on, where = (
        f"{PYTHON} train.py",
        f"model.device={args.device}",
        f"--device {args.device}",
    )
    if small:
        configs, work, cache, twice, held_out = (
            ["config_tiny.yaml"],
            "4 4 48 --mean 24 --dtype float32",
            "",
            "",
            "",
        )
        few = "training.batch_size=16 training.num_questions_per_batch=4 training.max_gen_len=48 data.test_size=8"
        short, saved = "training.max_steps=40 training.ckpt_save_interval=3", 3
    else:
        plan = make_plan(load_config(ROOT / "config.yaml"), named_shape(args.shape))
        configs, work, few, short, saved = (
            ["config.yaml", "config_24GB.yaml"],
            "32 8 1024 --mean 437",
            "",
            "",
            20,
        )
        cache, held_out = f"--cache-gib {plan.cache_bytes / GIB:.2f}", "data.test_size=32"
        twice = f"--checkpoint-layers {plan.checkpoint_layers} --micro-batch-tokens 3072"

    report.run(
        "a model with random weights",
        f"{PYTHON} bench/card.py --make {here}/model --shape {args.shape} {where}",
        minutes=3,
    )
    for config in configs:
        report.run(f"the plan of {config}", f"{train} --plan --config {config}", minutes=1)
        report.run(
            f"the check by {config}", f"{train} --check --config {config} {on} {few}", minutes=3
        )
    report.run("tests that need a card", f"{PYTHON} -m pytest -n 0 -m gpu", minutes=4)

    tiny, first = (
        f"{train} --config config_tiny.yaml {on} {few} {short}",
        scratch / f"broken/checkpoints/step-{saved:06d}",
    )
    report.run("the tiny run", f"{tiny} output_dir={here}/whole", minutes=4)
    report.run("the same, killed", f"{tiny} output_dir={here}/broken", minutes=3, kill_at=first)
    report.run("and resumed", f"{tiny} output_dir={here}/broken --resume", minutes=4)
    report.add(
        "resumed against unbroken",
        "metrics.jsonl of both",
        *compare(scratch / "whole", scratch / "broken"),
    )

    report.run(
        "rollout against the floor",
        f"{PYTHON} bench/rollout.py {args.shape} {work} {where} {cache}",
        minutes=4,
    )
    report.run(
        "update against the matrix peak",
        f"{PYTHON} bench/update.py {args.shape} {work} {where} {twice}",
        minutes=4,
    )
    random = f"model.path={here}/model task=tests.letters_task data.path=synthetic {held_out}"
    for config, steps in zip(configs, (10, 3), strict=False):
        lasting = (
            f"training.max_steps={steps} training.eval_interval=1000 output_dir={here}/{config}"
        )
        report.run(
            f"{steps} steps of a random {args.shape} by {config}, peaks against the plan",
            f"{train} --config {config} {on} {few} {random} {lasting}",
            minutes=10,
        )
    if command := os.environ.get("GRPO_ZERO"):
        report.run("the seed system", command, minutes=5)


def compare(*runs: Path) -> tuple[str, float, str]:
    """How many lines of the log of a broken run are those of an unbroken one."""
    logs = [run / "metrics.jsonl" for run in runs]
    whole, broken = (log.read_text().splitlines() if log.exists() else [] for log in logs)
    equal = sum(a == b for a, b in zip(whole, broken, strict=False))
    outcome = "exit code 0" if 0 < len(whole) == len(broken) else "not of one length"
    return outcome, 0.0, f"{equal} of {len(whole)} lines are equal"


def make_model(directory: Path, shape: str, device: str) -> None:
    """A model directory whose answers are random and, by its one stop id of some hundreds, end after some hundred tokens."""
    make_tokenizer(directory)
    stop_ids = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids[:1]}))
    config = replace(named_shape(shape), eos_token_id=stop_ids[0])
    random_model(config, device=device, dtype=torch.bfloat16).save_pretrained(directory)


if __name__ == "__main__":
    sys.exit(main())
