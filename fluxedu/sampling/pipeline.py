"""From a prompt to an image. The order of the stages is defined only here:

schedule -> tokenizers -> CLIP pooled vector + T5 embeddings -> noise
-> for each step: pack, Flux, unpack, solver -> autoencoder -> image
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from fluxedu.errors import GradientError, PromptWarning, RequestError, check_device, check_integer, checked, describe
from fluxedu.memory.placement import Networks, memory_advice
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.models.config import Sampling
from fluxedu.models.flux import Flux
from fluxedu.probe import Sited
from fluxedu.progress import progress_bar
from fluxedu.sampling.batches import batch_size, decoder_batch, parts
from fluxedu.sampling.checks import check_finite, check_networks, check_widths
from fluxedu.sampling.conditions import (
    Conditions,
    check_pictures,
    default_size,
    encode_conditions,
    paste_outside,
    read_pictures,
)
from fluxedu.sampling.gradients import gradient_mode, leaf
from fluxedu.sampling.images import Picture, resized, to_images
from fluxedu.sampling.latents import draw_noise
from fluxedu.sampling.prompts import Conditioning, PromptEncoder
from fluxedu.sampling.request import Request, checked_times, make_requests, refuse_unknown
from fluxedu.sampling.solvers import from_strength, get_solver, schedule
from fluxedu.sampling.step_context import StepContext, at_pictures, at_step, changed, entered, stopping_after
from fluxedu.sampling.velocity_field import VelocityField
from fluxedu.threads import adapted_threads, step_done

_RUNS = count()


@dataclass(frozen=True)
class Trajectory:
    """A whole run: ``times [N+1]``, ``latents [N+1, B, C, h, w]``, ``velocities [N, B, C, h, w]``."""

    times: Tensor
    latents: Tensor
    velocities: Tensor

    @property
    def x0(self) -> Tensor:
        """The predicted x0 of each step, ``x_t - t v``: the point that the tangent at x_t reaches at t = 0.

        Shape ``[N, B, C, h, w]``.
        """
        return self.latents[:-1] - self.times[:-1].view(-1, 1, 1, 1, 1).to(self.latents) * self.velocities

    @staticmethod
    @checked()
    def joined(runs: list[Trajectory]) -> Trajectory:
        """The runs of several batches of images on the same schedule as one."""
        if not runs:
            raise RequestError("runs must hold at least one trajectory.")
        latents, velocities = (torch.cat([getattr(run, name) for run in runs], 1) for name in ("latents", "velocities"))
        return Trajectory(runs[0].times, latents, velocities)


@dataclass(frozen=True)
class Output:
    """The pipeline's result: PIL ``images``, their ``latents [B, C, h, w]``, and the ``trajectory`` (or None)."""

    images: list[Image.Image]
    latents: Tensor
    trajectory: Trajectory | None


class FluxPipeline(Sited):
    """The whole of FLUX.1: ``pipe("a red circle", seed=0).images[0]``.

    Attributes: ``prompt_encoder``, ``flux``, ``autoencoder`` · ``defaults`` and ``size``, the variant's sampling
    settings and image side in pixels · ``redux``, a :class:`fluxedu.models.redux.Redux` or None, which encodes an
    image as tokens that are appended to T5's · ``lora``, the :class:`fluxedu.checkpoints.Merged` of ``load(lora=...)``,
    or None · ``prompt_problem``, a function of a prompt that says why the model cannot draw it, or returns None; only
    the miniature has one. Raises RequestError for networks of different models, whose widths do not fit each other.
    """

    site_path = "sample"

    @checked(RequestError, "prompt_encoder", "defaults", "size")
    def __init__(
        self, prompt_encoder: PromptEncoder, flux: Flux, autoencoder: AutoEncoder, defaults: Sampling, size: int
    ):
        check_widths(prompt_encoder, flux, autoencoder)
        self.prompt_encoder, self.flux, self.autoencoder = prompt_encoder, flux, autoencoder
        self.defaults, self.size = defaults, size
        self.redux = None
        self.lora = None
        self.prompt_problem: Callable[[str], str | None] | None = None

    @property
    def device(self) -> torch.device:
        return self.flux.img_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.flux.img_in.weight.dtype

    def networks(self) -> dict[str, torch.nn.Module]:
        """The networks by name: clip, t5, flux, ae, and redux if there is one."""
        networks = self.prompt_encoder.networks() | {"flux": self.flux, "ae": self.autoencoder}
        return networks if self.redux is None else networks | {"redux": self.redux}

    def to(self, *args, **kwargs) -> FluxPipeline:
        """Move or cast all networks, as ``nn.Module.to``; raises RequestError for an unavailable device."""
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, (str, torch.device)):
                check_device(argument)
        try:
            dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
            if dtype is not None and not dtype.is_floating_point:
                raise ValueError(f"{dtype} has no fractions")
        except (TypeError, RuntimeError, ValueError) as error:
            raise RequestError(f"to() takes a device, a dtype or both: {' '.join(str(error).split())[:100]}.") from None
        placement = self.flux.placement
        if placement is not None and placement.mode != "full":
            raise RequestError("to() cannot move streamed weights; call fe.load again with device= or memory='full'.")
        if placement is not None and placement.quantised:
            raise RequestError(
                f"to() cannot move or cast {placement.quantised} weights; call fe.load again with device= or dtype=."
            )
        for network in self.networks().values():
            network.to(*args, **kwargs)
        return self

    def __call__(
        self,
        prompt: str | list[str] | Conditioning,
        *,
        negative_prompt: str | list[str] | None = None,
        seed: int | list[int] = 0,
        num_images: int = 1,
        batch: int | None = None,
        latents: Tensor | None = None,
        steps: int | None = None,
        times: Sequence[float] | Tensor | None = None,
        shift: float | None = None,
        guidance: float | None = None,
        true_cfg_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        height: int | None = None,
        width: int | None = None,
        solver: str = "euler",
        image: Picture | None = None,
        strength: float = 0.6,
        mask: Picture | None = None,
        paste: bool = True,
        control: Picture | None = None,
        reference: Picture | list[Picture] | None = None,
        image_prompt: Picture | None = None,
        trajectory: bool = True,
        progress: bool = True,
        rounding: str = "up",
        decode: bool = True,
        stop_after: int | str | None = None,
        **unknown,
    ) -> Output:
        """Generate one image for the prompt, or one for each prompt of a list, several at once.

        prompt: text, or texts that are encoded already, ``pipe.prompt_encoder([...])``.
        negative_prompt: the prompt that classifier-free guidance moves away from; the empty prompt by default.
        seed: a number, or a list to draw one image per seed; an image depends only on its own seed and prompt.
        num_images: images of each prompt, with the seeds seed, seed + 1, ...
        batch: how many images are computed at once; by default as many as are fastest on a CPU, and as many as fit in
        the memory of a GPU, but one while an intervention is active. With 1, an image is the same to the last bit as
        alone; otherwise it differs by rounding.
        latents: the start ``[B, C, h, w]`` in place of noise; it sets the size of the image.
        steps: number of steps; the variant's own by default.
        times: the schedule itself, falling from 1 (noise) to 0 (image), in place of ``steps``.
        shift: how far the schedule is shifted towards noise, ``e^mu``: 1 leaves it unshifted; the variant's own by
        default.
        guidance: the guidance scale; the variant's own by default. Models with a guidance input receive it; for others
        it is the scale of classifier-free guidance, which 0 or 1 turns off.
        true_cfg_scale: the scale of classifier-free guidance for a model with a guidance input; 1 turns it off.
        guidance_interval: the times (low, high) between which classifier-free guidance is on.
        height, width: size of the image in pixels; by default that of the input picture, or the variant's own. A
        picture of more than twice the variant's own number of pixels (2 megapixels) is scaled down to about that
        number, with its aspect ratio and a warning; a reference is, whatever the size of the image.
        solver: ``euler``, ``midpoint``, ``heun``, or one added to ``fe.sampling.SOLVERS``.
        image: the picture that image-to-image starts from; with ``mask``, the picture that is filled (fill).
        strength: the fraction of the steps that image-to-image runs; 1 keeps nothing of ``image``.
        mask: the mask for ``image``, white where to paint (fill); transparent pixels are not painted.
        paste: whether the original pixels outside the mask are pasted back, in ``images`` only.
        control: the edges or the depth map that the image follows (canny, depth).
        reference: the picture that the prompt edits (kontext), or for FLUX.2 a list of one or more pictures.
        image_prompt: a picture that is encoded as part of the prompt (redux).
        trajectory: whether to return the states of all steps.
        progress: whether to show a progress bar.
        rounding: how sizes are rounded to whole patches, see :func:`fluxedu.sampling.latents.latent_size`.
        decode: whether latents are decoded to images.
        stop_after: index of the last step to run, or the site after which to stop; no image is decoded.

        Raises RequestError for invalid arguments; OutOfMemory when memory runs out. The miniature warns of prompts that
        it cannot draw (:class:`fluxedu.errors.PromptWarning`).
        """
        refuse_unknown(unknown)
        for name, flag in {"paste": paste, "trajectory": trajectory, "progress": progress, "decode": decode}.items():
            if not isinstance(flag, bool):
                raise RequestError(f"{name} must be True or False, not {describe(flag)}.")
        check_networks(self)
        pictures = {"image": image, "mask": mask, "control": control}
        pictures = read_pictures(pictures | {"reference": reference, "image_prompt": image_prompt})
        downscale = self.autoencoder.config.downscale
        check_pictures(self.flux.config, downscale, self.redux is not None, pictures)
        is_sized = latents is not None or (height is not None and width is not None)
        default_height, default_width = default_size(pictures, self.size, downscale, is_sized)
        if isinstance(latents, Tensor) and latents.ndim == 4 and height is None and width is None:
            default_height, default_width = (side * downscale for side in latents.shape[-2:])
        encoded = prompt if isinstance(prompt, Conditioning) else None
        if times is not None:
            times = checked_times(times)
            steps = len(times) - 1 if steps is None else steps
        requests = make_requests(
            prompt=prompt if encoded is None else self._placeholder_prompts(encoded),
            num_images=num_images,
            latents=latents,
            shift=shift,
            channels=self.autoencoder.config.z_channels,
            negative_prompt=negative_prompt,
            seed=seed,
            steps=self.defaults.steps if steps is None else steps,
            guidance=self.defaults.guidance if guidance is None else guidance,
            true_cfg_scale=true_cfg_scale,
            guidance_interval=guidance_interval,
            height=default_height if height is None else height,
            width=default_width if width is None else width,
            rounding=rounding,
            solver=solver,
            strength=strength,
            guidance_embed=self.flux.config.guidance_embed,
            downscale=downscale,
            paste=paste,
            references=pictures.pop("reference") or [],
            **pictures,
        )
        if encoded is None and (problem := self._problem_of([request.prompt for request in requests])):
            warnings.warn(problem, PromptWarning, stacklevel=2)
        if times is None:
            times = self.times(requests[0])
        elif shift is not None or requests[0].steps != len(times) - 1:
            raise RequestError("times= sets the whole schedule; leave steps= and shift= out.")
        all_steps = steps_to_run = len(times) - 1
        if isinstance(stop_after, int):
            last_step = check_integer("stop_after", stop_after, -all_steps, all_steps - 1, "it is a step or a site")
            steps_to_run, stop_after, decode = last_step % all_steps + 1, None, False
        txt_len = self.prompt_encoder.tokenizer.length
        txt_len += 0 if image_prompt is None else self.redux.tokens
        context = StepContext(self, requests[0], next(_RUNS), txt_len, 0, len(requests), all_steps)
        networks = Networks(self.flux, self.autoencoder, **self.prompt_encoder.networks(), dtype=self.dtype)
        batch = batch_size(batch, requests, networks, self.device, txt_len)

        images, latents, runs = [], [], []
        with self._running(context, networks, batch, steps_to_run, stop_after, progress) as bar:
            prompts, negative = self.encode(requests, encoded, batch)
            for part in parts(len(requests), batch):  # the images that are computed at once
                # with classifier-free guidance, B negative prompts and then B prompts
                texts = prompts[part] if negative is None else negative[part].joined(prompts[part])
                with at_pictures(requests[part], part.start):
                    x, run = self.denoise(requests[part], texts, times, steps_to_run, trajectory, bar)
                    images += self.decode(x, requests[part]) if decode else []
                latents.append(x)
                runs.append(run)
        if not runs:  # stopped at a site
            return Output([], torch.empty(0, device="cpu"), None)
        return Output(images, torch.cat(latents), Trajectory.joined(runs) if trajectory else None)

    # ---------------------------------------------------------------- the stages of a run

    @torch.no_grad()
    def encode(
        self, requests: list[Request], encoded: Conditioning | None = None, batch: int = 1
    ) -> tuple[Conditioning, Conditioning | None]:
        """The encoded prompts, one row per image, and with classifier-free guidance the encoded negative prompts.

        encoded: the prompts, if the caller has encoded them already · batch: how many are encoded at once.
        """
        negative = None
        if requests[0].uses_cfg:  # the same for all images
            with changed(negative=True):  # for instruments
                negative = self.prompt_encoder([request.negative_prompt for request in requests], batch)
        if encoded is None:
            encoded = self.prompt_encoder([request.prompt for request in requests], batch)
        images_per_prompt = len(requests) // len(encoded.txt)
        prompts = encoded[[i // images_per_prompt for i in range(len(requests))]]
        if requests[0].image_prompt is not None:  # Redux: more tokens after the text's
            tokens = [self.redux(request.image_prompt.to(self.device, self.dtype)) for request in requests]
            prompts = prompts.with_tokens(torch.cat(tokens))  # [B, L + M, D]
            negative = None if negative is None else negative.with_tokens(torch.cat(tokens))
        return prompts, negative

    def times(self, request: Request) -> Tensor:
        """The schedule, ``[N+1]`` times from 1 (noise) to 0 (image); for image-to-image, its last part."""
        tokens = request.shape[0] * request.shape[1] // 4
        times = schedule(request.steps, tokens, self.defaults.shift, self.defaults.shift_ends)
        if request.shift is not None:
            mu = math.log(request.shift)
            times = schedule(request.steps, tokens, True, (mu, mu))
        return from_strength(times, request.strength) if request.is_image_to_image else times

    def denoise(
        self, requests: list[Request], texts: Conditioning, times: Tensor, steps: int, trajectory: bool, bar: tqdm
    ) -> tuple[Tensor, Trajectory | None]:
        """From noise at t = 1 to the latents ``x [B, C, h, w]`` of images at t = 0, and the trajectory if it is wanted.

        The solver integrates ``dx/dt = velocity(x, t)`` along ``times``, of which it takes the first ``steps`` steps.
        """
        velocity = self.velocity_field(requests, times, texts)  # velocity(x, t): what the transformer predicts
        solver, x = get_solver(requests[0].solver), self.start(requests, times[0])
        states, velocities = [], []
        for step, (t, t_next) in enumerate(pairwise(times[: steps + 1].tolist())):
            with at_step(step, t):
                x = self.probe("x", x)  # [B, C, h, w] the state at the beginning of each step
                # Euler's method returns x + (t_next - t) * v and v, where v = velocity(x, t); others evaluate it twice
                x_next, v = solver.checked(solver.step(x, t, t_next, velocity), x)  # raises unless both have x's shape
                # warns of NaN and infinity, and only then computes the step again, to find where they begin
                check_finite("the latents", x_next, partial(solver.step, x, t, t_next, velocity), {"sample.x": x})
            if trajectory:
                states.append(x)
                velocities.append(v)
            x = x_next
            bar.update(len(x))
            step_done()
        run = Trajectory(times[: steps + 1], torch.stack([*states, x]), torch.stack(velocities)) if trajectory else None
        return x, run

    def start(self, requests: list[Request], t: Tensor) -> Tensor:
        """The latents ``[B, C, h, w]`` at the first time ``t``: noise, or ``(1 - t) * image + t * noise``."""
        states = []
        for i, request in enumerate(requests):
            noise = draw_noise(request.seed, self.autoencoder.config.z_channels, *request.shape)
            x = (noise if request.latents is None else request.latents).to(self.device, self.dtype)
            if request.is_image_to_image:
                with at_pictures([request], i):
                    latent = self._encode_picture(resized(request.image, request.shape, self._downscale))
                x = (1 - t) * latent + t * x
            states.append(x)
        return self.probe("noise", leaf(torch.cat(states)))  # [B, C, h, w] the state at the beginning of the run

    def velocity_field(self, requests: list[Request], times: Tensor, texts: Conditioning) -> VelocityField:
        """The function ``velocity(x, t)`` that the solver integrates, with all that stays the same during the run.

        texts: the encoded prompts; with classifier-free guidance, as many encoded negative prompts come first.
        """
        txt = self.probe("txt", leaf(texts.txt))  # [B, L, D] the prompt's embeddings, once per image
        pooled = texts.pooled
        if self.flux.config.vec_in_dim:
            pooled = self.probe("pooled", leaf(pooled))  # [B, D] the prompt's CLIP vector, once per image
        pictures = self._encode_conditions(requests)
        evaluation_times = get_solver(requests[0].solver).evaluation_times(times.tolist())
        return VelocityField(self.flux, Conditioning(txt, pooled), pictures, requests[0], evaluation_times)

    def _encode_conditions(self, requests: list[Request]) -> Conditions:
        """The pictures that some variants read besides text."""
        pictures, axes = [], len(self.flux.config.axes_dim)
        for i, request in enumerate(requests):
            with at_pictures([request], i):
                pictures.append(encode_conditions(request, self._encode_picture, self._downscale, axes))
        return Conditions.stacked(pictures)

    def decode(self, latents: Tensor, requests: list[Request]) -> list[Image.Image]:
        """The images of latents ``[B, C, h, w]``; for fill, with the original pixels outside the masks."""
        images = []
        for part in parts(len(requests), decoder_batch(len(requests), self.device)):
            with at_pictures(requests[part], part.start):
                latent = self.probe("latent", latents[part])  # [B, C, h, w] the state at the end of the run
                image = self.autoencoder.decode(latent)
                check_finite("the pixels", image, partial(self.autoencoder.decode, latent))
                image = self.probe("image", image)  # [B, C, h, w] the image, about -1 to 1; h and w are pixels
                if requests[0].mask is not None and requests[0].paste:
                    image = paste_outside(image, requests[part], self._downscale)
                images += to_images(image.detach())
        return images

    @contextmanager
    def _running(
        self, context: StepContext, networks: Networks, batch: int, steps: int, stop_after: str | None, progress: bool
    ) -> Iterator[tqdm]:
        """The gradient mode, advice when memory runs out, threads, progress bar and step context of a run."""
        request = context.request
        if gradient_mode() is not None and self.flux.placement is not None and self.flux.placement.mode != "full":
            raise GradientError("gradients need all weights in memory; load the pipeline with memory='full'.")
        height, width = (side * self._downscale for side in request.shape)
        with (
            torch.set_grad_enabled(gradient_mode() is not None),
            memory_advice(networks, self.device, height, width, context.txt_len),
            adapted_threads(self.flux, (batch, request.shape, request.uses_cfg)),
            progress_bar(total=context.pictures * steps, show=progress, desc="sampling") as bar,
            entered(context),
            stopping_after(stop_after),
        ):
            yield bar

    def _problem_of(self, prompts: list[str]) -> str | None:
        """Why the model cannot draw the first of these prompts that it cannot draw, and how many more there are."""
        if self.prompt_problem is None:
            return None
        problems = [problem for prompt in dict.fromkeys(prompts) if (problem := self.prompt_problem(prompt))]
        more = f" (and {len(problems) - 1} more of the prompts cannot be drawn)" if len(problems) > 1 else ""
        return f"{problems[0]}{more}." if problems else None

    def _placeholder_prompts(self, encoded: Conditioning) -> list[str]:
        """An empty prompt for each encoded one; raises RequestError for shapes that the transformer cannot read."""
        config, b = self.flux.config, len(encoded.pooled)
        length = self.prompt_encoder.tokenizer.length
        expected = (b, length, config.context_in_dim), (b, config.vec_in_dim)
        if (encoded.txt.shape, encoded.pooled.shape) != expected:
            raise RequestError(
                f"an encoded prompt must have txt {list(expected[0])} and pooled {list(expected[1])}, "
                f"not {list(encoded.txt.shape)} and {list(encoded.pooled.shape)}."
            )
        return [""] * b

    @property
    def _downscale(self) -> int:
        return self.autoencoder.config.downscale

    def _encode_picture(self, picture: Tensor) -> Tensor:
        return self.autoencoder.encode(picture.to(self.device, self.dtype))
