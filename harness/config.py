"""The hyperparameters: one frozen section of the YAML file each, read and checked once, before anything is loaded.

config.yaml says what each key does. What a section `data` may hold is the task's to say, by a class `Data` in its file.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from harness.tasks import load_task
from published_format import read_text

MAX_BYTES, MAX_DEPTH = 10**5, 20  # of a file, and of the nesting in it
MAX_FAULTS = 20  # nobody mends more at once


class Section(BaseModel, extra="forbid", frozen=True, strict=True, allow_inf_nan=False):
    """What is declared, and nothing else."""


class Data(Section):
    """For a task that declares no keys of its own."""

    path: str
    test_size: int = Field(ge=1, le=10**6)


class ModelConfig(Section):
    path: str
    device: Literal["cuda", "cpu"]
    dtype: Literal["bfloat16", "float32"]
    memory_gib: float | None = Field(None, gt=0.0)


class TrainingConfig(Section):
    seed: int = Field(ge=0)
    max_steps: int = Field(ge=1, le=10**9)
    batch_size: int = Field(ge=2, le=10**6)
    num_questions_per_batch: int = Field(ge=1)
    max_gen_len: int = Field(ge=1)
    temperature: float = Field(ge=1e-6, le=1e6)  # beyond, float32 holds no logits divided by it
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


class OptimizerConfig(Section):
    betas: list[Annotated[float, Field(ge=0.0, lt=1.0)]] = Field(
        min_length=1, examples=[0.9, 0.999]
    )
    eps: float = Field(ge=1e-30)  # below, it is 0 in float32
    weight_decay: float = Field(ge=0.0, le=1.0)
    offload: bool


DataOfTask = TypeVar("DataOfTask")


class Config(Section, Generic[DataOfTask]):
    task: str
    output_dir: str
    model: ModelConfig
    data: DataOfTask
    training: TrainingConfig
    optimizer: OptimizerConfig

    @model_validator(mode="after")
    def _fit_together(self) -> "Config":
        answers, questions = self.training.batch_size, self.training.num_questions_per_batch
        if answers % questions:
            raise ValueError(
                f"training.batch_size={answers} must be a multiple of training.num_questions_per_batch={questions}; "
                f"the nearest is {questions * max(2, round(answers / questions))}"
            )
        if answers == questions:
            raise ValueError(
                f"training.batch_size={answers} makes groups of one answer, which have nothing to compare with; "
                f"set it to {8 * questions}, or lower training.num_questions_per_batch"
            )
        if len(self.optimizer.betas) != 2:
            raise ValueError(
                f"optimizer.betas={self.optimizer.betas} must be two numbers, for example [0.9, 0.999]"
            )
        return self


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file, on top of the one its `extends:` names, and apply `key.path=value` overrides.

    Raises FileNotFoundError, or ValueError with a line for each fault: the key, what it got, what it wanted, the way out.
    """
    raw = _read_yaml(Path(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(
                f"{override!r} is not an override; write key.path=value, for example training.learning_rate=5e-6"
            )
        value = _parse(text, f"{override[:100]!r}: the value")
        for part in reversed(key.split(".", MAX_DEPTH)):
            value = {part: value}
        raw = _merge(raw, value)
    task = raw.get("task")
    whole = Config[getattr(load_task(task), "Data", Data) if isinstance(task, str) else Any]
    try:
        return whole.model_validate(raw)
    except ValidationError as error:
        fields = _fields(whole)
        raise ValueError(
            "\n".join(
                dict.fromkeys(_describe(fault, fields) for fault in error.errors()[:MAX_FAULTS])
            )
        ) from None


def as_yaml(config: Config) -> str:
    """The text from which load_config makes the same configuration."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False)


# ---------------------------------------------------------------- faults in words

WANTED = {  # by pydantic's name of the fault
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "greater_than": "must be above {gt}",
    "less_than": "must be below {lt}",
    "string_type": "is a {}; wanted a str",
    "bool_type": "is a {}; wanted a bool",
    "int_type": "is a {}; wanted an int",
    "float_type": "is a {}; wanted a float",
    "model_type": "must be a section of key: value lines",
}


def _describe(fault: dict, fields: dict[str, FieldInfo]) -> str:
    """One fault that pydantic found, as a line."""
    key = ".".join(
        part for part in fault["loc"] if isinstance(part, str)
    )  # the place in a list does not matter
    section, _, name = key.rpartition(".")
    kind, value = fault["type"], fault["input"]
    if kind == "missing":
        return f"config key {key} is missing; config.yaml shows every key with its meaning"
    if kind == "extra_forbidden":
        keys = sorted(fields, key=lambda known: known.startswith(f"{section}."))
        known = {
            key.rpartition(".")[2]: key for key in keys
        }  # of two of one name, the one in this section
        near = difflib.get_close_matches(name, known, n=1)
        return f"unknown config key {key[:200]}; {f'did you mean {known[near[0]]}?' if near else 'config.yaml shows every key'}"
    if kind == "value_error":
        return str(fault["ctx"]["error"])
    if kind in WANTED:
        wanted = WANTED[kind].format(type(value).__name__, **fault.get("ctx", {}))
    elif kind in ("list_type", "too_short"):
        examples = fields[key].examples if key in fields else None
        wanted = (
            f"must be a list, for example {examples}" if examples else "must be a list, not empty"
        )
    else:
        wanted = f"must be {fault['msg'].removeprefix('Input should be ')}"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        wanted += f"; write {int(value)}"
    shown = repr(value)
    return f"{key}={shown if len(shown) <= 200 else shown[:200] + '…'} {wanted}"


def _fields(section: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """By their whole keys, those of the sections in it included."""
    fields = {}
    for name, field in section.model_fields.items():
        fields[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            fields |= _fields(field.annotation, f"{prefix}{name}.")
    return fields


# ---------------------------------------------------------------- YAML, the plain part of it


class _Loader(yaml.SafeLoader):
    """Mappings, lists, words and numbers as they look. Numbers are decimal, and 010, 1:30 and 2026-01-01 are words."""

    yaml_implicit_resolvers: ClassVar[dict] = {}
    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if event.anchor or getattr(event, "tag", None):  # an alias has an anchor, too
            raise yaml.MarkedYAMLError(
                None, None, "anchors, aliases and tags are not read", event.start_mark
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                None, None, f"nested more than {MAX_DEPTH} deep", event.start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        mapping = {}
        for key, value in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str) or name in mapping:
                raise yaml.MarkedYAMLError(
                    None, None, f"the key {name!r:.100} must be a word, given once", key.start_mark
                )
            mapping[name] = self.construct_object(value, deep=True)
        return mapping


for _kind, _form in (
    ("null", r"~|null|"),
    ("bool", r"true|false|yes|no|on|off"),
    ("int", r"[-+]?(0|[1-9][0-9]*)"),
    ("float", r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)(e[-+]?[0-9]+)?|[-+]?\.inf|\.nan"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_form})$", re.IGNORECASE), None
    )


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for something else than a word."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _parse(text: str, name: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        problem = f"{error.context or ''} {error.problem}".strip()
        raise ValueError(
            f"{name} is not YAML: {problem:.300} (line {error.problem_mark.line + 1})"
        ) from None
    except (yaml.YAMLError, ValueError) as error:  # a control character, a number of 5,000 digits
        raise ValueError(f"{name} is not YAML: {str(error).splitlines()[0]:.300}") from None


def _read_yaml(path: Path, extended_by: tuple[Path, ...] = ()) -> dict:
    text = read_text(
        path, remedy="the repository has config.yaml and config_tiny.yaml", limit=MAX_BYTES
    )
    if path.resolve() in extended_by:
        raise ValueError(
            f"{path} extends itself, by way of {', '.join(p.name for p in extended_by)}; remove one `extends:`"
        )
    raw = _parse(text, str(path))
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not key: value lines")
    if "extends" in raw:
        base = raw.pop("extends")
        if not isinstance(base, str):
            raise ValueError(f"{path}: extends={base!r:.200} must be the name of a YAML file")
        raw = _merge(_read_yaml(path.parent / base, (*extended_by, path.resolve())), raw)
    return raw


def _merge(base: dict, changes: dict) -> dict:
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if nested else value
    return merged
