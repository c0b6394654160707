"""Checkpoints that a crash cannot spoil, the lock of an output directory, and logs that resume where a checkpoint stood.

A checkpoint is a model directory in the published format (it loads in transformers and vLLM) with two files more:
trainer.pt, the optimizer and the run's place, and complete.json, the size of every file, written last. It is written
aside, synced and renamed: what has no "step-" name is half-written and is removed on the next start.
"""

import fcntl
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from optimizer import AdamW
from qwen2_model import Transformer
from tokenizer import Tokenizer

ASIDE = ".partial-"
SLACK_BYTES = 64 * 1000**2  # tokenizer, logs and file system overhead beside the tensors


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Hold an output directory for this process; the kernel lets go when the process ends, however it ends.

    Raises ValueError if another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{directory} is in use by another run; wait for it, or choose another output_dir=…") from None
        yield


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def save_checkpoint(
    directory: Path, step: int, model: Transformer, tokenizer: Tokenizer, optimizer: AdamW, place: dict, *, keep: int
) -> None:  # fmt: skip
    """Write checkpoint `step`, then remove all but the newest `keep`. place: step, config and log sizes, for resume.

    Raises OSError with the room needed if the disk cannot hold it; earlier checkpoints are untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final, aside = checkpoint_path(directory, step), directory / f"{ASIDE}{step:06d}"
    if not final.exists() or find_damage(final):
        tensors = [*model.parameters(), *optimizer.state.values()]
        needed, free = sum(t.nbytes for t in tensors) + SLACK_BYTES, shutil.disk_usage(directory).free
        if needed > free:
            raise OSError(f"no room for the checkpoint of step {step}: {directory} has {free / 1e9:.2f} GB free, "
                          f"{needed / 1e9:.2f} GB are needed; free some, or lower training.keep_checkpoints")
        try:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            torch.save({"place": place, "optimizer": optimizer.state_dict()}, aside / "trainer.pt")
            for file in aside.iterdir():
                _sync(file)
            (aside / "complete.json").write_text(json.dumps({f.name: f.stat().st_size for f in aside.iterdir()}))
            _sync(aside / "complete.json")
            _sync(aside)
            if final.exists():
                _remove(final)
            aside.rename(final)
            _sync(directory)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(f"the checkpoint of step {step} could not be written to {directory} ({error}); free some room") from None
    for old in checkpoints(directory)[:-keep]:
        _remove(old)


def checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in directory.glob("step-*") if p.is_dir())


def remove_half_written(directory: Path) -> None:
    for path in directory.glob(ASIDE + "*"):
        shutil.rmtree(path)


def find_damage(checkpoint: Path) -> str:
    """Why a checkpoint cannot be used; empty if every file has the size it was written with."""
    try:
        sizes = json.loads((checkpoint / "complete.json").read_text())
    except (OSError, ValueError) as error:
        return f"complete.json: {error}"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.exists() or file.stat().st_size != size:
            return f"{name} has {file.stat().st_size if file.exists() else 'no'} bytes, not {size}"
    return ""


def load_trainer_state(checkpoint: Path) -> dict:
    """{"place", "optimizer"} of a checkpoint. Raises ValueError if it is damaged."""
    try:
        return torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{checkpoint / 'trainer.pt'} is damaged ({str(error).splitlines()[0]:.200}); "
                         f"remove {checkpoint} to resume from the checkpoint before it") from None


def _remove(checkpoint: Path) -> None:
    """In two moves, so that a crash leaves nothing that looks whole."""
    doomed = checkpoint.with_name(ASIDE + checkpoint.name)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
