"""What the user sees: a bar for the current phase, one line per step, messages and exit codes."""

import functools
import io
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from resource import RUSAGE_SELF, getrusage

import torch
from tqdm import tqdm

from data_types import NoProgress

UNITS = {"prefill": "prompts", "gradient": "tokens", "optimizer": "step", "TensorBoard": "lines"}
MAX_MESSAGE = 10_000  # characters
COLUMNS = {  # column: (metric, format); all of them fit into 80 characters
    "step": ("step", "{:>5d}"),
    "reward": ("reward", "{:6.3f}"),
    "solved": ("rewards/answer", "{:6.1%}"),
    "format": ("rewards/format", "{:6.1%}"),
    "equal": ("frac_reward_zero_std", "{:5.0%}"),
    "length": ("completions/mean_length", "{:6.1f}"),
    "cut off": ("completions/clipped_ratio", "{:7.1%}"),
    "entropy": ("entropy", "{:7.3f}"),
    "|grad|": ("grad_norm", "{:6.3f}"),
    "Δlogp": ("sampling/logp_difference_mean", "{:7.1e}"),
    "s/step": ("seconds", "{:6.2f}"),
}


class Progress(NoProgress):
    """Draws a bar for each phase of a rollout, an update or an evaluation, and measures the phases.

    check: called at every update, when nothing is half-done; it raises to end the work.
    seconds: of each phase. counts: the sum of n for each phase, and the sum of each other count.
    peak_bytes: see peak_bytes(); on a GPU it counts from the moment this object is made.
    card_bytes: GPU memory in use at the end of a phase, by all programs together; 0 on a CPU.
    """

    def __init__(self, label: str, check: Callable[[], None] = lambda: None, hidden: bool = False):
        self.label, self.check, self.hidden = label, check, hidden
        self.seconds, self.counts = Counter(), Counter()
        self.card_bytes = 0
        self._phase, self._bar = "", None
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self.peak_bytes = peak_bytes("cuda" if torch.cuda.is_initialized() else "cpu")

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[None]:
        self._phase, start = name, time.perf_counter()
        unit = UNITS.get(name, "answers")
        with bar(f"{self.label}: {name}", total, unit, hidden=self.hidden) as self._bar:
            yield
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
                free, size = torch.cuda.mem_get_info()
                self.card_bytes = max(self.card_bytes, size - free)
        self.seconds[name] += time.perf_counter() - start
        self.peak_bytes = peak_bytes("cuda" if torch.cuda.is_initialized() else "cpu")

    def update(self, n: int = 0, **counts: int) -> None:
        self.counts.update({self._phase: n})
        self.counts.update(counts)
        if "slot_steps" in counts:  # shows progress on long answers before any has finished
            self._bar.set_postfix_str(f"{self.counts['slot_steps']:,} tokens", refresh=False)
        self._bar.update(n)
        self.check()


@contextmanager
def bar(title: str, total: int, unit: str, *, hidden: bool) -> Iterator[tqdm]:
    """A bar on a terminal. Its line is cleared at the end, even if Ctrl-C was pressed."""
    shown = tqdm(
        desc=title,
        total=total,
        unit=unit,
        bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} {unit}{postfix} [{elapsed}]",
        ncols=shutil.get_terminal_size().columns - len("^C^C "),
        leave=False,
        miniters=0,
        disable=hidden or None,  # None: draw it only if stderr is a terminal
    )
    erase = "" if shown.disable else "\033[K"  # the terminal echoes "^C" after the bar
    try:
        yield shown
    finally:
        shown.close()
        print(erase, end="", file=sys.stderr, flush=True)


def peak_bytes(device: str) -> int:
    """Peak memory: of PyTorch's tensors on a GPU since the last reset; on a CPU, of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    kilobytes = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return kilobytes * getrusage(RUSAGE_SELF).ru_maxrss


def printable(text: str) -> str:
    """Escape control, direction and invisible characters: a model's text may hold any of them."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def prepare_streams() -> None:
    """Escape what a terminal or pipe that is not UTF-8 cannot show, instead of failing on it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def log(text: str = "") -> None:
    """Print a line to stdout, above the bar if there is one."""
    tqdm.write(printable(text))


def show_error(text: str) -> None:
    """Print the program's last message to stderr, even if the output is no longer read.

    A message that quotes something huge is cut. A closed pipe (`train.py | head`) is replaced by
    the null device. Otherwise Python would report a second error when it flushes the stream at
    exit.
    """
    if len(text) > MAX_MESSAGE:
        text = text[:MAX_MESSAGE] + " …"
    for stream, message in ((sys.stdout, ""), (sys.stderr, printable(text) + "\n")):
        try:
            stream.write(message)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def with_exit_code(command: Callable[[list[str] | None], None]) -> Callable[..., int]:
    """Turn a command into a main(argv) that returns 0, 2 for a user error, or 130 for Ctrl-C."""

    @functools.wraps(command)
    def main(argv: list[str] | None = None) -> int:
        prepare_streams()
        try:
            command(argv)
        except (ValueError, OSError) as error:
            show_error(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            show_error("interrupted")
            return 130
        return 0

    return main


def heading() -> str:
    return " ".join(f"{column:>{_width(form)}}" for column, (_, form) in COLUMNS.items())


def step_line(metrics: dict) -> str:
    """One step as a line under heading(), "-" for a missing metric, and why it was skipped."""
    cells = [
        form.format(metrics[name]) if name in metrics else "-".rjust(_width(form))
        for name, form in COLUMNS.values()
    ]
    reason = f"\n      no step: {metrics['skipped']}" if metrics.get("skipped") else ""
    return " ".join(cells) + reason


def _width(form: str) -> int:
    return len(form.format(0))


def duration(seconds: float) -> str:
    """In words, for example "2 minutes"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
