"""The house rules that can be read off the source: who imports whom, who prints, and that no config field is idle."""

import ast
import dataclasses
import shutil
import subprocess
import sys
import tomllib
import types
import typing
from pathlib import Path

import pytest

from harness.config import Config

ROOT = Path(__file__).parent.parent

# What each file may import of ours: the floors of the house, the ground first. A new import is a new line here, and a reason.
# No file of the algorithm imports anything of harness/.
ALLOWED = {
    "data_types": set(),
    "optimizer": set(),
    "qwen2_model": set(),
    "tokenizer": set(),
    "countdown_task": {"data_types", "tokenizer"},
    "generate": {"qwen2_model"},
    "packing": {"data_types", "qwen2_model"},
    "grpo": {"data_types", "generate", "packing", "qwen2_model", "tokenizer"},
    "harness": set(),
    "harness.config": set(),
    "harness.logs": set(),
    "harness.metrics": {"data_types"},
    "harness.tasks": {"data_types", "tokenizer"},
    "harness.checkpoint": {"optimizer", "qwen2_model", "tokenizer"},
    "harness.plan": {"harness.config", "grpo", "optimizer", "qwen2_model"},
    "evaluate": {
        "harness.checkpoint", "harness.config", "data_types", "generate", "grpo", "harness.metrics", "harness.plan", "qwen2_model",
        "harness.logs", "harness.tasks", "tokenizer",
    },
    "warm_start": {"harness.config", "countdown_task", "data_types", "grpo", "packing", "qwen2_model", "tokenizer"},
    "train": {
        "harness.checkpoint", "harness.config", "data_types", "evaluate", "grpo", "harness.metrics", "optimizer", "harness.plan",
        "qwen2_model", "harness.logs", "harness.tasks", "tokenizer", "warm_start",
    },
    "plot": {"harness.config"},
}  # fmt: skip
PATHS = {n: ROOT / n.replace(".", "/") / "__init__.py" if n == "harness" else ROOT / (n.replace(".", "/") + ".py") for n in ALLOWED}
SOURCES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in PATHS.items()}
PRINTS = {"train", "evaluate", "plot"}
PACKAGE_OF = {"yaml": "pyyaml"}  # where a module is not named like its package
LATE = {"pyarrow", "tensorboard", "torch.utils.tensorboard", "matplotlib"}  # of groups that may be left out: imported where used


def imports(tree: ast.AST) -> set[str]:
    """Full names of the modules that a tree imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: the files are no package"
            whole = node.module == "harness"  # from harness import checkpoint
            names |= {f"harness.{alias.name}" for alias in node.names} if whole else {node.module}
    return names


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def calls_of(tree: ast.AST, *functions: str) -> list[int]:
    """Lines that call a function by its bare name."""
    return [call.lineno for call in calls(tree) if isinstance(call.func, ast.Name) and call.func.id in functions]


def test_every_file_of_the_project_has_its_place():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {ROOT / line for line in listed.splitlines() if line.count("/") == line.startswith("harness/")}
    assert tracked == set(PATHS.values()), "a new file is a new line in ALLOWED, with what it may import"


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_imports_only_what_lies_below_it(name):
    imported = imports(SOURCES[name]) & SOURCES.keys()
    assert imported <= ALLOWED[name], f"{name}.py may not import {sorted(imported - ALLOWED[name])}"


def test_the_table_itself_has_no_circle():
    placed = set()
    while ready := {name for name in ALLOWED.keys() - placed if ALLOWED[name] <= placed}:
        placed |= ready
    assert placed == ALLOWED.keys(), f"these import each other: {sorted(ALLOWED.keys() - placed)}"


def test_the_algorithm_knows_no_task_and_no_config():
    reached = set()
    while more := {module for name in reached | {"grpo"} for module in imports(SOURCES[name]) & SOURCES.keys()} - reached:
        reached |= more
    assert not reached & {"countdown_task", "train", "evaluate", "warm_start"}
    assert not any(name.startswith("harness") for name in reached)


def test_only_declared_packages_are_imported_and_never_the_reference():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    declared = {d.split(">")[0] for d in [*project["project"]["dependencies"], *groups["data"], *groups["log"], "matplotlib"]}
    for name, tree in SOURCES.items():
        tops = {module.split(".")[0] for module in imports(tree)} - SOURCES.keys() - sys.stdlib_module_names
        assert not tops & {"transformers", "vllm"}
        assert {PACKAGE_OF.get(top, top) for top in tops} <= declared, name
        assert "matplotlib" not in tops or name == "plot"


def test_what_may_be_left_out_is_imported_where_it_is_used():
    for name, tree in SOURCES.items():
        at_the_head = {m for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for m in imports(node)}
        assert not {m for m in at_the_head if m in LATE or m.split(".")[0] in LATE} or name == "plot", name


@pytest.mark.parametrize("name", SOURCES)
def test_no_text_is_run_as_code(name):
    assert not calls_of(SOURCES[name], "eval", "exec", "compile", "__import__"), name
    assert "pickle" not in imports(SOURCES[name]) or not [
        call for call in calls(SOURCES[name]) if ast.unparse(call.func) in ("pickle.load", "pickle.loads", "pickle.Unpickler")
    ]
    for call in calls(SOURCES[name]):
        if ast.unparse(call.func) == "torch.load":
            safe = [k for k in call.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
            assert safe, f"{name}.py:{call.lineno}: torch.load runs code from the file unless weights_only=True"
        if ast.unparse(call.func) in ("importlib.import_module", "import_module"):
            assert name == "harness.tasks", f"{name}.py:{call.lineno}: only tasks.py imports by name"
        if ast.unparse(call.func) == "yaml.load":
            assert ast.unparse(call.args[1]) == "_Loader", f"{name}.py:{call.lineno}: only a SafeLoader may read YAML"
        assert ast.unparse(call.func) not in ("yaml.unsafe_load", "yaml.full_load", "os.system")


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - PRINTS))
def test_only_the_programs_print(name):
    assert not calls_of(SOURCES[name], "print"), f"{name}.py prints; return the value, or call a progress callback"


@pytest.mark.parametrize("name", SOURCES)
def test_no_exception_is_swallowed_unnamed(name):
    bare = [node.lineno for node in ast.walk(SOURCES[name]) if isinstance(node, ast.ExceptHandler) and node.type is None]
    assert not bare, f"{name}.py: bare except in lines {bare}"


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_says_what_it_is(name):
    assert ast.get_docstring(SOURCES[name]), f"{name}.py has no docstring"


def config_fields(cls=Config, section: str = "config"):
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        kind = typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind
        yield section, field.name
        if dataclasses.is_dataclass(kind):
            yield from config_fields(kind, field.name)


OWNERS = {"warm_start": {"warm_start", "warm"}}  # other names that a section goes by


@pytest.mark.parametrize(("section", "field"), list(config_fields()), ids=lambda value: value)
def test_every_config_field_is_read(section, field):
    owners = OWNERS.get(section, {section})
    for name, tree in SOURCES.items():
        for node in ast.walk(tree) if name != "harness.config" else ():
            if isinstance(node, ast.Attribute) and node.attr == field and isinstance(node.ctx, ast.Load):
                owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", None)
                if owner in owners:
                    return
    pytest.fail(f"nothing outside config.py reads {section}.{field}: a knob that turns nothing")
