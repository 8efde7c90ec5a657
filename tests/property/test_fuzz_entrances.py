"""Every public entrance is called with one argument that makes no sense: it works, or it says in a sentence why not."""

import os
import random

import pytest
from entrances import call, entrances
from fuzzing import ODD, fuzz

#: an error of somebody's function is that function's
FUNCTIONS = ("change", "device", "edit", "fields", "new", "progress", "reduce", "step", "text")
#: arguments with which a valid call may take minutes, or start other processes
SLOW = {"steps", "height", "width", "rounds", "reference", "evaluations", "num_images", "workers", "scheduler"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("entrances")


@pytest.fixture(scope="module")
def table(make_pipe, folder):
    return entrances(make_pipe, folder)


def is_slow(name: str, value) -> bool:
    if name in ("workers", "scheduler"):
        return isinstance(value, (int, str)) and value not in (1, "")
    if name == "compile":  # to import the compiler takes ten seconds on a busy machine
        return value is True
    numbers = [value, *value] if isinstance(value, (list, tuple)) else [value]
    return name in SLOW and any(isinstance(number, int) and 64 < number <= 5000 for number in numbers)


def one_call(table: dict, chance: random.Random):
    """The name of an entrance, of an argument, and the value that it gets."""
    entrance = chance.choice(sorted(table))
    name = chance.choice(list(table[entrance][1]))
    return entrance, name, chance.choice(ODD)


def test_entrances_as_they_are_meant(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for entrance in table.values():
        call(entrance)


@pytest.mark.filterwarnings("ignore")
def test_entrances(table, folder, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(folder))

    def case(chance):
        entrance, name, value = one_call(table, chance)
        if is_slow(name, value) or (name in FUNCTIONS and callable(value)):
            return
        here = folder / "here"
        here.mkdir(exist_ok=True)  # a checkpoint may have been written in the place of this empty folder
        os.chdir(here)
        call(table[entrance], **{name: value})

    before = os.getcwd()
    try:
        fuzz("entrances", 0.4, case, folder)
    finally:
        os.chdir(before)
