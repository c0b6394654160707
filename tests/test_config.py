"""The shipped YAML files, and every way to get one wrong: each field, found by introspection, and each combination."""

import copy
import dataclasses
import math
import re
import types
import typing
from pathlib import Path

import pytest
import yaml

from harness.config import Config, WarmStartConfig, load_config

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path.name for path in ROOT.glob("config*.yaml"))


def fields_of(cls, prefix: str = ""):
    """(key, type, bounds) of every field of a dataclass and of the sections in it."""
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        if isinstance(kind, types.UnionType):
            kind = typing.get_args(kind)[0]
        if dataclasses.is_dataclass(kind):
            yield from fields_of(kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, kind, {word: bound for word, bound in field.metadata.items() if bound is not None}


FIELDS = list(fields_of(Config))
SECTIONS = sorted({key.split(".")[0] for key, _, _ in FIELDS if "." in key})


TINY = yaml.safe_load((ROOT / "config_tiny.yaml").read_text())  # it has every section


def load_with(tmp_path: Path, changes: dict) -> Config:
    """The configuration of config_tiny.yaml with some values changed in the file."""
    raw = copy.deepcopy(TINY)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (raw[section] if section else raw)[name] = value
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(raw))
    return load_config(path)


def flat(config: Config) -> dict:
    values = {}
    for name, value in dataclasses.asdict(config).items():
        values |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return values


# ---------------------------------------------------------------- what loads


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_load(name):
    config = load_config(ROOT / name)
    assert config == load_config(str(ROOT / name))
    kinds = {key: kind for key, kind, _ in FIELDS} | {"warm_start": types.NoneType}
    for key, value in flat(config).items():
        kind = kinds[key]
        if typing.get_origin(kind) is list:
            assert all(type(item) is typing.get_args(kind)[0] for item in value), key
        else:
            assert type(value) is kind, key


def test_the_shipped_files_are_what_the_documents_say():
    default, small, tiny = (load_config(ROOT / name) for name in ("config.yaml", "config_24GB.yaml", "config_tiny.yaml"))
    assert (default.data.num_numbers, default.data.max_number) == ([3, 4], 99)
    assert (default.data.min_target, default.data.max_target) == (10, 100)
    assert (default.model.device, default.model.dtype, default.warm_start) == ("cuda", "bfloat16", None)
    assert (tiny.model.device, tiny.data.path) == ("cpu", "synthetic")  # nothing to download
    assert isinstance(tiny.warm_start, WarmStartConfig)
    assert small.optimizer.offload
    named = {line.split(":")[0].strip() for line in (ROOT / "config_24GB.yaml").read_text().splitlines() if ": " in line}
    for key, value in flat(default).items():
        differs = value != flat(small)[key]
        assert differs == (key.rpartition(".")[2] in named), f"config_24GB.yaml has only the lines that differ: {key}"


def test_a_configuration_cannot_be_changed():
    config = load_config(ROOT / "config_tiny.yaml")
    for section, name in ((config, "task"), (config.training, "seed"), (config.warm_start, "steps")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, name, 3)


def test_extends_changes_only_what_it_names(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text((ROOT / "config_tiny.yaml").read_text())
    (tmp_path / "middle.yaml").write_text("extends: base.yaml\ntraining: {max_steps: 7, seed: 11}\ndata: {num_numbers: [4, 5]}\n")
    (tmp_path / "deep/top.yaml").write_text("training:\n  seed: 13\nextends: ../middle.yaml\noutput_dir: elsewhere\n")
    base, top = flat(load_config(tmp_path / "base.yaml")), flat(load_config(tmp_path / "deep/top.yaml"))
    changed = {"training.max_steps": 7, "training.seed": 13, "data.num_numbers": [4, 5], "output_dir": "elsewhere"}
    assert top == base | changed


def test_overrides_have_the_last_word(tmp_path):
    (tmp_path / "top.yaml").write_text(f"extends: {ROOT / 'config_tiny.yaml'}\ntraining: {{seed: 11}}\n")
    overrides = {
        "training.seed=3": 3, "training.learning_rate=5e-6": 5e-6, "training.temperature=2": 2.0, "data.num_numbers=[2, 6]": [2, 6],
        "training.skip_unfinished_episodes=false": False, "data.path=some where/a=b.jsonl": "some where/a=b.jsonl",
        "output_dir='3'": "3", "warm_start.steps=17": 17, "model.dtype=bfloat16": "bfloat16",
    }  # fmt: skip
    config = load_config(tmp_path / "top.yaml", list(overrides))
    expected = flat(load_config(tmp_path / "top.yaml")) | {text.partition("=")[0]: value for text, value in overrides.items()}
    assert flat(config) == expected
    assert flat(load_config(tmp_path / "top.yaml", ["training.seed=3", "training.seed=4"]))["training.seed"] == 4


def test_a_section_can_be_overridden_and_left_out(tmp_path):
    path = ROOT / "config_tiny.yaml"
    assert load_config(path, ["optimizer={betas: [0.5, 0.75]}"]).optimizer.betas == [0.5, 0.75]
    assert load_config(path, ["optimizer={betas: [0.5, 0.75]}"]).optimizer.eps == load_config(path).optimizer.eps
    assert load_config(path, ["warm_start=null"]).warm_start is None
    without = {key: value for key, value in TINY.items() if key != "warm_start"}
    (tmp_path / "without.yaml").write_text(yaml.safe_dump(without))
    assert load_config(tmp_path / "without.yaml").warm_start is None


# Catches: the conversion of text to float left out: YAML reads a number without a point as text.
@pytest.mark.parametrize(("text", "value"), [("1e-6", 1e-6), ("5E-7", 5e-7), ("1.0e-6", 1e-6), ("0.25", 0.25), (".5", 0.5)])
def test_a_float_may_be_written_without_a_point(tmp_path, text, value):
    (tmp_path / "a.yaml").write_text(f"extends: {ROOT / 'config_tiny.yaml'}\ntraining:\n  learning_rate: {text}\n")
    for config in (load_config(tmp_path / "a.yaml"), load_config(ROOT / "config_tiny.yaml", [f"training.learning_rate={text}"])):
        assert config.training.learning_rate == value
        assert type(config.training.learning_rate) is float


# ---------------------------------------------------------------- every field

WRONG_TYPES = {  # type of a field -> (value, the part of it that the message shows, what the message wants)
    str: [(v, v, "str") for v in (5, True, None, ["a"])],
    bool: [(v, v, "bool") for v in (1, 0.0, "yes please", None)],
    int: [(v, v, "int") for v in ("1e3", 3.0, True, None, [3])],
    float: [(v, v, "float") for v in ("fast", "", True, None, [0.5])],
    list[int]: [(v, v, "list") for v in (3, "3", None, [], {"a": 3})] + [([3, v], v, "int") for v in ("a", 3.5, True, [3])],
    list[float]: [(v, v, "list") for v in (0.5, "0.5", None, [])] + [([0.5, v], v, "float") for v in ("a", True, [0.5])],
}


@pytest.mark.parametrize(("key", "kind"), [field[:2] for field in FIELDS], ids=[field[0] for field in FIELDS])
def test_a_wrong_type_is_refused(tmp_path, key, kind):
    for value, shown, wanted in WRONG_TYPES[kind]:
        with pytest.raises(ValueError, match=re.escape(key)) as caught:
            load_with(tmp_path, {key: value})
        message = str(caught.value)
        assert message.startswith(f"{key}={shown!r} "), message
        assert wanted in message.removeprefix(f"{key}={shown!r}")


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_that_is_none_is_refused(tmp_path, section):
    for value in (3, "text", [1], True) + (() if section == "warm_start" else (None,)):
        with pytest.raises(ValueError, match="section") as caught:
            load_with(tmp_path, {section: value})
        assert str(caught.value).startswith(f"{section}={value!r} ")


def outside(kind, bounds: dict) -> list[tuple]:
    """(value, what the message wants) just outside each bound."""
    step = 1 if kind in (int, list[int]) else 0.5
    cases = []
    if "at_least" in bounds:
        cases += [(bounds["at_least"] - step, f"at least {bounds['at_least']}")]
    if "at_most" in bounds:
        cases += [(bounds["at_most"] + step, f"at most {bounds['at_most']}")]
    if "above" in bounds:
        cases += [(bounds["above"] - d, f"above {bounds['above']}") for d in (0.0, step)]
    if "below" in bounds:
        cases += [(bounds["below"] + d, f"below {bounds['below']}") for d in (0.0, step)]
    if "one_of" in bounds:
        cases += [(v, c) for v in ("neither", "", bounds["one_of"][0].upper()) for c in bounds["one_of"]]
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
        inside = flat(load_config(ROOT / "config_tiny.yaml"))[key]
        with pytest.raises(ValueError, match="must be") as caught:
            load_with(tmp_path, {key: [*inside, value] if isinstance(inside, list) else value})
        message = str(caught.value)
        assert message.startswith(f"{key}={value!r} must be"), message
        assert wanted in message.removeprefix(f"{key}={value!r}")


COMPANIONS = {  # what else must change for a field's lowest value to make sense
    "training.batch_size": {"training.num_questions_per_batch": 1},
    "data.max_target": {"data.min_target": 0},
    "warm_start.hidden_size": {"warm_start.num_heads": 1},
}


# Catches: >= turned into > in a test of _check; a bound raised by one.
@pytest.mark.parametrize(("key", "kind", "bounds"), BOUNDED, ids=[field[0] for field in BOUNDED])
def test_a_value_at_its_bound_is_taken(tmp_path, key, kind, bounds):
    values = [bounds[word] for word in ("at_least", "at_most") if word in bounds] + list(bounds.get("one_of", []))
    for value in values:
        value = [value, value] if typing.get_origin(kind) is list else value
        assert flat(load_with(tmp_path, COMPANIONS.get(key, {}) | {key: value}))[key] == value


# Catches: any bound of config.py dropped or widened. Written by hand: the tests above read the bounds from the code.
@pytest.mark.parametrize(
    ("section", "nonsense"),
    [
        ("model", ["device=tpu", "device=''", "dtype=float16", "dtype=fp32", "memory_gib=0"]),
        ("data", ["test_size=0", "num_numbers=[1]", "num_numbers=[3, 7]", "max_number=1", "min_target=-1", "max_target=0"]),
        ("data", ["synthetic_seed=-1"]),
        ("training", ["seed=-1", "max_steps=0", "batch_size=1", "num_questions_per_batch=0", "max_gen_len=0", "temperature=0"]),
        ("training", ["learning_rate=0", "learning_rate=1", "max_grad_norm=0", "micro_batch_tokens=0", "eval_interval=0"]),
        ("training", ["ckpt_save_interval=0", "keep_checkpoints=0", "max_skipped_steps=0", "reward_timeout=0"]),
        ("training", ["reward_errors=ignore"]),
        ("optimizer", ["betas=[0.9, 1.0]", "betas=[-0.1, 0.9]", "eps=0", "weight_decay=-0.01"]),
        ("warm_start", ["hidden_size=0", "num_layers=0", "num_heads=0", "steps=0", "batch_size=0", "seed=-1"]),
    ],
)
def test_nonsense_is_refused(section, nonsense):
    for text in nonsense:
        with pytest.raises(ValueError, match="must be") as caught:
            load_config(ROOT / "config_tiny.yaml", [f"{section}.{text}"])
        assert str(caught.value).startswith(f"{section}.{text.partition('=')[0]}=")


# ---------------------------------------------------------------- unknown and missing keys


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("training.learning_rat", "training.learning_rate"),
        ("training.batchsize", "training.batch_size"),
        ("optimizer.beta", "optimizer.betas"),
        ("warm_start.step", "warm_start.steps"),
        ("modle", "model"),
        ("tasks", "task"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, wrong, near):
    for load in (lambda: load_config(ROOT / "config_tiny.yaml", [f"{wrong}=1"]), lambda: load_with(tmp_path, {wrong: 1})):
        with pytest.raises(ValueError, match="unknown config key") as caught:
            load()
        assert str(caught.value) == f"unknown config key {wrong}; did you mean {near}?"


@pytest.mark.parametrize("override", ["zzz=1", "training.x.y=1", "=5", "1=2", "training.=3", ".=3", "extends=config.yaml"])
def test_an_unknown_key_that_is_near_to_nothing_is_still_refused(override):
    with pytest.raises(ValueError, match=r"unknown config key .*; did you mean \w+(\.\w+)?\?"):
        load_config(ROOT / "config_tiny.yaml", [override])


@pytest.mark.parametrize("key", [key for key, _, _ in FIELDS] + [s for s in SECTIONS if s != "warm_start"])
def test_a_missing_key_is_named(tmp_path, key):
    raw = copy.deepcopy(TINY)
    section, _, name = key.rpartition(".")
    del (raw[section] if section else raw)[name]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ValueError, match=rf"^config key {key} is missing; config\.yaml"):
        load_config(tmp_path / "short.yaml")


# ---------------------------------------------------------------- combinations

COMBINATIONS = {
    "no multiple": (["training.batch_size=100"], ["batch_size=100", "training.num_questions_per_batch=32", "multiple", "96"]),
    "less than one answer each": (["training.batch_size=31"], ["training.batch_size=31", "multiple", "64"]),
    "groups of one": (["training.batch_size=32"], ["training.batch_size=32", "groups of one", "256"]),
    "one beta": (["optimizer.betas=[0.9]"], ["optimizer.betas=[0.9]", "two numbers"]),
    "three betas": (["optimizer.betas=[0.9, 0.9, 0.9]"], ["optimizer.betas=[0.9, 0.9, 0.9]", "two numbers"]),
    "targets swapped": (["data.min_target=41"], ["data.min_target=41", "data.max_target=40"]),
    "heads of a fraction": (["warm_start.num_heads=3"], ["warm_start.hidden_size=128", "warm_start.num_heads=3", "multiple"]),
    "heads of an odd size": (["warm_start.hidden_size=12"], ["warm_start.hidden_size=12", "warm_start.num_heads=4", "multiple"]),
}


@pytest.mark.parametrize(("overrides", "wanted"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_an_impossible_combination_is_refused(overrides, wanted):
    with pytest.raises(ValueError, match="=") as caught:
        load_config(ROOT / "config_tiny.yaml", overrides)
    assert [part for part in wanted if part not in str(caught.value)] == []


def test_combinations_at_their_limit_are_taken():
    config = load_config(ROOT / "config_tiny.yaml", ["training.batch_size=64", "data.min_target=40", "warm_start.hidden_size=24"])
    assert (config.training.batch_size, config.data.min_target, config.warm_start.hidden_size) == (64, 40, 24)


# ---------------------------------------------------------------- files and overrides that cannot be read

MALFORMED = {
    "open bracket": "training: [1, 2\n",
    "tab": "training:\n\tseed: 1\n",
    "two values": "a: b: c\n",
    "an object": "a: !!python/name:os.system\n",
    "unknown alias": "a: *nowhere\n",
    "control character": "a: \0\n",
    "empty": "",
    "comment": "# nothing\n",
    "a list": "- task: x\n",
    "a word": "countdown\n",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_named(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml (is not YAML|holds a)"):
        load_config(tmp_path / "bad.yaml")


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"task: \xff\xfe\n")
    with pytest.raises(ValueError, match=r"bad\.yaml is not YAML"):
        load_config(tmp_path / "bad.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist.*config_tiny\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "a.yaml").write_text("extends: nowhere.yaml\n")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist"):
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
    ],
)
def test_a_malformed_override_is_refused(override, wanted):
    with pytest.raises(ValueError, match=wanted):
        load_config(ROOT / "config_tiny.yaml", [override])


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
        load_config(ROOT / "config_tiny.yaml", ["training.batch_size=127"])


def test_a_number_beyond_float_is_refused():
    with pytest.raises(ValueError, match=r"training\.temperature"):
        load_config(ROOT / "config_tiny.yaml", ["training.temperature=1" + "0" * 400])


@pytest.mark.parametrize("key", ["training.temperature", "training.reward_timeout", "optimizer.eps", "optimizer.weight_decay"])
def test_infinity_is_refused(key):
    with pytest.raises(ValueError, match=key):
        load_config(ROOT / "config_tiny.yaml", [f"{key}=.inf"])


def test_an_impossible_date_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"output_dir"):
        load_config(ROOT / "config_tiny.yaml", ["output_dir=2026-13-45"])
