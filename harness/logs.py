"""The lines that a run writes about itself, as everything reads them."""

from pathlib import Path

from pydantic import BaseModel

from harness.console import say
from published_format import MAX_DATA_BYTES, Count, Record, parse_json, read_text, validated


class MetricsLine(BaseModel, extra="allow", allow_inf_nan=False):
    """A line of metrics.jsonl or timings.jsonl: numbers by name; None stands for one that was not finite."""

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


def read_log(path: Path, kind: type[Record]) -> list[Record]:
    """The lines of a run's log. A torn last one, as a crash leaves it, is passed over.

    Raises FileNotFoundError, or ValueError naming the file, the line and what is wrong with it.
    """
    *lines, torn = read_text(
        path, remedy="wanted the directory of a run, for example runs/tiny", limit=MAX_DATA_BYTES
    ).split("\n")
    if torn:
        say(f"{path}: passing over the last line, which is torn")
    read, remedy = [], "remove the line"
    for number, line in enumerate(lines, 1):
        raw = parse_json(line, f"{path}, line {number},", remedy=remedy)
        read.append(validated(kind, raw, f"{path}, line {number}", remedy=remedy))
    return read
