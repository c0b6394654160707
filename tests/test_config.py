"""How the config is read: shipped files, conversions, extends, overrides, fault messages."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from harness.config import Config, as_yaml, load_config

ROOT = Path(__file__).parent.parent
TINY = ROOT / "config_tiny.yaml"
SHIPPED = (
    "config.yaml",
    "config_24GB.yaml",
    "config_16GB.yaml",
    "config_tiny.yaml",
    "examples/config_gsm8k.yaml",
)
GENERATED = {"num_numbers", "max_number", "min_target", "max_target", "synthetic_seed"}


def flatten(raw: dict) -> dict:
    """{"training": {"seed": 1}} becomes {"training.seed": 1}."""
    values = {}
    for name, value in raw.items():
        if isinstance(value, dict):
            values |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            values[name] = value
    return values


def flat(config: Config) -> dict:
    return flatten(config.model_dump())


def extend(tmp_path: Path, text: str) -> Path:
    """A file with the given YAML on top of config_tiny.yaml."""
    path = tmp_path / "extended.yaml"
    path.write_text(f"extends: {TINY}\n{text}")
    return path


def faults(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(path, list(overrides))
    return str(caught.value).splitlines()


# ---------------------------------------------------------------- shipped files


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_loads_and_names_only_what_differs(name):
    config = load_config(str(ROOT / name))
    assert config == load_config(ROOT / name)
    if name != "config.yaml":
        default = flat(load_config(ROOT / "config.yaml"))
        named = flatten(yaml.safe_load((ROOT / name).read_text())).keys() - {"extends"}
        assert {key for key, value in flat(config).items() if default.get(key) != value} == named


def test_config_yaml_documents_every_key():
    text = (ROOT / "config.yaml").read_text()
    lines = [line for line in text.splitlines() if re.match(r" *\w+: +[^ #]", line)]
    assert [line for line in lines if not re.search(r" # \w", line)] == []
    raw = flatten(yaml.safe_load(text))
    assert [line.split(":")[0].strip() for line in lines] == [key.split(".")[-1] for key in raw]
    known = flat(load_config(ROOT / "config.yaml")).keys()
    assert raw.keys() == known - {f"data.{name}" for name in GENERATED}


def test_a_config_is_frozen():
    config = load_config(TINY)
    for section, name in (config, "task"), (config.training, "seed"), (config.data, "test_size"):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 3)


# ---------------------------------------------------------------- conversions, extends, overrides


# PyYAML reads 1e-6, without a point, as text.
@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "'0.5'", "2"])
def test_a_number_may_be_written_in_any_usual_form(tmp_path, text):
    in_file = load_config(extend(tmp_path, f"training: {{temperature: {text}}}"))
    overridden = load_config(TINY, [f"training.temperature={text}"])
    for config in in_file, overridden:
        assert config.training.temperature == float(text.strip("'"))
        assert type(config.training.temperature) is float


def test_extends_changes_only_what_it_names(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "middle.yaml").write_text(
        f"extends: {TINY}\ntraining: {{max_steps: 7, seed: 11}}\ndata: {{num_numbers: [4, 5]}}\n"
    )
    (tmp_path / "deep/top.yaml").write_text(
        "training:\n  seed: 13\nextends: ../middle.yaml\noutput_dir: elsewhere\n"
    )
    assert flat(load_config(tmp_path / "deep/top.yaml")) == flat(load_config(TINY)) | {
        "training.max_steps": 7,
        "training.seed": 13,
        "data.num_numbers": [4, 5],
        "output_dir": "elsewhere",
    }


def test_a_file_that_extends_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    assert faults(tmp_path / "a.yaml") == [
        f"{tmp_path}/a.yaml extends itself (a.yaml -> b.yaml -> a.yaml); remove one `extends:`"
    ]


def test_overrides_have_the_last_word(tmp_path):
    path = extend(tmp_path, "training: {seed: 11}")
    overrides = {
        "training.seed=3": 3,
        "data.num_numbers=[2, 6]": [2, 6],
        "training.skip_unfinished_episodes=true": True,
        "model.memory_gib=null": None,
        "training.batch_size=64": 64,  # groups of two, the smallest
        "data.min_target=40": 40,  # equal to max_target
    }
    expected = {text.partition("=")[0]: value for text, value in overrides.items()}
    expected |= {"optimizer.betas": [0.5, 0.75]}
    config = load_config(path, ["training.seed=4", *overrides, "optimizer={betas: [0.5, 0.75]}"])
    assert flat(config) == flat(load_config(path)) | expected


@pytest.mark.parametrize("key", ["output_dir", "model.path", "data.path"])
@pytest.mark.parametrize("text", ["exp #2", "2026", "2026-11-24", "null", "'a'", "a: b=c", "[x"])
def test_the_override_of_a_text_key_is_taken_as_it_is(key, text):
    assert flat(load_config(TINY, [f"{key}={text}"]))[key] == text


@pytest.mark.parametrize("key", ["output_dir", "model.path", "data.path"])
def test_the_home_directory_is_expanded(tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "output_dir: ~/a~b\nmodel: {path: ~/a~b}\ndata: {path: ~/a~b}\n"
    for config in load_config(TINY, [f"{key}=~/a~b"]), load_config(extend(tmp_path, text)):
        assert flat(config)[key] == f"{tmp_path}/a~b"


def test_a_base_file_in_the_home_directory_is_extended(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text(f"extends: {TINY}\noutput_dir: x\n")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/a.yaml").write_text("extends: ~/base.yaml\n")
    assert load_config(tmp_path / "inner/a.yaml").output_dir == "x"


@pytest.mark.parametrize("kind", ["str | None", "Path", "Path | None", "Annotated[str, Field()]"])
def test_a_text_key_of_a_task_may_be_declared_in_any_form(tmp_path, monkeypatch, kind):
    # Catches: only `str` taken as text, so that "exp #2" becomes "exp" and "007" a number.
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    name = f"task_with_{''.join(filter(str.isalpha, kind))}"
    imports = "from pathlib import Path\nfrom typing import Annotated\n"
    imports += "from pydantic import BaseModel, Field\n"
    data = f"class Data(BaseModel):\n    path: {kind} = 'x'\n    test_size: int = 1\n"
    (tmp_path / f"{name}.py").write_text(imports + TASK + data)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(load_config(TINY).model_dump() | {"data": {}}))
    for text in ("exp #2", "007", "2024"):
        assert str(load_config(path, [f"task={name}", f"data.path={text}"]).data.path) == text
    home = load_config(path, [f"task={name}", "data.path=~/a"]).data.path
    assert str(home) == f"{tmp_path}/a"
    if "None" in kind:
        assert load_config(path, [f"task={name}", "data.path=null"]).data.path is None


# Catches: json.dumps in place of yaml.safe_dump.
@settings(max_examples=100, deadline=None)
@given(
    st.text(min_size=1).filter(lambda text: not text.startswith("~"))
    | st.sampled_from(["1e3", "010", "1:30", "nULL", "yEs", "2026-11-24", "a: b", "&a", "é\u2028"])
)
def test_a_written_config_reads_back_unchanged(tmp_path_factory, text):
    written = tmp_path_factory.mktemp("written") / "config.yaml"
    config = load_config(TINY, [f"output_dir={text}", "training.learning_rate=1e-6"])
    written.write_text(as_yaml(config), encoding="utf-8")
    assert load_config(written) == config


# ---------------------------------------------------------------- unknown, missing and wrong values


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("training.learning_rat", "training.learning_rate"),
        ("training.lr", "training.learning_rate"),
        ("training.bs", "training.batch_size"),
        ("training.steps", "training.max_steps"),  # not optimizer.eps
        ("learning_rate", "training.learning_rate"),
        ("training.betas", "optimizer.betas"),
        ("model.tset_size", "data.test_size"),
        ("data.pth", "data.path"),  # and not model.path
        ("modle", "model"),
        ("training.kl_coef", None),
        ("extends", None),
        ("", None),
    ],
)
def test_an_unknown_key_names_the_nearest(wrong, near):
    wanted = f"did you mean {near}?" if near else "config.yaml shows every key"
    assert faults(TINY, f"{wrong}=1") == [f"unknown config key {wrong}; {wanted}"]


def test_a_missing_key_takes_its_default_or_is_named(tmp_path):
    path, raw = tmp_path / "short.yaml", load_config(TINY).model_dump()
    del raw["model"]["memory_gib"], raw["training"]["warmup_steps"], raw["data"]["max_number"]
    path.write_text(yaml.safe_dump(raw))
    config = load_config(path)
    assert (config.model.memory_gib, config.training.warmup_steps) == (None, 0)
    assert config.data.max_number == 99
    del raw["task"], raw["model"], raw["training"]["max_steps"]
    path.write_text(yaml.safe_dump(raw))
    assert faults(path) == [
        f"config key {key} is missing; config.yaml shows every key and its meaning"
        for key in ("task", "model", "training.max_steps")
    ]


# Catches: any bound of config.py dropped or widened.
@pytest.mark.parametrize(
    ("section", "wrong_values"),
    [
        ("model", "device=tpu dtype=float16 memory_gib=0 path="),
        ("training", "seed=-1 max_steps=0 max_steps=1000000001 batch_size=0 batch_size=1000032"),
        ("training", "num_questions_per_batch=0 max_gen_len=0 temperature=0 temperature=1e7"),
        ("training", "learning_rate=0 learning_rate=1 warmup_steps=-1 max_grad_norm=0"),
        ("training", "micro_batch_tokens=0 eval_interval=0 ckpt_save_interval=0"),
        ("training", "keep_checkpoints=0 max_skipped_steps=0 reward_timeout=0"),
        ("training", "reward_timeout=3601 reward_errors=ignore skip_unfinished_episodes=perhaps"),
        ("training", "seed=1.5 seed=x seed=null max_grad_norm=.inf temperature=.nan seed=[1]"),
        ("data", "test_size=0 num_numbers=[1] num_numbers=[3,7] num_numbers=[] max_number=1"),
        ("data", "min_target=-1 max_target=0 synthetic_seed=-1 test_size=1000001"),
        ("optimizer", "betas=[0.9,1.0] betas=[-0.1,0.9] betas=0.9 betas=[] betas=[x,0.9]"),
        ("optimizer", "eps=0 eps=1e-46 weight_decay=-0.01 weight_decay=1.5 offload=2"),
    ],
)
def test_a_value_out_of_bounds_or_of_another_type_is_refused(section, wrong_values):
    for text in wrong_values.split():
        key = f"{section}.{text.partition('=')[0]}"
        (fault,) = faults(TINY, f"{section}.{text}")
        assert re.match(rf"{re.escape(key)}(\.[01])?=.* must (be|have) ", fault)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("output_dir: 2026", "output_dir=2026 must be text, in quotes if needed"),
        ("task: [x]", "task=['x'] must be text, in quotes if needed"),
        ("training: 3", "training=3 must be a section of key: value lines"),
        ("model:", "model=None must be a section of key: value lines"),
    ],
)
def test_another_kind_of_value_in_a_file_is_refused(tmp_path, text, wanted):
    assert faults(extend(tmp_path, text)) == [wanted]


def test_every_fault_is_named_at_once(tmp_path):
    text = "training: {max_steps: 0, max_gen_len: long}\noptimizer: {betas: [0.9]}\nsed: 3\n"
    assert faults(extend(tmp_path, text)) == [
        "training.max_steps=0 must be greater than or equal to 1",
        "training.max_gen_len='long' must be a valid integer, unable to parse string as an integer",
        "optimizer.betas=[0.9] must be two numbers, for example [0.9, 0.999]",
        "unknown config key sed; did you mean training.seed?",
    ]


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("training.batch_size=100", "training.num_questions_per_batch=32; the nearest is 96"),
        ("training.batch_size=127", "must be a multiple of .*; the nearest is 128"),
        ("training.batch_size=31", "must be a multiple of .*; the nearest is 64"),
        ("training.batch_size=32", "groups of one answer, .*; set it to 256, or lower"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", r"must be two numbers, for example \[0.9, 0.999\]"),
        ("data.min_target=41", "is above data.max_target=40"),
        ("training.seed", "is not an override; write key.path=value"),
        ("training.seed=[}", "is not YAML: .*line 1"),
    ],
)
def test_an_impossible_override_is_refused(override, wanted):
    (fault,) = faults(TINY, override)
    assert re.match(f"{re.escape(override)} .*{wanted}", fault.replace("'", ""))


# ---------------------------------------------------------------- the task's own keys

TASK = """
def load_problems(data): ...
def render_prompt(problem, tokenizer): ...
def reward_function(response, **problem): ...
"""
DATA = """
from pydantic import BaseModel, model_validator

class Data(BaseModel, extra="forbid"):
    languages: list[str]
    path: str = "words"

    @model_validator(mode="after")
    def check(self):
        assert self.languages, "no language"
        return self
"""


def test_a_task_declares_the_keys_of_data(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "task_with_keys.py").write_text(TASK + DATA)
    (tmp_path / "task_without_keys.py").write_text(TASK)
    path = tmp_path / "config.yaml"
    raw = load_config(TINY).model_dump()
    path.write_text(yaml.safe_dump(raw | {"data": {"languages": ["en"]}}))
    with_keys = load_config(path, ["task=task_with_keys", "data.path=2026"])
    assert with_keys.data.model_dump() == {"languages": ["en"], "path": "2026"}
    assert faults(path, "task=task_with_keys", "data.languages=[]") == ["data: no language"]
    assert faults(path, "task=task_without_keys", "data.path=x", "data.tset_size=3") == [
        "config key data.test_size is missing; config.yaml shows every key and its meaning",
        "unknown config key data.languages; the task declares the keys of this section: "
        "data.path, data.test_size",
        "unknown config key data.tset_size; did you mean data.test_size?",
    ]


# ---------------------------------------------------------------- files that cannot be read


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: 1\nb: [1, 2\n", r"is not YAML: expected ',' or ']', .* \(line 3\)"),
        ("a: 2026-13-45\n", "is not YAML: month must be in 1..12"),
        ("a: \0\n", "is not YAML: unacceptable character"),
        ("# nothing\n", "holds None; write key: value lines"),
        ("# much\n" * 20_000, "has 140,000 bytes, more than 100,000"),
        (b"task: \xff\xfe\n", "is not UTF-8 text"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, text, wanted):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (fault,) = faults(path)
    assert re.match(f"{re.escape(str(path))} {wanted}", fault)


def test_a_missing_file_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: nowhere.yaml\n")
    for path in (tmp_path / "nowhere.yaml", tmp_path / "a.yaml"):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist"):
            load_config(path)


def test_an_unknown_key_of_the_task_names_the_keys_that_the_task_has():
    # Catches: a suggestion from another section. config.yaml does not show the keys of all tasks.
    with pytest.raises(ValueError, match=r"declares the keys of this section: data\.path, "):
        load_config(ROOT / "config_tiny.yaml", ["task=examples.gsm8k_task"])
