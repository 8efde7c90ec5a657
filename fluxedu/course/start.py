"""What START.ipynb shows: a prompt box that draws while you watch, with an explorer of the result; all explorers."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable
from html import escape
from typing import NamedTuple

import ipywidgets
import torch
from PIL.Image import Image
from torch import Tensor

import fluxedu as fe
from fluxedu import widgets
from fluxedu.errors import FluxeduError, PromptWarning
from fluxedu.instruments.interventions import Context
from fluxedu.nano.scenes import Claim
from fluxedu.nano.vocabulary import VOCABULARY
from fluxedu.sampling.images import to_images
from fluxedu.sampling.pipeline import FluxPipeline
from fluxedu.widgets.explorer import EXAMPLE_PROMPT, Explorer

PROMPT = "a red circle left of a blue square on a white background"
SIDE = 192  # of a picture on the page, in pixels
LIVE = 4  # while an image is drawn, every fourth step is decoded and shown


class Film:
    """The states ``[1, C, h, w]`` of a run with their times, decoded when they are first shown."""

    def __init__(self, pipe: FluxPipeline):
        self.pipe = pipe
        self.states: list[Tensor] = []
        self.times: list[float] = []
        self._decoded: dict[int, list[bytes]] = {}

    @property
    def steps(self) -> int:
        """The number of steps that are complete."""
        return len(self.states) - 1

    def append(self, x: Tensor, t: float) -> None:
        self.states.append(x)
        self.times.append(t)

    def images(self, step: int) -> list[bytes]:
        """The state before a step and its predicted x0, ``x - t v``, decoded, as PNG files.

        After the last step, the last state twice.
        """
        if step not in self._decoded:
            x, t = self.states[step], self.times[step]
            x0 = x
            if step < self.steps:  # the velocity of a step of Euler's method
                x0 = x - t * (self.states[step + 1] - x) / (self.times[step + 1] - t)
            with torch.no_grad():
                images = to_images(self.pipe.autoencoder.decode(torch.cat([x, x0])))
            self._decoded[step] = [_png(image) for image in images]
        return self._decoded[step]


class PromptBox(ipywidgets.VBox):
    """A text field for a prompt; Enter or "Draw" draws it step by step, with a film of the run and its attention.

    ``film`` and ``explorer`` belong to the last image.
    """

    def __init__(self, pipe: FluxPipeline, prompt: str = PROMPT, seed: int = 0):
        self.pipe, self.film, self.explorer = pipe, None, None
        wide = {"description_width": "initial"}
        self.prompt = ipywidgets.Text(
            prompt, description="prompt", layout={"width": "min(100%, 44rem)"}, style=wide, continuous_update=False
        )
        self.seed = ipywidgets.BoundedIntText(
            seed, 0, 10**9, description="seed", layout={"width": "9rem"}, style={"description_width": "2.6rem"}
        )
        self.button = ipywidgets.Button(description="Draw", button_style="primary", icon="pencil")
        self.message = ipywidgets.HTML()
        self.state, self.predicted = (
            ipywidgets.Image(format="png", width=SIDE, height=SIDE, layout={"object_fit": "contain"}) for _ in range(2)
        )
        self.player = ipywidgets.Play(interval=200, show_repeat=False)
        self.step = ipywidgets.IntSlider(description="step", continuous_update=True, layout={"width": "24rem"})
        ipywidgets.jslink((self.player, "value"), (self.step, "value"))
        self.below = ipywidgets.VBox()
        known = "; ".join(f"<b>{escape(kind)}</b> {escape(', '.join(words))}" for kind, words in VOCABULARY.items())
        super().__init__(
            [
                self.prompt,
                ipywidgets.HBox([self.seed, self.button]),
                ipywidgets.HTML(f"<details><summary>The words that the miniature knows</summary>{known}</details>"),
                self.message,
                ipywidgets.HBox(
                    [_titled("State x, decoded", self.state), _titled("Predicted x0, decoded", self.predicted)],
                    layout={"flex_flow": "row wrap"},
                ),
                ipywidgets.HBox([self.player, self.step], layout={"flex_flow": "row wrap"}),
                self.below,
            ]
        )
        self.button.on_click(lambda _: self.draw())
        self.prompt.observe(lambda _: self.draw(), "value")
        self.step.observe(lambda change: self.show(change["new"]), "value")
        self.draw()

    def draw(self) -> None:
        """Draw the prompt, show some of the steps at once, and the attention of the run at the end."""
        prompt, seed = self.prompt.value, self.seed.value
        self.button.disabled = True
        try:
            problem = self.pipe.prompt_problem(prompt) if self.pipe.prompt_problem else None
            self.message.value = _paragraph(f"{problem[0].upper()}{problem[1:]}.", "#b35900") if problem else ""
            self.film = Film(self.pipe)
            self.step.max = self.player.max = self.pipe.defaults.steps
            with (
                warnings.catch_warnings(),
                fe.intervene("sample.x", self._watch),
                fe.intervene("sample.latent", self._watch_last),
            ):
                warnings.simplefilter("ignore", PromptWarning)  # the message above says it
                explorer = widgets.attention(self.pipe, prompt, seed=seed, progress=False)
            former, self.explorer = self.explorer, explorer
            self.below.children = [explorer]
            if former is not None:
                former.close()
        except FluxeduError as error:
            self.message.value = _paragraph(str(error), "#b00020")
        finally:
            self.button.disabled = False

    def show(self, step: int) -> None:
        """Show the state before a step (after the last step: the last state), and what it predicts."""
        if self.film is not None and 0 <= step <= self.film.steps:
            self.state.value, self.predicted.value = self.film.images(step)

    def _watch(self, x: Tensor, context: Context) -> Tensor:
        """Keep the state before each step; show every fourth step as soon as it is complete."""
        self.film.append(x, context.time)
        if context.step % LIVE == 1:
            self.step.value = context.step - 1
        return x

    def _watch_last(self, x: Tensor, context: Context) -> Tensor:
        self.film.append(x, 0.0)
        self.step.value = self.film.steps
        return x

    def _ipython_display_(self) -> None:
        """Show a static figure of the attention and then the live box, which hides it."""
        from IPython.display import display

        file = io.BytesIO()
        self.explorer.figure().savefig(file, format="png", dpi=80)
        image = base64.b64encode(file.getvalue()).decode()
        still = f'<img class="fluxedu-still {self.explorer.still}" alt="{escape(self.explorer.title, quote=True)}" '
        display({"text/html": f'{still}src="data:image/png;base64,{image}">', "text/plain": repr(self)}, raw=True)
        display(self._repr_mimebundle_() | {"text/plain": repr(self)}, raw=True)

    def __repr__(self) -> str:
        return "<PromptBox>"


def _png(image: Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _titled(title: str, image: ipywidgets.Image) -> ipywidgets.VBox:
    return ipywidgets.VBox([ipywidgets.HTML(f"<b>{title}</b>"), image])


def _paragraph(text: str, colour: str) -> str:
    return f'<p role="status" style="color: {colour}; line-height: 1.4; max-width: 44rem">{escape(text)}</p>'


# ---------------------------------------------------------------- the gallery


class Entry(NamedTuple):
    """An explorer in the gallery: its question, the notebook about its subject, the code that makes one like it, and a
    function that makes it. By default the explorer takes a pipeline and a prompt.
    """

    question: str
    notebook: str
    code: str = ""
    make: Callable[[FluxPipeline], Explorer] | None = None


def _guidance(pipe: FluxPipeline) -> Explorer:
    claim = Claim((("red", "circle", None), ("blue", "square", None)), ((0, "left of", 1),), None)
    scales, seeds = [1.0, 3.0, 6.0, 9.0], [0, 1, 2]
    sweep = widgets.guidance.sweep(pipe, EXAMPLE_PROMPT, claim, scales=scales, seeds=seeds, steps=8)
    return widgets.guidance({"nano": sweep})


def _blind(pipe: FluxPipeline) -> Explorer:
    prompts = [EXAMPLE_PROMPT, "a green star above a pink ring", "a yellow cross right of a purple triangle"]
    images = {f"{steps} steps": pipe(prompts, steps=steps, progress=False).images for steps in (3, 8, 20)}
    return widgets.blind(images, prompts)


#: every explorer of the package, in the order of the course
GALLERY: dict[str, Entry] = {
    "attention": Entry("Which words and patches does a patch attend to?", "06b-joint-attention"),
    "architecture": Entry("What does each part of the model compute?", "00b-instruments"),
    "trajectory": Entry("How does an image emerge from noise?", "00-a-picture-from-a-sentence"),
    "latents": Entry("What do the numbers of a latent mean?", "01b-packing"),
    "similarity": Entry(
        "How similar are two prompts to CLIP?",
        "02b-contrastive-learning",
        "widgets.similarity(pipe, prompts)",
        lambda pipe: widgets.similarity(pipe),
    ),
    "tokens": Entry(
        "How similar are two tokens to T5?", "03-t5", make=lambda pipe: widgets.tokens(pipe, EXAMPLE_PROMPT)
    ),
    "positions": Entry(
        "How does RoPE make an attention score depend on the distance?",
        "04-rotary-positions",
        "widgets.positions(pipe)",
        lambda pipe: widgets.positions(pipe),
    ),
    "modulation": Entry(
        "How do time, guidance and the prompt control each layer?",
        "05b-modulation",
        make=lambda pipe: widgets.modulation(pipe, EXAMPLE_PROMPT),
    ),
    "streams": Entry("How large are text and image tokens, and what is added to them?", "07-the-double-stream-block"),
    "contributions": Entry("How much do attention and the MLP add in each block?", "08b-what-single-blocks-add"),
    "parameters": Entry(
        "Where are the parameters of a FLUX model?",
        "09b-parameters-and-layouts",
        "widgets.parameters()",
        lambda _: widgets.parameters(),
    ),
    "particles": Entry(
        "How does a flow carry noise to data?",
        "10b-velocity-field",
        'widgets.particles({"to 0": lambda x, t: x / t}, torch.zeros(1, 2))',
        lambda _: widgets.particles({"to 0": lambda x, t: x / t}, torch.zeros(1, 2)),
    ),
    "velocity": Entry(
        "Where does the velocity lead each run?",
        "10b-velocity-field",
        "widgets.velocity(pipe, prompts)",
        lambda pipe: widgets.velocity(pipe, [EXAMPLE_PROMPT, "a green star"], progress=False),
    ),
    "solvers": Entry("Which solver needs the fewest model evaluations?", "11-sampling"),
    "grid": Entry("How many steps and how much guidance does an image need?", "11-sampling"),
    "guidance": Entry(
        "What does the guidance scale change?",
        "12-guidance",
        'widgets.guidance({"nano": widgets.guidance.sweep(pipe, prompt, claim, scales=[1, 6], seeds=[0, 1])})',
        _guidance,
    ),
    "heads": Entry("Which attention heads matter?", "13b-patching"),
    "bench": Entry(
        "What happens to the image when one block is changed?",
        "13b-patching",
        "widgets.bench(pipe, prompt, other_prompt)",
        lambda pipe: widgets.bench(pipe, EXAMPLE_PROMPT, EXAMPLE_PROMPT.replace("red", "green"), progress=False),
    ),
    "blind": Entry(
        "Which image is better?",
        "15-the-arena",
        'widgets.blind({"3 steps": images, "20 steps": other_images}, prompts)',
        _blind,
    ),
}


class Gallery(ipywidgets.Accordion):
    """All explorers, each under its question; an explorer is made when its question is opened for the first time."""

    def __init__(self, pipe: FluxPipeline):
        self.pipe = pipe
        self.places = {name: ipywidgets.VBox() for name in GALLERY}
        boxes = []
        for name, entry in GALLERY.items():
            link = f'<a href="{entry.notebook}.ipynb">notebook {entry.notebook.partition("-")[0]}</a>'
            code = f"<code>{escape(entry.code or f'widgets.{name}(pipe, prompt)')}</code>"
            about = ipywidgets.HTML(f"<p>This is the subject of {link}. In your own notebook: {code}</p>")
            boxes.append(ipywidgets.VBox([about, self.places[name]]))
        super().__init__(boxes, titles=[entry.question for entry in GALLERY.values()])
        self.observe(lambda change: self.reveal(change["new"]), "selected_index")

    def reveal(self, index: int | None) -> None:
        """Make the explorer at this index of the list, unless it is there already."""
        name = None if index is None else list(GALLERY)[index]
        if name is None or self.places[name].children:
            return
        self.places[name].children = [ipywidgets.HTML("The model is running ...")]
        make = GALLERY[name].make or (lambda pipe: getattr(widgets, name)(pipe, EXAMPLE_PROMPT, progress=False))
        self.places[name].children = [make(self.pipe)]

    def __repr__(self) -> str:
        return "<Gallery>"
