"""What the README says is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("document", ["README.md", "docs/faq.md", "docs/recipes.md"])
def test_its_code_prints_what_is_printed_below_it(document, tmp_path):
    """All blocks one after the other, as a reader would type them."""
    text = (ROOT / document).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    promised = "".join(re.findall(r"prints\n\n```\n(.*?)```", text, re.DOTALL))
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == promised
    assert (tmp_path / "out.png").exists() == (document == "README.md")


def test_every_link_and_picture_inside_the_project_is_there():
    for document in ("README.md", "CONTRIBUTING.md", "fluxedu/nano/weights/README.md"):
        text = (ROOT / document).read_text()
        for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
            assert (ROOT / document).parent.joinpath(link).exists(), (document, link)


def test_the_numbers_of_sites():
    import fluxedu as fe

    said = re.search(r"any of the miniature's (\d+) sites \(dev has ([\d,]+)\)", README)
    assert int(said.group(1)) == len(fe.sites())
    assert int(said.group(2).replace(",", "")) == len(fe.sites("dev"))


def test_every_command_shown_is_a_command():
    from typer.main import get_command

    from fluxedu.cli import app

    known = set(get_command(app).commands)
    assert set(re.findall(r"^fluxedu (\w+)", README, re.MULTILINE)) <= known
