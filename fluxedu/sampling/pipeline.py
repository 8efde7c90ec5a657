"""From a sentence to a picture. This file alone knows the order of things:

prompt -> tokenizers -> CLIP pooled + T5 tokens -> noise packed to tokens -> schedule -> Flux per step
-> solver -> unpack -> autoencoder -> image
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from fluxedu.errors import RequestError
from fluxedu.memory.placement import Networks
from fluxedu.memory.shortage import advised
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.models.config import Sampling
from fluxedu.models.flux import Flux, Plan
from fluxedu.probe import Sited, watched
from fluxedu.sampling.conditions import Given, check_fits, pasted, read
from fluxedu.sampling.images import Picture, fitted, to_images, to_mask, to_tensor
from fluxedu.sampling.latents import draw_noise, image_ids, pack, text_ids, unpack
from fluxedu.sampling.prompts import Conditioning, PromptEncoder
from fluxedu.sampling.request import Request, checked_device, requests_of
from fluxedu.sampling.solvers import (
    SOLVERS,
    Velocity,
    active,
    doubled,
    evaluation_times,
    from_strength,
    guide,
    schedule,
)
from fluxedu.sampling.step_context import StepContext, count_evaluation, entered

_RUNS = count()


@dataclass(frozen=True)
class Trajectory:
    """A whole run: ``times [N+1]``, ``latents [N+1, B, C, h, w]``, ``velocities [N, B, C, h, w]``."""

    times: Tensor
    latents: Tensor
    velocities: Tensor

    @property
    def x0(self) -> Tensor:
        """Where each step's tangent would end: the picture foreseen, ``x_t - t v``, ``[N, B, C, h, w]``."""
        return self.latents[:-1] - self.times[:-1].view(-1, 1, 1, 1, 1).to(self.latents) * self.velocities


@dataclass(frozen=True)
class Output:
    """What the pipeline gives: PIL ``images``, their ``latents [B, C, h, w]``, and the ``trajectory``."""

    images: list[Image.Image]
    latents: Tensor
    trajectory: Trajectory | None

    @classmethod
    def of(cls, drawn: list[tuple[Image.Image, Trajectory]], keep: bool) -> Output:
        """Single pictures side by side; all share the times."""
        images, runs = zip(*drawn, strict=True)
        latents = torch.cat([run.latents for run in runs], dim=1)  # [N+1, B, C, h, w]
        velocities = torch.cat([run.velocities for run in runs], dim=1)
        return cls(list(images), latents[-1], Trajectory(runs[0].times, latents, velocities) if keep else None)


class FluxPipeline(Sited):
    """The whole of FLUX.1: ``pipe("a red circle", seed=0).images[0]``.

    Attributes: ``prompt_encoder``, ``flux``, ``autoencoder``, the ``defaults`` of its variant, and ``redux``
    (a :class:`fluxedu.models.redux.Redux`, or None), which turns a picture into tokens beside the words; and ``lora``,
    the :class:`fluxedu.checkpoints.Merged` of ``load(lora=...)``, or None.
    """

    site_path = "sample"
    redux: torch.nn.Module | None = None
    lora = None

    def __init__(
        self, prompt_encoder: PromptEncoder, flux: Flux, autoencoder: AutoEncoder, defaults: Sampling, size: int
    ):
        self.prompt_encoder, self.flux, self.autoencoder = prompt_encoder, flux, autoencoder
        self.defaults, self.size = defaults, size

    @property
    def device(self) -> torch.device:
        return self.flux.img_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.flux.img_in.weight.dtype

    def networks(self) -> dict[str, torch.nn.Module]:
        """The four networks by name, and Redux where there is one."""
        four = {
            "clip": self.prompt_encoder.clip,
            "t5": self.prompt_encoder.t5,
            "flux": self.flux,
            "ae": self.autoencoder,
        }
        return four if self.redux is None else {**four, "redux": self.redux}

    def to(self, *args, **kwargs) -> FluxPipeline:
        """Move or cast all networks, as ``nn.Module.to``; raises RequestError for a device that is not there."""
        for place in (*args, *kwargs.values()):
            if isinstance(place, (str, torch.device)):
                checked_device(place)
        if any(getattr(network, "visitors", ()) for network in self.networks().values()):
            raise RequestError("weights that visit a device cannot be moved; load again with another device or memory.")
        if small := getattr(self.flux, "quantised", None):
            raise RequestError(f"{small} weights cannot be moved or cast; load again with another device or dtype.")
        for network in self.networks().values():
            network.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str | list[str] | None = None,
        seed: int | list[int] = 0,
        steps: int | None = None,
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
        reference: Picture | None = None,
        image_prompt: Picture | None = None,
        trajectory: bool = True,
        progress: bool = True,
        rounding: str = "up",
    ) -> Output:
        """Draw ``prompt`` (or each of a list).

        seed: a number, or a list to draw one picture per seed; a picture depends on its own seed and
        prompt only · steps, guidance, height, width: the variant's own when not given · guidance: the
        strength, through the model's guidance input where it has one, else by classifier-free guidance, 0 being off ·
        true_cfg_scale: classifier-free guidance for a model that has the input, with negative_prompt ·
        guidance_interval: times between which classifier-free guidance is on · solver: euler, midpoint or
        heun · image, strength: begin from a picture instead of from noise · rounding: see ``latent_size``.

        Pictures that members of the family read: image and mask (fill), the mask white where to paint · paste: put the
        image's own pixels back outside the mask, in ``images`` only · control (canny, depth) · reference (kontext): the
        picture that the prompt edits · image_prompt (redux).

        Raises RequestError, one sentence that says what would be right; OutOfMemory, where memory ran out.
        """
        given = {"image": image, "control": control, "reference": reference, "image_prompt": image_prompt}
        pictures = {name: None if of is None else to_tensor(of) for name, of in given.items()}
        pictures["mask"] = None if mask is None else to_mask(mask)
        downscale = self.autoencoder.config.downscale
        check_fits(self.flux.config, downscale, self.redux is not None, **pictures)
        sized = next((pictures[n] for n in ("image", "control", "reference") if pictures[n] is not None), None)
        own_size = (self.size, self.size) if sized is None else sized.shape[-2:]
        asked = requests_of(
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            steps=self.defaults.steps if steps is None else steps,
            guidance=self.defaults.guidance if guidance is None else guidance,
            true_cfg_scale=true_cfg_scale,
            guidance_interval=guidance_interval,
            height=own_size[0] if height is None else height,
            width=own_size[1] if width is None else width,
            rounding=rounding,
            solver=solver,
            strength=strength,
            embedded=self.flux.config.guidance_embed,
            downscale=downscale,
            paste=paste,
            **pictures,
        )
        times = self.times(asked[0])
        words = self.prompt_encoder.t5_tokenizer.length
        words += 0 if image_prompt is None else self.redux.tokens
        here = StepContext(self, asked[0], next(_RUNS), words, 0, len(asked), len(times) - 1)
        networks = Networks(self.flux, self.autoencoder, self.prompt_encoder.clip, self.prompt_encoder.t5, self.dtype)
        sides = (side * downscale for side in asked[0].shape)
        with advised(networks, self.device, *sides, words, getattr(self.flux, "quantised", None)):
            return Output.of(self._each(asked, times, here, progress), keep=trajectory)

    def _each(self, asked: list[Request], times: Tensor, here: StepContext, progress: bool) -> list:
        """One picture after the other, so that a picture is the same to the last bit alone and in a batch.

        (A matrix product rounds differently when it has more rows.)
        """
        with entered(here):
            texts = self.encode(asked)
        with tqdm(total=len(asked) * (len(times) - 1), disable=not progress, delay=1.0, desc="sampling") as bar:
            drawn = []
            for picture, one in enumerate(zip(asked, texts, strict=True)):
                with entered(replace(here, request=one[0], picture=picture)):
                    drawn.append(self.draw(*one, times, bar))
            return drawn

    # -- stage by stage

    def encode(self, asked: list[Request]) -> list[Conditioning]:
        """Prompts to vectors, each different one once; with classifier-free guidance the negative comes first."""
        said = [[one.negative, one.prompt] if one.guided else [one.prompt] for one in asked]
        texts = self.prompt_encoder([prompt for row in said for prompt in row])
        return [self.with_image_prompt(*one) for one in zip(asked, texts.split(len(said[0])), strict=True)]

    def with_image_prompt(self, asked: Request, texts: Conditioning) -> Conditioning:
        """Redux: what is seen in a picture, as tokens behind T5's."""
        if asked.image_prompt is None:
            return texts
        seen = self.redux(asked.image_prompt.to(self.device, self.dtype))  # [1, M, D]
        return Conditioning(torch.cat([texts.txt, seen.expand(len(texts.txt), -1, -1)], dim=1), texts.pooled)

    def given(self, asked: Request) -> Given:
        """What the request's pictures are to the transformer."""
        encode = lambda picture: self.autoencoder.encode(picture.to(self.device, self.dtype))  # noqa: E731
        return read(asked, encode, self.autoencoder.config.downscale)

    def draw(self, asked: Request, texts: Conditioning, times: Tensor, bar: tqdm) -> tuple[Image.Image, Trajectory]:
        """One picture: noise, steps, decoding."""
        texts = Conditioning(self.probe("txt", texts.txt), self.probe("pooled", texts.pooled))
        x = self.probe("noise", self.start(asked, times[0]))
        xs, vs = self.integrate(pack(x), times, texts, asked, bar)
        latents, velocities = (torch.stack([unpack(v, *asked.shape) for v in kept]) for kept in (xs, vs))
        picture = self.probe("image", self.autoencoder.decode(self.probe("latent", latents[-1])))
        if asked.mask is not None and asked.paste:
            picture = pasted(picture, asked, self.autoencoder.config.downscale)
        (image,) = to_images(picture)
        return image, Trajectory(times, latents, velocities)

    def times(self, asked: Request) -> Tensor:
        """The schedule; of it only the end where a picture is begun from."""
        rows, columns = asked.shape
        times = schedule(asked.steps, rows * columns // 4, self.defaults.shift, self.defaults.shift_ends)
        return from_strength(times, asked.strength) if asked.begins_from_image else times

    def start(self, asked: Request, t: Tensor) -> Tensor:
        """The latent at the first time ``t``: noise, or a picture with noise on it."""
        noise = draw_noise(asked.seed, self.autoencoder.config.z_channels, *asked.shape).to(self.device, self.dtype)
        if not asked.begins_from_image:
            return noise
        picture = fitted(asked.image, asked.shape, self.autoencoder.config.downscale).to(self.device, self.dtype)
        return (1 - t) * self.autoencoder.encode(picture) + t * noise

    def integrate(
        self, x: Tensor, times: Tensor, texts: Conditioning, asked: Request, bar: tqdm
    ) -> tuple[list[Tensor], list[Tensor]]:
        """From noise tokens to picture tokens: every state on the way, N + 1 of them, and every velocity, N."""
        velocity = self.velocity_field(times, texts, asked)
        step, clock = SOLVERS[asked.solver], times.tolist()
        xs, vs = [x], []
        for i, (t, t_next) in enumerate(zip(clock, clock[1:], strict=False)):
            with entered(step=i, time=t, stage=-1):
                x = xs[-1] = self._as_latent("x", x, asked)
                x, v = step(x, t, t_next, velocity)
            xs.append(x)
            vs.append(v)
            bar.update()
        return xs, vs

    def velocity_field(self, times: Tensor, texts: Conditioning, asked: Request) -> Velocity:
        """``velocity(x, t)``, guided; all that depends on the time and the pooled text is planned here, once."""
        given = self.given(asked)
        ids = given.places(image_ids(*asked.shape)), text_ids(texts.txt.shape[1])
        rope = self.flux.rope(*(i.to(self.device) for i in ids))
        clock = list(dict.fromkeys(evaluation_times(asked.solver, times.tolist())))
        strength = torch.tensor([asked.guidance], device=self.device) if self.flux.config.guidance_embed else None

        def planned(said: Conditioning) -> dict[float, Plan]:
            moments = torch.tensor(clock, device=self.device)[:, None]
            return dict(zip(clock, self.flux.plan(moments, strength, said.pooled), strict=True))

        prompted = texts.split(1)[-1]
        alone, both = planned(prompted), planned(texts) if asked.guided else {}

        def asks(x: Tensor, said: Conditioning, plan: Plan) -> Tensor:
            return self.flux.velocity(given.around(x), said.txt, rope, plan)[:, : x.shape[1]]

        def velocity(x: Tensor, t: float) -> Tensor:
            if not (asked.guided and active(t, asked.interval)):
                return asks(x, prompted, alone[t])
            negative, positive = asks(doubled(x), texts, both[t]).chunk(2)
            negative, positive = self.probe("negative", negative), self.probe("prompted", positive)
            return guide(negative, positive, asked.true_cfg_scale)

        def seen(x: Tensor, t: float) -> Tensor:
            count_evaluation(t)
            # cheaper calls; what a watcher keeps stays ordinary. (inference_mode(False) would bring gradients back.)
            with torch.no_grad() if watched() else torch.inference_mode():
                return self._foreseen(x, self._as_latent("velocity", velocity(x, t), asked), t, asked)

        return seen

    def _as_latent(self, site: str, tokens: Tensor, asked: Request) -> Tensor:
        """Show tokens as the latent they are, ``[1, C, h, w]``."""
        if not self.is_watched(site):
            return tokens
        shown = unpack(tokens, *asked.shape)
        seen = self.probe(site, shown)
        return tokens if seen is shown else pack(seen)

    def _foreseen(self, x: Tensor, v: Tensor, t: float, asked: Request) -> Tensor:
        """Show the picture that ``v`` leads to, ``x0 = x - t v``; another one put in its place gives another ``v``."""
        if t == 0 or not self.is_watched("x0"):  # at t = 0 the state is the picture
            return v
        foreseen = unpack(x - t * v, *asked.shape)
        seen = self.probe("x0", foreseen)
        return v if seen is foreseen else (x - pack(seen)) / t
