# %% [markdown]
# # 06 · Attention
#
# **Who looks at whom?** Attention is the only place where a patch hears of a word, of another patch, of anything but
# itself. You will write it with a softmax by hand, give it FLUX's QKNorm and its two streams, put your part into the
# trained model, and read exact maps out of a kernel that never writes one down.
#
# Afterwards you can say what each axis of q, k and v is, why no score of FLUX explodes, and what the padding is good
# for.
#
# 65 minutes · needs notebook 04

# %%
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course, widgets
from fluxedu.instruments import lenses
from fluxedu.models import attention as library
from fluxedu.models.attention import rotate

device = course.begin()
pipe = fe.load(device=device)
flux = pipe.flux
prompt = "a red circle left of a blue square"
picture = pipe(prompt, seed=4, progress=False)
course.where(pipe, "double", "single")

# %% [markdown]
# Every block has one attention, and text and image take part in it together: 32 text tokens and 64 patches here,
# 512 and 4,096 in FLUX.1-dev at 1024 × 1024.
#
# ## Predict

# %%
pads = fe.predict("which percent of the patches' attention goes to padding, 23 of the 96 tokens?", 8)  # answer
spread = fe.predict("queries and keys times 10: what does attention do? nothing / sharpen / widen", "nothing")  # answer
without = fe.predict("and if the QKNorm does not divide them? nothing / sharpen / widen", "sharpen")  # answer
hidden = fe.predict(
    "nobody may look at padding: the final latent moves by nothing / a little (below 10 %) / much", "much"
)  # answer

# %% [markdown]
# ## Build it
#
# A query is a question, a key says what a token has to offer, a value is what it hands over. The score of a query
# and a key is their product.

# %% exercise="attention.attend"

# %% [markdown]
# The root keeps the scores at one size: a product of two vectors of d random numbers has a spread of `sqrt(d)`.
# Without it the softmax of wide heads would nearly always pick a single token.

# %%
for d in (8, 32, 128):
    q, k = torch.randn(2, 20_000, d)
    products = (q * k).sum(-1)
    print(f"d = {d:3}: spread of q·k {products.std():3.0f}, divided by sqrt(d) {products.std() / d**0.5:.0f}")

# %% [markdown]
# Training can still make queries and keys long, and in large models it does, until the softmax picks one token
# everywhere and no gradient is left. FLUX takes the length away from every query and key before they meet.

# %% exercise="attention.qknorm"
# Source: arXiv 2302.05442, where a network of 22 billion parameters would not train without it.

# %%
qknorm_done = bool(passed)
with fe.record("double.1.img_attn.q", "double.1.img_attn.q_norm", steps=8) as rec:
    pipe(prompt, seed=4, progress=False)
before, after = (rec[f"double.1.img_attn.{name}"].tensor[0] for name in ("q", "q_norm"))  # [5, 64, 32]
scale = flux.double_blocks[1].img_attn.norm.query_norm.scale.detach().cpu()
sizes = before.square().mean(-1).sqrt(), (after / scale).square().mean(-1).sqrt()
print("queries:", list(before.shape), "= heads, patches, numbers of a head")
print("the longest is at least twice the shortest before:", bool(sizes[0].max() > 2 * sizes[0].min()))
print("after it, without the learned scale, all have size 1:", bool((sizes[1] - 1).abs().max() < 1e-3))

# %% [markdown]
# ### From tokens to heads
#
# One linear layer makes q, k and v of all heads at once. Most mistakes in attention are made in the next line, where
# the row is cut; every wrong cut has the right shape somewhere.

# %% exercise="attention.stream"

# %%
stream_done = bool(passed)
row = torch.arange(3 * 2 * 4)  # 3 D numbers of one token, with H = 2 and d = 4
q_row, k_row, v_row = row.unflatten(-1, (3, 2, -1))
print("of the row 0 ... 23, head 1 of k gets", k_row[1].tolist())

# %% [markdown]
# ### Two streams, one attention
#
# In a double-stream block text and image have weights of their own up to here. Now they meet. The turn of notebook 04
# comes from the library.

# %% exercise="attention.joint"

# %% [markdown]
# Yours against a block of the trained model: what went in, and what came out behind the heads.

# %%
streams = [f"double.1.{s}_attn.{x}" for s in ("txt", "img") for x in ("q_norm", "k_norm", "v")]
with fe.record(*streams, "double.1.heads", "double.1.attn.rope", steps=8) as rec:
    pipe(prompt, seed=4, progress=False)
txt, img = [rec[site].tensor for site in streams[:3]], [rec[site].tensor for site in streams[3:]]  # [1, 5, L or N, 32]
turns = rec["double.1.attn.rope"].tensor[0]  # complex [L + N, 16]
heads = rec["double.1.heads"].tensor  # [1, 5, L + N, 32]
print("text:", list(txt[0].shape), "· image:", list(img[0].shape), "· together:", list(heads.shape))
if passed:
    heard = torch.cat(joint(txt, img, lambda x: rotate(x, turns)), dim=1)  # [1, L + N, 160]
    theirs = library.merge_heads(heads)
    print("as in the block to 1 in 100,000:", bool((heard - theirs).norm() / theirs.norm() < 1e-5))

# %% [markdown]
# ## The map, exactly
#
# The fused kernel behind `F.scaled_dot_product_attention` never writes the table of weights down: a block of
# FLUX.1-dev has 24 heads of 4,608 × 4,608 numbers of 2 bytes, 1.02 GB. Some tools that draw attention maps compute it
# all a second time. There is no need. The kernel knows of every query one number, the **log-sum-exp** of its scores,
# and with it any single entry can be had alone:
#
# `P[i, j] = exp(q_i · k_j / sqrt(d) - lse_i)`

# %%
with fe.record("single.2.attn.q", "single.2.attn.k", "single.2.attn.map", steps=8) as rec:
    pipe(prompt, seed=4, progress=False)
# [1, 5, 96, 32] twice, [1, 5, 96, 96]; float32 in any model
q, k, whole = (rec[f"single.2.attn.{x}"].tensor.float() for x in ("q", "k", "map"))
root = q.shape[-1] ** 0.5
lse = (q @ k.transpose(-1, -2) / root).logsumexp(-1)  # [1, 5, 96]: what the kernel gives us for nothing

pieces = pipe.prompt_encoder.t5_tokenizer.pieces(prompt)
word = pieces.index("▁square")
column = (q @ k[:, :, word, :, None] / root)[..., 0] - lse  # [1, 5, 96], a column of every head
print("tokens of the prompt:", *pieces)
print(f"the column of word {word} as in the whole map:", bool((column.exp() - whole[..., word]).abs().max() < 1e-5))
print("every row sums to 1:", bool((whole.sum(-1) - 1).abs().max() < 1e-5))

# %% [markdown]
# ## See it
#
# What the patches take from four words, block by block. Padding is not a word, so it is left out.

# %%
words = ["red", "circle", "blue", "square"]
maps = lenses.word_maps(pipe, prompt, words, seed=4, progress=False)
fig = fe.plots.word_maps(maps, picture.images[0])
fig.suptitle("In the middle blocks a word is looked at from near its thing")
fig

# %% [markdown]
# Nobody taught the network where a circle is; only velocities were learned. Is the title true in numbers? Take the best
# block for each word, and look whether its strongest patch lies on the side of its thing: the circle is left, the
# square right.

# %%
for i, word in enumerate(words):
    best = int(maps.tensor[:, i].sum((-1, -2)).argmax())
    row, column = divmod(int(maps.tensor[best, i].argmax()), maps.shape[-1])
    half = "left half" if column < maps.shape[-1] / 2 else "right half"
    print(f"{word:7} {maps.coords['block'][best]:9} strongest in the", half)

# %%
gallery = lenses.head_gallery(pipe, prompt, (5, 5), at_step=8, seed=4, progress=False)
fig, axes = plt.subplots(2, min(5, flux.config.num_heads), figsize=(8.4, 3.7), layout="constrained")
for line, block in zip(axes, ("double.0", "single.2")):
    for head, ax in enumerate(line):
        looked = gallery.tensor[gallery.coords["block"].index(block), head]
        ax.imshow(looked, cmap="magma", vmin=0)
        ax.plot(5, 5, "s", markersize=13, markerfacecolor="none", markeredgecolor="#56B4E9", markeredgewidth=2)
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"head {head}: {float(looked.sum()):.0%}", fontsize=9)
    line[0].set_ylabel(block)
fig.suptitle("One patch asks (blue frame), and every head looks elsewhere")
plt.show()

# %% [markdown]
# Each map has its own brightness; the percentage is what the head gives to the picture, the rest goes to the text.
#
# Now point yourself. Left: what a patch looks at, and in the shade of the words what it takes from each. Right: who
# looks at the chosen word. Change block, time and head. Every row and column is computed when you ask for it, from q, k
# and the log-sum-exp.

# %%
widgets.attention(pipe, prompt, seed=4, progress=False)

# %% [markdown]
# ## Put yours into the trained model
#
# Your `SelfAttention` in both streams of every double block, your `QKNorm` in every block. The picture must stay.

# %%
if stream_done and qknorm_done:
    with fe.swap("double.*_attn", SelfAttention, flux), fe.swap("single.*.norm", QKNorm, flux):
        again = pipe(prompt, seed=4, progress=False)
    far = (again.latents - picture.latents).norm() / picture.latents.norm()
    print("the latent stays the same to 1 in 1,000:", bool(far < 1e-3))
else:
    print("solve the exercises above first; then run this cell again")

# %% [markdown]
# ## Break it: queries and keys ten times as long
#
# How widely a query looks is measured by the entropy of its row: 0 when it looks at one token, log 96 = 4.6 when at all
# 96 alike. One state of the run, the mean over all blocks, heads and queries. First the QKNorm as it is, then one that
# keeps the learned scale but does not divide.

# %%
from fluxedu.sampling.latents import image_ids, pack, text_ids

text = pipe.prompt_encoder([prompt])
ids = image_ids(*picture.latents.shape[-2:]).to(device), text_ids(text.txt.shape[1]).to(device)
strength, time = torch.tensor([pipe.defaults.guidance], device=device), picture.trajectory.times[8:9].to(device)


class NoDivision(nn.Module):
    """The learned scale of a QKNorm, and nothing else."""

    def __init__(self, old: nn.Module):
        super().__init__()
        self.query_norm, self.key_norm = old.query_norm, old.key_norm

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q * self.query_norm.scale, k * self.key_norm.scale


def entropy(factor):
    """The mean entropy of all attention rows at step 8, queries and keys being `factor` times as long."""
    lengthen = fe.intervene("double.*_attn.[qk]", "single.?.[qk]", lambda x, ctx: factor * x)
    with torch.no_grad(), lengthen, fe.record("*.attn.map", reduce="entropy") as rec:
        x = pack(picture.trajectory.latents[8]).to(device)
        flux(x, ids[0], text.txt, ids[1], time, text.pooled, strength)
    return sum(float(rec[site].tensor.mean()) for site in rec) / len(rec)


factors = (0.1, 0.3, 1.0, 3.0, 10.0)
normed = [entropy(f) for f in factors]
with fe.swap("*.norm", lambda old: NoDivision(old), flux):
    bare = [entropy(f) for f in factors]
for f, a, b in zip(factors, normed, bare):
    print(f"times {f:4}: entropy with QKNorm {a:.1f}, without {b:.1f}")


def word_for(change):
    return "nothing" if abs(change) < 0.05 else "sharpen" if change < 0 else "widen"


spread.against(word_for(normed[4] - normed[2]))
without.against(word_for(bare[4] - bare[2]))

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.semilogx(factors, normed, "o-", color="#0072B2", label="with QKNorm")
ax.semilogx(factors, bare, "s--", color="#D55E00", label="scale only, no division")
ax.set(xlabel="queries and keys times", ylabel="entropy of a row (nats)", ylim=(0, 4.8), xticks=factors)
ax.set_xticks(factors, [f"{f:g}" for f in factors])
ax.set_title("With QKNorm, longer queries and keys change nothing")
ax.legend()
plt.show()

# %% [markdown]
# Ten times both is a hundred times the score. Without the division the softmax then has a single winner in nearly every
# row. With it, length is no longer something a query or key can have; only the learned scale, one number a channel
# and the same for all tokens, sets how sharp attention is.
#
# ## Break it: hide the padding
#
# The prompt fills 9 of 32 text tokens. The rest is padding, and FLUX has no mask: padding is looked at like anything.

# %%
blocks = lenses.padding_mass(pipe, prompt, seed=4, progress=False)  # [8 blocks, 20 steps]
padding = blocks.tensor.mean(1)
spoken = lenses.attention_balance(pipe, prompt, seed=4, progress=False).tensor.mean(1) - padding
pads.against(round(100 * float(padding.mean())), within=0.25)

fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
left = torch.zeros(len(padding))
patches = 1 - spoken - padding
shares = (("words and end mark", spoken, "#0072B2"), ("padding", padding, "#E69F00"), ("patches", patches, "0.8"))
for name, part, look in shares:
    ax.barh(blocks.coords["block"], 100 * part, left=100 * left, color=look, label=name)
    left = left + part
ax.invert_yaxis()
ax.set(xlabel="percent of a patch's attention", xlim=(0, 100))
ax.set_title("Patches look mostly at patches, and in every block at padding too")
ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2))
plt.show()

# %% [markdown]
# Hide tokens from everyone: their columns of every map become 0, and each row is made whole again.

# %%
filling = list(range(len(pieces), text.txt.shape[1]))
hide = {"padding": filling, "“red”": ["red"], "“circle”": ["circle"], "“left”": ["left"]}
hide["all words"] = list(range(len(pieces)))
outs, far = [picture], {}
for name, tokens in hide.items():
    with fe.ablate("*.attn.map", tokens=tokens):
        outs.append(pipe(prompt, seed=4, progress=False))
    far[name] = float((outs[-1].latents - picture.latents).norm() / picture.latents.norm())
    print(f"{name:9} hidden: the latent moves by {far[name]:.0%}")
hidden.against("nothing" if far["padding"] < 0.01 else "a little" if far["padding"] < 0.1 else "much")

fig, axes = plt.subplots(1, 6, figsize=(10, 2.3), layout="constrained")
for ax, out, name in zip(axes, outs, ["as it is", *hide]):
    ax.imshow(out.images[0])
    ax.set_title(name if name == "as it is" else f"{name} hidden", fontsize=9)
    ax.axis("off")
fig.suptitle("One word hidden, the scene stays: T5 has told the other tokens of it")
plt.show()

# %% [markdown]
# Without “circle” the red thing is still a circle, only smaller. Without “left” it still lies left, but the background, of
# which the prompt says nothing, is another: that is most of the distance. With all words hidden the padding is still
# there, and it is not enough for a picture.
#
# So what is padding good for? It is no empty place: T5 let it read the prompt as well, and the transformer was trained
# with it. Hidden, the picture is still right, but its things have moved. When you draw maps of words, leave padding
# out, or its share will be taken for meaning (arXiv 2501.06751).
#
# ## In five lines
#
# 1. `softmax(q k^T / sqrt(d)) v`, in each head for itself; a row belongs to a query and sums to 1.
# 2. QKNorm: every query and key to root mean square 1, in float32, times a learned number a channel.
# 3. Text and image come with weights of their own and meet in one softmax, text first.
# 4. q and k are turned by their positions, v is not.
# 5. With the log-sum-exp any part of the map is exact and cheap.
#
# **People ask**: *why is there no padding mask?* (flux pull requests 507, 511 and 512 propose one.) The model was trained without one; above
# you saw what a mask does to a model that does not expect it. *How do I get attention maps; there is no
# `output_attentions`?* (EraseAnything issue 2)
# `fe.record("*.attn.map", tokens=["red"], reduce="head-mean")`: it takes what it needs from the log-sum-exp, in
# single-stream blocks too, which tools have left out (attention-map-diffusers issues 15 and 21). *Must
# the picture be square?* (attention-map-diffusers issues 23 and 26) Not here. *And in bfloat16?* Take q and k to float32
# before you multiply them: the map is then exact to 4 in 10 million, else off by as much as 0.12.
#
# **Read**: Attention Is All You Need, arXiv 1706.03762 · QKNorm at scale, arXiv 2302.05442 · text against image in one
# softmax, arXiv 2506.07986 · `black-forest-labs/flux`, `modules/layers.py` (`QKNorm`, `SelfAttention`) and `math.py`
# (`attention`) · ours: `fluxedu/models/attention.py` and `fluxedu/models/attention_map.py`.

# %%
fe.score()
