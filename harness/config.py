"""The hyperparameters: one frozen dataclass a section of the YAML file, read and checked once, before anything is loaded."""

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


def bounded(at_least=None, at_most=None, *, above=None, below=None, one_of=None):
    """A config field with the values it may take."""
    return field(metadata={"at_least": at_least, "at_most": at_most, "above": above, "below": below, "one_of": one_of})


@dataclass(frozen=True)
class ModelConfig:
    path: str  # a model directory as published: config.json, *.safetensors, tokenizer files
    device: str = bounded(one_of=("cuda", "cpu"))
    dtype: str = bounded(one_of=("bfloat16", "float32"))  # of weights, activations and cache
    memory_gib: float = bounded(above=0.0)  # of the card (or RAM): what weights and optimizer leave goes to cache and activations


@dataclass(frozen=True)
class DataConfig:
    path: str  # "synthetic", a .jsonl file, or a dataset directory with data/*.parquet
    test_size: int = bounded(at_least=1)  # so many questions at the end are held out for evaluation
    num_numbers: list[int] = bounded(at_least=2, at_most=6)  # synthetic: how many numbers a question has, drawn from this list
    max_number: int = bounded(at_least=2)  # synthetic: numbers are 1..max_number
    min_target: int = bounded(at_least=0)  # synthetic: targets are min_target..max_target
    max_target: int = bounded(at_least=1)
    synthetic_seed: int = bounded(at_least=0)  # synthetic: another seed, other questions, held-out ones included


@dataclass(frozen=True)
class TrainingConfig:
    seed: int = bounded(at_least=0)  # of the order of questions, of sampling and of evaluation
    max_steps: int = bounded(at_least=1)  # rollout + update pairs
    batch_size: int = bounded(at_least=2)  # answers a step
    num_questions_per_batch: int = bounded(at_least=1)  # groups a step; batch_size / this is the size of a group
    max_gen_len: int = bounded(at_least=1)  # response tokens, for every answer alike
    temperature: float = bounded(above=0.0)  # of sampling and of scoring; 1 is the model's own distribution
    skip_unfinished_episodes: bool = field()  # leave answers that hit max_gen_len out of the loss (DAPO's overlong filtering)
    learning_rate: float = bounded(above=0.0, below=1.0)  # constant; too high shows first as collapsing answer lengths
    max_grad_norm: float = bounded(above=0.0)  # gradients are scaled down to this norm
    micro_batch_tokens: int = bounded(at_least=1)  # tokens through the model at once in the update; changes memory and speed only
    eval_interval: int = bounded(at_least=1)  # steps between evaluations on the held-out questions
    ckpt_save_interval: int = bounded(at_least=1)  # steps between checkpoints; there is one more at the end
    keep_checkpoints: int = bounded(at_least=1)  # the newest so many stay on the disk
    max_skipped_steps: int = bounded(at_least=1)  # so many steps in a row with a non-finite number end the run
    reward_timeout: float = bounded(above=0.0, at_most=3600.0)  # seconds an answer's reward may take
    reward_errors: str = bounded(one_of=("stop", "zero"))  # a reward that raises or hangs: end the run, or score the answer 0


@dataclass(frozen=True)
class OptimizerConfig:
    betas: list[float] = bounded(at_least=0.0, below=1.0)  # decay of the first and second moment
    eps: float = bounded(above=0.0)
    weight_decay: float = bounded(at_least=0.0)  # decoupled
    offload: bool = field()  # keep the optimizer's state in pinned CPU memory; the numerics are the same


@dataclass(frozen=True)
class WarmStartConfig:
    """Shape and supervised start of the small base model that is made when model.path does not exist."""

    hidden_size: int = bounded(at_least=8)
    num_layers: int = bounded(at_least=1)
    num_heads: int = bounded(at_least=1)
    steps: int = bounded(at_least=1)
    batch_size: int = bounded(at_least=1)
    seed: int = bounded(at_least=0)


@dataclass(frozen=True)
class Config:
    task: str  # the module with load_problems, render_prompt and reward_function
    output_dir: str  # everything a run writes; never overwritten
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    warm_start: WarmStartConfig | None = None


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file, on top of the one its `extends:` names, and apply `key.path=value` overrides.

    Raises FileNotFoundError, or ValueError naming the key, what it got, what it wanted and the way out.
    """
    raw = _read_yaml(Path(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"{override!r} is not an override; write key.path=value, for example training.learning_rate=5e-6")
        try:
            value = yaml.load(text, _Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{override!r}: the value is not YAML ({error})") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        raw = _merge(raw, value)
    config = _build(Config, raw, "")
    _check_combinations(config)
    return config


class _Loader(yaml.SafeLoader):
    """PyYAML would keep the last of two equal keys and say nothing."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, extended_by: tuple[Path, ...] = ()) -> dict:
    if path.resolve() in extended_by:
        raise ValueError(f"{path} extends itself, by way of {', '.join(p.name for p in extended_by)}; remove one `extends:`")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; the repository has config.yaml and config_tiny.yaml") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not key: value lines")
    if "extends" in raw:
        raw = _merge(_read_yaml(path.parent / str(raw.pop("extends")), (*extended_by, path.resolve())), raw)
    return raw


def _merge(base: dict, changes: dict) -> dict:
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if nested else value
    return merged


def _build(cls, raw: Any, prefix: str):
    if not isinstance(raw, dict):
        raise ValueError(f"{prefix.rstrip('.')}={raw!r} must be a section of key: value lines")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in raw.keys() - fields.keys():
        near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
        raise ValueError(f"unknown config key {prefix}{key}; did you mean {prefix}{near[0]}?")
    values = {}
    for name, f in fields.items():
        if name in raw:
            values[name] = _check(raw[name], typing.get_type_hints(cls)[name], f.metadata, prefix + name)
        elif f.default is dataclasses.MISSING:
            raise ValueError(f"config key {prefix}{name} is missing; config.yaml shows every key with its meaning")
    return cls(**values)


def _check(value: Any, kind: Any, bounds: dict, name: str):
    if isinstance(kind, types.UnionType):  # an optional section
        return None if value is None else _check(value, typing.get_args(kind)[0], bounds, name)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, name + ".")
    if typing.get_origin(kind) is list:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{name}={value!r} must be a list, for example [{bounds['at_least']}]")
        return [_check(item, typing.get_args(kind)[0], bounds, name) for item in value]
    if kind is float and type(value) in (str, int):  # YAML reads 1e-6, without a point, as text
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; wanted a {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number")
    tests = {
        "at_least": lambda b: value >= b, "at_most": lambda b: value <= b,
        "above": lambda b: value > b, "below": lambda b: value < b, "one_of": lambda b: value in b,
    }  # fmt: skip
    for word, bound in bounds.items():
        if bound is not None and not tests[word](bound):
            wanted = " or ".join(map(str, bound)) if word == "one_of" else f"{word.replace('_', ' ')} {bound}"
            raise ValueError(f"{name}={value!r} must be {wanted}")
    return value


def _check_combinations(config: Config) -> None:
    training, data = config.training, config.data
    answers, questions = training.batch_size, training.num_questions_per_batch
    if answers % questions:
        raise ValueError(f"training.batch_size={answers} must be a multiple of training.num_questions_per_batch={questions}; "
                         f"the nearest is {questions * max(2, round(answers / questions))}")
    if answers == questions:
        raise ValueError(f"training.batch_size={answers} makes groups of one answer, which have nothing to compare with; "
                         f"set it to {8 * questions}, or lower training.num_questions_per_batch")
    if data.min_target > data.max_target:
        raise ValueError(f"data.min_target={data.min_target} is above data.max_target={data.max_target}; swap them")
    if len(config.optimizer.betas) != 2:
        raise ValueError(f"optimizer.betas={config.optimizer.betas} must be two numbers, for example [0.9, 0.999]")
    if config.warm_start and config.warm_start.hidden_size % (2 * config.warm_start.num_heads):
        raise ValueError(f"warm_start.hidden_size={config.warm_start.hidden_size} must be a multiple of twice "
                         f"warm_start.num_heads={config.warm_start.num_heads}")
