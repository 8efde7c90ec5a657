# %% [markdown]
# # 09 · The whole transformer
#
# **How do the parts become one network?** You have written every block. Now you assemble them, load the trained weights
# into your own network, generate an image with it, and count the operations of one evaluation.
#
# Afterwards you can read the official code from top to bottom, and say what one evaluation costs and which part of the
# cost grows fastest with the size of the image.
#
# 50 minutes · needs notebooks 05b, 07 and 08

# %%
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fluxedu as fe
from fluxedu import course
from fluxedu.course import evidence
from fluxedu.models import FluxConfig
from fluxedu.models.attention import rope_table
from fluxedu.models.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxedu.models.flux import LastLayer
from fluxedu.models.modulation import MLPEmbedder, timestep_embedding
from fluxedu.sampling.latents import image_ids, pack, text_ids

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square"
original = pipe(prompt, seed=4, progress=False)
course.where(pipe, "in", "vec", "double", "single", "final")

# %% [markdown]
# The highlighted parts form one network, `pipe.flux`. The rest of the pipeline (the text encoders, the autoencoder, the
# solver) does not belong to it.
#
# ## Predict
#
# FLUX.1-dev has 4,096 image tokens at 1024 × 1024 and 16,384 at 2048 × 2048, and 512 text tokens in both. The *judge*
# is a program that reads shapes, colours and positions from an image.

# %%
attention_share = fe.predict("What percentage of the operations is attention at 1024 × 1024?", 20)  # answer
cost_ratio = fe.predict("How many times as many operations does one evaluation need at 2048 × 2048?", 5.6)  # answer
reversed_order = fe.predict(
    "The six single blocks run in reverse order. Of 40 images, are 'none', 'some' or 'most' right?", "none"
)  # answer

# %% [markdown]
# ## Build it
#
# The transformer computes a *velocity* for every image token (noise minus image, notebook 10). Its inputs are image
# tokens, text tokens from T5, and `vec`: the sum of the embeddings of the time, of the pooled text vector from CLIP
# and, in some variants, of the guidance scale (how strongly the image should follow the prompt, notebook 12b):
#
# $$\text{vec} = E_{\text{time}}(t) + E_{\text{guidance}}(g) + E_{\text{text}}(y)$$
#
# With $D_1, \dots$ for the double blocks, $S_1, \dots$ for the single blocks and $[\cdot, \cdot]$ for concatenation,
# the velocity is
#
# $$v = \mathrm{last}\big(\text{image part of}\; S_{38} \circ \dots \circ S_1\big([\,\text{txt}, \text{img}\,]\big)\big),
# \qquad (\text{img}, \text{txt}) = D_{19} \circ \dots \circ D_1(W_{\text{img}}\, x, \; W_{\text{txt}}\, c)$$

# %% exercise="whole.flux"
# `final_layer` modulates the tokens once more, with shift and scale but no gate, and maps each token to the velocity of
# its patch (2 × 2 cells of the latent). In the official code, the network is `model.py` lines 34-119 of
# `black-forest-labs/flux` (line numbers on this page are of commit 802fb47).

# %% [markdown]
# Load the miniature's weights strictly: every tensor must be present with the right shape, and there may be no other
# tensor. Then evaluate both networks on the same inputs: a batch of two, with a grid of patches that is not square.

# %%
config = pipe.flux.config
g = torch.Generator().manual_seed(9)
ids, txt_len = image_ids(8, 12).to(device), pipe.prompt_encoder.t5_tokenizer.length
inputs = (
    torch.randn(2, len(ids), config.in_channels, generator=g).to(device, pipe.dtype),  # [B, N, 64], noise
    ids,  # [N, 3]
    torch.randn(2, txt_len, config.context_in_dim, generator=g).to(device, pipe.dtype),  # [B, L, 128]
    text_ids(txt_len).to(device),  # [L, 3], all zero
    torch.tensor([0.9, 0.3], device=device),  # [B], times
    torch.randn(2, config.vec_in_dim, generator=g).to(device, pipe.dtype),  # [B, 96]
    torch.tensor([2.0, 6.0], device=device),  # [B], guidance scales
)
with torch.no_grad():
    expected = pipe.flux(*inputs)
print("velocity:", tuple(expected.shape))
if fe.passed("whole.flux"):
    my_flux = MyFlux(config).to(device, pipe.dtype)
    print(my_flux.load_state_dict(pipe.flux.state_dict(), strict=True))
    with torch.no_grad():
        course.compare("the velocity of your network and of the library's", my_flux(*inputs), expected)

# %% [markdown]
# ## Put your code into the trained model
#
# Generate an image with your network. `fe.intervene` calls a function at a *site*, a named point of the model, and
# continues with what the function returns. At each step, one function stores the state at the site `sample.x`; the
# other replaces the library's velocity by yours at the site `velocity`, before the solver uses it.

# %%
if fe.passed("whole.flux"):
    text = pipe.prompt_encoder([prompt])
    grid, state = image_ids(*original.latents.shape[-2:]).to(device), {}

    def store_state(x, ctx):
        state["x"] = x  # [1, 16, 16, 16]
        return x

    def my_velocity(velocity, ctx):
        time, guidance = (torch.tensor([value], device=device) for value in (ctx.time, pipe.defaults.guidance))
        with torch.no_grad():
            return my_flux(pack(state["x"]), grid, text.txt, text_ids(txt_len).to(device), time, text.pooled, guidance)

    with fe.intervene("sample.x", store_state), fe.intervene("velocity", my_velocity):
        out = pipe(prompt, seed=4, progress=False)
    course.compare("the final latent with your network and with the library's", out.latents, original.latents, 1e-3)

# %% [markdown]
# ## What one evaluation costs
#
# A weight that is applied to a token costs one multiplication and one addition. In every block, each of the $T$ tokens
# uses $12D^2$ weights: in a double block $18D^2 - 6D^2$ (the modulation) in its own stream, in a single block $15D^2 -
# 3D^2$. The attention's scores need $2T^2D$ operations, the weighted sum of the values another $2T^2D$. With the 57
# blocks of FLUX.1,
#
# $$\text{operations} \approx \underbrace{57 \cdot 2T \cdot 12D^2}_{\text{linear layers}} + \underbrace{57 \cdot
# 4T^2 D}_{\text{attention}} \qquad \text{equal at} \quad T = 6D$$
#
# Write the exact count, with the layers before and after the blocks.

# %% exercise="whole.flops"

# %% [markdown]
# Compare with what PyTorch counts while the miniature runs. (The fused attention of a CPU is not counted, so we use the
# attention that is not fused.) Then the numbers of FLUX.1-dev:

# %%
with torch.no_grad():
    img, ids, txt, ids_txt, times, pooled, scales = inputs
    plan, rope = pipe.flux.plan(times, scales, pooled), pipe.flux.rope(ids, ids_txt)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pipe.flux.velocity(img, txt, rope, plan)
print(f"PyTorch counts {counter.get_total_flops():,} operations for a batch of two")
if fe.passed("whole.flops"):
    print(f"your count is  {2 * flops(config, txt_len, len(ids)):,}")

dev = FluxConfig.variant("dev")
D, blocks = dev.hidden_size, dev.depth + dev.depth_single_blocks
costs = {}
print("pixels          tokens   linear layers   attention  (TFLOP per evaluation)")
for side in (512, 1024, 2048):
    T = (side // 16) ** 2 + 512  # image tokens and text tokens
    linear, attention = blocks * 2 * T * 12 * D**2 / 1e12, blocks * 4 * T**2 * D / 1e12
    costs[side] = linear, attention
    print(f"{side:4} x {side:<4} {T:10,} {linear:15.1f} {attention:11.1f}")
attention_share.against(100 * costs[1024][1] / sum(costs[1024]))
cost_ratio.against(sum(costs[2048]) / sum(costs[1024]))

# %% [markdown]
# The linear layers grow with the number of tokens, attention with its square; they are equal at $T = 6D = 18{,}432$
# tokens, which is an image of about 2140 × 2140 pixels. Four times as many pixels cost more than five times as much.
#
# ## See it

# %%
sides = torch.arange(256, 3073, 128)
T = (sides // 16) ** 2 + 512
linear, attention = blocks * 2 * T * 12 * D**2 / 1e12, blocks * 4 * T.double() ** 2 * D / 1e12
fig, ax = plt.subplots(figsize=(6.4, 3), layout="constrained")
ax.stackplot(sides, linear, attention, labels=("linear layers", "attention"), colors=("#0072B2", "#E69F00"))
ax.axvline(2140, color="0.3", linestyle=":")
ax.set(xlabel="pixels per side", ylabel="TFLOP per evaluation", xlim=(256, 3072))
ax.set_title("FLUX.1-dev: from 2140 × 2140 pixels on, attention is the larger part")
ax.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## Break it
#
# Mistakes in assembling raise no error, because all blocks have the same inputs and outputs. 40 prompts about two
# shapes, each with its own seed; the judge counts the images in which everything is right (share, with a 95 %
# interval), and how many of the claims are lost (two colours, two shapes and a position per image). The last line
# leaves out the pooled text, one of the three terms of `vec`.

# %%
parts = evidence.load("parts")
for name in ("nothing", "another seed", "double blocks exchanged", "single blocks reversed", "no pooled text"):
    row = parts[name]
    claims = row["claims, compared with nothing changed"]
    print(f"{name:24} right: {evidence.percent(row['everything right']):28} claims {100 * claims['value']:+.0f}",
          f"percentage points ({100 * claims['low']:+.0f} to {100 * claims['high']:+.0f})")  # fmt: skip
share = parts["single blocks reversed"]["everything right"]["value"]
reversed_order.against("none" if share == 0 else "most" if share > 0.5 else "some")

# %% [markdown]
# With either of the two other orders of the blocks no image is right, although each block could read the output of
# any other: a block's weights were trained for the tokens that arrive at its place. Without the pooled text, few images
# are right. `vec` sets the shifts, scales and gates of all blocks, and these were trained with three terms in the sum.
#
# Notebook 09b counts the parameters of this network and of its variants.
#
# ## In five lines
#
# 1. FLUX consists of input projections for image and text, `vec`, double blocks, single blocks and a last layer.
# 2. `vec` is a sum of embeddings: time, pooled text and, in dev, the guidance scale.
# 3. Text comes first wherever text and image are concatenated; the last layer reads the image tokens only.
# 4. Per token and block, 12 D² weights are applied, in double blocks and in single blocks alike.
# 5. The linear layers grow with the number of tokens, attention with its square: a fifth of the operations at 1024 ×
#    1024.
#
# **Questions people ask**: *Is there a report on FLUX.1?* (flux issue 68) No; the report on Kontext (arXiv 2506.15742)
# has a section about the architecture, but with few numbers: no widths, and of the parameters only “12B”. Counts like
# these come from the code and the files.
# *Guidance embedding or CFG?* (flux issues 63, 159) dev has the guidance input, schnell has none, and classifier-free
# guidance (CFG) evaluates the network twice: notebooks 12 and 12b.
#
# **Read**: `black-forest-labs/flux`, `model.py` and `modules/layers.py` (lines 129-253) · ours:
# `fluxedu/models/flux.py` and `fluxedu/models/config.py`.

# %%
fe.score()
