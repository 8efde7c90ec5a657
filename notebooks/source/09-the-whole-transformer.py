# %% [markdown]
# # 09 · The whole transformer
#
# **Where are the 12 billion parameters?** You have written every block. Now you assemble them, load the trained weights
# into your own network, generate an image with it, and then count the parameters of every variant of FLUX.1, exactly
# and on a laptop.
#
# Afterwards you can read the official code from top to bottom, say what the weights are spent on, and convert a
# checkpoint between the two common layouts without the mistakes that raise no error.
#
# 85 minutes, in two sittings: stop before “Count it” · needs notebooks 07 and 08

# %%
import copy

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.models import VARIANTS, Flux, FluxConfig
from fluxedu.models.attention import rope_table
from fluxedu.models.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxedu.models.flux import LastLayer
from fluxedu.models.meta_init import meta_init
from fluxedu.models.modulation import MLPEmbedder, timestep_embedding
from fluxedu.nano.judge import detect
from fluxedu.sampling.latents import image_ids, pack, text_ids

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square"
original = pipe(prompt, seed=4, progress=False)
course.where(pipe, "in", "vec", "double", "single", "final")


# %% [markdown]
# The highlighted parts form one network, `pipe.flux`. The rest of the pipeline (the text encoders, the autoencoder, the
# solver) is not part of the 12 billion.
#
# ## Predict
#
# The weights that compute shifts, scales and gates are called the *modulation* (notebook 05).

# %%
larger_part = fe.predict(
    "Which blocks of FLUX.1-dev have more weights in total? 19 double / 38 single", "19 double"
)  # answer
modulation_share = fe.predict("What percentage of its weights compute shifts, scales and gates?", 27)  # answer
guidance_weights = fe.predict("By how many million weights is dev larger than schnell?", 10)  # answer
diffusers_tensors = fe.predict(
    "In the official layout, dev has 780 tensors. How many does it have in diffusers' layout?", 1160
)  # answer

# %% [markdown]
# ## Build it
#
# The transformer computes a *velocity* for every image token (noise minus image, notebook 10). Its inputs are image
# tokens, text tokens from T5, and `vec`: the sum of the embeddings of the time, of the pooled text vector from CLIP
# and, in some variants, of the guidance scale (how strongly the image should follow the prompt, notebook 12).

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
# ## Count it
#
# FLUX.1-dev is the same class with larger numbers in its config. Its number of parameters follows from the config
# alone. A linear layer from $a$ to $b$ numbers has $ab$ weights and $b$ biases. Let $D$ be the hidden size, $d$ the
# width of a head and $4D$ the hidden width of the MLP. One *stream* of a double block (notebook 07) has
#
# $$\underbrace{6D^2 + 6D}_{\text{modulation}} + \underbrace{3D^2 + 3D}_{\text{qkv}} + \underbrace{2d}_{\text{QKNorm}}
# + \underbrace{D^2 + D}_{\text{proj}} + \underbrace{4D^2 + 4D + 4D^2 + D}_{\text{MLP}} = 18D^2 + 15D + 2d$$
#
# parameters, so the block has twice as many. In dev, with $D = 3072$ and $d = 128$, these are 339,831,296. Do the same
# for the single block on paper, then write the count for the whole network.

# %% exercise="whole.count"

# %% [markdown]
# Compare with the network itself. On PyTorch's *meta* device a tensor has a shape but no data, so all 12 billion
# parameters need no memory. `fe.models` has every published variant as a config.

# %%
flux = {}
for name in VARIANTS:
    with meta_init():
        flux[name] = Flux(FluxConfig.variant(name))
total = {name: sum(p.numel() for p in network.parameters()) for name, network in flux.items()}
yours = {name: int(count(FluxConfig.variant(name))) for name in VARIANTS} if fe.passed("whole.count") else {}
print(f"{'':10} {'parameters':>14}  tensors  channels in  guidance  your count")
for name, network in flux.items():
    c, guidance = network.config, "yes" if network.config.guidance_embed else "no"
    row = f"{name:10} {total[name]:>14,}  {len(network.state_dict()):>7}  {c.in_channels:>11}  {guidance:>8}"
    print(f"{row}  {yours[name] if name in yours else 'not yet':>10}")

# %% [markdown]
# A single block, whose `linear1` leads from $D$ to $3D + 4D$ numbers and whose `linear2` leads from $D + 4D$ to $D$,
# has $15D^2 + 11D + 2d$ parameters (141,591,808 in dev). Only the squares matter for the sum. With 19 double blocks and
# 38 single blocks the network has
#
# $$19 \cdot 36D^2 + 38 \cdot 15D^2 = 684D^2 + 570D^2 = 1254D^2 \approx 11.83 \cdot 10^9$$
#
# parameters in its blocks. The rest, 64 million, is in the biases and norms and in the layers before and after the
# blocks.
#
# The variants differ in two places. **schnell** has no guidance input. **fill**, **canny** and **depth** have more
# input channels: to the 64 numbers of noise per token, fill adds 64 of the masked image and 256 of the mask; canny and
# depth add 64 of a control image. All other tensors have the same shapes, with different values.

# %%
guidance_weights.against((total["dev"] - total["schnell"]) / 1e6)
print("fill's extra weights:", total["fill"] - total["dev"], "=", (384 - 64), "x", flux["fill"].config.hidden_size)
print(f"dev in bfloat16: {2 * total['dev'] / 1e9:.1f} GB; twice as much in float32")

# %% [markdown]
# ## See it
#
# Each tensor's name says which part it belongs to, so we can count the parameters of each part by name.

# %%
from fluxedu.plots import count_parameters

sizes = count_parameters(flux["dev"])  # by the first two parts of the name, without the block numbers
counts = {"double": 0, "single": 0, "modulation": 0}
for name, size in sizes.items():
    counts["double"] += size * name.startswith("double")
    counts["single"] += size * name.startswith("single")
    counts["modulation"] += size * ("mod" in name.lower().split(".")[-1])
larger_part.against("19 double" if counts["double"] > counts["single"] else "38 single")
modulation_share.against(round(100 * counts["modulation"] / total["dev"]))

stream_name = {"img": "image", "txt": "text", "modulation": "single"}
areas: dict[str, int] = {}
for name, size in sizes.items():
    block, last = name.split(".") if name.count(".") == 1 else ("", name)
    stream, layer = last.split("_") if block == "double_blocks" else (last, "mod" if last == "modulation" else "")
    label = f"single.{last}" if last.startswith("linear") and block else "rest"
    if layer:
        label = f"{layer}.{stream_name[stream]}"
    areas[label] = areas.get(label, 0) + size
fe.plots.treemap(areas, title="FLUX.1-dev: the modulation (mod) is 27 % of the 12 B parameters")

# %% [markdown]
# You can derive the 27 % from the formulas: the modulation has $12D^2$ of a double block's $36D^2$, one third, and
# $3D^2$ of a single block's $15D^2$, one fifth:
#
# $$\frac{19 \cdot 12 + 38 \cdot 3}{1254} = \frac{342}{1254} = 27.3\,\%$$
#
# ### And the computation?
#
# A weight that is applied to a token costs one multiplication and one addition. Each of the $T$ tokens meets $12D^2$
# weights per block, in a double block ($18D^2$ less $6D^2$ of the modulation) and in a single block ($15D^2$ less
# $3D^2$) alike. Attention computes $T \times T$ scores from $D$ numbers, and as many again for the weighted sum of
# the values. With 57 blocks,
#
# $$\text{FLOPs per step} \approx \underbrace{57 \cdot 2T \cdot 12D^2}_{\text{linear layers}}
# + \underbrace{57 \cdot 4T^2 D}_{\text{attention}} + \underbrace{2 \cdot 342D^2}_{\text{modulation}}$$

# %%
D = flux["dev"].config.hidden_size
print("pixels          tokens   linear layers   attention   modulation   (TFLOP per step)")
for side in (512, 1024, 2048):
    T = (side // 16) ** 2 + 512  # image tokens and text tokens
    parts = (57 * 2 * T * 12 * D**2, 57 * 4 * T**2 * D, 2 * 342 * D**2)
    linear, attention, modulation = (part / 1e12 for part in parts)
    print(f"{side:4} x {side:<4} {T:10,} {linear:15.1f} {attention:11.1f} {modulation:12.3f}")

# %% [markdown]
# The linear layers grow with the number of tokens, attention with its square; they are equal at $T = 6D = 18{,}432$
# tokens, which is a picture of about 2140 × 2140 pixels. The modulation layers read *one* vector per step, whereas all
# other layers read thousands of tokens. So they have 27 % of the weights and need almost none of the computation. Their
# outputs depend only on time, guidance scale and pooled text, so they can be computed before the run, and the layers
# need not stay on the GPU: `Flux.plan` computes them.
#
# The explorer shows this figure for every variant, and for the miniature. Point at a part to see its tensors, and at a
# tensor to see its name in the official layout and in diffusers' (or use Tab and the arrow keys). Which is the first
# part that differs between dev and fill?

# %%
from fluxedu.widgets.parameters import parameters

parameters({"miniature": config})

# %% [markdown]
# ## Two layouts
#
# The same weights are published in two layouts: that of the official files and that of diffusers. Most of the
# conversion is renaming. In addition, diffusers splits the fused matrices. You can now convert a single block yourself.

# %% exercise="whole.unfused"

# %% [markdown]
# The package converts the rest too, in both directions, and rejects tensors that do not fit.

# %%
from fluxedu.checkpoints.layouts import shapes

official = pipe.flux.state_dict()
diffusers = fe.checkpoints.convert(official, to="diffusers", config=config)
converted_back = fe.checkpoints.convert(diffusers, to="bfl", config=config)
print("the miniature:", len(official), "tensors in the official layout,", len(diffusers), "in diffusers'")
changed = sum(int((converted_back[name] != t).sum()) for name, t in official.items())
print(f"converted and back, {changed} of {sum(t.numel() for t in official.values()):,} weights have changed")
diffusers_tensors.against(len(shapes(FluxConfig.variant("dev"), "diffusers")))
if fe.passed("whole.unfused"):
    mine = unfused(dict(pipe.flux.single_blocks[3].state_dict()), config.hidden_size)
    theirs = torch.cat([diffusers[f"single_transformer_blocks.3.{name}"].flatten() for name in mine])
    course.compare(
        f"your {len(mine)} tensors of single block 3", torch.cat([t.flatten() for t in mine.values()]), theirs
    )

# %% [markdown]
# ## Break it
#
# Mistakes in a conversion rarely raise an error. Queries and keys have the same shape, and so have shift and scale, so
# a file in which they are exchanged loads silently. Here are four such files. For each, the *judge*, a program that
# finds shapes and colours in an image by geometry, counts for eight seeds how often exactly the prompt's two objects
# are there.

# %%
dim = config.hidden_size


def exchange_rows(tensor: Tensor, i: int, j: int) -> Tensor:
    """The tensor with its groups i and j of `dim` rows exchanged."""
    rows = list(tensor.split(dim))
    rows[i], rows[j] = rows[j], rows[i]
    return torch.cat(rows)


def altered(part: str, i: int, j: int) -> dict[str, Tensor]:
    """The miniature's tensors, with rows exchanged in every tensor whose name contains `part`."""
    return {name: exchange_rows(t, i, j) if part in name else t for name, t in official.items()}


files = {
    "q and k exchanged": altered("linear1", 0, 1),
    "k and v exchanged": altered("linear1", 1, 2),
    "last: scale, shift": altered("final_layer.adaLN_modulation", 0, 1),
    "single: shift, gate": altered("modulation.lin", 0, 2),
}
other_pipe, images_of = copy.deepcopy(pipe), {}
for name, file in {"original": official, **files}.items():
    message = other_pipe.flux.load_state_dict(file, strict=True)
    images = other_pipe(prompt, seed=list(range(8)), steps=8, trajectory=False, progress=False).images
    found = [sorted((thing.color, thing.form) for thing in detect(image).objects) for image in images]
    right = found.count([("blue", "square"), ("red", "circle")])
    images_of[name] = images
    print(f"{name:20} {message} · {right} of 8 images right")

# %%
fig, axes = plt.subplots(1, 5, figsize=(9, 2.2), layout="constrained")
for ax, (name, images) in zip(axes, images_of.items()):
    ax.imshow(images[4])
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle("Four files with exchanged rows load without an error (seed 4)", fontsize=11)
plt.show()

# %% [markdown]
# diffusers really does store the scale of the last layer before its shift: `AdaLayerNormContinuous.forward`
# (`models/normalization.py` line 349 of version 0.42.1) splits into `scale, shift`, the official `LastLayer`
# (`modules/layers.py` line 250) into `shift, scale`. A converter that only renames tensors produces the third of these
# files. It is therefore not enough to test that a converted file loads: one must compare
# the outputs of the two networks, with random values in all tensors. Mistakes that can be detected at loading are
# reported with the name of the tensor:

# %%
file = dict(official)
file["double_blocks.0.img_atn.qkv.weight"] = file.pop("double_blocks.0.img_attn.qkv.weight")
try:
    fe.checkpoints.convert(file, to="diffusers", config=config)
except fe.checkpoints.CheckpointError as error:
    print(error)

# %% [markdown]
# ## In five lines
#
# 1. FLUX consists of input projections for image and text, `vec`, double blocks, single blocks and a last layer.
# 2. dev has 11,901,408,320 parameters; variants differ in their input channels and in the guidance input.
# 3. The 19 double blocks hold more weights than the 38 single blocks.
# 4. 27 % of all weights compute the modulation. They need much memory and hardly any computation; the
#    modulation of all steps can be computed before the run.
# 5. The two layouts order rows differently, and a file with the wrong order loads without an error.
#
# **Questions people ask**: *Is there a report on FLUX.1?* (flux issue 68) No; the report on Kontext (arXiv 2506.15742)
# has a section about the architecture, but without numbers. Counts like these come from the code and the files. *Why do
# I run out of memory?* (flux issues 7, 185) The transformer alone is 23.8 GB of bfloat16 weights; T5-XXL adds 4.8 B
# parameters. *How do I get from diffusers back to the official names?* (diffusers issue 11165) As above, or for files
# with `fluxedu convert IN OUT --to bfl`. *Guidance embedding or CFG?* (flux issues 63, 159) dev has the input that you
# counted, schnell has none, and classifier-free guidance (CFG) evaluates the network twice: notebook 12.
#
# **Read**: `black-forest-labs/flux`, `model.py`, `modules/layers.py` (lines 129-253) and `util.py` · ours:
# `fluxedu/models/flux.py`, `fluxedu/models/config.py` and, for the layouts, `fluxedu/checkpoints/layouts.py`.

# %%
fe.score()
