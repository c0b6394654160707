"""The settings of a run: a YAML file, read into frozen sections and validated.

config.yaml documents every key. A task declares the keys of section `data` in its class `Data`.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from harness.rewards import load_task
from published_format import read_text

MAX_BYTES = 10**5  # of a config file
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A part of the config. Unknown keys are rejected."""


class Data(Section):
    """Section `data` of a task without a class `Data`."""

    path: Text
    test_size: int = Field(ge=1, le=10**6)


class ModelConfig(Section):
    path: Text
    device: Literal["cuda", "cpu"]
    dtype: Literal["bfloat16", "float32"]
    memory_gib: float | None = Field(None, gt=0.0)


class TrainingConfig(Section):
    seed: int = Field(ge=0)
    max_steps: int = Field(ge=1, le=10**9)
    batch_size: int = Field(ge=2, le=10**6)
    num_questions_per_batch: int = Field(ge=1)
    max_gen_len: int = Field(ge=1)
    temperature: float = Field(ge=1e-6, le=1e6)  # logits divided by it must fit in float32
    skip_unfinished_episodes: bool
    learning_rate: float = Field(gt=0.0, lt=1.0)
    warmup_steps: int = Field(0, ge=0)
    max_grad_norm: float = Field(gt=0.0)
    micro_batch_tokens: int = Field(ge=1)
    eval_interval: int = Field(ge=1)
    ckpt_save_interval: int = Field(ge=1)
    keep_checkpoints: int = Field(ge=1)
    max_skipped_steps: int = Field(ge=1)
    reward_timeout: float = Field(gt=0.0, le=3600.0)
    reward_errors: Literal["stop", "zero"]

    @model_validator(mode="after")
    def _check_groups(self) -> "TrainingConfig":
        answers, questions = self.batch_size, self.num_questions_per_batch
        got = f"training.batch_size={answers}"
        if answers % questions:
            nearest = questions * max(2, round(answers / questions))
            raise ValueError(
                f"{got} must be a multiple of training.num_questions_per_batch={questions}; "
                f"the nearest is {nearest}"
            )
        if answers == questions:
            raise ValueError(
                f"{got} makes groups of one answer, which has nothing to compare with; "
                f"set it to {8 * questions}, or lower training.num_questions_per_batch={questions}"
            )
        return self


class OptimizerConfig(Section):
    betas: list[Annotated[float, Field(ge=0.0, lt=1.0)]]
    eps: float = Field(ge=1e-30)  # below about 1e-45, it is 0 in float32
    weight_decay: float = Field(ge=0.0, le=1.0)
    offload: bool

    @field_validator("betas")
    @classmethod
    def _check_pair(cls, betas: list[float]) -> list[float]:
        if len(betas) == 2:
            return betas
        raise ValueError(f"optimizer.betas={betas} must be two numbers, for example [0.9, 0.999]")


TaskData = TypeVar("TaskData")


class Config(Section, Generic[TaskData]):
    task: Text
    output_dir: Text
    model: ModelConfig
    data: TaskData
    training: TrainingConfig
    optimizer: OptimizerConfig


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file and the files that it extends, then apply the overrides, `key.path=value`.

    Values are read as YAML, except that a text key such as output_dir takes everything after the
    "=" as it is. "~" in output_dir, model.path, data.path and `extends` is expanded.

    Raises FileNotFoundError, or ValueError with one line for each fault.
    """
    raw = _read_yaml(Path(path))
    changes = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            wanted = "key.path=value, for example training.learning_rate=5e-6"
            raise ValueError(f"{override!r} is not an override; write {wanted}")
        changes.append((key, text))
    task = dict(changes).get("task", raw.get("task"))
    schema = Config[getattr(load_task(task), "Data", Data) if isinstance(task, str) else Any]
    fields = _fields(schema)
    for key, text in changes:
        kind = fields[key].annotation if key in fields else None
        is_text = kind in (str, Path) or (kind in (str | None, Path | None) and text != "null")
        value = text if is_text else _parse(text, f"{key}={text!r:.200}")
        for part in reversed(key.split(".")):
            value = {part: value}
        raw = _merge(raw, value)
    for section, key in (raw, "output_dir"), (raw.get("model"), "path"), (raw.get("data"), "path"):
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = os.path.expanduser(section[key])
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        lines = [_describe(fault, fields) for fault in error.errors()]
        raise ValueError("\n".join(lines)) from None


def as_yaml(config: Config) -> str:
    """The YAML text from which load_config reads the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path, extended_by: tuple[Path, ...] = ()) -> dict:
    text = read_text(path, remedy="see config.yaml for an example", limit=MAX_BYTES)
    if path.resolve() in extended_by:
        names = " -> ".join(p.name for p in (*extended_by, path))
        raise ValueError(f"{path} extends itself ({names}); remove one `extends:`")
    raw = _parse(text, str(path))
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {raw!r:.200}; write key: value lines, as in config.yaml")
    if "extends" in raw:
        base = path.parent / os.path.expanduser(str(raw.pop("extends")))
        raw = _merge(_read_yaml(base, (*extended_by, path.resolve())), raw)
    return raw


def _parse(text: str, name: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise ValueError(f"{name} is not YAML: {error.problem} (line {line})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a NUL, or an invalid date
        raise ValueError(f"{name} is not YAML: {str(error).splitlines()[0]}") from None


def _merge(base: dict, changes: dict) -> dict:
    """base with the changes on top; sections are merged, lists and other values replaced."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if nested else value
    return merged


def _fields(section: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Sections and settings by their full keys, for example training.seed."""
    fields = {}
    for name, field in section.model_fields.items():
        fields[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            fields |= _fields(field.annotation, f"{prefix}{name}.")
    return fields


def _describe(fault: dict, fields: dict[str, FieldInfo]) -> str:
    """One of pydantic's errors in one line: the key, what it got, what it wanted."""
    key, kind = ".".join(str(part) for part in fault["loc"]), fault["type"]
    if kind == "missing":
        return f"config key {key} is missing; config.yaml shows every key and its meaning"
    if kind == "extra_forbidden":
        return f"unknown config key {key}; {_suggest(key, fields)}"
    if kind in ("value_error", "assertion_error"):  # from a validator, ours or the task's
        message = str(fault["ctx"]["error"])
        return message if key in message else f"{key}: {message}"
    wanted = {
        "model_type": "must be a section of key: value lines",
        "string_type": "must be text, in quotes if needed",
    }
    message = wanted.get(kind) or re.sub(r"^\w+ should", "must", fault["msg"])
    return f"{key}={fault['input']!r:.200} {message}"


def _suggest(key: str, fields: dict[str, FieldInfo]) -> str:
    section, _, name = key.rpartition(".")
    by_name = {}  # if several sections have this name, that of `key` comes last and wins
    for known in sorted(fields, key=lambda known: known.startswith(f"{section}.")):
        by_name[known.rpartition(".")[2]] = known
        by_name["".join(word[:1] for word in known.rpartition(".")[2].split("_"))] = known  # lr
    own = [n for n, known in by_name.items() if known.startswith(f"{section}.")]
    nearest = [m for names in (own, by_name) for m in difflib.get_close_matches(name, names, n=1)]
    if section == "data" and not (nearest and by_name[nearest[0]].startswith("data.")):
        known = ", ".join(key for key in fields if key.startswith("data."))
        return f"the task declares the keys of this section: {known}"
    return f"did you mean {by_name[nearest[0]]}?" if nearest else "config.yaml shows every key"
