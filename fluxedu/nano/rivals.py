"""A Stable Diffusion in miniature, to hold FLUX beside: the same world, autoencoder, CLIP and captions.

    FLUX                                        here
    transformer over patches and words          U-Net over the latent, words by cross-attention
    T5's tokens, CLIP's pooled vector           CLIP's tokens
    velocity of a straight path                 the noise, epsilon, of a curved one (DDPM, 1,000 times)
    Euler steps                                 DDIM steps (arXiv 2010.02502)
    guidance built in, or two passes            classifier-free guidance: two passes a step

The U-Net and the schedule are diffusers' own, the schedule with Stable Diffusion 1's numbers (arXiv 2112.10752); it
needs diffusers to be installed. A baseline to measure, nothing that is explained block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from fluxedu.errors import RequestError
from fluxedu.loading import WEIGHTS, load
from fluxedu.memory.quantised import quietly
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.models.config import Sampling
from fluxedu.nano import networks
from fluxedu.sampling.images import to_images
from fluxedu.sampling.latents import draw_noise
from fluxedu.sampling.pipeline import FluxPipeline, Output
from fluxedu.sampling.prompts import PromptEncoder

SD = "sd"  # its name, in the arena and for `fluxedu judge`
FILE = Path("unet") / "diffusion_pytorch_model.safetensors"
STEPS, GUIDANCE = 20, 5.0
UNET = {
    "in_channels": networks.AUTOENCODER.z_channels,
    "out_channels": networks.AUTOENCODER.z_channels,
    "block_out_channels": (64, 128),  # 4.0 million parameters, as the miniature FLUX has 4.4
    "layers_per_block": 1,
    # attention where the miniature FLUX has its tokens, at a cell for every 16 x 16 pixels
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": networks.CLIP.hidden_size,
    "attention_head_dim": 4,  # diffusers' name for how many heads; 32 channels each
    "norm_num_groups": 16,
}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}
#: "trailing" begins at the last of the thousand times whatever the number of steps (arXiv 2305.08891)
DDIM = {**SCHEDULE, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing"}


def unet() -> nn.Module:
    """diffusers' UNet2DConditionModel at the miniature's size; raises RequestError where diffusers is missing."""
    UNet2DConditionModel = _diffusers().UNet2DConditionModel
    network = UNet2DConditionModel(**UNET)
    network.set_attn_processor(_diffusers().models.attention_processor.AttnProcessor())  # products, faster so small
    return network


@cache
def schedule():
    """diffusers' DDPMScheduler, as the U-Net was trained with."""
    return _diffusers().DDPMScheduler(**SCHEDULE)


class StableDiffusion:
    """``sd("a red circle", seed=0).images[0]``: asked as a ``FluxPipeline`` is, of which it has the common part.

    ``unet`` · ``prompt_encoder``, of which CLIP alone is read · ``autoencoder``, the miniature's · ``defaults``.
    """

    def __init__(self, network: nn.Module, prompt_encoder: PromptEncoder, autoencoder: AutoEncoder):
        self.unet, self.prompt_encoder, self.autoencoder = network.eval(), prompt_encoder, autoencoder
        self.defaults = Sampling(steps=STEPS, guidance=GUIDANCE, text_length=networks.TEXT_LENGTH, shift=False)
        self.scheduler = _diffusers().DDIMScheduler(**DDIM)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.unet.dtype

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        height: int = 128,
        width: int = 128,
        begin: Tensor | None = None,
        trajectory: bool = False,
        progress: bool = True,
    ) -> Output:
        """Pictures from the noise that FLUX would begin at with these seeds, or from the latents ``begin``.

        Two questions a step, in one batch.

        Raises:
            RequestError: sides that are no multiple of 16, fewer seeds than prompts, no steps, a trajectory.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        steps = STEPS if steps is None else steps
        scale = GUIDANCE if guidance is None else guidance
        self._fits(len(prompts), len(seeds), steps, height, width, trajectory)
        config = self.autoencoder.config
        cells = height // config.downscale, width // config.downscale
        x = torch.cat([draw_noise(s, config.z_channels, *cells) for s in seeds]).to(self.device)  # [B, 16, h, w]
        if begin is not None:
            if begin.shape != x.shape:
                raise RequestError(f"begin is {list(x.shape)} for this size and prompts, not {list(begin.shape)}.")
            x = begin.to(x)
        words = self.words([""] * len(prompts) + prompts)  # [2B, 32, 96]
        self.scheduler.set_timesteps(steps)
        for t in tqdm(self.scheduler.timesteps, disable=not progress, delay=1.0, desc="sampling"):
            empty, prompted = self.unet(torch.cat([x, x]), t, words).sample.chunk(2)
            x = self.scheduler.step(empty + scale * (prompted - empty), t, x).prev_sample
        return Output(to_images(self.autoencoder.decode(x)), x, None)

    def words(self, prompts: list[str]) -> Tensor:
        """CLIP's last hidden states, ``[B, 32, 96]``: what Stable Diffusion 1 reads."""
        ids = self.prompt_encoder.clip_tokenizer(prompts)
        return self.prompt_encoder.clip(ids.to(self.device))[0]

    @staticmethod
    def _fits(prompts: int, seeds: int, steps: int, height: int, width: int, trajectory: bool) -> None:
        if not prompts or seeds != prompts:
            raise RequestError(f"{prompts} prompts need as many seeds, or one, not {seeds}.")
        if not 1 <= steps <= SCHEDULE["num_train_timesteps"]:
            raise RequestError(f"DDIM takes 1 to 1000 steps, not {steps}.")
        if any(side < 16 or side % 16 for side in (height, width)):
            raise RequestError(f"sides are multiples of 16, not {height} x {width}.")
        if trajectory:
            raise RequestError("this baseline keeps no trajectory; leave trajectory=False.")


def load_sd(weights: Path | str = WEIGHTS, device: str | torch.device = "cpu") -> StableDiffusion:
    """The Stable Diffusion that was trained; raises RequestError where it, or diffusers, is missing."""
    if not (path := Path(weights) / FILE).is_file():
        raise RequestError(f"there is no {path}; `fluxedu train --variant sd` makes one.")
    network, pipe = unet(), load("nano", device=device)
    network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return StableDiffusion(network.requires_grad_(False).to(device), pipe.prompt_encoder, pipe.autoencoder)


def opened(name: str, device: str | torch.device | None = None) -> FluxPipeline | StableDiffusion:
    """ "sd", or what :func:`fluxedu.load` opens."""
    return load_sd(device=device or "cpu") if name == SD else load(name, device=device)


def _diffusers():
    """diffusers; it looks for the libraries of quantised weights as well, and those talk."""
    try:
        with quietly():
            import diffusers

            _ = diffusers.UNet2DConditionModel, diffusers.DDIMScheduler  # imported when they are asked for
    except ImportError:
        raise RequestError("the Stable Diffusion baseline is diffusers' own: pip install diffusers.") from None
    return diffusers
