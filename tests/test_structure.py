"""The house rules that can be read off the source: who imports whom, who prints, how much a function asks for, and that no
config field is idle. Only the project's own files are looked at: a user's task beside them is none of our business.
"""

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from harness.config import load_config

ROOT = Path(__file__).parent.parent

# What each file may import of ours: the floors of the house, the ground first. A new import is a new line here, and a reason.
ALLOWED = {
    "gpu": set(),
    "data_types": set(),
    "flat": set(),
    "published_format": set(),
    "optimizer": {"gpu", "data_types", "flat"},
    "qwen2_model": {"flat", "published_format"},
    "tokenizer": {"published_format"},
    "countdown_task": {"data_types", "published_format", "tokenizer"},
    "generate": {"gpu", "data_types", "qwen2_model"},
    "packing": {"data_types", "qwen2_model"},
    "grpo": {"data_types", "flat", "generate", "packing", "qwen2_model", "tokenizer"},
    "harness": set(),
    "harness.console": {"data_types"},
    "harness.checkpoint": {
        "harness.console",
        "data_types",
        "flat",
        "optimizer",
        "published_format",
        "qwen2_model",
        "tokenizer",
    },
    "harness.cpu": {"qwen2_model"},
    "harness.logs": {"harness.console", "published_format"},
    "harness.output": {"harness.config", "harness.console", "harness.logs"},
    "harness.parallel": {"data_types", "gpu", "harness.plan"},
    "harness.metrics": {"data_types"},
    "harness.rewards": {"harness.console", "data_types"},
    "harness.config": {"harness.rewards", "published_format"},
    "harness.plan": {"harness.config", "harness.cpu", "gpu", "grpo", "optimizer", "qwen2_model"},
    "harness.cuda": {"harness.config", "harness.plan", "gpu"},
    "harness.run": {
        "harness.checkpoint",
        "harness.config",
        "harness.console",
        "harness.cpu",
        "harness.cuda",
        "harness.metrics",
        "harness.output",
        "harness.parallel",
        "harness.plan",
        "harness.rewards",
        "data_types",
        "flat",
        "generate",
        "gpu",
        "grpo",
        "optimizer",
        "qwen2_model",
        "published_format",
        "tokenizer",
    },
    "train": {
        "generate",
        "grpo",
        "harness.run",
        "harness.rewards",
        "optimizer",
        "qwen2_model",
        "tokenizer",
    },
    "evaluate": {
        "harness.checkpoint",
        "harness.config",
        "harness.console",
        "harness.cpu",
        "harness.cuda",
        "harness.logs",
        "harness.metrics",
        "harness.rewards",
        "data_types",
        "generate",
        "grpo",
        "qwen2_model",
        "tokenizer",
    },
    "warm_start": {
        "harness.config",
        "harness.console",
        "harness.cpu",
        "countdown_task",
        "data_types",
        "flat",
        "grpo",
        "packing",
        "qwen2_model",
        "tokenizer",
    },
    "plot": {"harness.console", "harness.logs"},
}
ALGORITHM = (
    "data_types",
    "flat",
    "gpu",
    "published_format",
    "optimizer",
    "qwen2_model",
    "tokenizer",
    "countdown_task",
    "generate",
    "packing",
    "grpo",
)
PATHS = {
    n: ROOT / n.replace(".", "/") / "__init__.py"
    if n == "harness"
    else ROOT / (n.replace(".", "/") + ".py")
    for n in ALLOWED
}
SOURCES = {
    name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in PATHS.items()
}
PRINTS = {"evaluate", "harness.console", "plot", "warm_start"}
PACKAGE_OF = {"yaml": "pyyaml"}  # where a module is not named like its package
LATE = {
    "pyarrow",
    "tensorboard",
    "torch.utils.tensorboard",
    "matplotlib",
}  # of groups that may be left out: imported where used


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
    return [
        call.lineno
        for call in calls(tree)
        if isinstance(call.func, ast.Name) and call.func.id in functions
    ]


def test_every_file_of_the_project_has_its_place():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {
        ROOT / line
        for line in listed.splitlines()
        if line.count("/") == line.startswith("harness/")
    }
    assert tracked <= set(PATHS.values()), (
        "a new file is a new line in ALLOWED, with what it may import"
    )


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_imports_only_what_lies_below_it(name):
    imported = imports(SOURCES[name]) & SOURCES.keys()
    assert imported <= ALLOWED[name], f"{name}.py may not import {sorted(imported - ALLOWED[name])}"


def test_the_table_itself_has_no_circle():
    placed = set()
    while ready := {name for name in ALLOWED.keys() - placed if ALLOWED[name] <= placed}:
        placed |= ready
    assert placed == ALLOWED.keys(), f"these import each other: {sorted(ALLOWED.keys() - placed)}"


@pytest.mark.parametrize("name", ALGORITHM)
def test_no_file_of_the_algorithm_imports_the_harness(name):
    assert not [module for module in imports(SOURCES[name]) if module.split(".")[0] == "harness"]


def test_the_algorithm_knows_no_task_and_no_config():
    reached = set()
    while (
        more := {
            module
            for name in reached | {"grpo"}
            for module in imports(SOURCES[name]) & SOURCES.keys()
        }
        - reached
    ):
        reached |= more
    assert not reached & {"countdown_task", "train", "evaluate", "warm_start"}
    assert not any(name.startswith("harness") for name in reached)


def test_only_declared_packages_are_imported_and_never_the_reference():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    declared = {
        d.split(">")[0]
        for d in [
            *project["project"]["dependencies"],
            *groups["data"],
            *groups["log"],
            "matplotlib",
        ]
    }
    for name, tree in SOURCES.items():
        tops = (
            {module.split(".")[0] for module in imports(tree)}
            - SOURCES.keys()
            - sys.stdlib_module_names
        )
        assert not tops & {"transformers", "vllm"}
        assert {PACKAGE_OF.get(top, top) for top in tops} <= declared, name
        assert "matplotlib" not in tops or name == "plot"


def test_what_may_be_left_out_is_imported_where_it_is_used():
    for name, tree in SOURCES.items():
        at_the_head = {
            m
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for m in imports(node)
        }
        assert (
            not {m for m in at_the_head if m in LATE or m.split(".")[0] in LATE} or name == "plot"
        ), name


@pytest.mark.parametrize("name", SOURCES)
def test_no_text_is_run_as_code(name):
    assert not calls_of(SOURCES[name], "eval", "exec", "compile", "__import__"), name
    assert "pickle" not in imports(SOURCES[name]) or not [
        call
        for call in calls(SOURCES[name])
        if ast.unparse(call.func) in ("pickle.load", "pickle.loads", "pickle.Unpickler")
    ]
    for call in calls(SOURCES[name]):
        if ast.unparse(call.func) == "torch.load":
            safe = [
                k
                for k in call.keywords
                if k.arg == "weights_only" and ast.unparse(k.value) == "True"
            ]
            assert safe, (
                f"{name}.py:{call.lineno}: torch.load runs code from the file unless weights_only=True"
            )
        if ast.unparse(call.func) in ("importlib.import_module", "import_module"):
            assert name == "harness.rewards", (
                f"{name}.py:{call.lineno}: only rewards.py imports by name"
            )
        if ast.unparse(call.func) == "yaml.load":
            assert ast.unparse(call.args[1]) == "_Loader", (
                f"{name}.py:{call.lineno}: only a SafeLoader may read YAML"
            )
        assert ast.unparse(call.func) not in ("yaml.unsafe_load", "yaml.full_load", "os.system")


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - PRINTS))
def test_only_the_programs_and_their_console_print(name):
    assert not calls_of(SOURCES[name], "print"), (
        f"{name}.py prints; return the value, or have harness/console.py say it"
    )


@pytest.mark.parametrize("name", SOURCES)
def test_no_exception_is_swallowed_unnamed(name):
    bare = [
        node.lineno
        for node in ast.walk(SOURCES[name])
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert not bare, f"{name}.py: bare except in lines {bare}"


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_says_what_it_is(name):
    assert ast.get_docstring(SOURCES[name]), f"{name}.py has no docstring"


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


@pytest.mark.parametrize("name", [*ALGORITHM, "train"])
def test_a_function_asks_for_little(name):
    for function in functions(SOURCES[name]):
        a = function.args
        parameters = [
            p
            for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg)
            if p and p.arg not in ("self", "cls")
        ]
        limit = (
            10 if (name, function.name) in (("grpo", "rollout"), ("grpo", "update_policy")) else 8
        )
        assert len(parameters) <= limit, (
            f"{name}.py:{function.lineno}: {function.name} has {len(parameters)} parameters"
        )


# ---------------------------------------------------------------- the config


def config_fields(cls: type[BaseModel], section: str = "config"):
    """(section, field) of the configuration and of all its sections, the shipped task's `data` among them."""
    for name, field in cls.model_fields.items():
        yield section, name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from config_fields(field.annotation, name)


FIELDS = list(config_fields(type(load_config(ROOT / "config.yaml"))))


def test_the_fields_of_every_section_are_found():
    assert {section for section, _ in FIELDS} == {
        "config",
        "model",
        "data",
        "training",
        "optimizer",
    }


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=lambda value: value)
def test_every_config_field_is_read(section, field):
    for name, tree in SOURCES.items():
        for node in ast.walk(tree) if name != "harness.config" else ():
            if (
                isinstance(node, ast.Attribute)
                and node.attr == field
                and isinstance(node.ctx, ast.Load)
            ):
                owner = (
                    node.value.id
                    if isinstance(node.value, ast.Name)
                    else getattr(node.value, "attr", None)
                )
                if owner == section:
                    return
    pytest.fail(f"nothing outside config.py reads {section}.{field}: a knob that turns nothing")
