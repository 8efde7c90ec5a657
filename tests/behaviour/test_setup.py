"""Installation: equal version bounds everywhere, a fast import, the import order, and commands that exist."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # installed with pytest on 3.10

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CONDA_NAMES = {"torch": "pytorch"}
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "ipython": "IPython", "opencv-python-headless": "cv2"}


def split(requirement: str) -> tuple[str, frozenset[str]]:
    """``"torch>=2.10,<3"`` -> ``("torch", {">=2.10", "<3"})``."""
    name, bounds = re.fullmatch(r"([A-Za-z0-9_.-]+)\s*(.*)", requirement).groups()
    return name.lower().replace("_", "-"), frozenset(b.strip() for b in bounds.split(",") if b.strip())


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_environment_yml_has_the_bounds_of_pyproject():
    expected = {"python": split("python" + PROJECT["requires-python"])[1]}
    for requirement in [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]:
        name, bounds = split(requirement)
        name = CONDA_NAMES.get(name, name)
        assert expected.setdefault(name, bounds) == bounds, f"{name} has two different bounds in pyproject.toml"

    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    requirements = [split(line) for line in lines if isinstance(line, str) and line != "pip"]
    assert len(requirements) == len(dict(requirements)), "environment.yml names a package twice"
    assert dict(requirements) == expected
    assert [line for line in lines if isinstance(line, dict)] == [{"pip": ["-e ."]}]


def test_core_dependencies_have_both_bounds():
    for requirement in PROJECT["dependencies"]:
        _, bounds = split(requirement)
        assert {re.match("[<>=]+", b).group() for b in bounds} == {">=", "<"}, requirement


def imports(path: Path, everywhere: bool) -> set[str]:
    """The packages that a file imports; ``everywhere``: those inside functions too."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else tree.body
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"fluxedu"}


@cache
def declared(*extras: str) -> set[str]:
    """The packages that pyproject.toml declares, under the names that Python imports them by."""
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    projects = {split(requirement)[0] for requirement in sum(groups, [])}
    found = {m for m, names in packages_distributions().items() if projects & {split(n)[0] for n in names}}
    return found | {IMPORTED_AS.get(project, project.replace("-", "_")) for project in projects}


def test_every_imported_package_is_declared():
    """What modules import as they load is in the core's dependencies (in lab's for grading and building notebooks);
    what functions import is in some group's.
    """
    for path in sorted((ROOT / "fluxedu").rglob("*.py")):
        extras = ["lab"] if path.parent.name == "course" else []
        assert imports(path, False) <= declared(*extras), path
        assert imports(path, True) <= declared(*PROJECT["optional-dependencies"]), path


def test_import_is_light():
    """`import fluxedu` adds at most 0.3 s (the best of three) to `import torch`, and imports nothing heavy."""
    code = """
import json, sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import fluxedu
print(json.dumps([time.perf_counter() - start, sorted({m.split(".")[0] for m in sys.modules})]))
"""
    runs = [json.loads(run_python(code)) for _ in range(3)]
    for _, modules in runs:
        assert not {"matplotlib", "ipywidgets", "transformers"} & set(modules)
    assert min(seconds for seconds, _ in runs) <= 0.3


def test_a_first_image_does_not_import_the_compiler():
    """torch's compiler takes seconds to import; loading the miniature and drawing an image must not need it."""
    code = """
import sys, fluxedu
fluxedu.load()("a red circle", steps=1, progress=False)
print([m for m in ("torch._dynamo", "sympy", "transformers", "matplotlib") if m in sys.modules])
"""
    assert run_python(code).strip() == "[]"


def test_imports_point_one_way():
    in_environment = Path(sys.executable).parent / "lint-imports"
    command = str(in_environment) if in_environment.exists() else shutil.which("lint-imports")
    assert command, "import-linter is not installed: pip install -e '.[test]'"
    result = subprocess.run([command, "--no-cache"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert run_python("import fluxedu; print(fluxedu.__version__)").strip() == PROJECT["version"]
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_every_make_command_in_the_documents_exists(document):
    targets = set(re.findall(r"^([a-z]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"lab", "test", "check", "bench", "train", "docs"} <= targets
    text = (ROOT / document).read_text()
    # only in code (a fence, backticks, a line of a script): prose may say "make sure"
    code = re.findall(r"`make ([a-z]+)", text) + re.findall(r"^\s*(?:\$ )?make ([a-z]+)", text, re.MULTILINE)
    assert code, f"{document} names no make target"
    assert set(code) <= targets


def test_ci_runs_the_test_command_of_the_readme():
    assert re.search(r"^make test\b", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert re.search(r"make test\b", (ROOT / "README.md").read_text())
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_every_notebook_cell_was_executed():
    """nbval skips cells without an execution count, so a notebook without counts would not be tested."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            if cell["cell_type"] == "code" and "".join(cell["source"]).strip():
                assert cell["execution_count"] is not None, f"{path.name}: cell {number} was not executed"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("took 1.25 s", "took 310 ms", True),
        ("<Figure at 0x7f12ab34cd00>", "<Figure at 0x7fffab34cd11>", True),
        ("sampling:  40%|████      | 8/20 [00:01<00:02,  6.1it/s]", "sampling: 100%|████| 20/20", True),
        ("20 steps", "21 steps", False),
        ("error 0.013", "error 0.014", False),
        ("yours: relative difference 3e-07 (rounding; at", "yours: relative difference 0e+00 (rounding; at", True),
        ("yours: relative difference 3e-01 (more than", "yours: relative difference 2e-01 (more than", False),
    ],
)
def test_notebook_outputs_are_compared_except_times_and_addresses(one, other, same):
    parser = configparser.RawConfigParser()
    parser.read(ROOT / "notebooks" / "nbval.cfg", encoding="utf-8")

    def clean(text: str) -> str:
        for section in parser.sections():
            text = re.sub(parser[section]["regex"], parser[section]["replace"], text)
        return text

    assert (clean(one) == clean(other)) is same
