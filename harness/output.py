"""The output directory of a run: its lock, its config, and what the run writes about itself.

metrics.jsonl and samples.jsonl hold what was computed, and come out the same, byte for byte, however often the run was
interrupted; timings.jsonl holds what it cost; TensorBoard is a view of them. Resuming cuts the files where the checkpoint
stood and draws TensorBoard anew from them, so that nothing is missing or doubled.
"""

import contextlib
import fcntl
import json
import os
import shutil
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from harness.config import Config, as_yaml
from harness.console import printable
from harness.logs import MetricsLine, SampleLine, read_log

FILES = {"metrics.jsonl": MetricsLine, "samples.jsonl": SampleLine, "timings.jsonl": MetricsLine}
PAGE_COLUMNS = 110  # TensorBoard does not wrap what is set in a fixed width


class OutputDirectory:
    """Held by this process until `closing` ends it; the kernel lets go when the process ends, however it ends.

    The lock is on the directory itself: no file in it can be removed to get past. A directory that was made for this and is empty
    in the end is removed.
    """

    def __init__(self, path: Path, closing: contextlib.ExitStack):
        """Raises ValueError if another process holds it, or if it cannot be a directory."""
        self.path, self._closing, self._files, self._opened = (
            path,
            closing,
            {},
            contextlib.ExitStack(),
        )
        self._show = lambda name, record: None  # on TensorBoard
        made = [directory for directory in (path, *path.parents) if not directory.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(
                f"output_dir={path} is, or lies in, something that is no directory; choose another"
            ) from None
        self.lock = os.open(path, os.O_RDONLY)
        closing.callback(self._let_go, made)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{path} is in use by another run; wait for it, or choose another output_dir=…"
            ) from None

    def _let_go(self, made: list[Path]) -> None:
        with contextlib.suppress(OSError):  # until one is not empty
            for directory in made if not self.is_lost() else ():
                directory.rmdir()
        os.close(self.lock)

    def descriptors(self) -> list[int]:
        """What a process forked from this one has to close, or it would hold the directory, too."""
        return [self.lock]

    def is_lost(self) -> bool:
        """Whether the path leads to nothing any more, or to another directory, made since."""
        return not self.path.exists() or self.is_anothers()

    def is_anothers(self) -> bool:
        return self.path.exists() and not os.path.samestat(os.stat(self.path), os.fstat(self.lock))

    # ------------------------------------------------------------ the config

    def holds_run(self) -> bool:
        return (self.path / "config.yaml").exists()

    def write_config(self, config: Config) -> None:
        """Aside first: a run can always be resumed by its config."""
        aside = self.path / "config.yaml.partial"
        aside.write_text(as_yaml(config), encoding="utf-8")
        aside.rename(self.path / "config.yaml")

    # ------------------------------------------------------------ the log

    def open_log(self, sizes: dict[str, int]) -> None:
        """sizes: how many bytes of each file to keep, in whole lines; what is not named is begun anew.

        Raises ValueError if what is kept is damaged.
        """
        self._closing.callback(self._close_log)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        for name in FILES:
            file = self._files[name] = self._opened.enter_context(open(self.path / name, "a+b"))  # noqa: SIM115
            file.seek(0)
            file.truncate(file.read()[: sizes.get(name, 0)].rfind(b"\n") + 1)
        with contextlib.suppress(ImportError):  # the dependency group "log" is not installed
            self._show = _Board(self.path / "tensorboard", self._opened).show
        for name in FILES:
            for record in self.read(name):
                self._show(name, record)

    def _close_log(self) -> None:
        with contextlib.suppress(OSError):  # of a write that failed before, and was reported then
            self._opened.close()

    def read(self, name: str) -> list[dict]:
        return [
            line.model_dump(exclude_unset=True) for line in read_log(self.path / name, FILES[name])
        ]

    def write(self, name: str, record: dict) -> None:
        """Append one line. record["step"] is the step it belongs to."""
        record = json.loads(
            json.dumps(record), parse_constant=lambda _: None
        )  # None for every number that is not finite
        self._files[name].write(json.dumps(record).encode() + b"\n")
        self._files[name].flush()
        self._show(name, record)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, all of them on the disk."""
        for file in self._files.values():
            os.fsync(file.fileno())
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}


class Nowhere:
    """Of a process that does not write, because the first one does: whatever is called does nothing, and says no or nothing."""

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
        file = closing.enter_context(
            open(directory / f"events.out.tfevents.{time.time():.0f}", "wb")
        )  # noqa: SIM115
        self._records = RecordWriter(file)
        self._write(file_version="brain.Event:2")

    def show(self, name: str, record: dict) -> None:
        """A line of one of the run's files."""
        if name == "samples.jsonl":
            text = f"{record['question']}{record['text']}\n\nreward {record['reward']}, advantage {record['advantage']}"
            wrapped = "\n".join(
                textwrap.fill(printable(line), PAGE_COLUMNS) for line in text.split("\n")
            )
            shown = textwrap.indent(wrapped, "    ")  # markdown leaves alone what is indented
            return self._write(
                step=record["step"], summary=self._summary.text(f"samples/{record['kind']}", shown)
            )
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                group = key if "/" in key else f"{name.removesuffix('.jsonl')}/{key}"
                self._write(step=record["step"], summary=self._summary.scalar(group, value))

    def _write(self, **content) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()
