# %% [markdown]
# # 08b · What single blocks add
#
# **What does a single block contribute, and what is lost without it?** You will count what merging the streams saves,
# write an instrument that measures what each block adds to the image while the model runs, and rebuild the block so
# that the MLP runs after the attention.
#
# Afterwards you can distinguish a statement about sizes from a statement about quotients, and say which parts of the
# single blocks the miniature needs, with numbers from 40 prompts.
#
# 60 minutes · needs notebooks 00b and 08

# %%
from textwrap import fill

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import display
from torch import Tensor

import fluxedu as fe
from fluxedu import course
from fluxedu.course import evidence
from fluxedu.models import FluxConfig
from fluxedu.models.attention import rotate, split_heads
from fluxedu.models.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxedu.models.meta_init import meta_init
from fluxedu.models.modulation import layer_norm, modulate
from fluxedu.widgets.contributions import contributions, measure_contributions, rms_over_tokens

device = course.begin()
pipe = fe.load(device=device)
config = pipe.flux.config
prompt = "a red circle left of a blue square"
original = pipe(prompt, seed=4, progress=False)
course.where(pipe, "single")

# %% [markdown]
# ## Predict
#
# The *judge* is a program that reads shapes, colours and positions from an image. A prompt about two shapes makes five
# *claims* about the image: two colours, two shapes and a position. *Removing* a block means that it adds nothing;
# *holding* the text means that a block does not change the text tokens.

# %%
weights_ratio = fe.predict(
    "How many times as many weights as a single block does a double block of FLUX.1 have?", 2.4
)  # answer
removed = fe.predict(
    "Without which block are most claims lost: 'the block that adds most' or 'another block'?", "another block"
)  # answer
serial_effect = fe.predict(
    "The MLP runs after the attention. Are 'fewer than half' or 'more than half' of 40 images right?", "fewer than half"
)  # answer
text_held = fe.predict(
    "The single blocks do not change the text. Are 'fewer than half' or 'more than half' of 40 images right?",
    "more than half",
)  # answer

# %% [markdown]
# ## What merging saves
#
# With an MLP of $4D$ hidden units, and without biases and the norms' scales, a stream of a double block has the
# matrices for q, k, v ($3D^2$), the attention's projection ($D^2$), the MLP ($8D^2$) and six modulation vectors
# ($6D^2$). A single block has `linear1` ($7D^2$), `linear2` ($5D^2$) and three modulation vectors ($3D^2$):
#
# $$\text{double: } 2 \cdot (3 + 1 + 8 + 6)\, D^2 = 36\, D^2 \qquad \text{single: } (7 + 5 + 3)\, D^2 = 15\, D^2 \qquad
# \frac{36}{15} = 2.4$$
#
# Count the parameters:

# %%
with meta_init():  # names and shapes only, no memory
    dev = FluxConfig.variant("dev")
    double = sum(p.numel() for p in DoubleStreamBlock(dev).parameters())
    single = sum(p.numel() for p in SingleStreamBlock(dev).parameters())
print(f"double block {double:,} parameters, single block {single:,}")
weights_ratio.against(double / single)
print(f"FLUX.1's blocks: {(19 * double + 38 * single) / 1e9:.1f} B; if all 57 were double: {57 * double / 1e9:.1f} B")

# %% [markdown]
# ## See it
#
# Since `linear2` can be split (notebook 08), we know exactly what attention and MLP each add to a token. The *size* of
# a token with the numbers $x_1, \dots, x_D$ is its root mean square,
#
# $$\mathrm{rms}(x) = \sqrt{\tfrac{1}{D} \textstyle\sum_i x_i^2}$$
#
# Here is the size of what each of the two adds, divided by the size of the token, at one step of the run:

# %%
sizes, added, _ = measure_contributions(pipe, prompt, seed=4, progress=False)
txt_len = pipe.prompt_encoder.t5_tokenizer.length
step, first = 10, config.depth
streams = {"image": slice(txt_len, None), "text": slice(0, txt_len)}
share = {}  # [block, source] for each stream; the sources are attention, MLP, and their sum
for name, tokens in streams.items():
    added_size = rms_over_tokens(added.tensor[first:, :, step], tokens)
    token_size = rms_over_tokens(sizes.tensor[first:, step, None], tokens)
    share[name] = added_size / token_size

fig, axes = plt.subplots(1, 2, figsize=(8.4, 3), layout="constrained", sharey=True)
block_numbers = torch.arange(len(sizes.coords["block"]) - first)
for ax, (name, values) in zip(axes, share.items()):
    for i, (source, colour) in enumerate((("attention", "#0072B2"), ("MLP", "#D55E00"))):
        ax.bar(block_numbers + 0.36 * i - 0.18, 100 * values[:, i], 0.36, label=source, color=colour)
    ax.set_xlabel(f"single block, {name} tokens")
axes[0].set_ylabel("size added / size of token, %")
axes[1].legend()
smallest_ratio = float((share["image"] / share["text"])[:, :2].min())
fig.suptitle(
    f"Step 10, seed 4: relative to their size, image tokens get at least {smallest_ratio:.1f} times as much as text",
    fontsize=10,
)
plt.show()

# %% [markdown]
# This is one step of one run, and each bar is a quotient: text tokens are larger, so an addition of the same size is a
# smaller share of them. Is it a property of the blocks? The same for 40 prompts, each with its own seed, in three parts
# of the run of 20 steps. Left, the size of what a block adds, in absolute terms; right, relative to the tokens' size.

# %%
stored = evidence.load("blocks")["sizes"]
single = [name for name in stored if name.startswith("single")]
fig, axes = plt.subplots(1, 2, figsize=(9.6, 3.2), layout="constrained")
for ax, measure in zip(axes, ("sum adds", "sum adds, relative to the size")):
    for stream, colour in (("text", "#0072B2"), ("image", "#D55E00")):
        for third, line in (("first third", "o:"), ("second third", "s--"), ("last third", "^-")):
            row = {name: stored[name][third][stream][measure] for name in single}
            evidence.plot(ax, row, label=f"{stream}, {third} of the run", color=colour, fmt=line, markersize=4)
    ax.set(ylim=0, title="size of what is added" if measure == "sum adds" else "relative to the size of the token")
    ax.tick_params(axis="x", labelsize=7)
axes[0].legend(fontsize=7)
plt.show()
for third in ("first third", "second third", "last third"):
    ratios = {}
    for measure in ("sum adds", "sum adds, relative to the size"):
        image, text = (
            [stored[name][third][stream][measure]["value"] for name in single] for stream in ("image", "text")
        )
        ratios[measure] = [a / b for a, b in zip(image, text)]
    absolute, relative = ratios.values()
    text, image = ([stored[name][third][stream]["size"]["value"] for name in single] for stream in ("text", "image"))
    sizes_ratio = [a / b for a, b in zip(text, image)]
    print(f"{third}: image / text, absolute {min(absolute):.1f} to {max(absolute):.1f}, "
          f"relative {min(relative):.1f} to {max(relative):.1f} (medians of 40 runs);",
          f"text / image, size on entering {min(sizes_ratio):.1f} to {max(sizes_ratio):.1f}")  # fmt: skip

# %% [markdown]
# In absolute terms a block adds about as much to text tokens as to image tokens, in every part of the run. The large
# difference on the right comes from the denominator: text tokens are 1.6 to 8.3 times as large when they enter these
# blocks, and grow during the run. So do not conclude from the first figure that the text tokens change little.
#
# The explorer shows all blocks and steps. Move over the table with the mouse, or with Tab and the arrow keys. In which
# blocks, and in which part of the image, do attention and MLP change the tokens in the same direction, and where in
# opposite directions?

# %%
contributions(pipe, prompt, seed=4, progress=False)

# %% [markdown]
# ## Which blocks add most to the image?
#
# Now measure it yourself, while the model runs. `fe.intervene` calls an object of yours at the site of every block's
# contribution. It only looks, so the image must stay the same.

# %% exercise="contributions.meter"

# %% [markdown]
# Five prompts with eight seeds each, 4 steps: what does each block add to the image tokens, in the mean over all steps?

# %%
prompts = (prompt, "a green triangle above a yellow star", "an orange square below a purple circle",
           "a yellow circle right of a red triangle", "a blue star left of a green square")  # fmt: skip
if fe.passed("contributions.meter"):
    meter, latents = Meter(), []
    for p in prompts:
        with fe.intervene("single.*.contribution", meter):
            latents.append(pipe(p, seed=list(range(8)), steps=4, trajectory=False, progress=False).latents)
    plain = pipe(prompts[0], seed=list(range(8)), steps=4, trajectory=False, progress=False)
    course.compare("the latents with and without your meter", latents[0], plain.latents, within=1e-3)
    for name, size in meter.ranking():
        print(f"{name} adds {size:.1f}")

# %% [markdown]
# And what does the image need? You saw in notebook 05b that fewer images are right if one block is removed; here the
# claims say how much is lost. The same blocks, removed one at a time: 40 prompts about two shapes, each with its own
# seed, in 20 steps. The first number is the share of images in which everything is right; the second compares the share
# of right claims with that of the same images with all blocks (both with 95 % intervals).

# %%
blocks = evidence.load("blocks")
for name, row in blocks["removed"].items():
    if name in ("nothing", "another seed") or name.startswith("single"):
        claims = row["claims, compared with all blocks"]
        print(f"{name:12} right: {evidence.percent(row['everything right']):28} claims {100 * claims['value']:+.0f}",
              f"percentage points ({100 * claims['low']:+.0f} to {100 * claims['high']:+.0f})")  # fmt: skip
single = [name for name in blocks["removed"] if name.startswith("single")]
lost = {name: -blocks["removed"][name]["claims, compared with all blocks"]["value"] for name in single}
thirds = {name: blocks["sizes"][name].values() for name in single}
added_to_image = {name: sum(third["image"]["sum adds"]["value"] for third in thirds[name]) for name in single}
largest, most_needed = max(added_to_image, key=added_to_image.get), max(lost, key=lost.get)
print(f"{largest} adds most, and most claims are lost without {most_needed}")
removed.against("the block that adds most" if largest == most_needed else "another block")

# %% [markdown]
# The last block adds more than twice as much as any other, but more is lost without `single.2`, whose contribution is
# among the middle ones: 37 percentage points of the claims (28 to 46), against 14 without the last block (9 to 21). A
# large contribution is not the same as an important one: what is added late, or in a direction that the last layer does
# not read, changes little in the image.
#
# %% [markdown]
# ## The MLP after the attention
#
# In a double block the MLP reads what the attention has added, in a single block it does not. Does it matter? With the
# two parts of `linear2`, $W_a$ for the attention output $a$ and $W_h$ for the hidden layer, a single block computes
# (left), and the usual order would be (right)
#
# $$x + g \odot \left(W_a\, a(x) + W_h\, h(x)\right) \qquad\qquad x' + g \odot W_h\, h(x') \quad\text{with}\quad
# x' = x + g \odot W_a\, a(x)$$

# %% exercise="contributions.serial"

# %% [markdown]
# Run it inside the trained model, in place of all six single blocks:

# %%
if fe.passed("contributions.serial"):
    with fe.swap("single.*", MLPAfterAttention, pipe):
        out = pipe(prompt, seed=4, progress=False)
    change = float((out.latents - original.latents).norm() / original.latents.norm())
    print(f"with the MLP after the attention, the latent changes by {change:.1f} of its length")
    display(fe.plots.side_by_side(original.images[0], out.images[0], names=("in parallel", "MLP after attention")))

# %% [markdown]
# ## Break it
#
# The same for 40 prompts, together with other changes: no attention, no MLP, and other roles of the text. The last
# column is the distance of the final latent, relative to its length (median); another seed is at about 1.2.

# %%
parts = evidence.load("parts")
names = ["nothing", "another seed", *(name for name in parts if name.startswith("single: ") and "gate" not in name),
         "double: no attention to text"]  # fmt: skip
for name in names:
    row = parts[name]
    print(f"{name:38} right: {evidence.percent(row['everything right']):28}",
          f"latent {row['change of the latent']['value']:.2f}")  # fmt: skip


def half(name: str) -> str:
    return "more than half" if parts[name]["everything right"]["value"] > 0.5 else "fewer than half"


serial_effect.against(half("single: MLP after attention"))
text_held.against(half("single: text held in all blocks"))

# %%
changes = {
    "text held": fe.ablate("single.*", streams="txt"),
    "no attention to text, single": fe.ablate("single.*.attn.map", streams="txt", queries="img"),
    "no attention to text, double": fe.ablate("double.*.attn.map", streams="txt", queries="img"),
}
outs = [original]
for change in changes.values():
    with change:
        outs.append(pipe(prompt, seed=4, progress=False))
fig, axes = plt.subplots(1, 4, figsize=(7, 2.3), layout="constrained")
for ax, out, name in zip(axes, outs, ["original", *changes]):
    ax.imshow(out.images[0])
    ax.set_title(fill(name, 20), fontsize=9)
    ax.axis("off")
plt.show()

# %% [markdown]
# The weights were trained for attention and MLP in parallel, and almost no image is right with the usual order. This
# does not show that parallel is better: a network trained with the usual order would probably fail in the same way.
#
# Patches need the text in the single blocks: without it no image is right, whereas more than half are right without it
# in the double blocks. (There are six single blocks and two double blocks, so these lines do not compare one block with
# one block.) But the single blocks do not have to change the text: if the text tokens keep the values from the double
# blocks, as many images are right as before. In the last block the update has no effect at all, because the result is
# not used: after it the text tokens are discarded. FLUX computes them nevertheless.
#
# ## In five lines
#
# 1. A double block has 2.4 times as many weights; 38 of FLUX.1's 57 blocks are single.
# 2. In absolute terms, single blocks add about as much to text tokens as to image tokens; relative to the tokens' size,
#    they add less to the text, because text tokens are larger.
# 3. A large contribution is not the same as an important one.
# 4. In the miniature, patches must attend to the text in the single blocks, but these do not have to change the text.
# 5. The last block's update of the text is not used.
#
# **Questions people ask**: *Why do attention-map tools leave out the single blocks?* (attention-map-diffusers issues 15
# and 21) They do not have to: here `single.2.attn.map` is a site like any other, and the numbers above show that the
# text acts on the image mostly there. *Can blocks be left out to save time?* In the miniature not without a loss:
# without any one of its six single blocks, the share of right images falls from 92 % to 62 % or less.
#
# **Read**: *Scaling Vision Transformers to 22 Billion Parameters*, arXiv 2302.05442, section 2 (parallel layers) ·
# ours: `fluxedu/models/blocks.py`, `fluxedu/widgets/contributions.py`, `evidence/parts.py`.

# %%
fe.score()
