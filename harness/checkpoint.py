"""Checkpoints that a crash cannot damage.

A checkpoint is a model directory in the published format, which transformers and vLLM can load,
plus three more files: the optimizer state (optimizer.tensors), the TrainerState (trainer.json) and
a checksum of every other file (complete.json). It is written under a temporary name, synced to the
disk and renamed. The next start of the run removes whatever still has a temporary name.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from data_types import SingleProcess
from flat import ALIGNMENT
from harness import console
from optimizer import AdamW
from published_format import Count, read_json, read_tensors, validated, write_tensors
from qwen2_model import Transformer
from tokenizer import Tokenizer

PARTIAL = ".partial-"
# A safetensors file under another name, because vLLM reads every *.safetensors file as weights.
OPTIMIZER = "optimizer.tensors"
SHARD = "optimizer-{:05d}-of-{:05d}.tensors"  # with several ranks, each writes its own shard
STATE, COMPLETE = "trainer.json", "complete.json"
SLACK_BYTES = 64 * 1000**2  # for the tokenizer, the logs and the file system's own overhead
REMEDY = "the checkpoint is damaged"


class TrainerState(BaseModel, extra="forbid", strict=True):
    """Where a run is, apart from its weights and its optimizer state."""

    step: Count
    optimizer_steps: Count  # smaller than `step` if steps were skipped
    log_sizes: dict[str, Count]  # bytes of each log file after this step
    config: dict[str, Any]


class NotSaved(OSError):
    """A checkpoint could not be written."""


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def checkpoints(directory: Path) -> list[Path]:
    """Every directory that has a checkpoint's name, oldest first."""
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
    state: TrainerState,
    *,
    keep: int | None,
) -> None:
    """Write the checkpoint of state.step, then remove earlier ones, so that `keep` remain.

    keep=None removes none. All ranks call it together. Raises NotSaved on every rank if one of
    them cannot write; then earlier checkpoints are untouched and no partial one is left.
    """
    world = optimizer.world
    final = checkpoint_path(directory, state.step)
    partial = directory / f"{PARTIAL}{state.step:06d}"
    local_file = partial / _optimizer_files(world.size)[world.rank]
    optimizer_state = optimizer.state_dict()
    state.optimizer_steps = optimizer_state.pop("steps")
    try:
        with raise_on_all_ranks(world):
            partial.mkdir(parents=True, exist_ok=True)
            state_bytes = world.size * sum(t.nbytes for t in optimizer_state.values())
            _check_room(directory, sum(t.nbytes for t in model.parameters()) + state_bytes)
        with raise_on_all_ranks(world):
            if world.rank == 0:
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
                (partial / STATE).write_text(state.model_dump_json() + "\n", encoding="utf-8")
            write_tensors(local_file, optimizer_state)
            _sync(local_file)
            local_sum = checksum(local_file)
        sums = dict(world.all_gather_objects((local_file.name, local_sum)))
        with raise_on_all_ranks(world):
            if world.rank == 0:
                _complete(partial, final, sums)
    except OSError as error:
        raise NotSaved(
            f"the checkpoint of step {state.step} could not be written to {directory}: {error}"
        ) from None
    finally:
        _remove(partial)
    if world.rank == 0 and keep is not None:
        until_now = [p for p in checkpoints(directory) if int(p.name[5:]) <= state.step]
        for old in until_now[:-keep]:
            _remove(old)


def _optimizer_files(size: int) -> list[str]:
    """The file that each of `size` ranks writes its optimizer state to, by rank."""
    return [OPTIMIZER] if size == 1 else [SHARD.format(rank, size) for rank in range(1, size + 1)]


@contextmanager
def raise_on_all_ranks(world: SingleProcess) -> Iterator[None]:
    """If the block raises OSError on any rank, raise it on every rank when all have run it."""
    local_error = None
    try:
        yield
    except OSError as error:
        local_error = error
    errors = [error for error in world.all_gather_objects(local_error) if error is not None]
    if errors:
        raise errors[0]


def _check_room(directory: Path, tensor_bytes: int) -> None:
    needed, free = tensor_bytes + SLACK_BYTES, shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"not enough disk space: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
            "free some space, or lower training.keep_checkpoints"
        )


def _complete(partial: Path, final: Path, sums: dict[str, str]) -> None:
    """Add the missing checksums, sync every file, and give the directory its final name."""
    if unseen := [name for name in sums if not (partial / name).is_file()]:
        raise OSError(
            f"{', '.join(unseen)} of another rank is not in {partial}; all ranks must see one "
            "output_dir, on a shared file system"
        )
    for file in partial.iterdir():
        if file.name not in sums:
            sums[file.name] = checksum(file)
    (partial / COMPLETE).write_text(json.dumps(sums) + "\n")
    for path in (*partial.iterdir(), partial):
        _sync(path)
    if os.path.lexists(final):
        _remove(final)
    partial.rename(final)
    _sync(final.parent)


def checksum(file: Path) -> str:
    """CRC-32 in hexadecimal: detects damage, at 3.4 GB/s (SHA-256: 1.1 GB/s)."""
    total, buffer = 0, memoryview(bytearray(2**20))
    with open(file, "rb", buffering=0) as f:
        while count := f.readinto(buffer):
            total = zlib.crc32(buffer[:count], total)
    return f"{total:08x}"


def _remove(path: Path) -> None:
    """Rename first, so that a crash leaves no half-removed checkpoint. Does not follow links."""
    if not path.name.startswith(PARTIAL):
        path = path.rename(path.with_name(PARTIAL + path.name))
    try:
        path.unlink()
    except OSError:  # a directory, or nothing at all
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- reading

# The checkpoint's path, its TrainerState, and this rank's shard of the optimizer state.
Found = tuple[Path, TrainerState, dict[str, Tensor]]


def find_checkpoint(directory: Path, world: SingleProcess) -> Found | None:
    """The newest undamaged checkpoint, the same on all ranks. Removes partial checkpoints."""
    found = None
    if world.rank == 0:
        for path in directory.glob(PARTIAL + "*"):
            _remove(path)
        found = newest_good(directory, world)
    path = world.all_gather_objects(found and found[0])[0]
    if path and not found:
        found = (path, *read_checkpoint(path, world))
    return found


def newest_good(directory: Path, world: SingleProcess = SingleProcess()) -> Found | None:
    """The newest undamaged checkpoint. Logs which newer ones it skips, and why.

    Returns None if there is no checkpoint. Raises ValueError if all are damaged.
    """
    found = checkpoints(directory)
    for path in reversed(found):
        try:
            return path, *read_checkpoint(path, world)
        except (ValueError, OSError) as error:
            console.log(f"skipping {path}: {error}")
    if found:
        raise ValueError(
            f"every checkpoint in {directory} is damaged; restore one from a copy, "
            "or remove them all to start over"
        )
    return None


def read_checkpoint(
    path: Path, world: SingleProcess = SingleProcess()
) -> tuple[TrainerState, dict[str, Tensor]]:
    """Check a whole checkpoint; return its TrainerState and this rank's shard of the optimizer.

    Any number of ranks may have written it. Raises ValueError or FileNotFoundError if something
    is missing or damaged.
    """
    state_files = check_files(path)
    state = validated(TrainerState, read_json(path / STATE, remedy=REMEDY), STATE, remedy=REMEDY)
    if checkpoint_path(path.parent, state.step) != path:
        raise ValueError(f"it is a copy of step {state.step}")
    _check_weights(path)
    written = [dict(read_tensors(path / name)) for name in state_files]
    if any(shard.keys() != written[0].keys() for shard in written):
        raise ValueError("the shards of the optimizer state do not belong together")
    return state, {
        name: _local_shard([shard[name] for shard in written], world) for name in written[0]
    }


def check_files(path: Path) -> list[str]:
    """Compare every file with its checksum; return the optimizer state's file names, by rank.

    Raises ValueError or FileNotFoundError if a file is missing or damaged.
    """
    sums = read_json(path / COMPLETE, remedy=REMEDY)
    state_files = sorted(name for name in sums if name.startswith("optimizer")) or [OPTIMIZER]
    if lacking := {"config.json", STATE, *state_files} - sums.keys():
        raise ValueError(f"{COMPLETE} lacks {', '.join(sorted(lacking))}")
    if state_files != _optimizer_files(len(state_files)):
        names = ", ".join(state_files)
        raise ValueError(f"{COMPLETE} names {names:.200}, not the complete set of optimizer shards")
    for name, expected in sums.items():
        if Path(name).name != name:
            raise ValueError(f"{COMPLETE} names {name!r:.100}, which is not a plain file name")
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if (found := checksum(path / name)) != expected:
            raise ValueError(f"{name} is damaged: its checksum is {found}, not {expected!r:.20}")
    return state_files


def _check_weights(path: Path) -> None:
    files = list(path.glob("model*.safetensors"))
    if not files:
        raise ValueError("it has no weights")
    for file in files:
        for name, tensor in read_tensors(file):
            if not tensor.isfinite().all():
                raise ValueError(f"{name} has values that are not finite")


def _local_shard(written: list[Tensor], world: SingleProcess) -> Tensor:
    """This rank's shard of a flat tensor that was written in pieces. One piece is not copied."""
    total = sum(len(tensor) for tensor in written)
    shard = world.shards(total, ALIGNMENT)[world.rank]
    pieces, start = [], 0
    for tensor in written:
        pieces.append(tensor[max(shard.start - start, 0) : max(shard.stop - start, 0)])
        start += len(tensor)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
