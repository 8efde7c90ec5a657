# %% [markdown]
# # 13b · Removing and patching
#
# **Which part is needed, and which value decides?** Recording shows what a part computes. To find out what it is for,
# remove it, or replace its output with the one it had for another prompt. You will do both, and find out from which
# text token the colour of a shape is read, and in which block. The answer may surprise you.
#
# Afterwards you can run a patching experiment with its controls, and say what it does and does not show.
#
# 55 minutes · needs notebook 13

# %%
from collections.abc import Callable, Mapping, Sequence
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import fluxedu as fe
from fluxedu import course
from fluxedu.course import evidence
from fluxedu.course.two_shapes import PROMPTS, both_named
from fluxedu.instruments import lenses
from fluxedu.instruments.interventions import positions
from fluxedu.instruments.lenses.run import blocks_of
from fluxedu.nano.judge import detect
from fluxedu.widgets.bench import bench

device = course.begin()
pipe = fe.load(device=device)
blocks, txt_len = blocks_of(pipe), pipe.prompt_encoder.t5_tokenizer.length
course.where(pipe, "double", "single")

# %% [markdown]
# A *site* is a named point of the model at which a value can be replaced. The *judge* is a program that finds shapes
# and colours in an image by geometry. *Padding* means the tokens that fill a prompt up to a fixed length.
#
# ## Predict
#
# The second question is about pairs of prompts such as “a red circle left of a blue square” and “a green circle left of
# a blue square”. We run the second prompt, and replace some of its text tokens by those of a run of the first prompt
# from the same noise.

# %%
vital_block = fe.predict(
    "Which block is needed most: the 'first', one in the 'middle', or the 'last'?", "first"
)  # answer
last_block = fe.predict(
    "All text tokens are replaced before the last block. Is the circle 'red' or 'green'?", "green"
)  # answer

# %% [markdown]
# ## See it: remove a block
#
# *Ablation* removes a part. We leave out what one block adds, generate the image again, and measure how much the final
# latent $z$ changes, relative to its length:
#
# $$\frac{\lVert z' - z \rVert}{\lVert z \rVert}$$
#
# You saw in notebook 05b what the judge says about this; here all blocks are compared by the latent. In a second
# experiment we keep the block, but give all patches the same position in its RoPE (the rotation of queries and keys by
# position, notebook 04). Stable Flow calls the blocks that change the image most *vital* (arXiv 2411.14430); FreeFlux
# did something like the second experiment, by shifting positions (arXiv 2503.16153). `lenses.vital_layers` and
# `lenses.position_dependence` do the same. Five prompts, with a seed each, in four steps:

# %%
few = {"prompt": list(PROMPTS), "seed": [0, 1, 2, 3, 4], "steps": 4, "decode": False, "progress": False}
original = pipe(**few).latents.flatten(1)
same_position = positions(torch.zeros_like)  # ids [N, 3] -> ids


def median_change(intervention) -> float:
    with intervention:
        z = pipe(**few).latents.flatten(1)
    return float(((z - original).norm(dim=1) / original.norm(dim=1)).median())


without_block = [median_change(fe.ablate(block)) for block in blocks]
without_positions = [median_change(fe.intervene(f"{block}.attn.rope", same_position)) for block in blocks]
fig, ax = plt.subplots(figsize=(6.6, 2.6), layout="constrained")
x = np.arange(len(blocks))
ax.bar(x - 0.2, 100 * np.array(without_block), 0.4, color="#0072B2", label="without the block")
ax.bar(x + 0.2, 100 * np.array(without_positions), 0.4, color="#E69F00", label="all patches in one position")
ax.set_xticks(x, blocks, fontsize=8)
ax.set(xlabel="block", ylabel="change of the latent, %", title="Five images: the median change, not yet a ranking")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# Five images do not make a ranking, and a distance between latents mostly measures the background. The same ablations
# for 40 scenes with a seed each, in 20 steps, and what the judge says; the dashed lines are the controls, the image of
# another seed (left) and the complete network (right):

# %%
removed = evidence.load("blocks")["removed"]
rows = {block: removed[block] for block in removed if block not in ("nothing", "another seed")}
fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 2.8), layout="constrained")
evidence.plot(left, {block: row["change of the latent"] for block, row in rows.items()}, color="#0072B2")
left.axhline(removed["another seed"]["change of the latent"]["value"], color="0.5", ls="--")
left.set(ylabel="change of the latent", ylim=0, title="Without a block: the latent (median, 95 % interval)")
evidence.plot(right, {block: row["everything right"] for block, row in rows.items()}, color="#D55E00")
right.axhline(removed["nothing"]["everything right"]["value"], color="0.5", ls="--")
right.set(ylabel="images with everything right", ylim=(-0.02, 1.02), title="The judge; dashed: with all blocks")
for ax in (left, right):
    ax.tick_params(axis="x", labelsize=7)
plt.show()
for block, row in rows.items():
    claims = row["claims, compared with all blocks"]  # two colours, two shapes and a position per image
    print(f"without {block}: everything right in {evidence.percent(row['everything right'])}, claims",
          f"{100 * claims['value']:+.0f} percentage points",
          f"({100 * claims['low']:+.0f} to {100 * claims['high']:+.0f})")  # fmt: skip
right_without = [row["everything right"]["value"] for row in rows.values()]
worst = right_without.index(min(right_without))
vital_block.against("first" if worst == 0 else "last" if worst == len(rows) - 1 else "middle")

# %% [markdown]
# The first block matters most: without it 62 percentage points of the claims are lost, without `single.2`, the next,
# 37, and these intervals are far apart. The shares of images with everything right, 0 % and 5 %, cannot be told apart.
#
# Ablation has a weakness. A network that was never trained with a missing block may fail for that reason alone. A large
# change can mean “this block drew the circle” or just “the next block cannot process this input”.
#
# ## Build it: activation patching
#
# A more precise method: run both prompts. Then run the second prompt (the *target* run) again, but at one site replace
# some tokens by those of the first prompt's run (the *source* run). If the circle turns red, these tokens are
# *sufficient* to make it red. Each new value is one that the network computes for a real prompt, so it is less unusual
# than a zero; its combination with the other tokens is still new. With $x^T$ and $x^S$ for the values at the site in
# the target and the source run, and $P$ for the tokens that are patched,
#
# $$x_i = x^S_i \;\text{ for } i \in P, \qquad x_i = x^T_i \;\text{ for all other tokens.}$$

# %% exercise="inside.transplant"

# %% [markdown]
# Which tokens are sufficient, and until which block? That is one experiment for each site and each group of tokens.

# %% exercise="inside.patch_grid"

# %% [markdown]
# How much of the source run's image is recovered? A common measure projects the latent $z$ onto the straight line from
# the target run's latent $z_T$ to the source run's, $z_S$:
#
# $$r = \frac{\langle z - z_T,\; z_S - z_T \rangle}{\lVert z_S - z_T \rVert^2}$$

# %% exercise="inside.recovered"

# %% [markdown]
# ## Put your code into the trained model
#
# We take eight pairs of prompts, which differ in the colour of the first shape. In all of them the colour word is the
# text token 1, the noun is 2, and the second noun is 7. For each pair, `draw` runs the target prompt with your `change`
# at one site, and returns 1 if the first shape has the source's colour, and 0 if not. Control: the second noun.

# %%
pairs = [  # source and target colour of the first shape; first shape; the rest of the prompt
    ("red", "green", "circle", "left of a blue square"), ("green", "red", "circle", "left of a blue square"),
    ("yellow", "purple", "star", "right of a red ring"), ("purple", "yellow", "star", "right of a red ring"),
    ("blue", "pink", "triangle", "left of a green cross"), ("pink", "blue", "triangle", "left of a green cross"),
    ("cyan", "red", "square", "right of a yellow star"), ("red", "cyan", "square", "right of a yellow star"),
]  # fmt: skip
sources, targets = ([f"a {pair[k]} {pair[2]} {pair[3]}" for pair in pairs] for k in (0, 1))
run = {"steps": 6, "progress": False}
sites = ["double.0.txt", "single.2.x", "single.3.x"]
groups = {"colour": [1], "noun": [2], "second noun": [7]}


def takes_color(image, source: str, shape: int) -> bool:
    """Whether the first (0) or the second (1) shape has the colour of the source's first shape."""
    color, form = both_named(source)[0][0], both_named(source)[shape][1]
    return any((o.color, o.form) == (color, form) for o in detect(image).objects)


latents, other_shape = {}, {}  # of all experiments, by pair


def experiment(k: int) -> Callable:
    """The function `draw` for the pair k."""

    def draw(site: str, change: Callable[[Tensor, int], Tensor]) -> float:
        with fe.intervene(site, lambda x, ctx: change(x, ctx.step)):
            out = pipe(targets[k], seed=k, **run)
        latents[k].append(out.latents)
        other_shape[k].append(takes_color(out.images[0], sources[k], 1))
        return float(takes_color(out.images[0], sources[k], 0))

    return draw


folder = TemporaryDirectory(ignore_cleanup_errors=True)  # recorded to a folder: for FLUX.1-dev this is many gigabytes
with fe.record(*sites, to=f"{folder.name}/source") as recording:
    source_run = pipe(sources, seed=list(range(8)), **run)
target_run = pipe(targets, seed=list(range(8)), **run)


# %%
def grid_of(k: int) -> Tensor:
    """The results for the pair k: [site, group]."""
    latents[k], other_shape[k] = [], []
    values = {site: recording[site].tensor[k][:, None].to(device) for site in sites}  # [step, 1, token, channel]
    return patch_grid(experiment(k), values, sites, list(groups.values()))


if fe.passed("inside.transplant", "inside.patch_grid"):
    first_four = [grid_of(k) for k in range(4)]

# %%
if fe.passed("inside.transplant", "inside.patch_grid"):
    live = torch.stack(first_four + [grid_of(k) for k in range(4, 8)]).mean(dim=0)  # [site, group]
    print("the share of the eight pairs, patched at the input of the first double block:")
    for name, share in zip(groups, live[0].tolist()):
        print(f"{name:12} {share:4.0%}")
    unchanged = [takes_color(image, source, 0) for image, source in zip(target_run.images, sources)]
    print(f"control, nothing replaced: {sum(unchanged)} of 8 (one pair is 12 %)")

# %% [markdown]
# You saw in notebook 03b that T5 puts a shape's colour into the vector of its noun; here FLUX takes it from there. Two
# controls: how often the *second* shape takes the colour, in your experiments, and the stored results for 40 pairs of
# prompts, drawn at random, each with its own seed, with tokens replaced at T5's output.

# %%
stored = evidence.load("patching")
print("nothing replaced      ", evidence.percent(stored["nothing replaced"]))
for part, entry in stored["tokens"].items():
    print(f"{part:22}", evidence.percent(entry))

if fe.passed("inside.transplant", "inside.patch_grid"):
    control = torch.tensor([other_shape[k] for k in range(8)]).float().mean(dim=0).view_as(live)
    fig, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
    for ax, grid, title in zip(axes, (live, control), ("Your experiments: first shape", "Control: second shape")):
        ax.imshow(grid, vmin=0, vmax=1, aspect="auto")
        for (i, j), share in np.ndenumerate(grid.numpy()):
            ax.text(j, i, f"{share:.0%}", ha="center", va="center", color="white" if share < 0.6 else "black")
        ax.set_xticks(range(3), groups)
        ax.set_yticks(range(3), [site.rpartition(".")[0] for site in sites], fontsize=8)
        ax.set_title(title, fontsize=9)
    evidence.plot(axes[2], {part: stored["tokens"][f"first {part}"] for part in ("colour", "noun")} | {
        "second noun": stored["tokens"]["second noun"]})  # fmt: skip
    axes[2].set(ylim=(-0.03, 1.03), xlim=(-0.5, 2.5))
    axes[2].set_title("40 pairs: first shape, patched after T5", fontsize=9)
    fig.suptitle("How often a shape takes the source's colour when one token is patched", fontsize=10)
    plt.show()

# %% [markdown]
# So the token of the *noun* is sufficient, and the token of the colour word almost never is. T5 mixes the words of a
# prompt, and its token for *circle* contains the information that the circle is red. This is one reason why changing
# the token of one word, or hiding one word from attention, often has less effect than people expect.
#
# Now replace *all* text tokens, or all image tokens, as they enter each block:

# %%
fig, ax = plt.subplots(figsize=(6.6, 2.8), layout="constrained")
for stream, style in (("text", "o-"), ("image", "s-")):
    row = {block: entries[stream] for block, entries in stored["blocks"].items()}
    evidence.plot(ax, row, label=f"{stream} tokens patched", fmt=style)
ax.set(xlabel="patched at the input of this block", ylabel="first shape in the\nsource's colour", ylim=(-0.03, 1.03))
ax.tick_params(axis="x", labelsize=7)
ax.set_title("40 pairs: the colour passes from text to image tokens in single.0 to single.2")
ax.legend(fontsize=8, loc="center left")
plt.show()
for block, entries in stored["blocks"].items():
    print(f"{block}: text", evidence.percent(entries["text"]), "· image", evidence.percent(entries["image"]))
last_block.against("red" if list(stored["blocks"].values())[-1]["text"]["value"] > 0.5 else "green")

# %% [markdown]
# Replacing all text tokens works less and less often: in nearly all images at the first block, in half of them at
# `single.2`, in none at `single.3`. Replacing all image tokens works in at most one of 40 pairs up to `single.2`, and
# in nearly all from `single.3` on. So at the input of `single.2`, in half of the pairs neither stream alone is
# sufficient: the image tokens already contain part of the colour. (For late blocks, replacing image tokens must work,
# since the output is computed from them. Each step of the sampler starts again with the original text tokens.)
#
# Tokens that are *sufficient* do not have to be the only ones, and a whole stream contains more than the colour. This
# is the miniature, with prompts of one form, in eight steps (the stored results) or six (yours). And in the first part
# of its training a linear head, removed later, had to name the colour and form of the object in each patch from the
# image tokens after `single.2` (`training/flow.py`), so the colour had to be there. In FLUX.1 it may pass elsewhere.
#
# Is the recovered fraction of the latent a good measure, too?

# %%
if fe.passed("inside.transplant", "inside.patch_grid", "inside.recovered"):
    for g, (name, share) in enumerate(zip(groups, live[0].tolist())):
        z = torch.cat([latents[k][g] for k in range(len(pairs))])  # the first site's experiments
        r = recovered(z.float(), target_run.latents.float(), source_run.latents.float())
        low, median, high = (round(float(value), 2) + 0.0 for value in (r.min(), r.median(), r.max()))
        print(f"{name:12} recovered {median:4.0%} of the latent (median; {low:.0%} to {high:.0%}), "
              f"and the colour in {share:.0%} of the images")  # fmt: skip

# %% [markdown]
# The two measures do not have to agree. The fraction is computed from the whole latent, and most of that is background,
# about which the prompts say nothing.
#
# ### The explorer
#
# Here you can try all of this by hand: choose a block and what is done to it. Begin with a question, for example
# whether there is a block whose single heads can be removed without effect, but not the whole block. Guess the answer,
# and only then look.

# %%
bench(pipe, sources[0], targets[0], seed=4, progress=False)

# %% [markdown]
# ## Break it
#
# What breaks the image when it is hidden from attention? You saw in notebook 06b that hidden padding changes the
# latent; here is how much patches attend to it, block by block.

# %%
padding = lenses.padding_mass(pipe, list(PROMPTS), seed=[0, 1, 2, 3, 4], steps=4, progress=False)
share = padding.tensor.mean(dim=(0, 2))  # over images and steps: [block]
lengths = [len(pipe.prompt_encoder.t5_tokenizer.pieces(prompt)) for prompt in PROMPTS]
print(f"padding tokens: {txt_len - max(lengths)} or {txt_len - min(lengths)} of {txt_len} text tokens")
print(f"their share of the image's attention: {share.min():.0%} to {share.max():.0%}, depending on the block")

# %% [markdown]
# Now we hide one part after the other from all queries. Do not rank the parts by an experiment with one seed: the order
# of the distances changes with the seed. For 40 scenes of two shapes, each with its own seed, in 20 steps:

# %%
hidden = evidence.load("hiding")
print(f"{'hidden from attention':22} {'first colour right':27} {'first shape right':27} latent changes by")
for name, row in hidden.items():
    first_two = (evidence.percent(row[key]) for key in ("first colour right", "first shape right"))
    print(f"{name:22} " + " ".join(f"{text:27}" for text in first_two), evidence.number(row["change of the latent"]))

# %% [markdown]
# The noun matters: without it the first shape is right in about two of three images. The colour word does not, as the
# patching above suggests. Without padding the latent changes by almost as much as without the noun, and yet the shapes
# and colours stay right. Hiding every sixth image token changes the latent more than hiding any single part of the
# prompt, and yet not fewer claims are right.
#
# ## In five lines
#
# 1. Ablation shows what this trained network cannot do without, patching which values are sufficient.
# 2. In 40 pairs of prompts, the colour passes from text to image tokens in `single.0` to `single.2`: at the input of
#    `single.3`, only image tokens can be replaced to change it. (In the first part of the miniature's training, the
#    colour had to be in the image tokens there.)
# 3. T5 mixes words: its token for *circle* is sufficient to make the circle red, and the token for *red* is not.
# 4. A control belongs to every experiment: another token, the other object, another seed.
# 5. A distance between latents mostly measures the background. Ask the judge about what you claim, over many seeds.
#
# **Questions people ask**: *Is padding masked?* (flux pull requests 507, 511, 512) No, see above; arXiv 2501.06751
# measures its effect in the large models. *Is a patched run a real run of the model?* No. It combines values of two
# runs, so a positive result shows what is possible, and a negative one may only mean that the combination is unusual.
#
# **Read**: activation patching, arXiv 2202.05262 · Stable Flow, arXiv 2411.14430 · FreeFlux, arXiv 2503.16153 · Padding
# Tone, arXiv 2501.06751 · ours: `fluxedu/instruments/interventions.py`, `evidence/patching.py`.

# %%
fe.score()
