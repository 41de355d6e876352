"""The shape of the house: who may import whom, who owns which third party, and how long things may be."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = """
errors schema state schedule redaction
rendezvous
meeting
dist log config watch digests sharing attention callbacks
data losses tracking models meter cost remedies
cache incarnation
tasks teacher student memory
zero checkpoint export evaluation report metrics runfolder planning onnx_export
predicting nearest pseudo
trainer parts hosts
resume compare asking placement staging
build capture finish
looking
distiller
launch data_tools
benchmarks
tests
"""
ROW_OF = {unit: number for number, row in enumerate(ROWS.strip().splitlines()) for unit in row.split()}
OUTSIDE = ("launch", "data_tools", "benchmarks", "tests")
EVERYWHERE = ("tests", "benchmarks")
OWNERS = {
    "deepspeed": ("engine/zero", *EVERYWHERE),
    "wandb": ("engine/tracking", *EVERYWHERE),
    "tensorboard": ("engine/tracking", *EVERYWHERE),
    "webdataset": ("engine/data/shards.py", "engine/data/shard_writer.py", *EVERYWHERE),
    "datasets": ("engine/tasks", "data_tools", *EVERYWHERE),
    "pyarrow": ("data_tools", *EVERYWHERE),
    "transformers": ("engine/models.py", "engine/attention.py", "engine/student", "engine/teacher", "engine/tasks",
                     "engine/export.py", *EVERYWHERE),
}  # fmt: skip
TYPES = {"PreTrainedModel", "PreTrainedConfig", "PreTrainedTokenizerBase"}
"""What others may import of transformers: names for annotations."""
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 80
"""Functions everywhere; files but for those of tests, which keep together what belongs to one subject."""
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}

Imported = tuple[str, str]
"""(module, name imported from it or "")"""


def sources() -> list[Path]:
    tops = ["engine", *OUTSIDE]
    return sorted(path for top in tops for path in (ROOT / top).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


def imports(path: Path) -> Iterator[Imported]:
    """Wherever in the file they are, except those that only type checkers see."""
    unseen = {
        id(inner)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree_of(path)):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            yield from ((node.module or "", alias.name) for alias in node.names)


def unit_of(module: str, name: str = "") -> str | None:
    """The row's word for a module of ours; None for others, and for the engine's front door."""
    first, *rest = module.split(".")
    if first in OUTSIDE:
        return first
    inner = rest[0] if rest else name
    return inner if first == "engine" and inner in ROW_OF else None


def home(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_module_of_the_engine_has_a_row() -> None:
    units = {
        path.stem for path in (ROOT / "engine").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert units - {"__init__"} == set(ROW_OF) - set(OUTSIDE)


def test_modules_import_only_from_rows_above_their_own() -> None:
    wrong = []
    for path in sources():
        own = unit_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module, name in imports(path):
            other = unit_of(module, name)
            if own and other and other != own and ROW_OF[other] >= ROW_OF[own]:
                wrong.append(f"{home(path)} imports {module}")
    assert wrong == []


def test_each_third_party_has_one_owner() -> None:
    wrong = []
    for path in sources():
        for module, name in imports(path):
            owners = OWNERS.get(module.split(".")[0])
            if owners is None or any(home(path) == owner or home(path).startswith(owner + "/") for owner in owners):
                continue
            if not (module == "transformers" and name in TYPES):
                wrong.append(f"{home(path)} imports {module} {name}".rstrip())
    assert wrong == []


def test_no_script_hides_a_module_that_others_import() -> None:
    """A script's own folder comes first on sys.path: launch/evaluate.py would break ``import evaluate``."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    scripts = [path for top in ("launch", "data_tools", "benchmarks") for path in (ROOT / top).glob("*.py")]
    assert [home(path) for path in scripts if path.stem != "__init__" and path.stem in taken] == []


def test_files_and_functions_fit_their_budgets() -> None:
    wrong = []
    for path in sources():
        num_lines = len(path.read_text().splitlines())
        if num_lines > MAX_FILE_LINES and not home(path).startswith("tests/"):
            wrong.append(f"{home(path)}: {num_lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                if (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
                    wrong.append(f"{home(path)}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
    assert wrong == []


def test_names_say_what_is_inside() -> None:
    assert [home(path) for path in sources() if VAGUE & set(path.relative_to(ROOT).with_suffix("").parts)] == []


@pytest.mark.parametrize("module", ["load", "resolve", "document"])
def test_reading_a_config_needs_no_torch(module: str) -> None:
    program = f"import engine.config.{module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0
