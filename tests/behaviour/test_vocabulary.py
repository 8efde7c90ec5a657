"""The miniature says which prompts it cannot draw: what is like its training's captions passes, the rest is named."""

import ast
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fluxedu as fe
from fluxedu.cli import app
from fluxedu.errors import PromptWarning
from fluxedu.nano import VOCABULARY, prompt_problem, split_words, unknown_words
from fluxedu.nano.scenes import SHAPES, caption, sample_scene

ROOT = Path(__file__).resolve().parents[2]


def test_no_caption_has_a_problem_and_together_they_use_every_word():
    rng = np.random.default_rng(5)
    captions = [caption(sample_scene(rng, held_out=i % 2 == 0), rng)[0] for i in range(600)]
    assert [text for text in captions if prompt_problem(text)] == []
    used = {word for text in captions for word, _, _ in split_words(text)}
    assert used == {word for words in VOCABULARY.values() for phrase in words for word in phrase.split()}


def test_no_instruction_of_kontext_has_a_problem():
    from training.edits import sample_edit

    rng = np.random.default_rng(5)
    instructions = [sample_edit(rng).instruction for _ in range(200)]
    assert [text for text in instructions if prompt_problem(text, instruction=True)] == []
    assert "'make'" in prompt_problem("make the circle green")  # which nano does not know


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a cat", ["cat"]),
        ("three red circles, three!", ["three", "circles"]),
        ("A red circle left-of a 'blue' square.", []),
        ("Ein roter Kreis 🐱", ["Ein", "roter", "Kreis", "🐱"]),
        ("a red letter B", ["B"]),
        ("", []),
    ],
)
def test_unknown_words(prompt, unknown):
    assert unknown_words(prompt) == unknown


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a cat", r"has never seen the word 'cat'; it knows colours \(red, .*shapes \(circle, .*backgrounds \(white,"),
        ("two Red circles", "has never seen the words 'two', 'Red' and 'circles'; it knows"),
        ("a Red circle", "knows the word 'red' in lower case only, not 'Red'"),
        ("a brown circle", "knows 'brown' as the colour of backgrounds only; objects are red, .* or pink"),
        ("a red circle on a pink background", "knows 'pink' as the colour of objects only; backgrounds are white"),
        ("a letter K", "objects with a colour, but 'K' has none here"),
        ("a red circle left of a red ring", "two red ones are often drawn wrong"),
        ("a red circle, a blue ring, a pink star and a green cross", "at most three objects, and this prompt has 4"),
        ("a red ring above a blue star and a pink cross below the red ring", None),
        ("", None),
    ],
)
def test_the_reason_is_one_sentence(prompt, reason):
    problem = prompt_problem(prompt)
    assert re.search(reason, problem) if reason else problem is None


def warnings_of(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(warning.filename == __file__ for warning in caught)  # the line of the caller, not one of the library
    return [str(warning.message) for warning in caught if warning.category is PromptWarning]


def test_the_miniature_warns_once_per_call_and_other_models_never():
    pipe = fe.load()
    short = {"steps": 1, "decode": False, "progress": False}
    (message,) = warnings_of(lambda: pipe(["a cat", "a red circle", "two dogs"], **short))
    assert "'cat'" in message and message.endswith("(and 1 more of the prompts cannot be drawn).")
    assert warnings_of(lambda: pipe("a red circle", negative_prompt="a cat", true_cfg_scale=2.0, **short)) == []
    assert warnings_of(lambda: pipe(pipe.prompt_encoder(["a cat"]), **short)) == []
    other = fe.FluxPipeline(pipe.prompt_encoder, pipe.flux, pipe.autoencoder, pipe.defaults, pipe.size)
    assert warnings_of(lambda: other("a cat", **short)) == []


def test_only_kontext_reads_instructions():
    from fluxedu.loading import WEIGHTS

    assert fe.load("nano-kontext").prompt_problem("make the circle green") is None
    assert fe.load(WEIGHTS, transformer="transformer_kontext").prompt_problem("make the circle green") is None
    assert fe.load("nano-schnell").prompt_problem("make the circle green") is not None


def test_a_command_says_it_too(tmp_path):
    result = CliRunner().invoke(app, ["sample", "a cat", "-o", str(tmp_path / "out.png"), "--steps", "1"])
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if "cat" in line]
    assert line.startswith("fluxedu: the miniature has never seen the word 'cat'; it knows colours (red,")
    assert "cat" not in result.stdout


#: prompts that a page uses although, or because, the miniature cannot draw them; they only go to a text encoder
EXPECTED = {"a letter K"}


def test_the_prompts_of_the_course_are_known():
    """A warning would be one more output of the notebook."""
    problems = {}
    for path in [*(ROOT / "notebooks" / "source").glob("*.py"), *(ROOT / "docs" / "images").glob("make_*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            is_prompt = re.match("(a|an|on|the|make|move|remove|two|three) ", text) and "\n" not in text
            if is_prompt and any(word.rstrip("s") in (*SHAPES, "letter") for word, _, _ in split_words(text)):
                instruction = text.startswith(("make", "move", "remove"))
                if text not in EXPECTED and (problem := prompt_problem(text, instruction)):
                    problems[path.name, text] = problem
    assert problems == {}
