"""What a run writes about itself: metrics.jsonl, samples.jsonl, timings.jsonl, and TensorBoard as a view of them.

metrics.jsonl and samples.jsonl hold what was computed, and come out the same, byte for byte, however often the run was
interrupted; timings.jsonl holds what it cost. Resuming cuts the files where the checkpoint stood and draws TensorBoard
anew from them, so that nothing is missing or doubled.
"""

import json
import math
import os
import shutil
import textwrap
from pathlib import Path

FILES = ("metrics.jsonl", "samples.jsonl", "timings.jsonl")
PAGE_COLUMNS = 110  # TensorBoard does not wrap what is set in a fixed width


class RunLog:
    def __init__(self, directory: Path, sizes: dict[str, int]):
        """sizes: how many bytes of each file to keep; what is not named is begun anew."""
        self._files = {}
        for name in FILES:
            file = open(directory / name, "a+", encoding="utf-8")  # noqa: SIM115  closed by close()
            file.truncate(sizes.get(name, 0))
            self._files[name] = file
        shutil.rmtree(directory / "tensorboard", ignore_errors=True)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # the dependency group "log" is not installed
            self._board = None
        else:
            self._board = SummaryWriter(directory / "tensorboard")
            for name in FILES:
                self._files[name].seek(0)
                for line in self._files[name]:
                    self._show(name, json.loads(line))

    def write(self, name: str, record: dict) -> None:
        """Append one line. record["step"] is the step it belongs to."""
        record = _finite(record)
        self._files[name].write(json.dumps(record) + "\n")
        self._files[name].flush()
        self._show(name, record)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, all of them on the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()

    def _show(self, name: str, record: dict) -> None:
        if self._board is None:
            return
        if name == "samples.jsonl":
            text = f"{record['question']}{record['text']}\n\nreward {record['reward']}, advantage {record['advantage']}"
            lines = [part for line in text.split("\n") for part in textwrap.wrap(printable(line), PAGE_COLUMNS) or [""]]
            shown = "\n".join("    " + line for line in lines)  # indented: markdown leaves it alone
            self._board.add_text(f"samples/{record['kind']}", shown, record["step"])
            return
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                group = key if "/" in key else f"{name.removesuffix('.jsonl')}/{key}"
                self._board.add_scalar(group, value, record["step"])


def _finite(value):
    """The same with None for every number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: str) -> str:
    """Text of a model made safe for a terminal or a page: control, direction and other invisible characters spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
