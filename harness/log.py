"""The log of a run: metrics.jsonl, samples.jsonl, timings.jsonl, and a view of them in TensorBoard.

metrics.jsonl and samples.jsonl hold what was computed: on a CPU, the same bytes however often the
run was interrupted. timings.jsonl holds what it cost. docs/metrics.md explains every name.
"""

import contextlib
import json
import os
import shutil
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_types import NoProgress
from harness.console import log, printable
from published_format import Count, Record, open_text, parse_json, validated

PAGE_COLUMNS = 110  # TensorBoard does not wrap text of a fixed width


class MetricsLine(BaseModel, extra="allow", allow_inf_nan=False):
    """A line of metrics.jsonl or timings.jsonl: numbers by name; None if not finite."""

    __pydantic_extra__: dict[str, float | None]

    step: Count
    skipped: str = ""
    skipped_questions: list[int] = []


class SampleLine(BaseModel, allow_inf_nan=False):
    """A line of samples.jsonl."""

    step: Count
    kind: str
    question: str
    text: str
    reward: float | None
    parts: dict[str, float | None]
    advantage: float | None
    length: Count
    finished: bool


FILES = {"metrics.jsonl": MetricsLine, "samples.jsonl": SampleLine, "timings.jsonl": MetricsLine}


def read_log(path: Path, kind: type[Record]) -> Iterator[Record]:
    """Read the lines of a log file, except an unfinished last line that a crash left.

    Raises FileNotFoundError, or ValueError naming the file, the line and what is wrong with it.
    """
    with open_text(path, remedy="wanted the directory of a run, for example runs/tiny") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                log(f"{path}: ignoring the last line, which is incomplete")
                return
            where, remedy = f"{path}, line {number}", "remove the line"
            raw = parse_json(line, f"{where},", remedy=remedy)
            yield validated(kind, raw, where, remedy=remedy)


class RunLog:
    """Writes the log files of a run. `sizes` holds their sizes in bytes."""

    def __init__(self, directory: Path, sizes: dict[str, int], progress: NoProgress = NoProgress()):
        """Truncate each file to the whole lines within its first sizes[name] bytes.

        A file that `sizes` does not name starts empty. TensorBoard's file is rebuilt from the lines
        that are left. Raises ValueError if one of them is damaged, and whatever progress raises.
        """
        self.directory, self.sizes, self._undrawn, self._board = directory, {}, [], None
        with contextlib.ExitStack() as opened:
            num_lines = sum(self._truncate(name, sizes.get(name, 0)) for name in FILES)
            shutil.rmtree(directory / "tensorboard", ignore_errors=True)
            with contextlib.suppress(ImportError):  # the dependency group "log" is not installed
                self._board = TensorBoard(directory / "tensorboard", opened)
            with progress.phase("TensorBoard", num_lines):
                for name in FILES:
                    for record in self.read(name):
                        if self._board:
                            self._board.show(name, record)
                        progress.update(1)
            self._opened = opened.pop_all()

    def _truncate(self, name: str, size: int) -> int:
        """Returns the number of lines that are left."""
        path, num_lines, end = self.directory / name, 0, 0
        with open(path, "a+b") as file:
            file.seek(0)
            for line in file:
                if end + len(line) > size or not line.endswith(b"\n"):
                    break
                num_lines, end = num_lines + 1, end + len(line)
            file.truncate(end)
        if end < size:
            log(f"warning: lines are missing in {path}: it has {end:,} of {size:,} bytes")
        self.sizes[name] = end
        return num_lines

    def write(self, name: str, *records: dict[str, Any]) -> None:
        """Append a line for each record, on disk when this returns; draw() draws it.

        record["step"] says which step it is about. None replaces NaN and inf. The file is opened by
        its name: if it was removed or replaced, the log goes on in a new one.
        """
        cleaned = [json.loads(json.dumps(r), parse_constant=lambda _: None) for r in records]
        path = self.directory / name
        with open(path, "ab") as file:
            if (size := file.tell()) != self.sizes[name]:
                log(
                    f"warning: another program changed {path}, which has {size:,} bytes instead of "
                    f"{self.sizes[name]:,}; lines may be missing"
                )
            file.write("".join(json.dumps(record) + "\n" for record in cleaned).encode())
            file.flush()
            os.fsync(file.fileno())
            self.sizes[name] = file.tell()
        self._undrawn += [(name, record) for record in cleaned]

    def draw(self) -> None:
        """Show what was written since the last call in TensorBoard."""
        undrawn, self._undrawn = self._undrawn, []
        for name, record in undrawn if self._board else ():
            self._board.show(name, record)

    def read(self, name: str) -> Iterator[dict[str, Any]]:
        for line in read_log(self.directory / name, FILES[name]):
            yield line.model_dump(exclude_unset=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a write failed before, and draw() raised it then
            self._opened.close()


class TensorBoard:
    """TensorBoard's event file.

    Not SummaryWriter: if the disk is full or the directory was removed, its thread prints a
    traceback in addition to the error that flush() and close() raise.
    """

    def __init__(self, directory: Path, opened: contextlib.ExitStack):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._event, self._summary = Event, summary
        directory.mkdir(exist_ok=True)
        path = directory / f"events.out.tfevents.{time.time():.0f}"
        file = opened.enter_context(open(path, "wb"))  # noqa: SIM115
        self._records = RecordWriter(file)
        self._add(file_version="brain.Event:2")

    def show(self, name: str, record: dict[str, Any]) -> None:
        """Add a line of one of the log files."""
        step = record["step"]
        if name == "samples.jsonl":
            text = self._summary.text(f"samples/{record['kind']}", page(record))
            return self._add(step=step, summary=text)
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                tag = key if "/" in key else f"{name.removesuffix('.jsonl')}/{key}"
                self._add(step=step, summary=self._summary.scalar(tag, value))

    def _add(self, **content) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()


def page(sample: dict[str, Any]) -> str:
    """A sample as an indented markdown block, which TensorBoard shows verbatim."""
    text = (
        f"{sample['question']}{sample['text']}\n\n"
        f"reward {sample['reward']}, advantage {sample['advantage']}"
    )
    lines = [
        textwrap.fill(line, PAGE_COLUMNS) if len(line) > PAGE_COLUMNS else line
        for line in printable(text).split("\n")
    ]
    return textwrap.indent("\n".join(lines), "    ")
