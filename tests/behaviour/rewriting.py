"""Answers made from the solutions by rewriting their code: wrong ones with mistakes, right ones in other styles.

`python tests/behaviour/rewriting.py [NUMBER]` checks NUMBER wrong answers to each exercise, all if it is 0, and right
ones in other styles, and prints how many were accepted, rejected, and explained.
"""

import ast
import copy
import random
import signal
import sys
import warnings
from collections import Counter
from contextlib import contextmanager

import torch

from fluxedu.course.check import Verdict, as_tensors, assess, judge, outcomes
from fluxedu.course.exercise import YOUR_TURN, all_exercises
from fluxedu.course.relations import relative_error

SECONDS = 2  # of computing time for one answer; a mistake may make a loop endless
SALTS = (11, 22, 33)

# ---------------------------------------------------------------- mistakes

OPERATORS = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div, ast.Add], ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult], ast.Pow: [ast.Mult], ast.Mod: [ast.FloorDiv], ast.BitAnd: [ast.BitOr],
    ast.BitOr: [ast.BitAnd],
}  # fmt: skip
COMPARISONS = {
    ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.GtE], ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt, ast.LtE],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is],
}  # fmt: skip


def exchanged(parts, i, j):
    parts = list(parts)
    parts[i], parts[j] = parts[j], parts[i]
    return parts


def with_fields(node, **fields):
    new = copy.deepcopy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def mistaken(node, names):
    """What a student might write in place of this node; ``names`` are those of other variables."""
    if isinstance(node, ast.BinOp):
        for operator in OPERATORS.get(type(node.op), []):
            yield with_fields(node, op=operator())
        yield node.left  # a term or a factor is forgotten
        yield node.right
        if isinstance(node.op, (ast.MatMult, ast.Sub, ast.Div)):
            yield with_fields(node, left=node.right, right=node.left)
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield node.operand
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):  # -1, usually a dim
        yield from (ast.parse(text, mode="eval").body for text in ("-2", "0", "1"))
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        else:
            for value in (node.value + 1, node.value - 1, node.value * 2 or 2, node.value / 10):
                yield ast.Constant(value if isinstance(node.value, float) else int(value))
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for operator in COMPARISONS.get(type(node.ops[0]), []):
            yield with_fields(node, ops=[operator()])
    elif isinstance(node, ast.Call):
        for i in range(len(node.args) - 1):
            yield with_fields(node, args=exchanged(node.args, i, i + 1))
        for keyword in node.keywords:
            yield with_fields(node, keywords=[k for k in node.keywords if k is not keyword])
        if isinstance(node.func, ast.Attribute):
            receiver = node.func.value
            if isinstance(receiver, ast.Name) and receiver.id in ("torch", "F", "math", "nn"):
                yield from node.args[:1]
            else:
                yield receiver
        elif len(node.args) == 1:
            yield node.args[0]
    elif isinstance(node, (ast.Tuple, ast.List)) and len(node.elts) > 1:
        for i in range(len(node.elts) - 1):
            yield with_fields(node, elts=exchanged(node.elts, i, i + 1))
    elif isinstance(node, ast.Slice) and (node.lower is None) != (node.upper is None):
        yield with_fields(node, lower=node.upper, upper=node.lower)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
        yield from (ast.Name(name, ast.Load()) for name in sorted(names - {node.id}))
    elif isinstance(node, (ast.Assign, ast.AugAssign)) and isinstance(getattr(node, "targets", [None])[0], ast.Name):
        yield ast.Pass()
    elif isinstance(node, ast.If):
        yield with_fields(node, test=ast.UnaryOp(ast.Not(), node.test))


def own_nodes(tree, task):
    """The nodes that the student writes, by their position in `ast.walk`; the rest of a class is given."""
    code = task._marked_code.splitlines()
    marks = [i for i, line in enumerate(code, 1) if YOUR_TURN.match(line + "\n")]
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if ast.get_docstring(node):
                skipped.update(map(id, ast.walk(node.body[0])))
        if isinstance(node, ast.FunctionDef):
            skipped.update(id(n) for part in (node.args, node.returns) if part for n in ast.walk(part))
    for index, node in enumerate(ast.walk(tree)):
        line = getattr(node, "lineno", 0)
        if id(node) in skipped or isinstance(node, ast.FunctionDef):
            continue
        if not marks or any(function.lineno < mark < line <= function.end_lineno for mark in marks
                            for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)):  # fmt: skip
            yield index, node


def replaced(tree, index, new):
    """A copy of the tree in which the node at this position in `ast.walk` is another one."""
    tree = copy.deepcopy(tree)
    old = next(node for i, node in enumerate(ast.walk(tree)) if i == index)
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list) and any(part is old for part in value):
                setattr(parent, name, [new if part is old else part for part in value])
    return tree


def wrong_answers(task, number, seed=0):
    """The code of ``number`` answers with one mistake (all if it is 0), and half as many with two."""
    tree = ast.parse(task._marked_code)
    rng = random.Random(f"{task.name} {seed}")
    function = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name != "__init__")
    names = {a.arg for a in function.args.args} - {"self"}

    def once(tree):
        return [(i, new) for i, node in own_nodes(tree, task) for new in mistaken(node, names)]

    singles = once(tree)
    chosen = singles if not number else rng.sample(singles, min(number, len(singles)))
    results = [replaced(tree, i, new) for i, new in chosen]
    for _ in range((number or len(singles)) // 2):
        (i, new), (j, other) = sorted(rng.sample(singles, 2), key=lambda pair: -pair[0])
        if i != j:
            results.append(replaced(replaced(tree, i, new), j, other))  # the later one in the walk first
    texts = dict.fromkeys(ast.unparse(ast.fix_missing_locations(x)) for x in results)
    return [text for text in texts if text != ast.unparse(tree)]


# ---------------------------------------------------------------- other styles


class Style(ast.NodeTransformer):
    """A way to write the same; each subclass rewrites one kind of node."""


class Functions(Style):
    """`torch.softmax(x, -1)` for `x.softmax(-1)`."""

    def visit_Call(self, node):
        self.generic_visit(node)
        f = node.func
        is_library = isinstance(getattr(f, "value", None), ast.Name) and f.value.id in ("torch", "F", "math", "nn")
        if isinstance(f, ast.Attribute) and not is_library and hasattr(torch, f.attr) and hasattr(torch.Tensor, f.attr):
            return with_fields(node, func=ast.parse(f"torch.{f.attr}", mode="eval").body, args=[f.value, *node.args])
        return node


class Matmul(Style):
    """`torch.matmul(a, b)` for `a @ b`."""

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if isinstance(node.op, ast.MatMult):
            return ast.Call(ast.parse("torch.matmul", mode="eval").body, [node.left, node.right], [])
        return node


class Einsum(Style):
    """`torch.einsum("...ij,...jk->...ik", a, b)` for `a @ b`."""

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if isinstance(node.op, ast.MatMult):
            rule = ast.Constant("...ij,...jk->...ik")
            return ast.Call(ast.parse("torch.einsum", mode="eval").body, [rule, node.left, node.right], [])
        return node


class Commuted(Style):
    """`b * a` for `a * b`, and `b + a` for `a + b`."""

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if isinstance(node.op, (ast.Add, ast.Mult)):
            return with_fields(node, left=node.right, right=node.left)
        return node


class Squares(Style):
    """`x * x` for `x.square()`, `x ** 0.5` for `x.sqrt()`, and `x[..., None]` for `x.unsqueeze(-1)`."""

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and not node.args and node.func.attr in ("square", "sqrt", "rsqrt"):
            power = {"square": 2, "sqrt": 0.5, "rsqrt": -0.5}[node.func.attr]
            return ast.BinOp(node.func.value, ast.Pow(), ast.Constant(power))
        return node


class Keywords(Style):
    """`x.softmax(dim=-1)` for `x.softmax(-1)`, and `transpose(dim0=..., dim1=...)`."""

    def visit_Call(self, node):
        self.generic_visit(node)
        f = node.func
        one_dim = ("softmax", "mean", "sum", "chunk", "cumsum", "argmax", "unsqueeze", "amax", "norm")
        if isinstance(f, ast.Attribute) and f.attr in one_dim and len(node.args) == 1 and not node.keywords:
            return with_fields(node, args=[], keywords=[ast.keyword("dim", node.args[0])])
        if isinstance(f, ast.Attribute) and f.attr == "transpose" and len(node.args) == 2:
            dims = [ast.keyword(f"dim{i}", x) for i, x in enumerate(node.args)]
            return with_fields(node, args=[], keywords=dims)
        return node


class Renamed(Style):
    """Other names for the variables."""

    def visit_FunctionDef(self, node):
        assigned = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.names = assigned - {a.arg for a in node.args.args}
        return self.generic_visit(node)

    def visit_Name(self, node):
        return with_fields(node, id=f"my_{node.id}") if node.id in getattr(self, "names", ()) else node


class Copied(Style):
    """A result is stored in a variable before it is returned, and is contiguous."""

    def visit_Return(self, node):
        text = "(lambda y: y.contiguous().clone() if isinstance(y, torch.Tensor) else y)"
        return ast.Return(ast.Call(ast.parse(text, mode="eval").body, [node.value], []))


class Numbers(Style):
    """NumPy's number, or a tensor without dims, for a Python number."""

    def visit_Return(self, node):
        text = "(lambda y: __import__('numpy').float64(y) if isinstance(y, float) else y)"
        return ast.Return(ast.Call(ast.parse(text, mode="eval").body, [node.value], []))


class Scalars(Style):
    """A tensor without dims for a Python number, a Python list for a tuple."""

    def visit_Return(self, node):
        text = "(lambda y: torch.tensor(y) if isinstance(y, (float, int)) else list(y) if type(y) is tuple else y)"
        return ast.Return(ast.Call(ast.parse(text, mode="eval").body, [node.value], []))


STYLES = (Functions, Matmul, Einsum, Commuted, Squares, Keywords, Renamed, Copied, Numbers, Scalars)


def right_answers(task):
    """The solution's code in each style in which it differs."""
    original = ast.unparse(ast.parse(task.solution_code))
    for style in STYLES:
        text = ast.unparse(ast.fix_missing_locations(style().visit(ast.parse(task.solution_code))))
        if text != original:
            yield style.__name__, text


# ---------------------------------------------------------------- checking them


@contextmanager
def limited(seconds=SECONDS):
    """Raise TimeoutError after this many seconds of computing time."""

    def stop(*_):
        raise TimeoutError("too slow")

    former = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, former)


def compiled(task, text):
    """The answer that this code defines, with the names of the exercise's file."""
    names = dict(vars(sys.modules[task.solution.__module__]))
    names["__name__"] = "student"
    exec(compile(text, "<student>", "exec"), names)
    return names[task.answer_name]


def judged(task, text):
    """The verdict on the answer that this code defines, or None if it does not end in time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            answer = compiled(task, text)
            with limited():
                cases = task.cases()
                given = outcomes(task, answer, cases)
            return answer, judge(task, cases, given)
        except TimeoutError:
            return None, Verdict(task.name, False, "it raises TimeoutError, in line ")
        except Exception as error:  # noqa: BLE001 - such as a SyntaxError
            return None, Verdict(task.name, False, f"it raises {type(error).__name__}: {error}")


def right_for_others(task, answer):
    """Whether the answer is right for three other draws of the inputs."""
    for salt in SALTS:
        cases = task.fresh_cases(salt)
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not judge(task, cases, outcomes(task, answer, cases)):
                return False
    return True


def kind_of(task, verdict):
    """How much a rejection says: see `KINDS`."""
    message = verdict.message
    if message in {known.message for known in task.wrong}:
        return "known mistake"
    if message.startswith("the values are right, but"):
        return "type or gradient"
    if message.startswith("it raises"):
        return "error with its line" if ", in line " in message else "error without line"
    if message.startswith(("the shape is", "it returns", "the dtype is", "the values are complex", "it modifies")):
        return "shape or type with a relation" if ": the " in message or ": `" in message else "shape or type"
    if not message.startswith("the shapes are right but"):
        return "relation"
    return "NaN, with its place" if "NaN" in message else "place of the first wrong value" if verdict.detail else "none"


def survey(number, tasks=None, seed=0, show=print):
    """Counts of the wrong answers by kind, and the list of those that were accepted although they are wrong."""
    counts, accepted = Counter(), []
    for task in tasks or all_exercises().values():
        own = Counter()
        for text in wrong_answers(task, number, seed):
            answer, verdict = judged(task, text)
            if not verdict:
                kind = kind_of(task, verdict)
            elif right_for_others(task, answer):
                kind = "equivalent"
            else:
                kind = "accepted although wrong"
                accepted.append((task.name, text))
            own[kind] += 1
            if show and kind in ("place of the first wrong value", "none", "error without line"):
                show(f"## {task.name}: {verdict}\n{text}\n", file=sys.stderr)
        if show:
            show(f"{task.name}: {dict(own)}", flush=True)
        counts += own
    return counts, accepted


def styles(tasks=None):
    """How many right answers in other styles there are, and those that were rejected, with the verdict."""
    number, rejected = 0, []
    for task in tasks or all_exercises().values():
        cases = task.cases()
        wanted = [as_tensors(task.call(task.solution, *copy.deepcopy(case))) for case in cases]
        for style, text in right_answers(task):
            try:
                answer = compiled(task, text)
                values = [as_tensors(task.call(answer, *copy.deepcopy(case))) for case in cases]
            except Exception:  # noqa: BLE001 - torch has no such function for numbers, say: not a right answer
                continue
            if max(relative_error(a, b) for a, b in zip(values, wanted, strict=True)) > task.tolerance:
                continue
            number += 1
            if not (verdict := assess(task, answer)):
                rejected.append((task.name, style, str(verdict)))
    return number, rejected


if __name__ == "__main__":
    total, wrongly = survey(int(sys.argv[1]) if len(sys.argv) > 1 else 0, seed=sys.argv[2] if len(sys.argv) > 2 else 0)
    for name, text in wrongly:
        print(f"accepted although wrong: {name}\n{text}\n")
    for kind, count in total.most_common():
        print(f"{count:6} {kind}")
    number, rejected = styles()
    print(f"right answers in other styles: {number}, rejected: {len(rejected)}", *rejected, sep="\n")
