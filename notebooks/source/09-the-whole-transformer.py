# %% [markdown]
# # 09 · The whole transformer
#
# **Where are 12 B parameters?** You have written every block. Now you put them together, load the trained weights
# into your own network, let it draw, and then count: each variant of FLUX.1 to the last parameter, on a laptop.
#
# Afterwards you can read the official code from top to bottom, say what the weights are spent on, and carry a
# checkpoint from one layout to the other without the mistakes that give no error.
#
# 65 minutes · needs notebooks 07 and 08

# %%
import copy

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.models import VARIANTS, Flux, FluxConfig
from fluxedu.models.blocks import DoubleStreamBlock
from fluxedu.models.modulation import MLPEmbedder, timestep_embedding
from fluxedu.models.meta_init import meta_init
from fluxedu.models.attention import rope_table
from fluxedu.models.blocks import SingleStreamBlock
from fluxedu.models.flux import LastLayer
from fluxedu.sampling.latents import image_ids, pack, text_ids

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square"
picture = pipe(prompt, seed=4, progress=False)
course.where(pipe, "in", "vec", "double", "single", "final")

# %% [markdown]
# The marked parts are one network, `pipe.flux`. What surrounds it (the text encoders, the autoencoder, the solver) is
# not counted in the 12 billion.
#
# ## Predict

# %%
larger = fe.predict("FLUX.1-dev: which blocks hold more of the weights? 19 double / 38 single", "19 double")  # answer
steering = fe.predict("how many percent of its weights make shifts, scales and gates?", 27)  # answer
guided = fe.predict("how many million weights has dev more than schnell?", 10)  # answer
apart = fe.predict("dev has 780 tensors in the official layout; how many in diffusers'?", 1160)  # answer

# %% [markdown]
# ## Build it

# %% exercise="whole.flux"
# `final_layer` modulates once more, with shift and scale and no gate, and maps each token to the velocity of its patch.

# %% [markdown]
# Load the miniature's weights, strictly: every tensor has to be there, no other, each in its shape. Then ask both
# networks the same question, on a grid that is not square, two pictures at once.

# %%
config = pipe.flux.config
g = torch.Generator().manual_seed(9)
ids, words = image_ids(8, 12).to(device), pipe.prompt_encoder.t5_tokenizer.length
question = (
    torch.randn(2, len(ids), config.in_channels, generator=g).to(device, pipe.dtype),  # [B, N, 64], noise
    ids,  # [N, 3]
    torch.randn(2, words, config.context_in_dim, generator=g).to(device, pipe.dtype),  # [B, L, 128]
    text_ids(words).to(device),  # [L, 3], all zero
    torch.tensor([0.9, 0.3], device=device),  # [B], times
    torch.randn(2, config.vec_in_dim, generator=g).to(device, pipe.dtype),  # [B, 96]
    torch.tensor([2.0, 6.0], device=device),  # [B], guidance
)
with torch.no_grad():
    theirs = pipe.flux(*question)
print("velocity:", tuple(theirs.shape))
whole = passed
if whole:
    mine = MyFlux(config).to(device, pipe.dtype)
    print(mine.load_state_dict(pipe.flux.state_dict(), strict=True))
    with torch.no_grad():
        far = (mine(*question) - theirs).norm() / theirs.norm()
    print("farthest from the library's below 1 in 100,000:", bool(far < 1e-5))

# %% [markdown]
# ## Put yours into the trained model
#
# Let your network draw. At each step of the running pipeline, the state `x` is caught at the site `sample.x`, and
# at the site `velocity` the library's answer is thrown away and yours goes on to the solver.

# %%
if whole:
    text = pipe.prompt_encoder([prompt])
    grid, state = image_ids(*picture.latents.shape[-2:]).to(device), {}

    def catch(x, ctx):
        state["x"] = x  # [1, 16, 16, 16]
        return x

    def answer(velocity, ctx):
        time, strength = (torch.tensor([v], device=device) for v in (ctx.time, pipe.defaults.guidance))
        with torch.no_grad():
            return mine(pack(state["x"]), grid, text.txt, text_ids(words).to(device), time, text.pooled, strength)

    with fe.intervene("sample.x", catch), fe.intervene("velocity", answer):
        again = pipe(prompt, seed=4, progress=False)
    far = (again.latents - picture.latents).norm() / picture.latents.norm()
    print("the latent stays the same to 1 in 1,000:", bool(far < 1e-3))
else:
    print("solve the exercise above first; then run this cell again")

# %% [markdown]
# ## Count it
#
# The same class with larger numbers in its config is FLUX.1-dev. How many parameters it has follows from the config
# alone.

# %% exercise="whole.count"

# %% [markdown]
# Against the network itself: on PyTorch's *meta* device a tensor has a shape and no numbers, so all 12 billion cost
# nothing. `fe.models` has every published variant as a config.

# %%
flux = {}
for name in VARIANTS:
    with meta_init():
        flux[name] = Flux(FluxConfig.variant(name))
total = {name: sum(p.numel() for p in network.parameters()) for name, network in flux.items()}
print(f"{'':10} {'parameters':>14}  tensors  channels in  guidance")
for name, network in flux.items():
    c = network.config
    print(f"{name:10} {total[name]:>14,}  {len(network.state_dict()):>7}  {c.in_channels:>11}  {c.guidance_embed}")
if passed:
    print("your count is right for all of them:", all(count(FluxConfig.variant(n)) == total[n] for n in VARIANTS))

# %% [markdown]
# Members of the family differ in two places. **schnell** has no guidance input. **fill**, **canny** and **depth** have
# more input channels: to a token's 64 numbers of noise, fill adds 64 of the masked picture and 256 of the mask, canny
# and depth 64 of the control picture. Everything else has the same shapes, with other values in it.

# %%
guided.against((total["dev"] - total["schnell"]) / 1e6)
print("fill's extra channels:", total["fill"] - total["dev"], "=", (384 - 64), "x", flux["fill"].config.hidden_size)
print(f"dev in bfloat16: {2 * total['dev'] / 1e9:.1f} GB; in float32 twice that")

# %% [markdown]
# ## See it
#
# Each tensor's name says where it belongs, so counting by name is counting by part.

# %%
from fluxedu.plots.parameters import parts_of

sizes = parts_of(flux["dev"])  # by the first two parts of the name, the numbers of blocks left out
kind = {"double": 0, "single": 0, "modulation": 0}
for name, size in sizes.items():
    kind["double"] += size * name.startswith("double")
    kind["single"] += size * name.startswith("single")
    kind["modulation"] += size * ("mod" in name.lower().split(".")[-1])
larger.against("19 double" if kind["double"] > kind["single"] else "38 single")
steering.against(round(100 * kind["modulation"] / total["dev"]))

tokens = 4096 + 512  # of a picture of 1024 x 1024 and its text
once, often = 2 * kind["modulation"], 2 * tokens * (sizes["single_blocks.linear1"] + sizes["single_blocks.linear2"])
print(
    f"operations of a step: modulations {once / 1e12:.3f} T, the single blocks' linear1 and linear2 {often / 1e12:.0f} T"
)

short = {"img": "image", "txt": "text", "modulation": "single"}
areas: dict[str, int] = {}
for name, size in sizes.items():
    block, last = name.split(".") if name.count(".") == 1 else ("", name)
    stream, job = last.split("_") if block == "double_blocks" else (last, "mod" if last == "modulation" else "")
    label = f"{job}.{short[stream]}" if job else f"single.{last}" if last.startswith("linear") and block else "rest"
    areas[label] = areas.get(label, 0) + size
fe.plots.treemap(areas, title="FLUX.1-dev: over a quarter of 12 B parameters only steer the others (mod)")

# %% [markdown]
# The modulations are worth a thought: they read *one* vector a step, where all others read thousands of tokens. So
# they are 27 % of the weights and next to none of the work. As they depend on time, guidance and the pooled text only,
# they can be computed for all steps ahead, and then need not stay on the GPU: `Flux.plan` does that.
#
# The explorer has this map for every variant, and for the miniature. Point at a part for its tensors, at a tensor
# for its official name and what becomes of it at diffusers (or Tab and the arrow keys). Which part is the first
# to differ when you go from dev to fill?

# %%
from fluxedu.widgets.parameters import parameters

parameters({"miniature": config})

# %% [markdown]
# ## Two layouts
#
# The same weights go about under two sets of names: the official files' and diffusers'. Most of it is renaming.
# What is not: diffusers cuts the fused matrices apart. You know enough to do a single block by yourself.

# %% exercise="whole.unfused"

# %% [markdown]
# The package's table covers the rest, in both directions, and refuses what does not fit.

# %%
from fluxedu.checkpoints.tables import shapes

official = pipe.flux.state_dict()
diffusers = fe.checkpoints.convert(official, to="diffusers", config=config)
back = fe.checkpoints.convert(diffusers, to="bfl", config=config)
print("the miniature:", len(official), "tensors, at diffusers'", len(diffusers))
print("there and back, the same to the bit:", all(torch.equal(back[name], t) for name, t in official.items()))
apart.against(len(shapes(FluxConfig.variant("dev"), "diffusers")))
if passed:
    yours = unfused(dict(pipe.flux.single_blocks[3].state_dict()), config.hidden_size)
    same = (torch.equal(t, diffusers[f"single_transformer_blocks.3.{name}"]) for name, t in yours.items())
    print("yours of single block 3 are the package's:", all(same))

# %% [markdown]
# ## Break it
#
# What goes wrong in a conversion is rarely an error. Queries and keys have one shape, shift and scale have one shape:
# a wrong table loads without a word. Here are four such files, made on purpose, and what they draw.

# %%
dim = config.hidden_size


def exchanged(tensor: Tensor, one: int, other: int) -> Tensor:
    """The tensor with two groups of `dim` rows in each other's place."""
    rows = list(tensor.split(dim))
    rows[one], rows[other] = rows[other], rows[one]
    return torch.cat(rows)


def altered(ending: str, one: int, other: int) -> dict[str, Tensor]:
    """The miniature's tensors with those rows exchanged wherever a name contains `ending`."""
    return {name: exchanged(t, one, other) if ending in name else t for name, t in official.items()}


files = {
    "q and k exchanged": altered("linear1", 0, 1),
    "k and v exchanged": altered("linear1", 1, 2),
    "last: scale, shift": altered("final_layer.adaLN_modulation", 0, 1),
    "single: shift, gate": altered("modulation.lin", 0, 2),
}
outs, other = [picture], copy.deepcopy(pipe)
for name, file in files.items():
    said = other.flux.load_state_dict(file, strict=True)
    outs.append(other(prompt, seed=4, progress=False))
    far = float((outs[-1].latents - picture.latents).norm() / picture.latents.norm())
    print(f"{name:20} {said} · the latent moves by " + (f"{far:.0%}" if far < 3 else "more than 300%"))

# %%
fig, axes = plt.subplots(1, 5, figsize=(9, 2.2), layout="constrained")
for ax, out, name in zip(axes, outs, ["as it is", *files]):
    ax.imshow(out.images[0])
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle("Every one of these files loads without an error", fontsize=11)
plt.show()

# %% [markdown]
# diffusers does store the last layer's scale before its shift, so a converter that only renames makes the third of
# them. That is why a conversion is compared by what the network answers, with random values in all tensors, and never
# by whether it loads. What can be refused at loading is refused, with the name:

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
# 1. FLUX is: two ways in, one vector that steers, double blocks, single blocks, one way out.
# 2. dev has 11,901,408,320 parameters; variants differ in the channels they take in and in the guidance input.
# 3. The 19 double blocks hold more than the 38 single ones.
# 4. 27 % of all weights are modulations: much memory, hardly any work, computable ahead of the run.
# 5. Layouts fuse and order rows differently, and a wrong order loads as well as the right one.
#
# **People ask**: *is there a report?* (flux issue 68) Not of its own; the one on Kontext (arXiv 2506.15742) has a
# section, without numbers. So counts like these are read off the code and the files.
# *Why do I run out of memory?* (flux issues 7, 185) 23.8 GB of bfloat16 weights are the transformer alone; T5-XXL adds
# 4.8 B parameters. *How do I get from diffusers back to the official names?* (diffusers issue 11165) As above, or for
# files `fluxedu convert IN OUT --to bfl`. *Guidance embedding or CFG?* (flux issues 63, 159) dev has the input you
# counted, schnell has none, and real classifier-free guidance runs the network twice: notebook 12.
#
# **Read**: `black-forest-labs/flux`, `model.py` and `util.py` · ours: `fluxedu/models/flux.py`, 171 lines,
# `fluxedu/models/config.py` and, for the layouts, `fluxedu/checkpoints/tables.py`.

# %%
fe.score()
