"""What the fuzz tests share: cases by number, values nobody expects, and a judge of what comes out.

FLUXEDU_FUZZ_CASES=10000 makes that many cases in all (by default a few hundred), FLUXEDU_FUZZ_SEED=abc others. A case
is known by the seed, the name of its test and its number, and always the same; a failure names it.
FLUXEDU_FIGURES=fuzz.json keeps how many there were, and how they ended (of one process: not with -n 2).
"""

import copy
import json
import math
import os
import random
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from fluxedu.errors import FluxeduError

CASES = int(os.environ.get("FLUXEDU_FUZZ_CASES", 300))
SEED = os.environ.get("FLUXEDU_FUZZ_SEED", "")
LIMIT = 10.0  # seconds a case may take

#: values a JSON or YAML file can hold, where others are expected
PLAIN = [
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 2**200, 10**9, 0.5, -0.0, 1e308, math.inf, math.nan,
    "", "x", "0", "F32", "F64", "../../escaped", "/tmp/escaped", "a\nb", "\x00", "\ud800", "é" * 300, "double.*",
    [], [0], [1, 2, 3], [-1, -2], [[[]]], ["x"], [None], {}, {"x": 1}, {"": {}}, [2**40, 2**40], [0, 2**63],
]  # fmt: skip
#: and those that a call may get besides
ODD = [
    *PLAIN, b"", b"x", object(), int, len, torch.nan, torch.zeros(0), torch.zeros(2, 3), torch.tensor(1), np.zeros(3),
    np.int64(3), np.float32(0.5), slice(None), slice(0, 1), slice("a"), range(3), {1, 2}, iter([1]), lambda *a: a,
    torch.float32, torch.int8, torch.device("cpu"), Path("nowhere"), ("a", 1), complex(1, 2), Exception("x"),
    "a" * 100_000, "double.99", "double.0.img", 1e9, -1e9, [[1, [2, [3]]]], ["a" * 100_000], {"a" * 100_000: 1},
    (1,), (1, 2, 3), [math.nan], (x for x in range(3)), set(), frozenset("ab"), bytearray(b"a"), dict, torch.nn.Linear,
    torch.rand(2, 3, 4, 5), torch.full((1, 4, 4, 4), math.nan), torch.zeros(3, 16, 16, dtype=torch.int8), {"a": None},
    torch.zeros(1, 2, 3, dtype=torch.complex64), torch.empty(2, device="meta"), np.zeros((2, 2), object),
    Path("a" * 100_000),
]  # fmt: skip


class Hung(BaseException):
    """A case took too long."""


_guarded: list[Path] = []
_outside: list[str] = []


def _audit(event: str, arguments: tuple) -> None:
    """Python tells this hook of every file that is opened or moved, and of every class that a pickle asks for."""
    if not _guarded:
        return
    if event == "pickle.find_class":
        _outside.append(f"a pickle asks for {arguments}")
    writes = event == "open" and arguments[2] is not None and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree"):
        if event.startswith("os.") and arguments[-1] not in (-1, None) and event in ("os.remove", "os.rmdir"):
            return  # inside a folder that rmtree deletes
        paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
        for path in (p for p in paths if isinstance(p, (str, bytes, os.PathLike))):
            where = Path(os.path.realpath(os.fsdecode(path)))
            if not where.is_relative_to(_guarded[-1]) and not where.is_relative_to("/dev"):
                _outside.append(f"{event} {where}")


sys.addaudithook(_audit)


@contextmanager
def guarded(folder: Path):
    """Nothing is written but in ``folder``, nothing unpickled, and it ends in time."""

    def ring(*_):
        raise Hung(f"more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    _guarded.append(folder.resolve())
    try:
        yield
    finally:
        _guarded.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    found, _outside[:] = list(_outside), []
    assert not found, found


def is_a_sentence(error: BaseException) -> bool:
    """Is it one of the library's own errors, in one line that can be read at once?"""
    text = str(error)
    return isinstance(error, FluxeduError) and "\n" not in text and 10 < len(text) < 1000 and text[-1] in ".?)"


def fuzz(name: str, share: float, case, folder: Path) -> None:
    """Run ``case(random)`` for this test's share of the cases; each ends well or in a sentence."""
    faults, hangs, cases = [], 0, max(1, int(CASES * share))
    for number in range(cases):
        chance = random.Random(f"{SEED} {name} {number}".strip())
        try:
            with guarded(folder):
                case(chance)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            hangs += isinstance(error, Hung)
            if not is_a_sentence(error):
                text = "".join(traceback.format_exception(error)[-4:])
                faults.append(f"case {number}: {text[-1500:]}")
    _keep(name, cases, len(faults) - hangs, hangs)
    assert not faults, f"{len(faults)} cases of {name} end badly:\n\n" + "\n".join(faults[:4])


def _keep(name: str, cases: int, crashes: int, hangs: int) -> None:
    """The figures of one test, beside those of the others, where FLUXEDU_FIGURES names a file."""
    if "FLUXEDU_FIGURES" not in os.environ:
        return
    path = Path(os.environ["FLUXEDU_FIGURES"])
    known = json.loads(path.read_text()) if path.exists() else {"cases": {}, "crashes": 0, "hangs": 0}
    known["command"] = " ".join(
        [f"FLUXEDU_FUZZ_CASES={CASES} FLUXEDU_FUZZ_SEED={SEED} python -m pytest", *sys.argv[1:]]
    )
    known["cases"][name] = cases
    known["total"] = sum(known["cases"].values())
    known["crashes"], known["hangs"] = known["crashes"] + crashes, known["hangs"] + hangs
    path.write_text(json.dumps(known, indent=2) + "\n")


# ---------------------------------------------------------------- mutations


def bytes_changed(chance: random.Random, data: bytes) -> bytes:
    """Cut, flipped, doubled, filled."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(data) + 1) if chance.random() < 0.5 else chance.randrange(min(300, len(data) + 1))
        length = chance.choice((1, 1, 4, 8, 100))
        match chance.randrange(6):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + length]
            case 2:
                data[at : at + length] = chance.randbytes(length)
            case 3:
                data[at:at] = data[at : at + length]
            case 4 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 5:
                data[:8] = chance.choice((0, 1, 7, 2**31, 2**63, 2**64 - 1, len(data))).to_bytes(8, "little")
    return bytes(data)


def paths_in(value, path=()):
    """The path of keys and indices to every value in nested lists and mappings."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


def plain_changed(chance: random.Random, value, pool=PLAIN):
    """A copy in which a few things, or their names, are others'."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        path = chance.choice(list(paths_in(value)))
        if not path:
            if chance.random() < 0.05:
                return copy.deepcopy(chance.choice(pool))
            continue
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        other = copy.deepcopy(chance.choice(pool))
        what = chance.randrange(5)
        if what == 0:
            del owner[path[-1]]
        elif what == 1 and isinstance(owner, dict):
            owner[chance.choice(("../../escaped", "/tmp/escaped", "", "x", "..", "a" * 5000, "\x00"))] = owner.pop(
                path[-1]
            )
        elif what == 2:
            owner[path[-1]] = _near(chance, owner[path[-1]])
        else:
            owner[path[-1]] = other
    return value


def _near(chance: random.Random, value):
    """Almost the same: off by a little, or of another kind."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return chance.choice((value + 1, value - 1, -value, value * 2, float(value), str(value), value * 10**6))
    if isinstance(value, str):
        return chance.choice((value + "x", value[:-1], value.upper(), value * 2, value.replace("0", "99999999")))
    return [value] if chance.random() < 0.5 else value
