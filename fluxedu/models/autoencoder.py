"""The autoencoder: 8x8 pixels become one latent cell of 16 channels (FLUX.2: 32), and back.

    image [B, 3, H, W] in [-1, 1]  --encode-->  latent [B, 16, H/8, W/8]  --decode-->  image

A pyramid of residual blocks: three downsamplings in the encoder, three upsamplings in the decoder, and one
self-attention at the lowest resolution, where every cell attends to every other. Names of modules and tensors are those
of the official ``ae.safetensors``, so the official file loads without renaming.
Source: black-forest-labs/flux, modules/autoencoder.py; black-forest-labs/flux2, autoencoder.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.attention_map import AttentionMap
from fluxedu.models.config import AutoEncoderConfig, Flux2AutoEncoderConfig, PyramidConfig
from fluxedu.probe import Probed, name_sites


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=groups, num_channels=channels, eps=1e-6)


class ResnetBlock(Probed):
    """Residual block: ``x + conv(silu(norm(conv(silu(norm(x))))))``."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:  # the skip connection must change width too
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C', h, w]
        h = self.probe("norm1", self.norm1(x))  # [B, C, h, w] group-normalised, before the first SiLU and convolution
        h = F.silu(h)
        h = self.conv1(h)
        h = self.probe("norm2", self.norm2(h))  # [B, C, h, w] group-normalised, before the second SiLU and convolution
        h = F.silu(h)
        h = self.conv2(h)
        h = self.probe("residual", h)  # [B, C, h, w] what the block adds
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return self.probe("out", x + h)  # [B, C, h, w] the block's output


class AttnBlock(Probed):
    """Single-head self-attention over the cells at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        normed = self.probe("norm", self.norm(x))  # [B, C, h, w] group-normalised: the attention's input
        q = self.probe("q", _as_tokens(self.q(normed)))  # [B, 1, G, C] queries of the cells, row by row
        k = self.probe("k", _as_tokens(self.k(normed)))  # [B, 1, G, C] keys of the cells
        v = self.probe("v", _as_tokens(self.v(normed)))  # [B, 1, G, C] values of the cells
        if self.is_watched("map"):
            attn_map = AttentionMap(q, k, v)
            attn_map = self.probe("map", attn_map)  # [B, 1, G, G] attention map (lazy), one row per query
            out = attn_map @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        out = out.squeeze(1).transpose(1, 2).reshape(x.shape)  # [B, C, h, w]
        return self.probe("out", x + self.proj_out(out))  # [B, C, h, w] the cells after the attention


def _as_tokens(x: Tensor) -> Tensor:
    """``[B, C, h, w] -> [B, 1, h*w, C]``: one head, the cells as tokens."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)


class Downsample(nn.Module):
    """Halve the resolution; padded only on the right and below, as the official weights require."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, h/2, w/2]
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution by repeating cells, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w] -> [B, C, 2h, 2w]
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(Probed):
    """The residual blocks of one resolution, then ``downsample`` or ``upsample`` where the owner sets one."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, groups: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return self.probe("out", x)  # [B, C, h, w] a level's output, at the next resolution


class Middle(nn.Module):
    """The lowest resolution: residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(Probed):
    """Image -> the mean and log-variance of its latent, stacked: ``[B, 2z, H/8, W/8]``.

    FLUX.2's has one more 1x1 convolution at the end, ``quant_conv``, which its owner sets.
    """

    def __init__(self, config: PyramidConfig):
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
        for level in self.down:
            h = level(h)
        h = self.probe("mid", self.mid(h))  # [B, C, h, w] the lowest resolution, after its attention
        moments = self.conv_out(F.silu(self.norm_out(h)))
        if hasattr(self, "quant_conv"):
            moments = self.quant_conv(moments)
        return self.probe("moments", moments)  # [B, C, h, w] mean and log-variance of the raw latent, stacked


class Decoder(Probed):
    """Latent -> image. ``up[0]`` is the highest resolution, as in the official file; it runs last.

    FLUX.2's has one more 1x1 convolution at the beginning, ``post_quant_conv``, which its owner sets.
    """

    def __init__(self, config: PyramidConfig):
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
        if hasattr(self, "post_quant_conv"):
            z = self.post_quant_conv(z)
        h = self.probe("mid", self.mid(self.conv_in(z)))  # [B, C, h, w] the lowest resolution, after its attention
        for level in reversed(self.up):
            h = level(h)
        image = self.conv_out(F.silu(self.norm_out(h)))
        return self.probe("image", image)  # [B, C, h, w] the image, about -1 to 1; h and w are pixels


class AutoEncoder(Probed):
    """The variational autoencoder of FLUX.1; ``AutoEncoder()`` has the official size (83.8 M).

    ``encode`` returns latents shifted and scaled to about unit variance, ``z = scale_factor * (z_raw - shift_factor)``,
    which is what the flow is trained on; ``decode`` inverts that.
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

    def normalise(self, z: Tensor) -> Tensor:
        """Raw latent -> latent of variance about 1."""
        return self.config.scale_factor * (z - self.config.shift_factor)

    def denormalise(self, latent: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        return latent / self.config.scale_factor + self.config.shift_factor

    def encode(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``image [B, 3, H, W]`` in [-1, 1] -> latent ``[B, z, H/8, W/8]``.

        Without ``generator`` the latent is the mean; with one it is a sample,
        ``mean + exp(logvar / 2) * noise``, the noise drawn on the generator's device.
        """
        z, logvar = self.moments(image)
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, device=generator.device, dtype=torch.float32)
            z = z + torch.exp(0.5 * logvar) * noise.to(z)
        latent = self.normalise(z)
        return self.probe("latent", latent)  # [B, C, h, w] the image as the flow sees it, of variance about 1

    def decode(self, latent: Tensor) -> Tensor:
        """Latent ``[B, z, h, w]`` -> image ``[B, 3, 8h, 8w]``, about [-1, 1] (not clipped)."""
        return self.decoder(self.denormalise(latent))

    def forward(self, image: Tensor) -> Tensor:
        return self.decode(self.encode(image))


class Flux2AutoEncoder(AutoEncoder):
    """The variational autoencoder of FLUX.2; ``Flux2AutoEncoder()`` has the official size (84.0 M).

    It is FLUX.1's with 32 channels, a 1x1 convolution more on each side of the latent, and another scaling: in place of
    one shift and one scale, each of the 4 x 32 channels of a patch has its own mean and variance, those of the training
    images, in ``bn``. As in FLUX.1, a latent here is ``[B, z, H/8, W/8]``, not packed; H, W are multiples of 16 pixels.
    """

    def __init__(self, config: Flux2AutoEncoderConfig | None = None):
        Probed.__init__(self)  # in place of FLUX.1's layers
        self.config = config or Flux2AutoEncoderConfig()
        z = self.config.z_channels
        self.encoder = Encoder(self.config)
        self.encoder.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.decoder = Decoder(self.config)
        self.decoder.post_quant_conv = nn.Conv2d(z, z, 1)
        self.bn = nn.BatchNorm2d(4 * z, eps=1e-4, affine=False)  # only its statistics are used, they are never updated
        name_sites(self, "ae")

    def normalise(self, z: Tensor) -> Tensor:
        """Raw latent -> latent of mean 0 and variance 1 in every channel of a patch of 2 x 2 cells."""
        patches = F.pixel_unshuffle(z, 2)  # [B, 4 z, h/2, w/2], channels in the order (channel, row, column)
        patches = F.batch_norm(patches, self.bn.running_mean, self.bn.running_var, eps=self.bn.eps)
        return F.pixel_shuffle(patches, 2)

    def denormalise(self, latent: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        mean, std = self.bn.running_mean, torch.sqrt(self.bn.running_var + self.bn.eps)
        patches = F.pixel_unshuffle(latent, 2) * std[:, None, None] + mean[:, None, None]
        return F.pixel_shuffle(patches, 2)
