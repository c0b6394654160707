"""What a run writes about itself: metrics.jsonl, samples.jsonl, timings.jsonl, and TensorBoard as a view of them.

metrics.jsonl and samples.jsonl hold what was computed, and come out the same, byte for byte, however often the run was
interrupted; timings.jsonl holds what it cost. Resuming cuts the files where the checkpoint stood and draws TensorBoard
anew from them, so that nothing is missing or doubled.
"""

import contextlib
import json
import os
import shutil
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from harness.console import printable, say
from published_format import MAX_DATA_BYTES, Count, first_fault, parse_json, read_text

Line = TypeVar("Line", bound=BaseModel)
PAGE_COLUMNS = 110  # TensorBoard does not wrap what is set in a fixed width


class MetricsLine(BaseModel):
    """A line of metrics.jsonl or timings.jsonl: numbers by name; None stands for one that was not finite."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    __pydantic_extra__: dict[str, float | None]

    step: Count
    skipped: str = ""
    skipped_questions: list[int] = []


class SampleLine(BaseModel):
    """A line of samples.jsonl."""

    model_config = ConfigDict(allow_inf_nan=False)

    step: Count
    kind: str
    question: str
    text: str
    reward: float | None
    parts: dict[str, float | None]
    advantage: float | None
    length: Count
    finished: bool


def read_log(path: Path, kind: type[Line]) -> list[Line]:
    """The lines of a run's log. A torn last one, as a crash leaves it, is passed over.

    Raises FileNotFoundError, or ValueError naming the file, the line and what is wrong with it.
    """
    *lines, torn = read_text(path, remedy="wanted the directory of a run, for example runs/tiny", limit=MAX_DATA_BYTES).split("\n")
    if torn:
        say(f"{path}: passing over the last line, which is torn")
    read = []
    for number, line in enumerate(lines, 1):
        try:
            read.append(kind.model_validate(parse_json(line, f"{path}, line {number},", remedy="remove the line")))
        except ValidationError as error:
            raise ValueError(f"{path}, line {number}: {first_fault(error)}; remove the line") from None
    return read


FILES = {"metrics.jsonl": MetricsLine, "samples.jsonl": SampleLine, "timings.jsonl": MetricsLine}


class RunLog:
    def __init__(self, directory: Path, sizes: dict[str, int]):
        """sizes: how many bytes of each file to keep, in whole lines; what is not named is begun anew.

        Raises ValueError if what is kept is damaged.
        """
        self._directory, self._files, self._show = directory, {}, lambda name, record: None
        shutil.rmtree(directory / "tensorboard", ignore_errors=True)
        with contextlib.ExitStack() as closing:
            for name in FILES:
                file = self._files[name] = closing.enter_context(open(directory / name, "a+b"))
                file.seek(0)
                file.truncate(file.read()[: sizes.get(name, 0)].rfind(b"\n") + 1)
            with contextlib.suppress(ImportError):  # the dependency group "log" is not installed
                self._show = _Board(directory / "tensorboard", closing).show
            for name in FILES:
                for record in self.read(name):
                    self._show(name, record)
            self._closing = closing.pop_all()

    def read(self, name: str) -> list[dict]:
        return [line.model_dump(exclude_unset=True) for line in read_log(self._directory / name, FILES[name])]

    def write(self, name: str, record: dict) -> None:
        """Append one line. record["step"] is the step it belongs to."""
        record = json.loads(json.dumps(record), parse_constant=lambda _: None)  # None for every number that is not finite
        self._files[name].write(json.dumps(record).encode() + b"\n")
        self._files[name].flush()
        self._show(name, record)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, all of them on the disk."""
        for file in self._files.values():
            os.fsync(file.fileno())
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a write that failed before, and was reported then
            self._closing.close()


class NoLog:
    """Of a process that does not write, because the first one does: whatever is called, nothing happens and nothing is there."""

    def __getattr__(self, method: str) -> Callable[..., dict]:
        return lambda *_: {}


class _Board:
    """TensorBoard's file. Its own writer has a thread, which ends in a traceback when the disk is full or the directory gone."""

    def __init__(self, directory: Path, closing: contextlib.ExitStack):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        directory.mkdir(exist_ok=True)
        self._event, self._summary = Event, summary
        file = closing.enter_context(open(directory / f"events.out.tfevents.{time.time():.0f}", "wb"))  # noqa: SIM115
        self._records = RecordWriter(file)
        self._write(file_version="brain.Event:2")

    def show(self, name: str, record: dict) -> None:
        """A line of one of the run's files."""
        if name == "samples.jsonl":
            text = f"{record['question']}{record['text']}\n\nreward {record['reward']}, advantage {record['advantage']}"
            wrapped = "\n".join(textwrap.fill(printable(line), PAGE_COLUMNS) for line in text.split("\n"))
            shown = textwrap.indent(wrapped, "    ")  # markdown leaves alone what is indented
            return self._write(step=record["step"], summary=self._summary.text(f"samples/{record['kind']}", shown))
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                group = key if "/" in key else f"{name.removesuffix('.jsonl')}/{key}"
                self._write(step=record["step"], summary=self._summary.scalar(group, value))

    def _write(self, **content) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()
