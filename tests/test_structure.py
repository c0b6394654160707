"""The house rules that can be checked in the source, and the files that the pages name.

Only the project's own files are checked, not a user's task beside them.
"""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from harness.config import load_config

ROOT = Path(__file__).parent.parent

# Every file may import only from the files before it, and a program is imported by no other file.
ALGORITHM = [
    *("data_types", "gpu", "published_format", "flat", "optimizer", "qwen2_model", "tokenizer"),
    *("generate", "packing", "grpo"),
]
TASKS = ["countdown_task"]
HARNESS = [
    *("harness", "harness.console", "harness.log", "harness.metrics", "harness.cpu"),
    *("harness.rewards", "harness.config", "harness.plan", "harness.cuda", "harness.distributed"),
    *("harness.checkpoint", "harness.process", "harness.run"),
]
PROGRAMS = ["train", "evaluate", "plot", "warm_start"]
ORDER = [*ALGORITHM, *TASKS, *HARNESS, *PROGRAMS]

PRINTS = {"evaluate", "harness.console", "plot", "warm_start"}
PACKAGE_OF = {"yaml": "pyyaml"}
# Packages of dependency groups that may be missing.
OPTIONAL = {"pyarrow", "tensorboard", "torch.utils.tensorboard", "matplotlib"}


def path_of(name: str) -> Path:
    relative = name.replace(".", "/")
    return ROOT / (f"{relative}/__init__.py" if name == "harness" else f"{relative}.py")


SOURCES = {name: ast.parse(path_of(name).read_text(encoding="utf-8")) for name in ORDER}


def imports(tree: ast.AST) -> set[str]:
    """Full names of the modules that a tree imports, except those for type checkers only."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If)]
    for_types = [block for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING"]
    ignored = {node for block in for_types for node in ast.walk(block)}
    names = set()
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "harness":
            names |= {f"harness.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: the files are not a package"
            names.add(node.module)
    return names


def calls(tree: ast.AST) -> list[tuple[str, int]]:
    """(function as it is written, line) of every call."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), call.lineno) for call in found]


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


# ---------------------------------------------------------------- imports


def test_every_file_of_the_project_is_in_the_order():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "*.py", "harness/*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {
        line for line in listed.splitlines() if "/" not in line or line.startswith("harness")
    }
    assert tracked == {str(path_of(name).relative_to(ROOT)) for name in ORDER}


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_files_before_it(name):
    allowed = set(ORDER[: ORDER.index(name)]) - set(PROGRAMS)
    wrong = (imports(SOURCES[name]) & set(ORDER)) - allowed
    assert not wrong, f"{name}.py may not import {sorted(wrong)}"


def test_only_declared_packages_are_imported_and_never_the_reference():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    dependencies = [*project["project"]["dependencies"], *groups["data"], *groups["log"]]
    declared = {dependency.split(">")[0] for dependency in dependencies} | {"matplotlib"}
    for name, tree in SOURCES.items():
        tops = {module.split(".")[0] for module in imports(tree)}
        tops -= set(ORDER) | sys.stdlib_module_names
        assert {PACKAGE_OF.get(top, top) for top in tops} <= declared, name
        assert "matplotlib" not in tops or name == "plot"


@pytest.mark.parametrize("name", sorted(set(ORDER) - {"plot"}))
def test_optional_packages_are_imported_where_they_are_used(name):
    statements = [n for n in SOURCES[name].body if isinstance(n, ast.Import | ast.ImportFrom)]
    at_the_top = {module for node in statements for module in imports(node)}
    assert not {m for m in at_the_top if m in OPTIONAL or m.split(".")[0] in OPTIONAL}


# ---------------------------------------------------------------- code


@pytest.mark.parametrize("name", ORDER)
def test_no_text_from_outside_is_run_as_code(name):
    forbidden = {"eval", "exec", "compile", "__import__", "os.system"}
    forbidden |= {"pickle.load", "pickle.Unpickler", "torch.load"}
    forbidden |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}
    if name != "harness.rewards":  # imports the task; its worker unpickles what the run sends
        forbidden |= {"importlib.import_module", "import_module", "pickle.loads"}
    assert not [(call, line) for call, line in calls(SOURCES[name]) if call in forbidden]


@pytest.mark.parametrize("name", sorted(set(ORDER) - PRINTS))
def test_only_programs_and_their_console_print(name):
    assert "print" not in dict(calls(SOURCES[name])), f"{name}.py: use harness/console.py instead"


@pytest.mark.parametrize("name", ORDER)
def test_no_exception_is_caught_without_a_name(name):
    handlers = [n for n in ast.walk(SOURCES[name]) if isinstance(n, ast.ExceptHandler)]
    assert not [handler.lineno for handler in handlers if handler.type is None]


@pytest.mark.parametrize("name", ORDER)
def test_a_file_says_what_it_is(name):
    assert ast.get_docstring(SOURCES[name]), f"{name}.py has no docstring"


@pytest.mark.parametrize("name", ORDER)
def test_a_function_fits_on_a_screen(name):
    limit = 100 if name in PROGRAMS else 60
    for function in functions(SOURCES[name]):
        docstring = (ast.get_docstring(function) or "").count("\n")
        length = function.end_lineno - function.lineno + 1 - docstring
        assert length <= limit, f"{name}.py: {function.name} has {length} lines"


@pytest.mark.parametrize("name", [*ALGORITHM, "train"])
def test_a_function_takes_few_arguments(name):
    for function in functions(SOURCES[name]):
        arguments = function.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        count = len([p for p in parameters if p.arg not in ("self", "cls")])
        limit = 11 if function.name in ("rollout", "update_policy") else 8
        assert count <= limit, f"{name}.py: {function.name} takes {count} arguments"


# ---------------------------------------------------------------- config and pages


def config_fields(cls: type[BaseModel], section: str = "config"):
    """(section, field) of the config and its sections, including the shipped task's `data`."""
    for name, field in cls.model_fields.items():
        yield section, name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from config_fields(field.annotation, name)


FIELDS = list(config_fields(type(load_config(ROOT / "config.yaml"))))


def test_the_fields_of_every_section_are_found():
    sections = {section for section, _ in FIELDS}
    assert sections == {"config", "model", "data", "training", "optimizer"}


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=lambda value: value)
def test_every_config_field_is_read(section, field):
    for name, tree in SOURCES.items():
        for node in ast.walk(tree) if name != "harness.config" else ():
            if isinstance(node, ast.Attribute) and node.attr == field:
                owner = ast.unparse(node.value).rpartition(".")[2]
                if owner == section and isinstance(node.ctx, ast.Load):
                    return
    pytest.fail(f"nothing outside config.py reads {section}.{field}")


@pytest.mark.parametrize("page", ["README.md", *[f"docs/{p.name}" for p in ROOT.glob("docs/*.md")]])
def test_a_page_names_only_files_that_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)", text)
    paths = {(ROOT / page).parent / link for link in links if "://" not in link}
    paths |= {ROOT / script for script in re.findall(r"uv run ([\w/]+\.py)", text)}
    assert not [str(path) for path in paths if not path.resolve().exists()]
