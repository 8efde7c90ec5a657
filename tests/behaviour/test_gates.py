"""Exercises may be solved in any order: a cell that needs an answer, or what a cell made with it, asks for it first.

Both editions are run by nbval: with all exercises solved, and with none. Here the code says what holds between.
"""

import ast

import pytest
from test_course import ROOT

from fluxedu.course import all_exercises
from fluxedu.course.build import edition, sources


class Gates(ast.NodeVisitor):
    """Walks through a notebook's code in order, and notes each use of a name outside the gate that it needs."""

    def __init__(self):
        self.needs: dict[str, set[str]] = {}  # a name, and the exercises without which it is not there or not right
        self.gate: set[str] = set()
        self.wrong: list[str] = []

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        """``if fe.passed("a", "b"):``, or ``x if fe.passed("a") else y``."""
        calls = [n for n in ast.walk(node.test) if isinstance(n, ast.Call) and ast.unparse(n.func) == "fe.passed"]
        before = self.gate
        self.gate = before | {argument.value for call in calls for argument in call.args}
        for part in node.body if isinstance(node, ast.If) else [node.body]:
            self.visit(part)
        self.gate = before
        for part in node.orelse if isinstance(node, ast.If) else [node.orelse]:
            self.visit(part)

    visit_IfExp = visit_If

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        """What a function needs is asked for where it is used."""
        bases = node.bases if isinstance(node, ast.ClassDef) else []  # a class may override what its base needs
        inside = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n not in bases]
        own = {n.id for n in inside if isinstance(n.ctx, ast.Store)} | {n.arg for n in ast.walk(node) if is_argument(n)}
        own |= {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef)}
        used = {n.id for n in inside} - own
        self.needs[node.name] = self.gate.union(*(self.needs.get(name, ()) for name in used))

    visit_ClassDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)

    def visit_comprehension_first(self, node: ast.AST) -> None:
        """Its variables are stored before they are used, and are gone afterwards."""
        before = dict(self.needs)
        for part in (*node.generators, *(value for name, value in ast.iter_fields(node) if name != "generators")):
            self.visit(part)
        self.needs = before

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_first

    def visit_Lambda(self, node: ast.Lambda) -> None:
        before = dict(self.needs)
        for argument in (n for n in ast.walk(node.args) if is_argument(n)):
            self.needs.pop(argument.arg, None)
        self.visit(node.body)
        self.needs = before

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.needs[node.id] = set(self.gate)
        elif lacking := self.needs.get(node.id, set()) - self.gate:
            self.wrong.append(f"{node.id} needs fe.passed of {', '.join(sorted(lacking))}")


def is_argument(node: ast.AST) -> bool:
    return isinstance(node, ast.arg)


def missing_gates(notebook) -> list[str]:
    """What is used without a gate for the exercises that it needs."""
    gates = Gates()
    for cell in notebook.cells:
        about = cell.metadata.get("fluxedu", {})
        if about.get("role") == "answer":
            gates.needs[all_exercises()[about["exercise"]].answer_name] = {about["exercise"]}
        elif cell.cell_type == "code" and about.get("role") != "check":
            gates.visit(ast.parse(cell.source))
    return gates.wrong


@pytest.mark.parametrize("source", sources(ROOT / "notebooks"), ids=lambda path: path.stem)
def test_cells_ask_for_the_answers_that_they_use(source):
    assert not missing_gates(edition(source, "solved"))


def test_a_missing_gate_is_found():
    from nbformat.v4 import new_code_cell, new_notebook

    answer = {"fluxedu": {"exercise": "latents.pack", "role": "answer"}}
    cells = [
        new_code_cell("def pack(x):\n    return x", metadata=answer),
        new_code_cell('if fe.passed("latents.pack"):\n    y = pack(1)'),
        new_code_cell('if fe.passed("latents.pack", "latents.unpack"):\n    z = y'),
        new_code_cell('if fe.passed("latents.unpack"):\n    z = y'),
        new_code_cell("pack(1)"),
        new_code_cell("print(z)"),
    ]
    assert missing_gates(new_notebook(cells=cells)) == [
        "y needs fe.passed of latents.pack",
        "pack needs fe.passed of latents.pack",
        "z needs fe.passed of latents.unpack",
    ]
