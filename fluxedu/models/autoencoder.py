"""The autoencoder: 8x8 pixels become one latent cell of 16 numbers, and back.

    image [B, 3, H, W] in [-1, 1]  --encode-->  latent [B, 16, H/8, W/8]  --decode-->  image

A pyramid of residual blocks: three halvings on the way in, three doublings on the way out, and one
self-attention at the bottom where every cell may look at every other. Names of modules and tensors
are those of the official ``ae.safetensors`` (black-forest-labs/flux, modules/autoencoder.py), so the
official file loads with no rename.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.models.attention import attention_or_map
from fluxedu.models.attention_map import AttentionMap
from fluxedu.models.config import AutoEncoderConfig
from fluxedu.probe import Probed, name_sites


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=groups, num_channels=channels, eps=1e-6)


class ResnetBlock(Probed):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``: what the block adds is learned, x passes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:  # the passing x must change width too
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C', h, w]
        h = self.conv1(F.silu(self.probe("norm1", self.norm1(x))))
        h = self.conv2(F.silu(self.probe("norm2", self.norm2(h))))
        h = self.probe("residual", h)
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return self.probe("out", x + h)


class AttnBlock(Probed):
    """Single-head self-attention over the cells of the bottom of the pyramid."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        normed = self.probe("norm", self.norm(x))
        q, k, v = (  # each [B, 1, h*w, C]: the cells are the tokens, the channels their features
            self.probe(name, conv(normed).flatten(2).transpose(1, 2).unsqueeze(1))
            for name, conv in (("q", self.q), ("k", self.k), ("v", self.v))
        )
        attended = lambda: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
        h = attention_or_map(self, "map", lambda: AttentionMap(q, k, v), attended)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)  # [B, C, h, w]
        return self.probe("out", x + self.proj_out(h))


class Downsample(nn.Module):
    """Halve the grid; the padding is only right and below, as in the official weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, h/2, w/2]
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the grid by repeating cells, then smooth with a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, 2h, 2w]
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution; attributes ``downsample``/``upsample`` are set by the owner."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, groups: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x


class Middle(nn.Module):
    """The bottom of the pyramid: residual, attention, residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(Probed):
    """Image -> the mean and log-variance of its latent, stacked: ``[B, 2z, H/8, W/8]``."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (width_in, width_out) in enumerate(zip([config.ch, *widths], widths, strict=False)):
            level = Level(width_in, width_out, config.num_res_blocks, config.norm_groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width_out)
            self.down.append(level)
        self.mid = Middle(widths[-1], config.norm_groups)
        self.norm_out = _norm(widths[-1], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for i, level in enumerate(self.down):
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
            h = self.probe(f"level.{i}", h)
        h = self.probe("mid", self.mid(h))
        return self.probe("moments", self.conv_out(F.silu(self.norm_out(h))))


class Decoder(Probed):
    """Latent -> image. ``up[0]`` is the finest level, as in the official file; it runs last."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.norm_groups)
        self.up = nn.ModuleList()
        for i, (width_in, width_out) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=False)):
            level = Level(width_in, width_out, config.num_res_blocks + 1, config.norm_groups)
            if i > 0:
                level.upsample = Upsample(width_out)
            self.up.append(level)
        self.norm_out = _norm(widths[0], config.norm_groups)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.probe("mid", self.mid(self.conv_in(z)))
        for i, level in reversed(list(enumerate(self.up))):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
            h = self.probe(f"level.{i}", h)
        return self.probe("image", self.conv_out(F.silu(self.norm_out(h))))


class AutoEncoder(Probed):
    """The variational autoencoder of FLUX.1, ``AutoEncoder()`` being the official size (83.8 M).

    ``encode`` gives latents already shifted and scaled to about unit variance,
    ``z = scale_factor * (z_raw - shift_factor)``, which is what the flow is trained on; ``decode``
    undoes it. Source: black-forest-labs/flux, modules/autoencoder.py.
    """

    def __init__(self, config: AutoEncoderConfig | None = None):
        super().__init__()
        self.config = config or AutoEncoderConfig()
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        name_sites(self, "ae")

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the raw (unscaled) latent, each ``[B, z, H/8, W/8]``."""
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return mean, logvar

    def encode(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``image [B, 3, H, W]`` in [-1, 1] -> latent ``[B, z, H/8, W/8]``.

        Without ``generator`` the latent is the mean; with one it is a sample,
        ``mean + exp(logvar / 2) * noise``, the noise drawn on the generator's device.
        """
        z, logvar = self.moments(image)
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, device=generator.device, dtype=torch.float32)
            z = z + torch.exp(0.5 * logvar) * noise.to(z)
        return self.probe("latent", self.config.scale_factor * (z - self.config.shift_factor))

    def decode(self, latent: Tensor) -> Tensor:
        """Latent ``[B, z, h, w]`` -> image ``[B, 3, 8h, 8w]``, about [-1, 1] (not clipped)."""
        z = latent / self.config.scale_factor + self.config.shift_factor
        return self.decoder(z)

    def forward(self, image: Tensor) -> Tensor:
        return self.decode(self.encode(image))
