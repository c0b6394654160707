"""The shipped YAML files, and every way to get one wrong: each field, found by introspection, and each combination."""

import copy
import json
import math
import os
import re
import time
import types
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from harness.config import MAX_FAULTS, Config, as_yaml, load_config

ROOT = Path(__file__).parent.parent
TINY_FILE = ROOT / "config_tiny.yaml"
SHIPPED = ("config.yaml", "config_24GB.yaml", "config_tiny.yaml")
BOUNDS = {"ge": "at least", "le": "at most", "gt": "above", "lt": "below"}


def fields_of(cls: type[BaseModel], prefix: str = ""):
    """(key, type, bounds) of every field of a section and of the sections in it."""
    for name, field in cls.model_fields.items():
        kind, metadata = field.annotation, list(field.metadata)
        if isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is list:
            item, *inner = typing.get_args(typing.get_args(kind)[0])
            kind, metadata = list[item], inner[0].metadata
        bounds = {
            word: getattr(m, sign)
            for m in metadata
            for sign, word in BOUNDS.items()
            if hasattr(m, sign)
        }
        if typing.get_origin(kind) is typing.Literal:
            kind, bounds = typing.Literal, {"one of": typing.get_args(kind)}
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields_of(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind, bounds


TINY = load_config(TINY_FILE).model_dump()
FIELDS = list(fields_of(type(load_config(TINY_FILE))))
SECTIONS = sorted({key.split(".")[0] for key, _, _ in FIELDS if "." in key})
DEFAULTS = {  # what may be left out, and what it is then
    "model.memory_gib": None,
    "training.warmup_steps": 0,
    "data.num_numbers": [3, 4],
    "data.max_number": 99,
    "data.min_target": 10,
    "data.max_target": 100,
    "data.synthetic_seed": 0,
}


def in_yaml(raw: dict) -> str:
    """JSON is YAML in which every text is quoted, but for these two words."""
    return json.dumps(raw).replace("NaN", ".nan").replace("Infinity", ".inf")


def load_with(tmp_path: Path, changes: dict) -> Config:
    """The configuration of config_tiny.yaml with some values changed in the file."""
    raw = copy.deepcopy(TINY)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (raw[section] if section else raw)[name] = value
    path = tmp_path / "changed.yaml"
    path.write_text(in_yaml(raw))
    return load_config(path)


def flatten(raw: dict) -> dict:
    values = {}
    for name, value in raw.items():
        values |= (
            {f"{name}.{key}": v for key, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return values


def flat(config: Config) -> dict:
    return flatten(config.model_dump())


# ---------------------------------------------------------------- what loads


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_load(name):
    config = load_config(ROOT / name)
    assert config == load_config(str(ROOT / name))
    kinds = {key: kind for key, kind, _ in FIELDS}
    for key, value in flat(config).items():
        kind = str if kinds[key] is typing.Literal else kinds[key]
        if typing.get_origin(kind) is list:
            assert all(type(item) is typing.get_args(kind)[0] for item in value), key
        else:
            assert type(value) is kind, key


def test_the_shipped_files_are_what_the_documents_say():
    default, small, tiny = (
        load_config(ROOT / name) for name in ("config.yaml", "config_24GB.yaml", "config_tiny.yaml")
    )
    assert (default.data.num_numbers, default.data.max_number) == ([3, 4], 99)
    assert (default.data.min_target, default.data.max_target) == (10, 100)
    assert (default.model.device, default.model.dtype) == ("cuda", "bfloat16")
    assert (tiny.model.device, tiny.model.path, tiny.data.path) == (
        "cpu",
        "models/tiny",
        "synthetic",
    )  # nothing to download
    assert small.optimizer.offload
    for name, config in (("config_24GB.yaml", small), ("config_tiny.yaml", tiny)):
        named = flatten(yaml.safe_load((ROOT / name).read_text())).keys() - {"extends"}
        differing = {key for key, value in flat(default).items() if value != flat(config)[key]}
        assert differing == named, f"{name} has only the lines that differ"


def test_a_configuration_cannot_be_changed():
    config = load_config(TINY_FILE)
    for section, name in ((config, "task"), (config.training, "seed"), (config.data, "test_size")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 3)


def test_extends_changes_only_what_it_names(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text(in_yaml(TINY))
    (tmp_path / "middle.yaml").write_text(
        "extends: base.yaml\ntraining: {max_steps: 7, seed: 11}\ndata: {num_numbers: [4, 5]}\n"
    )
    (tmp_path / "deep/top.yaml").write_text(
        "training:\n  seed: 13\nextends: ../middle.yaml\noutput_dir: elsewhere\n"
    )
    base, top = (
        flat(load_config(tmp_path / "base.yaml")),
        flat(load_config(tmp_path / "deep/top.yaml")),
    )
    changed = {
        "training.max_steps": 7,
        "training.seed": 13,
        "data.num_numbers": [4, 5],
        "output_dir": "elsewhere",
    }
    assert top == base | changed


def test_overrides_have_the_last_word(tmp_path):
    (tmp_path / "top.yaml").write_text(
        f"extends: {ROOT / 'config_tiny.yaml'}\ntraining: {{seed: 11}}\n"
    )
    overrides = {
        "training.seed=3": 3,
        "training.learning_rate=5e-6": 5e-6,
        "training.temperature=2": 2.0,
        "data.num_numbers=[2, 6]": [2, 6],
        "training.skip_unfinished_episodes=false": False,
        "data.path=some where/a=b.jsonl": "some where/a=b.jsonl",
        "output_dir='3'": "3",
        "training.warmup_steps=17": 17,
        "model.dtype=bfloat16": "bfloat16",
    }
    config = load_config(tmp_path / "top.yaml", list(overrides))
    expected = flat(load_config(tmp_path / "top.yaml")) | {
        text.partition("=")[0]: value for text, value in overrides.items()
    }
    assert flat(config) == expected
    assert (
        flat(load_config(tmp_path / "top.yaml", ["training.seed=3", "training.seed=4"]))[
            "training.seed"
        ]
        == 4
    )


def test_a_section_can_be_overridden():
    changed = load_config(TINY_FILE, ["optimizer={betas: [0.5, 0.75]}"]).optimizer
    assert changed == load_config(TINY_FILE).optimizer.model_copy(update={"betas": [0.5, 0.75]})


# Catches: the float form of _Loader taken from PyYAML, which reads a number without a point as text.
@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("5E-7", 5e-7), ("1.0e-6", 1e-6), ("0.25", 0.25), (".5", 0.5)],
)
def test_a_float_may_be_written_without_a_point(tmp_path, text, value):
    (tmp_path / "a.yaml").write_text(
        f"extends: {ROOT / 'config_tiny.yaml'}\ntraining:\n  learning_rate: {text}\n"
    )
    for config in (
        load_config(tmp_path / "a.yaml"),
        load_config(TINY_FILE, [f"training.learning_rate={text}"]),
    ):
        assert config.training.learning_rate == value
        assert type(config.training.learning_rate) is float


# ---------------------------------------------------------------- every field

WRONG_TYPES = {  # type of a field -> (value, the part of it that the message shows, what the message wants)
    str: [(v, v, "str") for v in (5, True, None, ["a"])],
    typing.Literal: [(v, v, "must be '") for v in (5, True, None, ["a"])],
    bool: [(v, v, "bool") for v in (1, 0.0, "yes please", None)],
    int: [(v, v, "int") for v in ("1e3", 3.0, True, None, [3])],
    float: [(v, v, "float") for v in ("fast", "", True, None, [0.5])],
    list[int]: [(v, v, "list") for v in (3, "3", None, [], {"a": 3})]
    + [([3, v], v, "int") for v in ("a", 3.5, True, [3])],
    list[float]: [(v, v, "list") for v in (0.5, "0.5", None, [])]
    + [([0.5, v], v, "float") for v in ("a", True, [0.5])],
}


@pytest.mark.parametrize(
    ("key", "kind"), [field[:2] for field in FIELDS], ids=[field[0] for field in FIELDS]
)
def test_a_wrong_type_is_refused(tmp_path, key, kind):
    for value, shown, wanted in WRONG_TYPES[kind]:
        if value is None and DEFAULTS.get(key, 0) is None:
            continue
        with pytest.raises(ValueError, match=re.escape(key)) as caught:
            load_with(tmp_path, {key: value})
        message = str(caught.value)
        assert message.startswith(f"{key}={shown!r} "), message
        assert wanted in message.removeprefix(f"{key}={shown!r}")


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_that_is_none_is_refused(tmp_path, section):
    for value in (3, "text", [1], True, None):
        with pytest.raises(ValueError, match="section") as caught:
            load_with(tmp_path, {section: value})
        assert str(caught.value).startswith(f"{section}={value!r} ")


def outside(kind, bounds: dict) -> list[tuple]:
    """(value, what the message wants) just outside each bound."""
    step = 1 if kind in (int, list[int]) else 0.5
    cases = []
    for word, direction, distances in (
        ("at least", -1, [step]),
        ("at most", 1, [step]),
        ("above", -1, [0.0, step]),
        ("below", 1, [0.0, step]),
    ):
        if word in bounds:
            cases += [
                (bounds[word] + direction * distance, f"{word} {bounds[word]}")
                for distance in distances
            ]
    if "one of" in bounds:
        cases += [
            (v, f"'{c}'")
            for v in ("neither", "", bounds["one of"][0].upper())
            for c in bounds["one of"]
        ]
    if kind in (float, list[float]):
        cases += [(math.nan, "must be"), (-math.inf, "must be")]
    return cases


BOUNDED = [field for field in FIELDS if field[2]]


def test_every_number_has_a_bound():
    numbers = {key for key, kind, _ in FIELDS if kind in (int, float, list[int], list[float])}
    assert numbers - {key for key, _, _ in BOUNDED} == set()


@pytest.mark.parametrize(("key", "kind", "bounds"), BOUNDED, ids=[field[0] for field in BOUNDED])
def test_a_value_out_of_bounds_is_refused(tmp_path, key, kind, bounds):
    for value, wanted in outside(kind, bounds):
        inside = flat(load_config(TINY_FILE))[key]
        with pytest.raises(ValueError, match="must be") as caught:
            load_with(tmp_path, {key: [*inside, value] if isinstance(inside, list) else value})
        message = str(caught.value)
        assert message.startswith(f"{key}={value!r} must be"), message
        assert wanted in message.removeprefix(f"{key}={value!r}")


COMPANIONS = {  # what else must change for a field's lowest value to make sense
    "training.batch_size": {"training.num_questions_per_batch": 1},
    "data.max_target": {"data.min_target": 0},
}


# Catches: ge turned into gt; a bound raised by one.
@pytest.mark.parametrize(("key", "kind", "bounds"), BOUNDED, ids=[field[0] for field in BOUNDED])
def test_a_value_at_its_bound_is_taken(tmp_path, key, kind, bounds):
    values = [bounds[word] for word in ("at least", "at most") if word in bounds] + list(
        bounds.get("one of", [])
    )
    for value in values:
        value = [value, value] if typing.get_origin(kind) is list else value
        assert flat(load_with(tmp_path, COMPANIONS.get(key, {}) | {key: value}))[key] == value


# Catches: any bound of config.py dropped or widened. Written by hand: the tests above read the bounds from the code.
@pytest.mark.parametrize(
    ("section", "nonsense"),
    [
        ("model", ["device=tpu", "device=''", "dtype=float16", "dtype=fp32", "memory_gib=0"]),
        (
            "data",
            [
                "test_size=0",
                "num_numbers=[1]",
                "num_numbers=[3, 7]",
                "max_number=1",
                "min_target=-1",
                "max_target=0",
            ],
        ),
        ("data", ["synthetic_seed=-1"]),
        (
            "training",
            [
                "seed=-1",
                "max_steps=0",
                "batch_size=1",
                "num_questions_per_batch=0",
                "max_gen_len=0",
                "temperature=0",
            ],
        ),
        (
            "training",
            [
                "learning_rate=0",
                "learning_rate=1",
                "max_grad_norm=0",
                "micro_batch_tokens=0",
                "eval_interval=0",
            ],
        ),
        (
            "training",
            [
                "ckpt_save_interval=0",
                "keep_checkpoints=0",
                "max_skipped_steps=0",
                "reward_timeout=0",
            ],
        ),
        (
            "training",
            [
                "reward_errors=ignore",
                "warmup_steps=-1",
                "reward_timeout=3601",
                "batch_size=10000000",
            ],
        ),
        (
            "optimizer",
            [
                "betas=[0.9, 1.0]",
                "betas=[-0.1, 0.9]",
                "eps=0",
                "eps=1e-46",
                "weight_decay=-0.01",
                "weight_decay=1e20",
            ],
        ),
    ],
)
def test_nonsense_is_refused(section, nonsense):
    for text in nonsense:
        with pytest.raises(ValueError, match="must be") as caught:
            load_config(TINY_FILE, [f"{section}.{text}"])
        assert str(caught.value).startswith(f"{section}.{text.partition('=')[0]}=")


# ---------------------------------------------------------------- unknown and missing keys


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("training.learning_rat", "training.learning_rate"),
        ("training.batchsize", "training.batch_size"),
        ("optimizer.beta", "optimizer.betas"),
        ("learning_rate", "training.learning_rate"),
        ("training.betas", "optimizer.betas"),
        ("model.tset_size", "data.test_size"),
        ("model.pth", "model.path"),
        ("data.pth", "data.path"),
        ("modle", "model"),
        ("tasks", "task"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, wrong, near):
    for load in (
        lambda: load_config(TINY_FILE, [f"{wrong}=1"]),
        lambda: load_with(tmp_path, {wrong: 1}),
    ):
        with pytest.raises(ValueError, match="unknown config key") as caught:
            load()
        assert str(caught.value) == f"unknown config key {wrong}; did you mean {near}?"


# Catches: the nearest key named however far it is: kl_coef is not skip_unfinished_episodes.
@pytest.mark.parametrize(
    "wrong",
    [
        "zzz",
        "training.kl_coef",
        "training.x.y",
        "",
        "1",
        "training.",
        ".",
        "extends",
        "a" + 5000 * ".a",
        "é" * 5000,
    ],
)
def test_an_unknown_key_that_is_near_to_nothing_is_still_refused(wrong):
    shown = {"training.x.y": "training.x", ".": "", "a" + 5000 * ".a": "a"}.get(wrong, wrong)[:200]
    with pytest.raises(ValueError, match="unknown config key") as caught:
        load_config(TINY_FILE, [f"{wrong}=1"])
    assert str(caught.value) == f"unknown config key {shown}; config.yaml shows every key"


def test_of_very_many_faults_the_first_are_named(tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"extends: {TINY_FILE}\n" + "".join(f"key_{i}: 1\n" for i in range(5000))
    )
    clock = time.perf_counter()
    with pytest.raises(ValueError, match=r"unknown config key key_0;") as caught:
        load_config(tmp_path / "a.yaml")
    assert len(str(caught.value).splitlines()) == MAX_FAULTS
    assert time.perf_counter() - clock < 10


@pytest.mark.parametrize("key", [key for key, _, _ in FIELDS if key not in DEFAULTS] + SECTIONS)
def test_a_missing_key_is_named(tmp_path, key):
    with pytest.raises(ValueError, match=rf"^config key {key} is missing; config\.yaml[^\n]*$"):
        load_without(tmp_path, key)


@pytest.mark.parametrize(("key", "value"), DEFAULTS.items())
def test_a_key_with_a_default_may_be_left_out(tmp_path, key, value):
    assert flat(load_without(tmp_path, key))[key] == value


def load_without(tmp_path: Path, key: str) -> Config:
    raw = copy.deepcopy(TINY)
    section, _, name = key.rpartition(".")
    del (raw[section] if section else raw)[name]
    (tmp_path / "short.yaml").write_text(in_yaml(raw))
    return load_config(tmp_path / "short.yaml")


def test_every_fault_is_named_at_once(tmp_path):
    with pytest.raises(ValueError, match="missing") as caught:
        load_with(
            tmp_path,
            {"training.max_steps": 0, "optimizer.eps": "small", "sed": 3, "model": {"path": "x"}},
        )
    named = [
        re.split(" is | must |;", line)[0].removeprefix("config key ")
        for line in str(caught.value).splitlines()
    ]
    assert named == [
        "model.device",
        "model.dtype",
        "training.max_steps=0",
        "optimizer.eps='small'",
        "unknown config key sed",
    ]


# Catches: the keys of `data` checked against a task that is not known, which names four more that are right.
@pytest.mark.parametrize("task", [5, None, ["x"]])
def test_a_task_that_is_no_name_is_the_only_fault(tmp_path, task):
    with pytest.raises(ValueError, match=rf"^task={re.escape(repr(task))} is a \w+; wanted a str$"):
        load_with(tmp_path, {"task": task})


# ---------------------------------------------------------------- the keys of a task

TASK = """
def load_problems(data): ...
def render_prompt(problem, tokenizer): ...
def reward_function(response, **problem): ...
"""
DATA = """
from pydantic import BaseModel, ConfigDict, Field

class Data(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    test_size: int = 7
    languages: list[str] = Field(min_length=1)
    difficulty: float = Field(0.5, lt=1.0)
"""


@pytest.mark.parametrize(
    ("name", "text"), [("plain_task_of_a_test", TASK), ("task_of_a_test_with_keys", TASK + DATA)]
)
def test_a_task_says_what_data_holds(tmp_path, monkeypatch, name, text):
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    keys = (
        {"path": "x", "test_size": 3} if text == TASK else {"languages": ["en"], "difficulty": 0.25}
    )
    config = load_with(tmp_path, {"task": name, "data": keys})
    assert config.data.model_dump() == {"test_size": 7} | keys
    wrong = {"path": 3, "test_size": 0} if text == TASK else {"languages": "en", "difficulty": 1.0}
    expected = (
        ["data.path=3 is a int; wanted a str", "data.test_size=0 must be at least 1"]
        if text == TASK
        else [
            "data.languages='en' must be a list, not empty",
            "data.difficulty=1.0 must be below 1.0",
        ]
    )
    with pytest.raises(ValueError, match="data") as caught:
        load_with(tmp_path, {"task": name, "data": wrong | {"tset_size": 3}})
    assert str(caught.value).splitlines() == [
        *expected,
        "unknown config key data.tset_size; did you mean data.test_size?",
    ]


# ---------------------------------------------------------------- combinations

COMBINATIONS = {
    "no multiple": (
        ["training.batch_size=100"],
        ["batch_size=100", "training.num_questions_per_batch=32", "multiple", "96"],
    ),
    "less than one answer each": (
        ["training.batch_size=31"],
        ["training.batch_size=31", "multiple", "64"],
    ),
    "groups of one": (
        ["training.batch_size=32"],
        ["training.batch_size=32", "groups of one", "256"],
    ),
    "one beta": (
        ["optimizer.betas=[0.9]"],
        ["optimizer.betas=[0.9]", "two numbers", "for example [0.9, 0.999]"],
    ),
    "a beta alone": (
        ["optimizer.betas=0.9"],
        ["optimizer.betas=0.9", "a list", "for example [0.9, 0.999]"],
    ),
    "three betas": (
        ["optimizer.betas=[0.9, 0.9, 0.9]"],
        ["optimizer.betas=[0.9, 0.9, 0.9]", "two numbers"],
    ),
    "targets swapped": (["data.min_target=41"], ["data.min_target=41", "data.max_target=40"]),
}


@pytest.mark.parametrize(("overrides", "wanted"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_an_impossible_combination_is_refused(overrides, wanted):
    with pytest.raises(ValueError, match="=") as caught:
        load_config(TINY_FILE, overrides)
    assert [part for part in wanted if part not in str(caught.value)] == []


def test_combinations_at_their_limit_are_taken():
    config = load_config(TINY_FILE, ["training.batch_size=64", "data.min_target=40"])
    assert (config.training.batch_size, config.data.min_target) == (64, 40)


# ---------------------------------------------------------------- files and overrides that cannot be read

MALFORMED = {
    "open bracket": "training: [1, 2\n",
    "tab": "training:\n\tseed: 1\n",
    "two values": "a: b: c\n",
    "an object": "a: !!python/name:os.system\n",
    "a tag": "a: !!bool x\n",
    "another tag": "seed: !!int 010\n",
    "unknown alias": "a: *nowhere\n",
    "aliases that multiply": "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(60)
    ),
    "an alias to itself": "a: &a [*a]\n",
    "a merge key": "base: &b {seed: 3}\ntraining:\n  <<: *b\n",
    "nested lists": f"a: {'[' * 5000}{']' * 5000}\n",
    "nested mappings": "{a: " * 5000 + "\n",
    "nested lines": "- " * 5000 + "\n",
    "nested keys": "? " * 5000 + "\n",
    "a list as key": "? [a]\n: 1\n",
    "a number as key": "3: a\n",
    "twice the same key, often": "{" + ",".join("a" * 20_000) + "}",
    "a number of 5,000 digits": f"seed: {'1' * 5000}\n",
    "two documents": "--- {a: 1}\n--- {b: 1}\n",
    "control character": "a: \0\n",
    "empty": "",
    "comment": "# nothing\n",
    "a list": "- task: x\n",
    "a word": "countdown\n",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_named(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    clock = time.perf_counter()
    with pytest.raises(ValueError, match=r"^[^\n]*bad\.yaml (is not YAML|holds a)[^\n]*$"):
        load_config(tmp_path / "bad.yaml")
    assert time.perf_counter() - clock < 5


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"task: \xff\xfe\n")
    with pytest.raises(ValueError, match=r"bad\.yaml is not UTF-8 text"):
        load_config(tmp_path / "bad.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist.*config_tiny\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "a.yaml").write_text("extends: nowhere.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "a.yaml")


def no_file(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "no file"
    if kind == "directory":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "circle of links":
        path.symlink_to(path)
    elif kind == "endless device":
        return Path("/dev/zero")
    else:
        path.write_text("# much\n" * 20_000)
    return path


# Catches: reading before looking at what it is: a FIFO waits for ever, /dev/zero fills the memory.
@pytest.mark.parametrize(
    "kind", ["directory", "FIFO", "circle of links", "endless device", "far too large"]
)
def test_what_is_no_readable_file_is_refused(tmp_path, kind):
    path = no_file(tmp_path, kind)
    (tmp_path / "a.yaml").write_text(f"extends: {path}\n")
    for config in (path, tmp_path / "a.yaml"):
        with pytest.raises(
            ValueError,
            match=rf"^{re.escape(str(path))} [^\n]*; the repository has config\.yaml[^\n]*$",
        ):
            load_config(config)


@pytest.mark.parametrize("base", [None, 3, ["config.yaml"], {"a": 1}, True])
def test_extends_must_name_a_file(tmp_path, base):
    (tmp_path / "a.yaml").write_text(in_yaml({"extends": base}))
    wanted = f"{tmp_path}/a.yaml: extends={base!r} must be the name of a YAML file"
    with pytest.raises(ValueError, match=f"^{re.escape(wanted)}$"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("training.seed", "is not an override; write key.path=value"),
        ("", "is not an override"),
        ("--fast", "is not an override"),
        ("data.path=[}", "is not YAML"),
        ("training=5", r"^training=5 must be a section"),
        ("task.name=x", r"^task=\{'name': 'x'\} is a dict"),
        ("model.path=", r"^model\.path=None is a NoneType; wanted a str"),
        (
            "training.max_steps=1e3",
            r"^training\.max_steps=1000\.0 is a float; wanted an int; write 1000$",
        ),
        ("training.seed=010", r"^training\.seed='010' is a str; wanted an int$"),  # not 8
        ("training.seed=1:30", r"^training\.seed='1:30' is a str; wanted an int$"),  # not 90
        ("training.temperature=010", r"^training\.temperature='010' is a str; wanted a float$"),
        (
            "training.seed=!!int 010",
            r"is not YAML: anchors, aliases and tags are not read \(line 1\)$",
        ),
        ("data={<<: {path: x}}", r"^unknown config key data\.<<; config\.yaml"),
        (
            "data.path=" + "[" * 5000 + "]" * 5000,
            r"^'data\.path=\[+': the value is not YAML: nested more than 20 deep \(line 1\)$",
        ),
        ("data.path=" + "{a: " * 5000, r"is not YAML: nested more than 20 deep \(line 1\)$"),
        (
            "training.seed=" + "1" * 5000,
            r"^'training\.seed=1+': the value is not YAML: Exceeds the limit",
        ),
    ],
)
def test_a_malformed_override_is_refused(override, wanted):
    with pytest.raises(ValueError, match=wanted):
        load_config(TINY_FILE, [override])


def test_a_circle_of_extends_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ValueError, match=r"a\.yaml"):
        load_config(tmp_path / "a.yaml")


def test_a_key_given_twice_is_refused(tmp_path):
    text = "training:\n  max_steps: 5\ntraining:\n  seed: 3\n"
    (tmp_path / "twice.yaml").write_text(f"extends: {ROOT / 'config_tiny.yaml'}\n{text}")
    with pytest.raises(ValueError, match="training"):
        load_config(tmp_path / "twice.yaml")


def test_the_nearest_multiple_is_the_nearest():
    with pytest.raises(ValueError, match="the nearest is 128"):
        load_config(TINY_FILE, ["training.batch_size=127"])


def test_a_number_beyond_float_is_refused():
    with pytest.raises(ValueError, match=r"training\.temperature"):
        load_config(TINY_FILE, ["training.temperature=1" + "0" * 400])


@pytest.mark.parametrize(
    "key",
    ["training.temperature", "training.reward_timeout", "optimizer.eps", "optimizer.weight_decay"],
)
def test_infinity_is_refused(key):
    with pytest.raises(ValueError, match=key):
        load_config(TINY_FILE, [f"{key}=.inf"])


def test_a_date_is_a_word():
    for text in ("2026-13-45", "2026-11-24"):
        assert load_config(TINY_FILE, [f"output_dir={text}"]).output_dir == text


@settings(max_examples=150, deadline=None)
@given(st.text("[]{}:,-?!&*|>'\"%@#~<=.\\ \n\t01ebo_é\0"))
def test_no_override_does_more_than_raise_one_line(text):
    message = ""
    try:
        load_config(TINY_FILE, [f"training.seed={text}"])
    except ValueError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


# ---------------------------------------------------------------- what a run writes down of its configuration


# Catches: yaml.safe_dump in as_yaml, which writes words that PyYAML takes for words and this loader for numbers.
@settings(max_examples=100, deadline=None)
@given(
    st.text()
    | st.sampled_from(
        [
            "1e3",
            ".5e3",
            "1.",
            "010",
            "1:30",
            "nULL",
            "yEs",
            "",
            "~",
            "a: b",
            "<<",
            "&a",
            "!a",
            "1e-6",
        ]
    )
)
def test_what_is_written_is_read_again(tmp_path_factory, text):
    written = tmp_path_factory.mktemp("written") / "config.yaml"
    config = load_config(TINY_FILE).model_copy(update={"output_dir": text})
    written.write_text(as_yaml(config), encoding="utf-8")
    assert load_config(written) == config
