"""Notebook 16b: FLUX.2's latents, schedule and size."""

import torch
from torch import Tensor

from fluxedu.course.exercise import exercise, mistakes
from fluxedu.models import Flux2, Flux2AutoEncoder, Flux2AutoEncoderConfig, Flux2Config
from fluxedu.models.meta_init import meta_init
from fluxedu.sampling.flux2 import empirical_mu
from fluxedu.sampling.latents import pack


def _latents() -> list[tuple]:
    cases = []
    for seed, channels, size in ((167, 2, (4, 6)), (168, 4, (2, 2)), (169, 16, (16, 16))):
        g = torch.Generator().manual_seed(seed)
        z = 3 * torch.randn(2, channels, *size, generator=g) + 1
        mean = torch.randn(4 * channels, generator=g)
        var = 0.01 + torch.rand(4 * channels, generator=g)  # some so small that the 1e-4 matters
        cases.append((z, mean, var))
    return cases


def _library_tokens(z: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    config = Flux2AutoEncoderConfig(ch=4, ch_mult=(1, 1), num_res_blocks=1, z_channels=z.shape[1], norm_groups=2)
    autoencoder = Flux2AutoEncoder(config)
    autoencoder.bn.running_mean, autoencoder.bn.running_var = mean, var
    return pack(autoencoder.normalise(z))


@exercise(
    "flux2.normalise",
    minutes=8,
    difficulty=2,
    cases=_latents,
    against=_library_tokens,
    hints=(
        "Pack first (notebook 01b): after that, the last axis has one entry for each mean and each variance.",
        "`pack(z)` is `[B, N, 4 C]`. Subtract the mean and divide by the standard deviation, which is the square root "
        "of the variance plus 1e-4.",
        "`return (pack(z) - mean) / (var + 1e-4).sqrt()`.",
    ),
)
def normalised_tokens(z: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """The image tokens that FLUX.2's transformer reads: raw latent `z [B, C, h, w]` -> `[B, h/2 * w/2, 4 C]`.

    Each of the 4 C numbers of a token is normalised by itself: `(x - mean) / sqrt(var + 1e-4)`, with the stored
    statistics `mean [4 C]` and `var [4 C]`. In a token, the order is (channel, row, column), which is that of
    `pack(z)`, the library's function from notebook 01b.
    """
    tokens = pack(z)  # [B, N, 4 C]
    return (tokens - mean) / (var + 1e-4).sqrt()


@mistakes(
    "flux2.normalise",
    ("no eps", "the 1e-4 that is added to the variance is missing."),
    ("outside", "you add 1e-4 to the standard deviation; add it to the variance, inside the root."),
    ("variance", "you divide by the variance; divide by its square root."),
    ("no mean", "the mean is not subtracted."),
    ("this batch", "you compute mean and variance from these latents; the stored ones of the training set are meant."),
    ("order", "your statistics belong to another order: in a token, the order is (channel, row, column)."),
    ("inverse", "this is the inverse, x * sqrt(var + 1e-4) + mean, which the decoder needs."),
)
def _normalise_with(mistake, z, mean, var):
    tokens = pack(z)
    if mistake == "this batch":
        mean, var = tokens.mean((0, 1)), tokens.var((0, 1), correction=0)
    if mistake == "order":
        mean, var = (x.unflatten(0, (4, -1)).mT.flatten() for x in (mean, var))
    std = (var + (mistake not in ("no eps", "outside")) * 1e-4).sqrt() + (mistake == "outside") * 1e-4
    if mistake == "inverse":
        return tokens * std + mean
    return (tokens - (mistake != "no mean") * mean) / (std**2 if mistake == "variance" else std)


@exercise(
    "flux2.mu",
    minutes=6,
    difficulty=2,
    cases=lambda: [(4096, 50), (1024, 4), (256, 200), (4300, 28), (4301, 28), (8160, 50), (4096, 10), (1024, 400)],
    against=empirical_mu,
    tolerance=1e-9,
    hints=(
        "Compute mu for 10 steps and for 200 steps first. For another number of steps, take the line through these two "
        "points.",
        "A line through (10, a) and (200, b) has the slope (b - a) / 190.",
        "`at_10 + (steps - 10) * (at_200 - at_10) / 190`, and before that `if tokens > 4300: return at_200`.",
    ),
)
def mu(tokens: int, steps: int) -> float:
    """FLUX.2's mu for an image of `tokens` tokens, drawn in `steps` steps.

    For 10 steps it is `8.73809524e-05 * tokens + 1.89833333`, for 200 steps `0.00016927 * tokens + 0.45666666`. For any
    other number of steps it lies on the straight line through these two values. Above 4300 tokens, the value for 200
    steps holds for every number of steps.
    """
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    return at_10 + (steps - 10) * (at_200 - at_10) / 190


@mistakes(
    "flux2.mu",
    ("no limit", "the exception for large images is missing: above 4300 tokens, the value for 200 steps holds."),
    ("200", "your slope is divided by 200; from 10 to 200 steps there are 190."),
    ("from 0", "your line starts at 0 steps; the first value belongs to 10 steps."),
    ("exchanged", "the values for 10 and for 200 steps are exchanged."),
    ("clamped", "you keep mu constant below 10 steps; the line goes on."),
    ("clamped above", "you keep mu constant above 200 steps; the line goes on."),
    ("below", "your exception is for small images; it is for those above 4300 tokens."),
    ("at limit", "your exception includes 4300 tokens; it begins above that number."),
)
def _mu_with(mistake, tokens, steps):
    at_10, at_200 = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666
    large = {"no limit": False, "below": tokens < 4300, "at limit": tokens >= 4300}.get(mistake, tokens > 4300)
    if large:
        return at_200
    if mistake == "exchanged":
        at_10, at_200 = at_200, at_10
    steps = {"clamped": max(steps, 10), "clamped above": min(steps, 200)}.get(mistake, steps)
    return at_10 + (steps - (mistake != "from 0") * 10) * (at_200 - at_10) / (200 if mistake == "200" else 190)


SMALL = Flux2Config(
    in_channels=20, out_channels=12, context_in_dim=10, hidden_size=24, mlp_ratio=1.5, num_heads=2, depth=2,
    depth_single_blocks=3, axes_dim=(2, 4, 2, 4),
)  # fmt: skip


def _parameters(config: Flux2Config) -> int:
    """The reference: the network itself."""
    with meta_init():
        return sum(p.numel() for p in Flux2(config).parameters())


@exercise(
    "flux2.count",
    minutes=10,
    difficulty=2,
    cases=lambda: [(SMALL,), (SMALL.with_(guidance_embed=False, depth=1),), (Flux2Config.variant("klein-4b"),)],
    against=_parameters,
    tolerance=1e-12,
    hints=(
        "A linear layer from a to b numbers has a * b weights and, in FLUX.2, no bias. Count one stream of a double "
        "block, a single block, the shared modulation, and the layers before and after the blocks.",
        "One stream of a double block has qkv 3 D², proj D², the MLP 2 D M + M D, and a QKNorm of 2 d numbers. A "
        "single block has exactly as many: D (3 D + 2 M) + (D + M) D + 2 d.",
        "`block = 4 * D * D + 3 * D * M + 2 * d`; `(2 * depth + depth_single) * block + 15 * D * D` for blocks and "
        "modulation; one embedder has `256 * D + D * D`; the last layer `2 * D * D + D * out`.",
    ),
)
def count(config: Flux2Config) -> int:
    """The number of parameters of a FLUX.2 transformer. No layer has a bias.

    `config` has hidden_size (D), head_dim (d), mlp_hidden (M, the inputs of the MLP's last layer), depth,
    depth_single_blocks, in_channels, out_channels, context_in_dim and guidance_embed (whether there is an embedder for
    the guidance scale). An embedder has a layer from 256 to D and one from D to D. Do not forget the QKNorms (d numbers
    each for q and k, in each stream), and the last layer's own modulation, from D to 2 D.
    """
    dim, hidden = config.hidden_size, config.mlp_hidden
    block = 4 * dim**2 + 3 * dim * hidden + 2 * config.head_dim  # one stream of a double block, or a single block
    blocks = (2 * config.depth + config.depth_single_blocks) * block
    modulation = (6 + 6 + 3) * dim**2
    embedders = (1 + config.guidance_embed) * (256 * dim + dim**2)
    before = (config.in_channels + config.context_in_dim) * dim
    return before + embedders + modulation + blocks + 2 * dim**2 + dim * config.out_channels


@mistakes(
    "flux2.count",
    ("own modulation", "you count a modulation for every block; three layers serve all blocks."),
    ("narrow MLP", "the first layer of the MLP has 2 M outputs, gate and value; you count M."),
    ("biases", "you count biases; no layer of FLUX.2 has one."),
    ("guidance", "you count two embedders for every variant; without guidance_embed there is only the time's."),
    ("one stream", "a double block has two streams, each with its own weights; you count one."),
    ("no norms", "the QKNorms are missing: 2 d numbers in each stream and in each single block."),
    ("last", "the last layer's own modulation is missing, from D to 2 D."),
    ("ends", "img_in and txt_in are missing."),
)
def _count_with(mistake, config):
    dim, hidden, out = config.hidden_size, config.mlp_hidden, config.out_channels
    number = (1 if mistake == "one stream" else 2) * config.depth + config.depth_single_blocks
    total = count(config) + (number - 2 * config.depth - config.depth_single_blocks) * (
        4 * dim**2 + 3 * dim * hidden + 2 * config.head_dim
    )
    if mistake == "own modulation":
        total += (12 * config.depth + 3 * config.depth_single_blocks - 15) * dim**2
    if mistake == "narrow MLP":
        total -= number * dim * hidden
    if mistake == "biases":
        per_block = 2 * config.depth * (5 * dim + 2 * hidden) + config.depth_single_blocks * (4 * dim + 2 * hidden)
        embedders = 2 * (1 + config.guidance_embed) * dim
        total += per_block + embedders + (15 + 2 + 2) * dim + out
    if mistake == "guidance" and not config.guidance_embed:
        total += 256 * dim + dim**2
    if mistake == "no norms":
        total -= number * 2 * config.head_dim
    if mistake == "last":
        total -= 2 * dim**2
    if mistake == "ends":
        total -= (config.in_channels + config.context_in_dim) * dim
    return total
