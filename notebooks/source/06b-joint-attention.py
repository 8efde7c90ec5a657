# %% [markdown]
# # 06b · Joint attention
#
# **Which tokens attend to which?** Text and image tokens have separate weights in FLUX's double blocks, but one common
# attention. You will join the two streams inside the trained model, compute exact attention maps, and hide tokens.
#
# Afterwards you can compute any part of an attention map, although PyTorch's fused attention never stores one, and say
# what you can and cannot conclude about padding.
#
# 60 minutes · needs notebook 06

# %%
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

import fluxedu as fe
from fluxedu import course, widgets
from fluxedu.course import evidence
from fluxedu.instruments import lenses
from fluxedu.models import attention as library
from fluxedu.models.attention import rotate

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square"
reference = pipe(prompt, seed=4, progress=False)
course.where(pipe, "double", "single")

# %% [markdown]
# *Padding* means the tokens that fill a short prompt up to 32 text tokens (512 in FLUX.1-dev). The 64 patches of an
# image come after them, so there are 96 tokens.
#
# ## Predict
#
# For the third question, a change of less than 1 % of the latent's length counts as 'not', and below 10 % as 'a
# little'. In the last one, we count how often everything is drawn right with a part of the prompt hidden.

# %%
map_size = fe.predict(
    "How many GB has the attention map of a block of FLUX.1-dev (24 heads, 4,608 tokens, 2 bytes a number)?", 1.02
)  # answer
padding_share = fe.predict(
    "23 of 96 tokens are padding. What percentage of the patches' attention do they get?", 9
)  # answer
padding_effect = fe.predict(
    "No token may attend to padding. How much does the final latent change: 'not', 'a little' or 'much'?", "much"
)  # answer
most_needed = fe.predict(
    "Which hidden part makes most images wrong: 'padding', 'relation' (“left of”) or 'first noun'?", "first noun"
)  # answer

# %% [markdown]
# ## Two streams, one attention
#
# In a double block, each stream has computed its queries, keys and values with weights of its own. With
# $[\cdot\,;\cdot]$ for joining the tokens, text first, and $R$ for the rotation of notebook 04, both streams share one
# softmax:
#
# $$Q = R\,[q^{\text{txt}};\, q^{\text{img}}], \quad K = R\,[k^{\text{txt}};\, k^{\text{img}}], \quad
# V = [v^{\text{txt}};\, v^{\text{img}}], \qquad O = \mathrm{softmax}\Big(\frac{Q K^\top}{\sqrt d}\Big) V$$

# %% exercise="attention.joint"

# %% [markdown]
# ## Put your code into the trained model
#
# `fe.intervene` calls a function at every site that matches (a *site* is a named point inside the model) and continues
# with its result. The first one only keeps the q, k, v and rotations that a double block has computed; the second one
# replaces the output of the block's heads by yours. (`q_norm` and `k_norm` are normalised, but not yet rotated.) The
# image must stay the same. The control leaves out the rotation.

# %%
inputs = {}


def keep(value, ctx):
    inputs[ctx.site] = value
    return value


def my_heads(apply_rope):
    def change(heads, ctx):
        block = ctx.site.removesuffix(".heads")
        rope = inputs[f"{block}.attn.rope"]
        txt, img = ([inputs[f"{block}.{s}_attn.{x}"] for x in ("q_norm", "k_norm", "v")] for s in ("txt", "img"))
        attn_out = torch.cat(joint(txt, img, lambda x: apply_rope(x, rope)), dim=1)  # [1, L + N, 160]
        return library.to_heads(attn_out, heads.shape[1])

    return change


if fe.passed("attention.joint"):
    watched, outs = ("double.*_attn.?_norm", "double.*_attn.v", "double.*.attn.rope"), []
    for apply_rope in (rotate, lambda x, rope: x):
        with fe.intervene(*watched, keep), fe.intervene("double.*.heads", my_heads(apply_rope)):
            outs.append(pipe(prompt, seed=4, progress=False).latents)
    course.compare("the latent with your attention and with the library's", outs[0], reference.latents, within=1e-3)
    change = float((outs[1] - reference.latents).norm() / reference.latents.norm())
    print(f"without the rotation the latent changes by {change:.0%}")

# %% [markdown]
# ## The attention map
#
# The *attention map* is the table of all weights, one row per query and one column per key.

# %% exercise="attention.map"

# %%
sites = ("q_norm", "k_norm", "attn.rope", "attn.q", "attn.k", "attn.map")
kernel_lse = []


def keep_lse(attn_map, ctx):
    kernel_lse.append(attn_map.lse.cpu())  # [1, 5, 96]
    return attn_map  # unchanged


with fe.record(*(f"single.2.{x}" for x in sites), steps=8) as rec, fe.intervene("single.2.attn.map", keep_lse, steps=8):
    pipe(prompt, seed=4, progress=False)
recorded = {x: rec[f"single.2.{x}"].tensor for x in sites}
if fe.passed("attention.map"):
    mine = attention_map(recorded["q_norm"].float(), recorded["k_norm"].float(), recorded["attn.rope"])
    course.compare("your map and the library's", mine, recorded["attn.map"])
map_size.against(round(24 * 4608**2 * 2 / 1e9, 2))

# %% [markdown]
# The fused kernel behind `F.scaled_dot_product_attention` never stores this map, because it would be too large. A
# single number per query, the **log-sum-exp** of its scores, is enough to compute any entry of it:
#
# $$\mathrm{lse}_i = \log \sum_{j} e^{q_i \cdot k_j / \sqrt d} \qquad P_{ij} = e^{q_i \cdot k_j / \sqrt d\, -\, \mathrm{lse}_i}$$
#
# The fused kernel returns this number beside its output: it is `lse` of the library's `AttentionMap`, which the cell
# above has kept.

# %%
# [1, 5, 96, 32] twice, [1, 5, 96, 96]; float32 in any model
q, k, attn_map = (recorded[f"attn.{x}"].float() for x in ("q", "k", "map"))
root, (lse,) = q.shape[-1] ** 0.5, kernel_lse
course.compare("the kernel's log-sum-exp and that of all scores", lse, (q @ k.transpose(-1, -2) / root).logsumexp(-1))

pieces = pipe.prompt_encoder.t5_tokenizer.pieces(prompt)
word = pieces.index("▁square")
column = (q @ k[:, :, word, :, None] / root)[..., 0] - lse  # [1, 5, 96]: one column of the map per head
print("tokens of the prompt:", *pieces)
course.compare(f"column {word} from the log-sum-exp, and that of the whole map", column.exp(), attn_map[..., word])
print(f"the rows sum to {attn_map.sum(-1).min():.3f} to {attn_map.sum(-1).max():.3f}")

# %% [markdown]
# ## See it
#
# The figure shows how much the patches attend to four words, block by block. Bright is much; each row has its own
# scale, up to the word's largest weight in any block. `lenses.word_maps` is a *lens*, a function that runs the model,
# records and measures one quantity.

# %%
words = ["red", "circle", "blue", "square"]
maps = lenses.word_maps(pipe, prompt, words, seed=4, progress=False)
fig = fe.plots.word_maps(maps, reference.images[0])
fig.suptitle("How much each patch attends to four words (seed 4)")
fig

# %% [markdown]
# Attention was never told which word belongs to which patch. (But for about the first four fifths of its training the
# network had a second task: a linear head, removed later, had to name the colour and form of the object in each patch
# from the image tokens after `single.2`; see `training/flow.py`. How FLUX.1 was trained is not published.) Do patches
# attend to the words that describe what they show? We take 40 short runs (5 prompts of this form, 8 seeds each), in
# which the first object is on the left and the second on the right. For each of their colours and nouns we ask how much
# of the patches' attention to the word comes from the half of the image that holds its object. If attention did not
# depend on the object, it would be 50 %.

# %%
pairs = [("green star", "red cross"), ("yellow ring", "blue circle")]
pairs += [("pink square", "red star"), ("blue ring", "red circle")]
five = [prompt] + [f"a {left_object} left of a {right_object}" for left_object, right_object in pairs]
prompts = [p for p in five for _ in range(8)]
with fe.record("*.attn.map", steps=2) as rec:
    pipe(prompts, seed=list(range(8)) * 5, steps=4, trajectory=False, progress=False)
blocks = {site.removesuffix(".attn.map"): rec[site].tensor[:, 0].mean(1)[:, 32:] for site in rec}  # each [40, 64, 96]
for block, weights in blocks.items():
    shares = []
    for one_prompt, weight in zip(prompts, weights):
        pieces = [piece.strip("▁") for piece in pipe.prompt_encoder.t5_tokenizer.pieces(one_prompt)]
        columns = [i for i, piece in enumerate(pieces) if len(piece) > 2 and piece not in ("left", "</s>")]  # 4 words
        from_left = weight[:, columns].unflatten(0, (8, 8))[:, :4].sum((0, 1)) / weight[:, columns].sum(0)  # [4]
        shares += [*from_left[:2].tolist(), *(1 - from_left[2:]).tolist()]
    low, middle, high = torch.tensor(shares).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    print(f"{block}: median {middle:.0%}; the middle 80 % of {len(shares)} words lie between {low:.0%} and {high:.0%}")

# %% [markdown]
# In double.1 to single.2, most of the attention to a word comes from the half of its object; in the other blocks little
# more than half of it. (That this ends after `single.2` may come from the second task.) Do the heads of a block agree?

# %%
gallery = lenses.head_gallery(pipe, prompt, (5, 5), at_step=8, seed=4, progress=False)
fig, axes = plt.subplots(2, 5, figsize=(8.4, 3.7), layout="constrained")
for row, block in zip(axes, ("double.0", "single.2")):
    for head, ax in enumerate(row):
        weights = gallery.tensor[gallery.coords["block"].index(block), head]
        ax.imshow(weights, cmap="magma", vmin=0)
        ax.plot(5, 5, "s", markersize=13, markerfacecolor="none", markeredgecolor="#56B4E9", markeredgewidth=2)
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"head {head}: {float(weights.sum()):.0%}", fontsize=9)
    row[0].set_ylabel(block)
fig.suptitle("For one and the same query (blue frame), each head attends to different patches")
plt.show()

# %% [markdown]
# Each map has its own brightness scale. The percentage is the head's attention to image tokens; the rest goes to text.
#
# Now explore it yourself. Left: how much the chosen patch attends to each other patch and, in the shades of the words,
# to each word. Right: which patches attend to the chosen word. You can change block, time and head.

# %%
widgets.attention(pipe, prompt, seed=4, progress=False)

# %% [markdown]
# ## Break it: hide tokens
#
# The prompt fills 9 of 32 text tokens. The rest is padding, and FLUX has no mask: tokens attend to padding as to any
# other token. How much? We take the maps of the 40 runs above.

# %%
parts = {"words and end token": slice(0, 9), "padding": slice(9, 32), "patches": slice(32, None)}
shares = {part: torch.stack([w[:, :, keys].sum(-1).mean(1) for w in blocks.values()]) for part, keys in parts.items()}
for part, share in shares.items():  # each [8 blocks, 40]
    low, middle, high = (100 * share.mean(0).quantile(level) for level in (0, 0.5, 1))
    print(f"{part:20} get {middle:2.0f} % of the patches' attention ({low:.0f} to {high:.0f} in 40 runs)")
padding_share.against(round(100 * float(shares["padding"].mean())))

fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
left = torch.zeros(len(blocks))
for (part, share), colour in zip(shares.items(), ("#0072B2", "#E69F00", "0.8")):
    ax.barh(list(blocks), 100 * share.mean(1), left=100 * left, color=colour, label=part)
    left = left + share.mean(1)
ax.invert_yaxis()
ax.set(xlabel="percentage of a patch's attention (mean of 40 runs)", xlim=(0, 100))
ax.set_title(f"Patches attend mostly to patches; padding gets {shares['padding'].mean():.0%} on average")
ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.25))
plt.show()

# %% exercise="attention.hide"

# %% [markdown]
# With a score of minus infinity, $e^{-\infty} = 0$ leaves the sum. All other weights of a row grow by the same factor:
#
# $$P'_{ij} = \frac{P_{ij}}{\sum_{j' \text{ not hidden}} P_{ij'}} \quad \text{if } j \text{ is not hidden, otherwise } 0$$
#
# Your function now acts in all blocks and steps of the trained model. The library's `fe.ablate` does the same.

# %%
hidden_tokens = {"padding": list(range(9, 32)), "“red”": [1], "“circle”": [2], "“left”": [3]}
hidden_tokens["all words"] = list(range(9))
if fe.passed("attention.hide"):
    outs, changes = [reference], {}
    for name, tokens in hidden_tokens.items():
        with fe.intervene("*.attn.scores", lambda scores, ctx: hide_keys(scores, tokens)):
            outs.append(pipe(prompt, seed=4, progress=False))
        changes[name] = float((outs[-1].latents - reference.latents).norm() / reference.latents.norm())
        print(f"{name:9} hidden: the latent changes by {changes[name]:.0%}")
    with fe.ablate("*.attn.map", tokens=hidden_tokens["padding"]):
        out = pipe(prompt, seed=4, progress=False)
    course.compare("padding hidden, by you and by the library", outs[1].latents, out.latents, within=1e-3)
    padding_effect.against("not" if changes["padding"] < 0.01 else "a little" if changes["padding"] < 0.1 else "much")

    fig, axes = plt.subplots(1, 6, figsize=(10, 2.3), layout="constrained")
    for ax, out, name in zip(axes, outs, ["unchanged", *hidden_tokens]):
        ax.imshow(out.images[0])
        ax.set_title(name if name == "unchanged" else f"{name} hidden", fontsize=9)
        ax.axis("off")
    fig.suptitle("Seed 4: with one of these words hidden, two objects are still drawn; with all words hidden, none")
    plt.show()

# %% [markdown]
# One image is an example, and the change of the latent includes the background, which this prompt leaves open. So here
# are 40 scenes of two shapes, each with its own seed, and what the judge finds (a program that recognises shapes and
# colours; the bars are 95 % intervals). Two controls are at the end: every sixth image token hidden (11, a few more
# than the prompt has text tokens), and CLIP's pooled vector exchanged for that of the empty prompt. The vector takes no
# part in attention, so no mask can hide what it knows. (A *claim* is one statement of the prompt, such as the colour of
# one shape. The column *claims* is the share of right claims minus the share with nothing hidden.)

# %%
hidden = evidence.load("hiding")
measures = ("first colour right", "first shape right", "relation right", "everything right")
fig, axes = plt.subplots(1, 4, figsize=(11, 3.3), layout="constrained", sharey=True)
for ax, measure in zip(axes, measures):
    evidence.plot(ax, {name: row[measure] for name, row in hidden.items()}, color="#0072B2")
    ax.set(title=measure, ylim=(-0.03, 1.03))
    ax.tick_params(axis="x", labelrotation=90, labelsize=8)
axes[0].set_ylabel("share of 40 images\nwith this claim right")
fig.suptitle("With a noun hidden, little more than half of the images are right; with all words hidden, none")
plt.show()
measures = ("second colour right", *measures)
print("hidden                ", " · ".join(measures), "· claims, compared with nothing hidden")
for name, row in hidden.items():
    print(f"{name:22}", " · ".join(f"{row[measure]['value']:4.0%}" for measure in measures),
          f"· claims {100 * row['claims, compared with nothing hidden']['value']:+4.1f} percentage points",
          "· latent changes by", evidence.number(row["change of the latent"]))  # fmt: skip
options = ("padding", "relation", "first noun")
most_needed.against(min(options, key=lambda name: hidden[name]["everything right"]["value"]))

# %% [markdown]
# With a colour word hidden, as many colours are right (98 % of the second colours with their word hidden and without);
# with the relation hidden, nearly as many relations. The likely reason: T5 has already put this information into the
# vectors of the nouns (notebook 13b tests it for the colour). With all words hidden but CLIP's vector kept, almost
# nothing is right. With CLIP's vector replaced and the words visible, the images are as good as before. With the first
# noun hidden, its shape is wrong in a third of the images and its colour in a tenth. “Everything right” also requires
# that no further object is drawn, so it can fall while more claims are right, as with the padding hidden.
#
# The run with seed 4 was an exception, and its prompt leaves the background open: there, hiding “left” changes the
# latent by half of its length; in the 40 scenes the median is 3 %. Nor is this change a good measure. It is larger with
# some *image* tokens hidden than with any single word hidden, and yet nearly all of those images are right: what
# changes is the background and exact positions and sizes.
#
# Padding is not empty: T5's padding tokens attended to the prompt as well, and the transformer was trained with them.
# But leave padding out when you draw maps of words: a large share of attention to it does not mean that it describes
# the object (arXiv 2501.06751).
#
# ## In five lines
#
# 1. Text and image have separate weights and share one softmax, text first.
# 2. q and k are rotated by their positions, v is not.
# 3. A row of the map belongs to a query and sums to 1; a column says who attends to a token.
# 4. With the log-sum-exp any part of the map can be computed exactly and cheaply.
# 5. Scores of minus infinity hide tokens. Hiding padding changes the latent, but usually the same objects are drawn.
#
# **Questions people ask**: *Why is there no padding mask?* The model was trained without one; above you saw that
# hiding the padding from joint attention changes the result. (flux pull requests 507, 511 and 512 propose another mask,
# inside the text encoders T5 and CLIP.) *How do I get attention maps
# without `output_attentions`?* (EraseAnything issue 2) `fe.record("*.attn.map", tokens=["red"], reduce="head-mean")`
# computes what it needs from the log-sum-exp, also in single-stream blocks, which some tools leave out
# (attention-map-diffusers issues 15 and 21). *Must the image be square?* (attention-map-diffusers issues 23 and 26) Not
# here. *Is the map exact in bfloat16, too?* Convert q and k to float32 before you multiply them: then the map is exact
# to 4 in 10 million, otherwise it is off by as much as 0.12 (measured outside this page).
#
# **Read**: text and image in one softmax, arXiv 2506.07986 · `black-forest-labs/flux`, `math.py` (`attention`) · ours:
# `fluxedu/models/attention.py` and `fluxedu/attention_map.py`.

# %%
fe.score()
