# %% [markdown]
# # 09b · Parameters and layouts
#
# **Where are the 12 billion parameters?** You will count the parameters of every variant of FLUX.1, exactly and on a
# laptop, see what they are spent on, and convert blocks between the two layouts in which the weights are published.
#
# Afterwards you can say what the weights are spent on, and convert a checkpoint between the two common layouts without
# the mistakes that raise no error.
#
# 60 minutes · needs notebook 09

# %%
import copy

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import fluxedu as fe
from fluxedu import course
from fluxedu.checkpoints.layouts import shapes
from fluxedu.course import evidence
from fluxedu.models import VARIANTS, Flux, FluxConfig
from fluxedu.models.meta_init import meta_init
from fluxedu.plots import count_parameters
from fluxedu.widgets.parameters import parameters

device = course.begin()
pipe = fe.load(device=device)
config = pipe.flux.config
prompt = "a red circle left of a blue square"
course.where(pipe, "in", "vec", "double", "single", "final")

# %% [markdown]
# ## Predict
#
# The weights that compute shifts, scales and gates are called the *modulation* (notebook 05b).

# %%
larger_part = fe.predict(
    "Which blocks of FLUX.1-dev have more weights in total: the '19 double' or the '38 single'?", "19 double"
)  # answer
guidance_weights = fe.predict("By how many million weights is dev larger than schnell?", 10)  # answer
diffusers_tensors = fe.predict(
    "In the official layout, dev has 780 tensors. How many does it have in diffusers' layout?", 1160
)  # answer

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
# parameters in its blocks. The rest, 67 million, is in the biases and norms and in the layers before and after the
# blocks.
#
# The variants differ in two places. **schnell** has no guidance input. **fill**, **canny** and **depth** have more
# input channels: to the 64 numbers of noise per token, fill adds 64 of the masked image and 256 of the mask; canny and
# depth add 64 of a control image. All other tensors have the same shapes, with different values. (**krea** and
# **kontext** have all shapes of dev, **canny-lora** and **depth-lora** those of canny: notebooks 14 and 14c.)

# %%
guidance_weights.against((total["dev"] - total["schnell"]) / 1e6)
print("fill's extra weights:", total["fill"] - total["dev"], "=", (384 - 64), "x", flux["fill"].config.hidden_size)
print(f"dev in bfloat16: {2 * total['dev'] / 1e9:.1f} GB; twice as much in float32")

# %% [markdown]
# ## See it
#
# Each tensor's name says which part it belongs to, so we can count the parameters of each part by name.

# %%
sizes = count_parameters(flux["dev"])  # by the first two parts of the name, without the block numbers
counts = {"double": 0, "single": 0, "modulation": 0}
for name, size in sizes.items():
    counts["double"] += size * name.startswith("double")
    counts["single"] += size * name.startswith("single")
    counts["modulation"] += size * ("mod" in name.lower().split(".")[-1])
larger_part.against("19 double" if counts["double"] > counts["single"] else "38 single")

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
# The modulation layers read *one* vector per step, whereas nearly all other layers read thousands of tokens. So they
# have 27 % of the weights and need almost none of the computation. Their outputs depend only on time, guidance scale
# and pooled text, so they can be computed before the run, and the layers do not have to stay on the GPU: `Flux.plan`
# computes them.
#
# The explorer shows this figure for every variant, and for the miniature. Point at a part to see its tensors, and at a
# tensor to see its name in the official layout and in diffusers' (or use Tab and the arrow keys). Which is the first
# part that differs between dev and fill?

# %%
parameters({"miniature": config})

# %% [markdown]
# ## Two layouts
#
# The same weights are published in two layouts: that of the official files and that of diffusers. Most of the
# conversion is renaming: here for a double block, whose text stream has names with `context`, `add` and `added`.

# %% exercise="whole.renamed"

# %% [markdown]
# In addition, diffusers splits the fused matrices. Convert a whole single block:

# %% exercise="whole.unfused"

# %% [markdown]
# The package converts the rest too, in both directions, and rejects tensors that do not fit. Your tensors must equal
# the package's:

# %%
official = pipe.flux.state_dict()
diffusers = fe.checkpoints.convert(official, to="diffusers", config=config)
converted_back = fe.checkpoints.convert(diffusers, to="bfl", config=config)
print("the miniature:", len(official), "tensors in the official layout,", len(diffusers), "in diffusers'")
changed = sum(int((converted_back[name] != t).sum()) for name, t in official.items())
print(f"converted and back, {changed} of {sum(t.numel() for t in official.values()):,} weights have changed")
diffusers_tensors.against(len(shapes(FluxConfig.variant("dev"), "diffusers")))
if fe.passed("whole.renamed", "whole.unfused"):
    mine = {}
    for i, block in enumerate(pipe.flux.double_blocks):
        unsplit = {name: tensor for name, tensor in block.state_dict().items() if "qkv" not in name}
        mine |= {f"transformer_blocks.{i}.{name}": tensor for name, tensor in renamed(unsplit).items()}
    for i, block in enumerate(pipe.flux.single_blocks):
        converted = unfused(dict(block.state_dict()), config.hidden_size)
        mine |= {f"single_transformer_blocks.{i}.{name}": tensor for name, tensor in converted.items()}
    theirs = torch.cat([diffusers[name].flatten() for name in mine])
    print(f"you have converted {len(mine)} of {len(diffusers)} tensors")
    course.compare("your tensors and the package's", torch.cat([t.flatten() for t in mine.values()]), theirs)

# %% [markdown]
# ## Break it
#
# Mistakes in a conversion rarely raise an error. Queries and keys have the same shape, and so have shift and scale, so
# a file in which they are exchanged loads without an error. In each of these four weight files, two parts of a matrix
# are exchanged.

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
    print(f"{name:20} {message}")
    images_of[name] = other_pipe(prompt, seed=4, progress=False).images[0]

fig, axes = plt.subplots(1, 5, figsize=(9, 2.2), layout="constrained")
for ax, (name, image) in zip(axes, images_of.items()):
    ax.imshow(image)
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle("Four files with exchanged rows load without an error (seed 4)", fontsize=11)
plt.show()

# %% [markdown]
# You saw in notebook 08 that no image is right with the first two files; here are all four, with 40 prompts about two
# shapes, each with its own seed. The *judge*, a program that reads shapes, colours and positions from an image by
# geometry, says in what share of the images everything is right (with a 95 % interval), and how many of the claims are
# lost (two colours, two shapes and a position per image).

# %%
parts = evidence.load("parts")
for name in ("nothing", "another seed", *files):
    row = parts[name]
    claims = row["claims, compared with nothing changed"]
    print(f"{name:20} right: {evidence.percent(row['everything right']):28} claims {100 * claims['value']:+.0f}",
          f"percentage points ({100 * claims['low']:+.0f} to {100 * claims['high']:+.0f})")  # fmt: skip

# %% [markdown]
# diffusers really does store the scale of the last layer before its shift: `AdaLayerNormContinuous.forward`
# (`models/normalization.py` line 349 of version 0.42.1) splits into `scale, shift`, the official `LastLayer`
# (`modules/layers.py` line 250 of commit 802fb47) into `shift, scale`. A converter that only renames tensors produces
# the third of these files. It is therefore not enough to test that a converted file loads: one must compare the outputs
# of the two networks, with random values in all tensors. Mistakes that can be detected at loading are reported with the
# name of the tensor:

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
# 1. The number of parameters follows from the config alone: 36 D² per double block and 15 D² per single block.
# 2. dev has 11,901,408,320 parameters; variants differ in their input channels and in the guidance input.
# 3. The 19 double blocks hold more weights than the 38 single blocks.
# 4. 27 % of all weights compute the modulation. They need much memory and almost no computation; the modulation of all
#    steps can be computed before the run.
# 5. The two layouts order rows differently, and a file with the wrong order loads without an error.
#
# **Questions people ask**: *Why do I run out of memory?* (flux issues 7, 185) The transformer alone is 23.8 GB of
# bfloat16 weights; T5-XXL adds 4.8 B parameters. *How do I get from diffusers back to the official names?* (diffusers
# issue 11165) As above, or for files with `fluxedu convert IN OUT --to bfl`.
#
# **Read**: `black-forest-labs/flux`, `util.py` · ours: `fluxedu/models/config.py` and, for the layouts,
# `fluxedu/checkpoints/layouts.py`.

# %%
fe.score()
