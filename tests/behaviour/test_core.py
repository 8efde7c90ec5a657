"""What a reader of the core relies on: names where they are written, a short stack, one place per idea."""

import re
import traceback
import types
from pathlib import Path

import pytest
import torch

import fluxedu as fe
from fluxedu.errors import FluxeduError, RequestError
from fluxedu.sampling import SOLVERS, Solver

PACKAGE = Path(fe.__file__).parent
PROMPT = "a red circle left of a blue square"


def draw(pipe, **options):
    return pipe(PROMPT, steps=3, progress=False, **options).latents


def test_the_name_of_every_site_stands_as_a_literal_on_its_source_line(pipe):
    for site in fe.sites(pipe):
        file, line = site.source.split(":")
        text = (PACKAGE / file).read_text().splitlines()[int(line) - 1]
        names = re.findall(r'"([\w.]+)"', text)
        assert any(site.name == name or site.name.endswith(f".{name}") for name in names), (site.name, text)
        assert site.meaning in text


def test_no_site_has_a_computed_name():
    for file in [*(PACKAGE / "models").glob("*.py"), *(PACKAGE / "sampling").glob("*.py")]:
        assert not re.search(r"probe\(\s*f[\"']", file.read_text()), file


def test_from_the_pipeline_to_the_first_query_there_are_at_most_eight_frames(pipe):
    def stop(value, ctx):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as error, fe.intervene("double.0.img_attn.q", stop):
        draw(pipe)
    frames = [frame for frame in traceback.extract_tb(error.tb) if Path(frame.filename).is_relative_to(PACKAGE)]
    to_query = next(i for i, frame in enumerate(frames) if frame.name == "forward" and '"q"' in frame.line)
    assert to_query + 1 <= 8, [f"{Path(frame.filename).name}:{frame.name}" for frame in frames]


def test_names_are_where_one_expects_them():
    assert fe.models.DoubleStreamBlock and fe.models.SingleStreamBlock and fe.models.rotate
    assert fe.instruments.record is fe.record
    assert len(fe.sampling.schedule(4, 256)) == 5
    assert issubclass(fe.FluxeduError, ValueError)
    import fluxedu.sampling.solvers
    import fluxedu.widgets.solvers

    assert isinstance(fluxedu.widgets.solvers, types.ModuleType) and callable(fe.widgets.solvers)
    assert isinstance(fluxedu.sampling.solvers, types.ModuleType)


def test_every_error_class_is_a_fluxedu_error():
    from fluxedu import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    classes = [c for c in classes if not issubclass(c, Warning)]  # a warning is not an error
    assert len(classes) > 10 and all(issubclass(c, FluxeduError) for c in classes)


# ---------------------------------------------------------------- a solver that a user adds


def third_order(x, t, t_next, velocity):
    """Kutta's third-order method."""
    dt = t_next - t
    k1 = velocity(x, t)
    k2 = velocity(x + dt / 2 * k1, t + dt / 2)
    k3 = velocity(x + dt * (2 * k2 - k1), t_next)
    return x + dt / 6 * (k1 + 4 * k2 + k3), k1


def own_euler(x, t, t_next, velocity):
    v = velocity(x, t)
    return x + (t_next - t) * v, v


@pytest.mark.parametrize("stages", [None, (0,), (0, 1 / 2, 1), (0, 0.3)])
def test_a_solver_is_added_to_the_registry_and_is_the_whole_work(pipe, monkeypatch, stages):
    """With its own stages, with others, or as a plain function: a time that was not planned is computed when needed."""
    monkeypatch.setitem(SOLVERS, "kutta", third_order if stages is None else Solver(third_order, stages=stages))
    with fe.record("sample.velocity") as rec:
        kutta = draw(pipe, solver="kutta")
    assert len(rec.entries("sample.velocity")) == 9
    fine = pipe(PROMPT, steps=200, solver="midpoint", progress=False).latents
    distance = {name: float((draw(pipe, solver=name) - fine).norm()) for name in ("euler", "kutta")}
    assert distance["kutta"] < distance["euler"] and torch.isfinite(kutta).all()


def test_a_copy_of_euler_is_euler_to_the_last_bit(pipe, monkeypatch):
    monkeypatch.setitem(SOLVERS, "mine", Solver(own_euler))
    assert torch.equal(draw(pipe, solver="mine"), draw(pipe))


@pytest.mark.parametrize("result", [None, 3, (1, 2), "x only"])
def test_a_wrong_return_value_of_a_solver_is_refused(pipe, monkeypatch, result):
    step = (lambda x, *rest: x) if result == "x only" else (lambda *inputs: result)
    monkeypatch.setitem(SOLVERS, "mine", Solver(step))
    with pytest.raises(
        RequestError, match=r"a solver's step must return \(x_next, v\), two tensors of shape \[1, 16, 4, 4\]"
    ):
        pipe(PROMPT, steps=1, height=32, width=32, progress=False, solver="mine")


def test_an_unknown_solver_is_one_sentence(pipe):
    with pytest.raises(RequestError, match="solver must be one of euler, midpoint, heun, not 'ralston'"):
        draw(pipe, solver="ralston")


# ---------------------------------------------------------------- order of the tokens


def test_redux_tokens_come_after_the_words():
    """So that the index of a word is the same with and without an image prompt."""
    pipe = fe.load("nano-redux")
    picture = torch.zeros(1, 3, 128, 128)
    encoded = pipe.prompt_encoder([PROMPT]).txt[0]
    with fe.record("sample.txt") as rec, fe.record("double.*.attn.map", tokens=["red"], steps=0) as maps:
        pipe(PROMPT, steps=1, progress=False, image_prompt=picture)
    txt = rec["sample.txt"].tensor
    assert txt.shape[0] == len(encoded) + pipe.redux.tokens
    assert torch.equal(txt[: len(encoded)], encoded.detach())
    assert maps["double.0.attn.map"].coords["key"] == ["▁red"]
