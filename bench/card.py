"""Measure everything that needs a GPU, in one unattended run of at most 25 minutes.

    uv run bench/card.py                               on a GPU; writes the report card.md
    uv run bench/card.py train                         one part of it; writes card-train.md
    uv run bench/card.py --device cpu --shape tiny     tries the script without a GPU, in minutes

The parts are tests, tiny, speed, train and train-24GB. Each takes at most 9 minutes and needs none
of the others. Nothing is downloaded. --scratch needs about 50 GB of disk. If the environment
variable GRPO_ZERO holds a shell command that runs GRPO-Zero on the same work, the part speed runs
it, too.
"""

import argparse
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import SHAPES, named_shape

from bench.synthetic import random_model
from harness.config import load_config
from harness.plan import GIB, make_plan
from warm_start import make_tokenizer

ROOT = Path(__file__).parent.parent
PYTHON = shlex.quote(sys.executable)
SHOWN_LINES = 40  # the report shows this many lines from the end of a command's output
PART_MINUTES = 9


class Report:
    """Runs one command after another until a deadline, and rewrites the report after each."""

    def __init__(self, path: Path):
        self.path, self.deadline = path, 0.0  # by the clock of time.monotonic()
        self.rows: list[str] = []
        self.sections: list[str] = []
        self.num_failed = 0

    def run(self, title: str, command: str, *, minutes: float, kill_at: Path | None = None) -> None:
        """Run a shell command. kill_at: once this path exists, kill the command with SIGKILL."""
        start = time.monotonic()
        limit = min(60 * minutes, self.deadline - start)
        if limit < 10:
            self.add(title, command, "not run: no time is left", ok=False)
            return
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command, shell=True, cwd=ROOT, start_new_session=True, stdout=output, stderr=output
            )
            killed = ""
            while process.poll() is None and not killed:
                time.sleep(0.2)
                if kill_at and kill_at.exists():
                    killed = "killed, as planned"
                elif time.monotonic() - start > limit:
                    killed = "killed: it took too long"
            if killed:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            output.seek(0)
            outcome = killed or f"exit code {process.returncode}"
            ok = killed == "killed, as planned" if kill_at else outcome == "exit code 0"
            self.add(title, command, outcome, ok, time.monotonic() - start, output.read())

    def add(
        self,
        title: str,
        command: str,
        outcome: str,
        ok: bool,
        seconds: float = 0.0,
        output: str = "",
    ) -> None:
        self.num_failed += not ok
        lines = output.strip().splitlines() or [""]
        last_line = lines[-1][:200].replace("|", "/")
        self.rows.append(f"| {title} | {outcome} | {seconds:.0f} s | {last_line} |")
        shown = "\n".join(lines[-SHOWN_LINES:])
        self.sections.append(
            f"## {title}\n\n    {command}\n\n{outcome}, {seconds:.0f} s\n\n```\n{shown}\n```\n"
        )
        print(self.rows[-1], flush=True)
        heading = ["# Report of a GPU", "", "| command | outcome | time | last line |"]
        heading += ["| --- | --- | --- | --- |"]
        self.path.write_text("\n".join([*heading, *self.rows, "", *self.sections]))


@dataclass(frozen=True)
class Work:
    """How large the commands are."""

    training: dict[str, tuple[str, int]]  # part: arguments of train.py, steps with a random model
    overrides: str  # of every run
    tiny_run: str  # overrides of the tiny run
    kill_after_step: int  # kill the tiny run when this checkpoint exists
    shape: str  # arguments of the benchmarks
    rollout: str = ""
    update: str = ""
    held_out: str = ""


def small_work() -> Work:
    tiny = "--config config_tiny.yaml"
    return Work(
        training={"train": (tiny, 10), "train-24GB": (tiny, 3)},
        overrides="training.batch_size=16 training.num_questions_per_batch=4 "
        "training.max_gen_len=48 data.test_size=8",
        tiny_run="training.max_steps=40 training.ckpt_save_interval=3",
        kill_after_step=3,
        shape="tiny 4 4 48 --mean 24 --dtype float32",
    )


def whole_work(shape: str) -> Work:
    config = load_config(ROOT / "config.yaml")
    plan = make_plan(config, named_shape(shape))
    offload = " --offload" if config.optimizer.offload else ""
    config_24gb = "--config config_24GB.yaml model.memory_gib=22.5"  # even if more is free
    return Work(
        training={"train": ("--config config.yaml", 5), "train-24GB": (config_24gb, 3)},
        overrides="",
        tiny_run="",
        kill_after_step=20,
        shape=f"{shape} 32 8 1024 --mean 437",
        rollout=f"--cache-gib {plan.cache_bytes / GIB:.2f}",
        update=f"--recompute-layers {plan.recompute_layers} "
        f"--micro-batch-tokens {config.training.micro_batch_tokens}{offload}",
        held_out="data.test_size=32",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure everything that needs a GPU.")
    parser.add_argument("part", nargs="?", choices=PARTS, help="default: all parts in this order")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="3B", choices=SHAPES)
    parser.add_argument("--minutes", type=float, default=25, help="for all parts together")
    parser.add_argument("--out", type=Path, help="default: card.md, or card-PART.md")
    parser.add_argument("--scratch", type=Path, help="directory for temporary models and runs")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_model(args.make, args.shape, args.device)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; try the script with --device cpu --shape tiny")
    out = args.out or Path(f"card-{args.part}.md" if args.part else "card.md")
    report, end = Report(out.absolute()), time.monotonic() + 60 * args.minutes
    work = small_work() if args.shape == "tiny" else whole_work(args.shape)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for part in [args.part] if args.part else PARTS:
            report.deadline = min(end, time.monotonic() + 60 * PART_MINUTES)
            PARTS[part](report, work, args, Path(scratch))
    print(f"{out}: {len(report.rows)} results, {report.num_failed} failed")
    return int(report.num_failed > 0)


def run_tests(report: Report, work: Work, args: argparse.Namespace, scratch: Path) -> None:
    report.run("tests for a GPU", f"{PYTHON} -m pytest -n 0 -m gpu", minutes=4)


def run_tiny(report: Report, work: Work, args: argparse.Namespace, scratch: Path) -> None:
    here = shlex.quote(str(scratch))
    tiny = f"{PYTHON} train.py --config config_tiny.yaml model.device={args.device} "
    tiny += f"{work.overrides} {work.tiny_run} output_dir={here}"
    saved = scratch / f"killed/checkpoints/step-{work.kill_after_step:06d}"
    report.run("tiny run", f"{tiny}/whole", minutes=4)
    report.run("tiny run, killed", f"{tiny}/killed", minutes=3, kill_at=saved)
    report.run("tiny run, resumed", f"{tiny}/killed --resume", minutes=4)
    compare(report, scratch / "whole", scratch / "killed")


def run_benchmarks(report: Report, work: Work, args: argparse.Namespace, scratch: Path) -> None:
    common = f"{work.shape} --device {args.device}"
    rollout = f"{PYTHON} bench/rollout.py {common} {work.rollout}"
    update = f"{PYTHON} bench/update.py {common} {work.update}"
    report.run("rollout against its floor", rollout, minutes=4)
    report.run("update against the rate of a large product", update, minutes=4)
    if command := os.environ.get("GRPO_ZERO"):
        report.run("GRPO-Zero", command, minutes=5)


def run_training(
    part: str, report: Report, work: Work, args: argparse.Namespace, scratch: Path
) -> None:
    here, (config, steps) = shlex.quote(str(scratch)), work.training[part]
    if not (scratch / "model").exists():
        make = f"{PYTHON} bench/card.py --make {here}/model --shape {args.shape}"
        report.run("make a random model", f"{make} --device {args.device}", minutes=3)
    report.run(f"plan of {part}", f"{PYTHON} train.py --plan {config}", minutes=1)
    report.run(
        f"{steps} steps of {part}: peaks against the plan",
        f"{PYTHON} train.py {config} model.device={args.device} {work.overrides} "
        f"model.path={here}/model task=tests.letters_task data.path=synthetic {work.held_out} "
        f"training.max_steps={steps} training.eval_interval=1000 output_dir={here}/{part}",
        minutes=PART_MINUTES,
    )
    # The last checkpoint of the 3B model takes 37 GB; a disk may not hold two of them.
    shutil.rmtree(scratch / part, ignore_errors=True)


PARTS = {
    "tests": run_tests,
    "tiny": run_tiny,
    "speed": run_benchmarks,
    "train": functools.partial(run_training, "train"),
    "train-24GB": functools.partial(run_training, "train-24GB"),
}


def compare(report: Report, whole: Path, resumed: Path) -> None:
    """Report how many lines of the logs of an unbroken and a resumed run are equal."""
    logs = [run / "metrics.jsonl" for run in (whole, resumed)]
    a, b = [log.read_text().splitlines() if log.exists() else [] for log in logs]
    equal = sum(x == y for x, y in zip(a, b, strict=False))
    report.add(
        "resumed run against unbroken run",
        "compare metrics.jsonl",
        f"{len(a)} and {len(b)} lines",
        ok=0 < len(a) == len(b),
        output=f"{equal} of {len(a)} lines are equal",
    )


def make_model(directory: Path, shape: str, device: str) -> None:
    """Write a random model with one stop id, so that answers end after a few hundred tokens."""
    make_tokenizer(directory)
    path = directory / "generation_config.json"
    stop_ids = json.loads(path.read_text())["eos_token_id"]
    path.write_text(json.dumps({"eos_token_id": stop_ids[:1]}))
    config = replace(named_shape(shape), eos_token_id=stop_ids[0])
    random_model(config, device=device, dtype=torch.bfloat16).save_pretrained(directory)


if __name__ == "__main__":
    sys.exit(main())
