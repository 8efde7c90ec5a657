# %% [markdown]
# # 16b · Latents, schedule and cost of FLUX.2
#
# **What changed around the transformer, and what does it all cost?** You will normalise latents as FLUX.2 does, compute
# its schedule, count the parameters of every variant, and find every part of it in the official code.
#
# Afterwards you can say what one evaluation of each model costs in memory and in computation, and read
# `black-forest-labs/flux2` with the names that you know.
#
# 50 minutes · needs notebooks 01b, 09b, 11 and 16

# %%
from itertools import islice

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fluxedu as fe
from fluxedu import course
from fluxedu.models import Flux, Flux2, Flux2Config, FluxConfig
from fluxedu.models.meta_init import meta_init
from fluxedu.nano.scenes import render, scenes, to_tensor
from fluxedu.sampling.flux2 import empirical_mu
from fluxedu.sampling.latents import image_ids, pack, text_ids
from fluxedu.sampling.solvers import schedule

device = course.begin()
pipe = fe.load("nano", device=device)

# %% [markdown]
# ## Predict
#
# TFLOP are $10^{12}$ operations (additions and multiplications). An image has 1024 × 1024 pixels and 512 text tokens.

# %%
dev_ratio = fe.predict("How many times as many TFLOP per evaluation does FLUX.2-dev need as FLUX.1-dev?", 3.8)  # answer
klein_ratio = fe.predict("How many times as many TFLOP does FLUX.2-klein (4 B) need as FLUX.1-dev?", 0.47)  # answer
noisier = fe.predict(
    "Of 50 steps at 1024 × 1024, do 'more' or 'fewer' start above t = 0.5 in FLUX.2 than in FLUX.1?", "more"
)  # answer

# %% [markdown]
# ## Latents with 32 channels
#
# FLUX.1's autoencoder turns 8 × 8 pixels of three colours, 192 numbers, into a latent cell of 16 channels; FLUX.2's
# into 32. So it compresses by 6 instead of 12, which leaves room for finer structures. The number of
# tokens stays the same, since a token still has 2 × 2 cells; only the first and the last layer of the transformer
# become wider (128 numbers instead of 64), which costs next to nothing.
#
# The transformer is trained with noise of variance 1, so its latents should have variance 1, too. FLUX.1 uses one shift
# and one scale for all channels: $z = 0.3611\,(z_\text{raw} - 0.1159)$. But channels differ. Take the miniature's
# autoencoder and 64 scenes, and look at each of the 64 numbers of a token:

# %%
drawn = np.stack([render(scene) for scene in islice(scenes(0, size=(128, 128)), 64)])
images = to_tensor(drawn).to(device)  # [64, 3, 128, 128]
with torch.no_grad():
    raw, _ = pipe.autoencoder.moments(images)  # [64, 16, 16, 16]
tokens = pack(pipe.autoencoder.normalise(raw))  # [64, 64, 64]
means, stds = tokens.mean((0, 1)), tokens.std((0, 1))  # [64] each
print(f"one shift, one scale: means from {means.min():.1f} to {means.max():.1f},",
      f"standard deviations from {stds.min():.1f} to {stds.max():.1f}")  # fmt: skip

# %% [markdown]
# FLUX.2 normalises each of the $4 \cdot 32$ numbers by itself, with mean $m_c$ and variance $s_c^2$ over the latents of
# the training images. They are stored in the autoencoder's file as a batch norm, and never updated:
#
# $$z_c = \frac{z_{\text{raw}, c} - m_c}{\sqrt{s_c^2 + 10^{-4}}}$$
#
# This costs next to nothing, and noise hides all channels to the same degree. Note the order: in FLUX.1 one may scale
# before or after packing; here the statistics belong to the packed numbers, so one packs first.

# %% exercise="flux2.normalise"

# %%
if fe.passed("flux2.normalise"):
    packed = pack(raw)
    mine = normalised_tokens(raw, packed.mean((0, 1)), packed.var((0, 1)))
    print(f"your tokens: means from {mine.mean((0, 1)).abs().min():.1f} to {mine.mean((0, 1)).abs().max():.1f},",
          f"standard deviations from {mine.std((0, 1)).min():.1f} to {mine.std((0, 1)).max():.1f}")  # fmt: skip

# %% [markdown]
# ## The schedule
#
# In notebook 11, $\mu$ shifted the times $t$ towards the noise,
#
# $$t' = \frac{e^\mu}{e^\mu + 1/t - 1}$$
#
# and it was a line in the number of image tokens. FLUX.2's $\mu$ depends on the number of *steps* as well: two lines
# give it for 10 and for 200 steps, and for any other number of steps it lies on the straight line through these two
# points (for klein's 4 steps, outside them). Above 4300 tokens, the value for 200 steps holds for all. The official
# function is called `compute_empirical_mu`; how its constants were found is not published.

# %% exercise="flux2.mu"

# %%
MU = {"FLUX.1": 1.15, **{f"FLUX.2, {steps} steps": empirical_mu(4096, steps) for steps in (200, 50, 4)}}
fig, ax = plt.subplots(figsize=(5.6, 2.6), layout="constrained")
above = {}
for (name, value), style in zip(MU.items(), ("C7-", "C0:", "C0-", "C1-")):
    times = schedule(50, 4096, ends=(value, value))  # the same shift for every number of tokens
    above[name] = int((times[:-1] > 0.5).sum())
    ax.plot(torch.linspace(0, 1, 51), times, style, label=f"{name}: mu = {value:.2f}")
ax.set(xlabel="share of the steps", ylabel="time t (1 is noise)")
ax.set_title(f"Of 50 steps at 4096 tokens, {above['FLUX.1']} start above t = 0.5 in FLUX.1, "
             f"{above['FLUX.2, 50 steps']} in FLUX.2", fontsize=10)  # fmt: skip
ax.legend(fontsize=8)
plt.show()
noisier.against("more" if above["FLUX.2, 50 steps"] > above["FLUX.1"] else "fewer")

# %% [markdown]
# The line for 200 steps is FLUX.1's own: it goes through (256, 0.5) and (4096, 1.15). Up to 4300 tokens, the shift is
# stronger the fewer steps there are; above, it is FLUX.1's for any number of steps.
#
# ## What it costs
#
# Count the parameters as in notebook 09b. Without biases and with shared modulation, the count is shorter. One stream
# of a double block and a single block now have the same number,
#
# $$\underbrace{3D^2 + D^2}_{\text{attention}} + \underbrace{2DM + MD}_{\text{MLP}} + \underbrace{2d}_{\text{QKNorm}} =
# 4D^2 + 3DM + 2d \quad\text{and with } M = 3D\text{:}\quad 13 D^2 + 2d$$

# %% exercise="flux2.count"

# %% [markdown]
# Now all models in one table. On PyTorch's *meta* device tensors have no data, so networks of any size can be built,
# and even evaluated: only shapes are computed, and `FlopCounterMode` counts the operations of the matrix products. All
# blocks of a kind cost the same, so we evaluate one of each and multiply. The modulation, which is computed once for
# all tokens, is left out: less than 0.01 % of the published models, less than 0.5 % of the miniatures.


# %%
def cost(kind: type, config, txt_len: int, side: int = 1024) -> tuple[int, float]:
    """Parameters, and TFLOP of one evaluation for one image of `side` x `side` pixels."""
    axes, n = len(config.axes_dim), (side // 16) ** 2
    with meta_init():
        whole, small = kind(config), kind(config.with_(depth=1, depth_single_blocks=1))
        img, txt = torch.empty(1, n, config.in_channels), torch.empty(1, txt_len, config.context_in_dim)
        number, pooled = torch.empty(1), torch.empty(1, config.vec_in_dim)
    ids = image_ids(side // 8, side // 8, axes), text_ids(txt_len, axes)
    plan, rope = small.plan(number, number, pooled), small.rope(*ids).to("meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        small(img, ids[0], txt, ids[1], number, pooled, number, rope=rope, plan=plan)
    counts = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    total = counts["Global"] + (config.depth - 1) * counts[f"{kind.__name__}.double_blocks.0"]
    total += (config.depth_single_blocks - 1) * counts[f"{kind.__name__}.single_blocks.0"]
    return sum(p.numel() for p in whole.parameters()), total / 1e12


MODELS = {
    "FLUX.1 dev": (Flux, FluxConfig.variant("dev"), 512),
    "FLUX.1 schnell": (Flux, FluxConfig.variant("schnell"), 256),  # reads 256 text tokens
    "FLUX.2 dev": (Flux2, Flux2Config.variant("dev"), 512),
    "FLUX.2 klein 4B": (Flux2, Flux2Config.variant("klein-4b"), 512),
    "FLUX.2 klein 9B": (Flux2, Flux2Config.variant("klein-9b"), 512),
    "miniature FLUX.1": (Flux, pipe.flux.config, 32, 128),  # images of 128 x 128 pixels
    "miniature FLUX.2": (Flux2, fe.load("nano-flux2").flux.config, 32, 128),
}
costs, flux2_configs = {}, {name: config for name, (kind, config, *_) in MODELS.items() if kind is Flux2}
yours = {name: f"{count(config):15,}" for name, config in flux2_configs.items()} if fe.passed("flux2.count") else {}
print(f"{'':16} blocks   width      parameters     bfloat16     TFLOP      your count")
for name, (kind, config, *request) in MODELS.items():
    parameters, tflop = costs[name] = cost(kind, config, *request)
    print(f"{name:16} {config.depth:2} + {config.depth_single_blocks:2} {config.hidden_size:6} {parameters:15,}",
          f"{2 * parameters / 1e9:9.3f} GB {tflop:9.3g} {yours.get(name, '')}")  # fmt: skip
dev_ratio.against(costs["FLUX.2 dev"][1] / costs["FLUX.1 dev"][1])
klein_ratio.against(costs["FLUX.2 klein 4B"][1] / costs["FLUX.1 dev"][1])

# %% [markdown]
# These are the costs of the transformer for *one* evaluation. A run multiplies them: klein is distilled to 4 steps, dev
# takes 50 by default, both with one evaluation per step (the undistilled klein-base takes two, for classifier-free
# guidance). The text encoder comes on top, once per prompt: a language model of 4 B (Qwen3, klein 4B), 8 B (Qwen3,
# klein 9B) or 24 B (Mistral, dev).
#
# Where do FLUX.2-dev's parameters go? Its width is twice FLUX.1-dev's, so a matrix of the same kind has four times as
# many weights; it has fewer double blocks (8 instead of 19), which have two sets of weights, and more single blocks.
#
# ## Reading the official code
#
# The table leads from `black-forest-labs/flux2`, at commit ab7cca6, to ours (`fluxedu/models/flux2.py`, unless another
# file is named). Open both and compare.
#
# | `src/flux2/` | lines | ours |
# |---|---|---|
# | `model.py`: `Flux2Params` | 9-19 | `Flux2Config` in `config.py` |
# | `Flux2.forward`: `x`, `ctx`, `pe_x`, `pe_ctx` | 82-131 | `Flux.forward` and `Flux.velocity` in `flux.py`: `img`, `txt`, `rope` |
# | `SiLUActivation` | 149-156 | `SwiGLU` |
# | `Modulation` | 159-171 | `SharedModulation`, then `SplitModulation` in `modulation.py` |
# | `SingleStreamBlock` | 196-249 | `Flux2SingleStreamBlock` |
# | `DoubleStreamBlock` | 252-349 | `Flux2DoubleStreamBlock` |
# | `EmbedND`, `rope` | 363-376, 436-443 | `rope_table` in `attention.py` |
# | `sampling.py`: `prc_txt`, `prc_img` | 93-151 | `text_ids`, `image_ids` with `axes=4`, in `latents.py` |
# | `compute_empirical_mu` | 251-266 | `empirical_mu` in `sampling/flux2.py` |
# | `encode_image_refs`: ids 10, 20, ... | 52-90 | `Flux2Pipeline`, argument `reference` |
# | `autoencoder.py`: `normalize`, `encode` | 304-325 | `Flux2AutoEncoder.normalise` in `autoencoder.py` |
#
# Four details are easy to miss. `Modulation` returns two triples (shift, scale, gate), the second of which is None for
# single blocks. `encode` returns packed latents, `[B, 128, H/16, W/16]`; ours stay `[B, 32, H/8, W/8]` until the
# transformer reads them, as in FLUX.1. `rope` computes its angles in float32 and returns 2 × 2 rotation matrices; ours
# are complex numbers, from float64. And at this commit `Flux2` always has a guidance input; klein, which has none, was
# published later, so our klein is compared with diffusers' instead.
#
# ## In five lines
#
# 1. FLUX.2's latents have 32 channels; each of the 128 numbers of a token has a mean and a variance of its own.
# 2. Its schedule depends on the number of tokens and, up to 4300 tokens, of steps; at 200 steps it is FLUX.1's.
# 3. A single block has as many weights as one stream of a double block: 13 D² with FLUX.2's MLP.
# 4. klein (4 B) needs about half of FLUX.1-dev's operations per evaluation, FLUX.2-dev almost four times as many.
# 5. The official code is the one you know, with three modulation layers, SwiGLU and four position ids.
#
# **Questions people ask**: *Which one fits on my GPU?* In bfloat16 the transformers of klein 4B, klein 9B and
# FLUX.2-dev need 8, 18 and 64 GB, without the text encoder. `docs/weights.md` says how to stream or quantise them. *Can
# I use a FLUX.1 LoRA?* No: it was trained for other weights. Most layers have other shapes; where they fit (in klein
# 4B, some layers of the double blocks), the result would mean nothing.
#
# **Read**: `black-forest-labs/flux2`, the files above · ours: `fluxedu/models/flux2.py`, `fluxedu/sampling/flux2.py`.

# %%
fe.score()
