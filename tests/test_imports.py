"""The import rules of DESIGN.md, by walking the syntax tree of every file."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "core": {"core"},
    "data": {"core", "data"},
    "model": {"core", "model"},
    "train": {"core", "data", "model", "infer", "train"},
    "infer": {"core", "data", "model", "infer"},
    "evals": {"core", "data", "model", "infer", "evals"},
    "configs": {"core", "data", "model", "train", "infer", "evals"},
}
# A config file chooses: it imports dataclasses of sections, presets, and the config of a bundle.
CONFIGS_MAY_IMPORT = {
    "core.checkpoint",
    "core.sharding",
    "model",
    "model.attention.spec",
    "model.ops.rope",
}
MAX_LINES, MAX_FILES = 400, 12

FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
MODULES = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in FILES]
TREES = {module: ast.parse(p.read_text()) for module, p in zip(MODULES, FILES, strict=True)}


def imported(node: ast.AST) -> list[str]:
    """Dotted names that an import statement brings in; `from a.b import c` gives a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        return [node.module]
    return []


def own_imports(module: str) -> set[str]:
    names = {name for node in ast.walk(TREES[module]) for name in imported(node)}
    return {name for name in names if name.split(".")[0] in {*MAY_IMPORT, "tests"}}


def test_every_package_has_files():
    assert {module.split(".")[0] for module in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    allowed = MAY_IMPORT[module.split(".")[0]]
    wrong = [name for name in own_imports(module) if name.split(".")[0] not in allowed]
    assert not wrong, f"{module} may import {sorted(allowed)}, not {wrong}"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("configs.")])
def test_configs_import_sections_and_presets_only(module):
    wrong = {n for n in own_imports(module) if n.split(".")[-1] != "config"} - CONFIGS_MAY_IMPORT
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_no_import_inside_a_function(module):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {
        f"{function.name}:{node.lineno}"
        for function in ast.walk(TREES[module])
        if isinstance(function, functions)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not inside


def test_no_class_name_stands_twice():
    names = [
        n.name for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)
    ]
    assert not {name for name in names if names.count(name) > 1}


def test_no_module_is_named_utils():
    assert not [p for p in FILES if p.stem in ("utils", "util", "helpers", "misc", "common")]


def test_no_folder_is_large():
    """A person must be able to see a room."""
    folders = {
        p.parent for p in (*FILES, *(ROOT / "bench").rglob("*.py"), *(ROOT / "tests").rglob("*.py"))
    }
    counts = {str(f.relative_to(ROOT)): len(list(f.glob("*.py"))) for f in folders}
    assert not {name: count for name, count in counts.items() if count > MAX_FILES}


def test_no_file_is_long():
    files = [*FILES, *(ROOT / "tests").rglob("*.py")]
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert not {name: count for name, count in lines.items() if count > MAX_LINES}


def test_importing_does_no_work():
    """No backend starts and no JAX flag changes.

    JAX refuses to change the number of CPU devices once a backend has started.
    """
    code = f"""
import importlib, jax
before = dict(jax.config.values)
for module in {MODULES}:
    importlib.import_module(module)
changed = {{k for k, v in jax.config.values.items() if before.get(k, v) != v}}
assert not changed, f"flags changed: {{changed}}"
jax.config.update("jax_num_cpu_devices", 3)
assert jax.device_count() == 3
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
