"""Checkpoints that a crash cannot spoil.

A checkpoint is a model directory in the published format (it loads in transformers and vLLM) with three files more:
optimizer.tensors, the optimizer's state; trainer.json, the run's place; and complete.json, a checksum of every other file,
written last. It is written aside, synced and renamed: what has no "step-" name is half-written and is removed on the next start.
"""

import contextlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from data_types import ALONE, Alone
from flat import ALIGNMENT
from harness.console import say
from optimizer import AdamW
from published_format import Count, read_json, read_tensors, validated, write_tensors
from qwen2_model import Transformer
from tokenizer import Tokenizer

ASIDE = ".partial-"
OPTIMIZER = "optimizer.tensors"  # in the safetensors format; vLLM takes every *.safetensors of a directory for weights
PART = "optimizer-{:05d}-of-{:05d}.tensors"  # of several processes each writes its own
PLACE, COMPLETE = "trainer.json", "complete.json"
SLACK_BYTES = 64 * 1000**2  # tokenizer, logs and file system overhead beside the tensors
REMEDY = "the checkpoint is damaged"


class Place(BaseModel, extra="forbid", strict=True):
    """Where a run stands."""

    step: Count
    optimizer_steps: Count  # fewer, if steps were skipped
    log_sizes: dict[str, Count]  # bytes of each file of the log after this step
    config: dict[str, Any]


class NotSaved(OSError):
    """A checkpoint could not be written."""


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def checkpoints(directory: Path) -> list[Path]:
    """What is named like a checkpoint, oldest first."""
    found = [
        path
        for path in directory.glob("step-*")
        if re.fullmatch("step-[0-9]{6,18}", path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name[5:]))


# ---------------------------------------------------------------- writing


def save_checkpoint(
    directory: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer: AdamW,
    place: Place,
    *,
    keep: int | None,
) -> None:
    """Write the checkpoint of place.step, then remove all before it but the newest `keep`; None: remove nothing.

    Raises NotSaved if it cannot be written; then earlier checkpoints are untouched and nothing half-written stays.
    """
    processes, first = optimizer.processes, optimizer.processes.rank == 0
    final, aside = checkpoint_path(directory, place.step), directory / f"{ASIDE}{place.step:06d}"
    own_file = aside / (
        OPTIMIZER if processes.size == 1 else PART.format(processes.rank + 1, processes.size)
    )
    state = optimizer.state_dict()
    place.optimizer_steps = state.pop("steps")
    try:
        with by_all(processes):
            aside.mkdir(parents=True, exist_ok=True)
            state_bytes = processes.size * sum(t.nbytes for t in state.values())
            needed = sum(t.nbytes for t in model.parameters()) + state_bytes + SLACK_BYTES
            if needed > (free := shutil.disk_usage(directory).free):
                raise OSError(
                    f"no room: {free / 1e9:.2f} GB are free, {needed / 1e9:.2f} GB needed; lower "
                    "training.keep_checkpoints"
                )
        with by_all(processes):
            if first:
                model.save_pretrained(aside)
                tokenizer.save_pretrained(aside)
                (aside / PLACE).write_text(place.model_dump_json() + "\n", encoding="utf-8")
            write_tensors(own_file, state)
            _sync(own_file)
            own_sum = checksum(own_file)
        sums = dict(
            processes.share([(own_file.name, own_sum)])
        )  # and from here on all files are there
        with by_all(processes):
            if first:
                sums = {
                    file.name: sums.get(file.name) or checksum(file)
                    for file in sorted(aside.iterdir())
                }
                (aside / COMPLETE).write_text(json.dumps(sums) + "\n")
                for path in (*aside.iterdir(), aside):
                    _sync(path)
                if os.path.lexists(final):
                    _remove(final)
                aside.rename(final)
                _sync(directory)
    except OSError as error:
        raise NotSaved(
            f"the checkpoint of step {place.step} could not be written to {directory}: {error}"
        ) from None
    finally:
        if first:
            _remove(aside)
    until_now = [path for path in checkpoints(directory) if int(path.name[5:]) <= place.step]
    for old in until_now[:-keep] if keep and first else ():
        _remove(old)


@contextlib.contextmanager
def by_all(processes: Alone) -> Iterator[None]:
    """What fails in one process fails in all of them, when all have tried."""
    faults = []
    try:
        yield
    except OSError as error:
        faults.append(error)
    if faults := processes.share(faults):
        raise faults[0]


def checksum(file: Path) -> str:
    """CRC-32 as hexadecimal digits: it finds damage, not malice, at 3.4 GB/s, more than a disk delivers; SHA-256 reads 1.1."""
    total, buffer = 0, memoryview(bytearray(2**20))
    with open(file, "rb", buffering=0) as f:
        while count := f.readinto(buffer):
            total = zlib.crc32(buffer[:count], total)
    return f"{total:08x}"


def _remove(path: Path) -> None:
    """In two moves, so that a crash leaves nothing that looks whole. Of a link, the link alone."""
    if not path.name.startswith(ASIDE):
        path = path.rename(path.with_name(ASIDE + path.name))
    try:
        path.unlink()
    except OSError:  # a directory, or nothing
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- reading


Found = tuple[
    Path, Place, dict[str, Tensor]
]  # a checkpoint, the run's place, and the own part of the optimizer's state


def find_place(directory: Path, processes: Alone) -> Found | None:
    """The newest undamaged checkpoint, the same for all processes; what is half-written is removed."""
    found = None
    if processes.rank == 0:
        for path in directory.glob(ASIDE + "*"):
            _remove(path)
        found = newest_good(directory, processes)
    path = processes.share([found and found[0]])[0]
    return found if found or not path else (path, *read_checkpoint(path, processes))


def newest_good(directory: Path, processes: Alone = ALONE) -> Found | None:
    """The newest undamaged checkpoint; says which it passes over, and why.

    None if there is no checkpoint. Raises ValueError if all are damaged.
    """
    for path in reversed(found := checkpoints(directory)):
        try:
            return path, *read_checkpoint(path, processes)
        except (ValueError, OSError) as error:
            say(f"passing over {path}: {error}")
    if found:
        raise ValueError(
            f"every checkpoint in {directory} is damaged; put a good one back, or remove them all and start over"
        )
    return None


def read_checkpoint(path: Path, processes: Alone = ALONE) -> tuple[Place, dict[str, Tensor]]:
    """Look at all of a checkpoint; of the optimizer's state return the own part, however many wrote it.

    Raises ValueError or FileNotFoundError for whatever makes it unfit to go on from.
    """
    state_files = check_files(path)
    place = validated(Place, read_json(path / PLACE, remedy=REMEDY), PLACE, remedy=REMEDY)
    if checkpoint_path(path.parent, place.step) != path:
        raise ValueError(f"it is a copy of step {place.step}")
    weights = list(path.glob("model*.safetensors"))
    if not weights:
        raise ValueError("it holds no weights")
    if broken := [
        name
        for file in weights
        for name, tensor in read_tensors(file)
        if not tensor.isfinite().all()
    ]:
        raise ValueError(f"{broken[0]} holds numbers that are not finite")
    written = [dict(read_tensors(path / name)) for name in state_files]
    if any(state.keys() != written[0].keys() for state in written):
        raise ValueError("the parts of the optimizer's state do not belong together")
    return place, {
        name: _own_part([state[name] for state in written], processes) for name in written[0]
    }


def _own_part(written: list[Tensor], processes: Alone) -> Tensor:
    """Of a flat tensor that was written in parts. One that was written whole is not copied."""
    own, pieces, start = (
        processes.parts_of(sum(map(len, written)), ALIGNMENT)[processes.rank],
        [],
        0,
    )
    for tensor in written:
        pieces.append(tensor[max(own.start - start, 0) : max(own.stop - start, 0)])
        start += len(tensor)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def check_files(path: Path) -> list[str]:
    """Returns the names of the files with the optimizer's state, in the order of its parts.

    Raises ValueError or FileNotFoundError unless every file has the checksum it was written with.
    """
    sums = read_json(path / COMPLETE, remedy=REMEDY)
    state_files = sorted(name for name in sums if name.startswith("optimizer")) or [OPTIMIZER]
    if lacking := {"config.json", PLACE, *state_files} - sums.keys():
        raise ValueError(f"{COMPLETE} lacks {', '.join(sorted(lacking))}")
    if state_files not in (
        [OPTIMIZER],
        [PART.format(rank, len(state_files)) for rank in range(1, len(state_files) + 1)],
    ):
        raise ValueError(
            f"{COMPLETE} names {', '.join(state_files):.200}, which are not all parts of the optimizer's state"
        )
    for name, written in sums.items():
        if Path(name).name != name:
            raise ValueError(f"{COMPLETE} names {name!r:.100}, which is no file of the checkpoint")
        if not (path / name).is_file():
            raise ValueError(f"{name} is not there")
        if (found := checksum(path / name)) != written:
            raise ValueError(f"{name} is damaged: its checksum is {found}, not {written!r:.20}")
    return state_files
