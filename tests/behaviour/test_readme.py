"""The examples of README, FAQ and recipes run and print what the page shows; links, numbers and commands are right."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("document", ["README.md", "docs/faq.md", "docs/recipes.md"])
def test_the_examples_print_what_the_page_shows(document, tmp_path):
    """All code blocks of a page in order, as a reader would type them."""
    text = (ROOT / document).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    expected = "".join(re.findall(r"prints\n\n```\n(.*?)```", text, re.DOTALL))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == expected
    assert (tmp_path / "out.png").exists() == (document == "README.md")


def test_every_local_link_exists():
    for document in ("README.md", "CONTRIBUTING.md", "fluxedu/nano/weights/README.md"):
        text = (ROOT / document).read_text()
        for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text):
            assert (ROOT / document).parent.joinpath(link).exists(), (document, link)


def test_the_numbers_of_sites():
    """Rounded down to hundreds, so that a new site does not need a new README."""
    import fluxedu as fe

    numbers = re.search(r"miniature has\s+more than ([\d,]+) sites and FLUX.1-dev more than ([\d,]+)", README)
    nano, dev = (int(number.replace(",", "")) for number in numbers.groups())
    assert nano < len(fe.sites()) < nano + 100
    assert dev < len(fe.sites("dev")) < dev + 100


def test_the_course_is_listed_with_links_and_minutes():
    """The sum of a row is that of its notebooks; together the rows list all of them."""
    linked = []
    for row in re.findall(r"^\| (\[0.*|\[1.*) \| (\d+) \|", README, re.MULTILINE):
        names = re.findall(r"\(notebooks/([^)]+)\.ipynb\)", row[0])
        texts = [(ROOT / "notebooks" / "source" / f"{name}.py").read_text("utf-8") for name in names]
        assert int(row[1]) == sum(int(re.search(r"^# (\d+) minutes", text, re.MULTILINE)[1]) for text in texts)
        linked += names
    assert linked == sorted(path.stem for path in (ROOT / "notebooks" / "source").glob("[0-9]*.py"))


@pytest.mark.parametrize("document", ["README.md", "docs/index.md"])
def test_the_share_of_right_images(document):
    scores = json.loads((ROOT / "fluxedu/nano/weights/judge.json").read_text())["nano"]["rows"]["everything"]
    assert f"Of all {scores['n']} prompts it draws {scores['percent']:.0f} % right" in (ROOT / document).read_text()


def test_every_command_shown_is_a_command():
    from typer.main import get_command

    from fluxedu.cli import app

    assert set(re.findall(r"^fluxedu (\w+)", README, re.MULTILINE)) <= set(get_command(app).commands)


def test_the_table_of_the_official_code_names_code_that_exists(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from made import OFFICIAL, source_lines

    for _, name, _ in OFFICIAL:
        assert re.fullmatch(r"`fluxedu/[\w/]+\.py` \d+-\d+", source_lines(name)), name
