# %% [markdown]
# # 13 · Maps and lenses
#
# **What can you see inside the network?** The parts of a network have no labels. The first way to find out what a part
# does is to record its output. You will measure whether attention maps point at the right object, write a reduction of
# your own that runs inside the model, and look at the image that the network predicts after each block. Notebook 13b
# removes and replaces parts.
#
# Afterwards you can say how well an attention map localises an object, and write a reduction for the recorder.
#
# 60 minutes · needs notebooks 06 to 08 and 10

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import fluxedu as fe
from fluxedu import course
from fluxedu.course.two_shapes import FORTY, PROMPTS, number_right, rounded
from fluxedu.instruments import lenses
from fluxedu.instruments.lenses.run import blocks_of
from fluxedu.instruments.named import Named
from fluxedu.instruments.reductions import Value, to_named
from fluxedu.nano.exam import questions as exam_prompts
from fluxedu.nano.judge import detect
from fluxedu.nano.scenes import Scene, SceneObject, object_map

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square"
settings = {"seed": 4, "steps": 6, "progress": False}
original = pipe(prompt, **settings)
blocks, txt_len = blocks_of(pipe), pipe.prompt_encoder.t5_tokenizer.length
img_len = original.latents[0, 0].numel() // 4  # 64 image tokens
course.where(pipe, "double", "single")

# %% [markdown]
# A *site* is a named point of the model at which a value can be recorded or replaced. An *attention map* is the table
# of attention weights: one row per query, one column per key, and each row sums to 1. A *patch* is the area of one
# image token, 16 × 16 pixels. A *lens* is a function of `fluxedu.instruments.lenses` that runs the model, records and
# measures one quantity; `lenses.__all__` lists their names. The *judge* is a program that finds shapes and colours in
# an image by geometry.
#
# ## Predict

# %%
best_block = fe.predict(
    "A noun's map fits its object best in which block: 'the first', 'a middle one' or 'the last'?", "a middle one"
)  # answer
largest_value = fe.predict(
    "At the input of the last block, how many times as large as the median is the largest value (both without signs)?",
    120,
)  # answer
massive_tokens = fe.predict(
    "The largest numbers are all in one channel. In which tokens is it large: 'one token', 'most text tokens' or 'most "
    "image tokens'?",
    "most text tokens",
)  # answer

# %% [markdown]
# ## Build it
#
# ### Do patches attend to the word for the object that they show?
#
# `fe.record` only observes: it stores the values at a site. Here it stores, for every patch, how much of its attention
# goes to each of two words, averaged over heads, in the later steps.

# %%
with fe.record("*.attn.map", tokens=["circle", "square"], reduce="head-mean", steps=slice(3, None)) as rec:
    out = pipe(prompt, **settings)
print(rec["double.0.attn.map"])
print(f"with recording, the latent differs by at most {float((out.latents - original.latents).abs().max()):g}")

# %% [markdown]
# A bright map proves nothing: you see a circle in it because you know that there is one. So we measure. We take twelve
# prompts of the miniature's exam, which were never used in training; `claim` lists the objects that such a prompt
# names. For every noun, we compare where its map is bright with where the judge finds the object. `coverage` is the
# fraction of each patch that the object covers.


# %%
def coverage_of(found, rows, columns):
    """The fraction of each patch that a detected object covers: [rows, columns]."""
    item = SceneObject(found.form, found.color, found.size, found.x, found.y, found.radius)
    covered = object_map(Scene("white", (item,), 16 * rows, 16 * columns)) >= 0  # [16 rows, 16 columns], pixels
    return torch.tensor(covered.reshape(rows, 16, columns, 16).mean((1, 3))).float()


maps, coverages = [], []
for q in [q for q in exam_prompts(100) if len(q.claim.objects) > 1][:12]:
    names = [form for _, form, _ in q.claim.objects]
    size_and_seed = {"seed": q.seed, "height": q.size[0], "width": q.size[1], "steps": 8, "progress": False}
    with fe.record("sample.image") as rec:
        word_maps = lenses.word_maps(pipe, q.prompt, names, at_steps=slice(3, None), **size_and_seed)
    pixels = rec["sample.image"].tensor.float().permute(1, 2, 0)  # [H, W, 3]
    objects = detect(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()).objects
    for i, (color, form, _) in enumerate(q.claim.objects):
        found = [o for o in objects if (o.color, o.form) == (color, form)]
        if len(found) == 1:  # the object was drawn, once
            maps.append(word_maps.tensor[:, i])  # [block, row, column]
            coverages.append(coverage_of(found[0], *word_maps.shape[2:]))
print(len(maps), "nouns to measure")

# %% exercise="inside.points"

# %% [markdown]
# The *intersection over union* (IoU) of two sets is the number of elements that they share, divided by the number of
# elements in either of them:
#
# $$\mathrm{IoU}(A, B) = \frac{|A \cap B|}{|A \cup B|}$$

# %% exercise="inside.iou"
# Both thresholds, half of the peak and 0.15, are conventions. State them whenever you report an IoU of attention maps.

# %% [markdown]
# ## See it

# %%
if fe.passed("inside.points", "inside.iou") and maps:
    # your functions get one map per block instead of one per word: [block, row, column]
    hits = torch.stack([points(m, c.expand_as(m)) for m, c in zip(maps, coverages)]).mean(0)  # [block]
    overlap = torch.stack([iou(m, c.expand_as(m)) for m, c in zip(maps, coverages)]).mean(0)
    chance = torch.stack([(c > 0.1).float().mean() for c in coverages]).mean()
    best = int(overlap.argmax())
    fig, ax = plt.subplots(figsize=(6.6, 2.8), layout="constrained")
    ax.plot(100 * hits, "o-", color="#0072B2", label="brightest patch on the object")
    ax.plot(100 * overlap, "s-", color="#D55E00", label="overlap (IoU)")
    ax.axhline(100 * chance, color="0.5", ls="--", label="a random patch (for the brightest patch)")
    ax.set_xticks(range(len(blocks)), blocks, fontsize=8, rotation=30)
    ax.set(ylabel="percent", ylim=(0, 105), xlabel="block")
    three = overlap.topk(3).indices.sort().values.tolist()  # the three best blocks, in the order of the network
    ax.set_title(
        f"{len(maps)} nouns: best overlap in {', '.join(blocks[i] for i in three)} "
        f"(IoU {overlap[three].min():.2f} to {overlap[three].max():.2f})",
        fontsize=10,
    )
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.show()
    names = ["a middle one"] * len(blocks)
    names[0], names[-1] = "the first", "the last"
    print(
        f"{len(maps)} nouns: the brightest patch is on the object in {hits.min():.0%} to {hits.max():.0%} of them, "
        f"depending on the block; by chance in {chance:.0%}"
    )
    best_block.against(names[best])

# %% [markdown]
# A map that points at the object does not show that the network *uses* this attention. And blocks differ: the average
# map over all blocks, which many tools show, mixes maps that point at the object with maps that do not. That the good
# blocks end with `single.2` may come from our training: at first a linear head, removed later, had to name each patch's
# object from the image tokens after `single.2` (`training/flow.py`). In FLUX.1 other blocks may be best.
#
# ## Put your code into the trained model
#
# A whole map has 96 × 96 numbers per head here; in FLUX.1 it has 24 × 4,608 × 4,608 numbers of 2 bytes, one gigabyte
# per block. So the recorder can *reduce* a value as soon as it is computed, that is, store a smaller result in its
# place. You have used the reduction `"head-mean"`; now write one yourself, which runs inside the model. It counts the
# tokens that a head attends to, by the entropy of each row $p$ of the map:
#
# $$n = \exp\Bigl( -\sum_j p_j \log p_j \Bigr)$$
#
# For $p = (1, 0, 0, \ldots)$ this is 1, and for $n$ equal weights $1/n$ it is $\exp(\log n) = n$.

# %% exercise="inside.spread"

# %%
if fe.passed("inside.spread"):
    mine, exact = (fe.record("*.attn.map", reduce=how, steps=3) for how in (spread, "entropy"))
    with mine, exact:
        pipe(prompt, **settings)
    name = "single.0.attn.map"
    # yours computes the whole map, the library's does not
    course.compare("your reduction and the library's", mine[name].tensor, exact[name].tensor.exp(), within=1e-3)
    counts = torch.stack([mine[f"{b}.attn.map"].tensor[0, :, txt_len:].mean(-1) for b in blocks])  # [block, head]
    fig, ax = plt.subplots(figsize=(6.6, 2.6), layout="constrained")
    image = ax.imshow(counts.T, cmap="viridis", vmin=1, vmax=txt_len + img_len, aspect="auto")
    for (i, j), count in np.ndenumerate(counts.numpy()):
        ax.text(i, j, f"{count:.0f}", ha="center", va="center", color="white" if count < 55 else "black", fontsize=8)
    ax.set_xticks(range(len(blocks)), blocks, fontsize=8)
    ax.set(ylabel="head", xlabel="block")
    ax.set_title(
        f"Heads attend to {counts.min():.0f} to {counts.max():.0f} of {txt_len + img_len} tokens (mean over patches)"
    )
    fig.colorbar(image, label="tokens")
    plt.show()

# %% [markdown]
# ## The predicted image after each block
#
# The last layer turns image tokens into a velocity $v$, and a velocity implies a final image, the *predicted x0*
# (notebook 10):
#
# $$\hat{x}_0 = x_t - t\,v$$
#
# We can apply the last layer after *every* block, not only after the last one. This is our
# adaptation of the *logit lens*, which applies a language model's last layer to the output of each block.

# %%
# one latent per block: [block, step, channel, row, column]
predicted_x0 = lenses.x0_by_block(pipe, prompt, at_steps=4, **settings)
fig, axes = plt.subplots(1, len(blocks), figsize=(10, 1.7), layout="constrained")
for ax, block, latent in zip(axes, blocks, predicted_x0.tensor[:, 0]):
    with torch.no_grad():
        pixels = pipe.autoencoder.decode(latent[None].to(device, pipe.dtype))[0].float().cpu()
    ax.imshow((pixels.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0))
    ax.set(xticks=[], yticks=[])
    ax.set_title(block, fontsize=9)
time = predicted_x0.coords["step"][0]
fig.suptitle(f"The predicted x0 becomes clearer from block to block (t = {time:.1f})", fontsize=11)
plt.show()

# %% [markdown]
# The last layer was trained on the output of the last block only, so the images for early blocks are a rough guess.
#
# ## Break it
#
# Networks of this kind have *massive activations*, values that are far larger than nearly all others (arXiv
# 2510.11538). We look for the largest value after each block in ten runs, two seeds for each of five prompts.

# %%
runs = lenses.massive_activations(
    pipe, [*PROMPTS, *PROMPTS], at_step=3, seed=list(range(10)), steps=6, progress=False
).tensor  # [run, block, what]
ratio = runs[:, :, 0] / runs[:, :, 1]  # largest value divided by the median: [run, block]
fig, ax = plt.subplots(figsize=(6.6, 2.5), layout="constrained")
ax.semilogy(ratio.T, "o-", color="#D55E00", alpha=0.4)
ax.set_xticks(range(len(blocks)), blocks, fontsize=8)
ax.set(xlabel="after this block", ylabel="largest / median", ylim=(10, None))
ax.set_title(f"Ten runs: before the last block the largest value is {ratio[:, -2].median():.0f} times the median")
plt.show()
largest_value.against(float(ratio[:, -2].median()))

channels = runs[:, -2, 3].int().tolist()
massive = max(channels, key=channels.count)
print("index of the channel:", sorted(set(channels)))

before_last = f"{blocks[-2]}.out"
with fe.record(before_last, steps=3) as rec:
    pipe([*PROMPTS, *PROMPTS], seed=list(range(10)), steps=6, decode=False, progress=False)
large = rec[before_last].tensor.flatten(0, -3)[..., massive].abs() > 100  # [run, token]
length = torch.tensor([[len(pipe.prompt_encoder.t5_tokenizer.pieces(text))] for text in [*PROMPTS, *PROMPTS]])
token = torch.arange(large.shape[1]).expand_as(large)
kinds = {
    "words": token < length - 1,
    "the end token and padding": (token >= length - 1) & (token < txt_len),
    "image tokens": token >= txt_len,
}
for kind, mask in kinds.items():
    print(f"{kind}: the channel is above 100 in {large[mask].float().mean():.0%}")
print("in the first prompt:", dict(zip(pipe.prompt_encoder.t5_tokenizer.pieces(PROMPTS[0]), large[0].tolist())))
in_text, in_image = (float(large[:, part].float().mean()) for part in (slice(txt_len), slice(txt_len, None)))
massive_tokens.against("most text tokens" if in_text > 0.5 else "most image tokens" if in_image > 0.5 else "one token")

# %% [markdown]
# It is the same channel in all ten runs, and it is large in most text tokens: in padding (which fills a prompt up to a
# fixed length), in the end token and in about half of the words (in the first prompt an article, “left” and “of”, but
# not colours and nouns). We measure before the last block, because text tokens are discarded after it.
#
# Is the channel needed? The ratio jumps after `single.0` (figure), so we set it to 0 in all text tokens at the input of
# `single.1`, at every step. The control does this to the next channel. Five prompts with eight seeds each, in eight
# steps; the distance is that of the final latent, divided by the latent's length. Counts are given as ranges, because
# rounding on another machine can change one image.


# %%
def without(channel: int):
    """An intervention that sets one channel to 0, in all text tokens."""

    def change(x: Tensor, ctx) -> Tensor:
        new = x.clone()
        new[:, :txt_len, channel] = 0
        return new

    return fe.intervene("single.1.x", change)


normal = pipe(**FORTY, steps=8, progress=False)

# %%
for name, channel in (("the massive channel", massive), ("the next channel (control)", massive + 1)):
    with without(channel):
        out = pipe(**FORTY, steps=8, progress=False)
    change = (out.latents - normal.latents).flatten(1).norm(dim=1) / normal.latents.flatten(1).norm(dim=1)
    low, median, high = (float(change.quantile(share)) for share in (0.1, 0.5, 0.9))
    print(f"without {name}: the latent changes by {median:.0%} (median; 8 of 10 images: {low:.0%} to {high:.0%})")
    right = [rounded(number_right(images, FORTY["prompt"])) for images in (normal.images, out.images)]
    print(f"images with both objects and nothing else: {right[0]} normally, {right[1]} without it")

# %% [markdown]
# The channel has an effect: without it the latent changes several times as much as in the control. But nearly all
# images still show both objects, so the change lies in what the judge does not check. The size of a value does not tell
# you what it is for; you have to change it and look at the effect, by more than one measure, as notebook 13b does.
#
# ## In five lines
#
# 1. Recording shows what a part computes, and never changes the image. It does not show what the part is needed for.
# 2. An attention map is a claim about positions, so compare it with the object's position: pointing and IoU, per block.
# 3. A reduction makes a recording small while it is made; the exponential of the entropy counts tokens.
# 4. The last layer, applied after each block, shows how the predicted image becomes clearer.
# 5. Massive activations: here one channel, the same in all ten runs, is large in most text tokens.
#
# **Questions people ask**: *How do I get attention maps without `output_attentions`?* (EraseAnything issue 2) Use
# `fe.record("*.attn.map", ...)`: maps are computed exactly, and only where you ask for them, from queries, keys and the
# fused kernel's log-sum-exp. *Why are my maps black, and why are the single blocks missing?* (attention-map-diffusers
# issues 27, 15 and 21) These tools replace another library's attention; here every block has its own site. *Do hooks
# work with `torch.compile`?* (pytorch issue 117758) A module hook that is added later is silently ignored. A site is
# not, because recording switches compiled code off while it lasts.
#
# **Read**: Massive activations, arXiv 2510.11538 · `black-forest-labs/flux`, `modules/layers.py` (the values that can
# be recorded) · ours: `fluxedu/instruments/`, begin with `recorder.py`.

# %%
fe.score()
