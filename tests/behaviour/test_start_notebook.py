"""START.ipynb's prompt box and gallery: a prompt is drawn step by step, and every explorer is in the gallery."""

import io

import numpy as np
import pytest
from PIL import Image

import fluxedu as fe
from fluxedu.course.build import notebooks_folder
from fluxedu.course.start import GALLERY, Gallery, PromptBox
from fluxedu.widgets import explorers


@pytest.fixture(scope="module")
def pipe():
    return fe.load()


@pytest.fixture(scope="module")
def box(pipe):
    return PromptBox(pipe, "a red circle", seed=3)


def test_the_film_ends_with_the_image_that_the_pipeline_draws(pipe, box):
    expected = pipe("a red circle", seed=3, progress=False)
    assert box.step.value == box.film.steps == 20 and box.film.times[0] == 1 and box.film.times[-1] == 0
    decoded = pipe.autoencoder.decode(expected.trajectory.x0[7]).detach()
    (x0,) = fe.sampling.images.to_images(decoded)
    shown = [(box.film.images(20)[0], expected.images[0]), (box.film.images(20)[1], expected.images[0])]
    for png, image in [*shown, (box.film.images(7)[1], x0)]:  # at most 1: two at once are rounded differently from one
        assert np.abs(np.asarray(Image.open(io.BytesIO(png)), int) - np.asarray(image, int)).max() <= 1


def test_moving_the_slider_shows_that_step(box):
    box.step.value = 0
    first = box.state.value
    box.step.value = 20
    assert box.state.value != first and box.state.value == box.predicted.value


def test_a_new_prompt_is_drawn_and_a_strange_one_is_explained(box):
    former, image = box.explorer, box.state.value
    box.prompt.value = "a cat"
    assert box.explorer is not former and box.below.children == (box.explorer,) and box.state.value != image
    assert "has never seen the word" in box.message.value and "cat" in box.message.value
    box.prompt.value = "red " * 60  # longer than T5's context
    assert "at most 32 T5 tokens" in box.message.value and not box.button.disabled


def test_every_explorer_is_in_the_gallery_and_opens_once(pipe):
    own = {name for name, entry in explorers().items() if entry.function.__module__.startswith("fluxedu.widgets.")}
    assert set(GALLERY) == own
    gallery = Gallery(pipe)
    for name in ("tokens", "particles"):
        gallery.selected_index = list(GALLERY).index(name)
        (shown,) = gallery.places[name].children
        assert shown.title == GALLERY[name].question
        gallery.selected_index = None
        gallery.selected_index = list(GALLERY).index(name)
        assert gallery.places[name].children == (shown,)
    for entry in GALLERY.values():
        assert (notebooks_folder() / f"{entry.notebook}.ipynb").exists()
