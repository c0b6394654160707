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
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from harness.console import log, printable
from published_format import MAX_DATA_BYTES, Count, Record, parse_json, read_text, validated

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


def read_log(path: Path, kind: type[Record]) -> list[Record]:
    """Read the lines of a log file, except an unfinished last line that a crash left.

    Raises FileNotFoundError, or ValueError naming the file, the line and what is wrong with it.
    """
    remedy = "wanted the directory of a run, for example runs/tiny"
    *lines, unfinished = read_text(path, remedy=remedy, limit=MAX_DATA_BYTES).split("\n")
    if unfinished:
        log(f"{path}: ignoring the last line, which is incomplete")
    records, remedy = [], "remove the line"
    for number, line in enumerate(lines, 1):
        raw = parse_json(line, f"{path}, line {number},", remedy=remedy)
        records.append(validated(kind, raw, f"{path}, line {number}", remedy=remedy))
    return records


class RunLog:
    """The log files of a run, open for writing."""

    def __init__(self, directory: Path, sizes: dict[str, int]):
        """Truncate each file to the whole lines within its first sizes[name] bytes.

        A file that `sizes` does not name starts empty. TensorBoard's file is rebuilt from the lines
        that are left. Raises ValueError if one of them is damaged.
        """
        self.directory, self._files, self._board = directory, {}, None
        with contextlib.ExitStack() as opened:
            for name in FILES:
                file = opened.enter_context(open(directory / name, "a+b"))
                file.seek(0)
                file.truncate(file.read(sizes.get(name, 0)).rfind(b"\n") + 1)
                self._files[name] = file
            shutil.rmtree(directory / "tensorboard", ignore_errors=True)
            with contextlib.suppress(ImportError):  # the dependency group "log" is not installed
                self._board = TensorBoard(directory / "tensorboard", opened)
            for name in FILES:
                for record in self.read(name):
                    self._show(name, record)
            self._opened = opened.pop_all()

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Append a line; record["step"] says which step it is about. None replaces NaN and inf."""
        record = json.loads(json.dumps(record), parse_constant=lambda _: None)
        self._files[name].write(json.dumps(record).encode() + b"\n")
        self._files[name].flush()
        self._show(name, record)

    def _show(self, name: str, record: dict[str, Any]) -> None:
        if self._board:
            self._board.show(name, record)

    def read(self, name: str) -> list[dict[str, Any]]:
        lines = read_log(self.directory / name, FILES[name])
        return [line.model_dump(exclude_unset=True) for line in lines]

    def sizes(self) -> dict[str, int]:
        """Sync every file to disk, and return its size in bytes."""
        for file in self._files.values():
            os.fsync(file.fileno())
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a write failed before, and write() raised it then
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
    lines = [textwrap.fill(printable(line), PAGE_COLUMNS) for line in text.split("\n")]
    return textwrap.indent("\n".join(lines), "    ")
