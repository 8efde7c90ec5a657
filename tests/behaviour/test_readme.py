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


def test_the_table_of_flux1_and_flux2():
    """Its numbers are those of the configurations and of the position ids, and klein 9B's those of the sentence."""
    from fluxedu.models import FLUX2_MODELS, VARIANTS, AutoEncoderConfig, Flux2AutoEncoderConfig
    from fluxedu.models.counting import count_parameters
    from fluxedu.sampling.latents import image_ids, text_ids

    text = (ROOT / "docs" / "flux2.md").read_text(encoding="utf-8")
    rows = {name: cells.split(" | ") for name, cells in re.findall(r"^\| ([^|]+) \| (.*) \|$", text, re.MULTILINE)}
    models = VARIANTS["dev"], FLUX2_MODELS["flux2-dev"], FLUX2_MODELS["klein"]
    for i, (model, ae) in enumerate(zip(models, [AutoEncoderConfig()] + 2 * [Flux2AutoEncoderConfig()], strict=True)):
        c, cell = model.flux, {name: cells[i] for name, cells in rows.items() if len(cells) == 3}
        assert cell["parameters of the transformer"] == f"{count_parameters(c):,}"
        assert cell["width of a token, attention heads"] == f"{c.hidden_size}, {c.num_heads} × {c.head_dim}"
        assert cell["double-stream and single-stream blocks"] == f"{c.depth} + {c.depth_single_blocks}"
        assert cell["numbers per text token"].split(" = ")[0] == str(c.context_in_dim)
        assert ("guidance" in cell["`vec` is the sum of"]) == c.guidance_embed
        assert ("text" in cell["`vec` is the sum of"]) == (c.vec_in_dim > 0)
        assert f"{c.mlp_ratio:g} × as wide" in cell["MLP"]
        assert cell["RoPE: channels per axis, theta"] == f"{' + '.join(map(str, c.axes_dim))}, {c.theta}"
        axes = len(c.axes_dim)
        for ids, name in ((image_ids(4, 4, axes)[-1], "an image token"), (text_ids(2, axes)[-1], "a text token")):
            stated = cell[f"position ids of {name}"].strip("()").split(", ")
            assert [word != "0" for word in stated] == ids.bool().tolist()
        assert cell["channels of the latent, numbers per patch"] == f"{ae.z_channels}, {c.in_channels}"
        guidance = "none" if model.sampling.guidance == 1 else f"{model.sampling.guidance:g}"
        assert cell["steps, guidance scale by default"] == f"{model.sampling.steps}, {guidance}"
    nine = FLUX2_MODELS["klein-9b"].flux
    sizes = (
        f"a width of {nine.hidden_size} with {nine.num_heads} heads, {nine.depth} + {nine.depth_single_blocks} blocks"
    )
    assert f"klein 9B has {count_parameters(nine):,} parameters, {sizes}" in " ".join(text.split())


def test_the_table_of_the_official_code_names_code_that_exists(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from made import OFFICIAL, OFFICIAL_FLUX2, source_lines

    for _, name, _ in OFFICIAL + OFFICIAL_FLUX2:
        assert re.fullmatch(r"`fluxedu/[\w/]+\.py` \d+-\d+", source_lines(name)), name
