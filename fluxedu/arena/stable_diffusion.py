"""A baseline: Stable Diffusion at the miniature's size, trained on the same scenes with the same autoencoder and CLIP.

    FLUX                                          Stable Diffusion
    transformer over image and text tokens        U-Net over the latent, text by cross-attention
    T5's tokens and CLIP's pooled vector          CLIP's tokens
    predicts the velocity of a straight path      predicts the noise of a curved one (DDPM, 1,000 times)
    Euler steps                                   DDIM steps (arXiv 2010.02502)
    guidance built in, or two evaluations         classifier-free guidance: two evaluations per step

The U-Net and the noise schedule are diffusers' own, so diffusers must be installed; the schedule has Stable Diffusion
1's numbers (arXiv 2112.10752). ``training/baselines.py`` trains it. It is here for comparison, not for explanation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fluxedu.errors import RequestError, check_integer
from fluxedu.loading import WEIGHTS, load
from fluxedu.memory.quantised import quiet_imports
from fluxedu.models.autoencoder import AutoEncoder
from fluxedu.models.config import Sampling
from fluxedu.nano import networks
from fluxedu.progress import progress_bar
from fluxedu.sampling.images import to_images
from fluxedu.sampling.latents import draw_noise
from fluxedu.sampling.pipeline import FluxPipeline, Output
from fluxedu.sampling.prompts import PromptEncoder

SD = "sd"  # its name in the arena and for `fluxedu judge`
FILE = Path("unet") / "diffusion_pytorch_model.safetensors"
STEPS, GUIDANCE = 20, 5.0
UNET = {
    "in_channels": networks.AUTOENCODER.z_channels,
    "out_channels": networks.AUTOENCODER.z_channels,
    "block_out_channels": (64, 128),  # 4.0 million parameters, as the miniature FLUX has 4.4
    "layers_per_block": 1,
    # attention at one cell per 16 x 16 pixels, the size of a FLUX token
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": networks.CLIP.hidden_size,
    "attention_head_dim": 4,  # diffusers' name for the number of heads, each of 32 channels
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
#: "trailing" starts at the last of the 1,000 times, whatever the number of steps (arXiv 2305.08891)
DDIM = {**SCHEDULE, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing"}


def build_unet() -> nn.Module:
    """diffusers' UNet2DConditionModel at the miniature's size, untrained; RequestError if diffusers is missing."""
    diffusers = _diffusers()
    unet = diffusers.UNet2DConditionModel(**UNET)
    # plain matrix products, which are faster than the fused kernel at this size
    unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    return unet


@cache
def noise_schedule():
    """The diffusers DDPMScheduler that the U-Net was trained with."""
    return _diffusers().DDPMScheduler(**SCHEDULE)


class StableDiffusion:
    """``sd("a red circle", seed=0).images[0]``: called like a ``FluxPipeline``, with the arguments they share.

    Of ``prompt_encoder`` only CLIP is used; ``autoencoder`` is the miniature's.
    """

    def __init__(self, unet: nn.Module, prompt_encoder: PromptEncoder, autoencoder: AutoEncoder):
        self.unet, self.prompt_encoder, self.autoencoder = unet.eval(), prompt_encoder, autoencoder
        self.defaults = Sampling(steps=STEPS, guidance=GUIDANCE, text_length=networks.TEXT_LENGTH, shift=False)
        self.scheduler = _diffusers().DDIMScheduler(**DDIM)

    @property
    def device(self) -> torch.device:
        """The device of the U-Net."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the U-Net."""
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
        """Images from the noise that FLUX would start from with these seeds, or from the latents ``begin``.

        Raises:
            RequestError: sides that are not multiples of 16, fewer seeds than prompts, no steps, a trajectory.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        steps = STEPS if steps is None else steps
        scale = GUIDANCE if guidance is None else guidance
        if not prompts or len(seeds) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts need as many seeds, or one, not {len(seeds)}.")
        check_integer("steps", steps, 1, SCHEDULE["num_train_timesteps"])
        if any(side < 16 or side % 16 for side in (height, width)):
            raise RequestError(f"height and width must be multiples of 16, not {height} x {width}.")
        if trajectory:
            raise RequestError("the Stable Diffusion baseline keeps no trajectory; use trajectory=False.")
        config = self.autoencoder.config
        cells = height // config.downscale, width // config.downscale
        x = torch.cat([draw_noise(s, config.z_channels, *cells) for s in seeds]).to(self.device)  # [B, 16, h, w]
        if begin is not None:
            if begin.shape != x.shape:
                raise RequestError(f"begin is {list(x.shape)} for this size and prompts, not {list(begin.shape)}.")
            x = begin.to(x)
        txt = self.encode([""] * len(prompts) + prompts)  # [2B, 32, 96]
        self.scheduler.set_timesteps(steps)
        for t in progress_bar(self.scheduler.timesteps, show=progress, desc="sampling"):
            empty, prompted = self.unet(torch.cat([x, x]), t, txt).sample.chunk(2)
            x = self.scheduler.step(empty + scale * (prompted - empty), t, x).prev_sample
        return Output(to_images(self.autoencoder.decode(x)), x, None)

    def encode(self, prompts: list[str]) -> Tensor:
        """CLIP's last hidden states, ``[B, 32, 96]``, which Stable Diffusion 1 attends to."""
        ids = self.prompt_encoder.clip_tokenizer(prompts)
        return self.prompt_encoder.clip(ids.to(self.device))[0]


def load_sd(weights: Path | str = WEIGHTS, device: str | torch.device = "cpu") -> StableDiffusion:
    """The trained Stable Diffusion; raises RequestError if its weights, or diffusers, are missing."""
    if not (path := Path(weights) / FILE).is_file():
        raise RequestError(f"there is no {path}; `fluxedu train --variant sd` makes one.")
    unet, pipe = build_unet(), load("nano", device=device)
    unet.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return StableDiffusion(unet.requires_grad_(False).to(device), pipe.prompt_encoder, pipe.autoencoder)


def open_model(name: str, device: str | torch.device | None = None, **options) -> FluxPipeline | StableDiffusion:
    """The Stable Diffusion for "sd"; for any other name, what :func:`fluxedu.load` opens with these options."""
    if name != SD:
        return load(name, device=device, **options)
    for option, value in options.items():
        if value is not None:
            raise RequestError(f"{option}= does not apply to {SD}, which ships with fluxedu.")
    return load_sd(device=device or "cpu")


def _diffusers():
    """Import diffusers, without the messages of the quantisation libraries that it imports."""
    try:
        with quiet_imports():
            import diffusers

            _ = diffusers.UNet2DConditionModel, diffusers.DDIMScheduler  # imported at first use, so here
    except ImportError:
        raise RequestError("the Stable Diffusion baseline is built from diffusers: pip install diffusers.") from None
    return diffusers
