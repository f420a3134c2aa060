"""Docstrings begin with a verb or with a noun phrase that names the thing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("core", "data", "model", "train", "infer", "evals", "configs", "bench")
NEVER = {"Of", "As", "With", "What", "That", "Those", "Which", "Where", "How"}
NEVER |= {"In", "From", "For", "By", "On"}
THINGS = ast.Module, ast.ClassDef, ast.FunctionDef


def begins_badly(text: str) -> list[str]:
    """The docstrings of a file whose first word tells neither what is done nor what it is."""
    things = (node for node in ast.walk(ast.parse(text)) if isinstance(node, THINGS))
    docstrings = filter(None, map(ast.get_docstring, things))
    return [line for line in docstrings if line.split()[0].rstrip(",:") in NEVER]


@pytest.mark.parametrize("room", ROOMS)
def test_first_words(room):
    wrong = {str(p): begins_badly(p.read_text()) for p in (ROOT / room).rglob("*.py")}
    assert not {path: lines for path, lines in wrong.items() if lines}


def test_a_sentence_without_subject_and_verb_is_found():
    assert begins_badly('def f():\n    """Of the mesh in use."""') == ["Of the mesh in use."]
    assert not begins_badly('def f():\n    """Returns the mesh in use."""')
