# %% [markdown]
# # 08 · The single-stream block
#
# **Why merge?** After the double blocks, FLUX lays text and image end to end and sends both through one set of
# weights, attention and MLP side by side. You will prove that its two wide matrices are the usual six in
# disguise, write the block, and put it into the trained model.
#
# Afterwards you can undo the fusion in either direction, say which half of a block did what, and say what the
# text is still there for.
#
# 55 minutes · needs notebook 07

# %%
import copy
from contextlib import ExitStack, contextmanager

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.models import FluxConfig
from fluxedu.models.attention import QKNorm, split_heads
from fluxedu.models.blocks import DoubleStreamBlock
from fluxedu.models.meta_init import meta_init
from fluxedu.models.modulation import Modulation, modulate, normalised
from fluxedu.models.attention import rotate
from fluxedu.models.blocks import SingleStreamBlock

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square"
picture = pipe(prompt, seed=4, progress=False)
course.where(pipe, "single")

# %% [markdown]
# FLUX.1 has 38 of these blocks behind its 19 double ones, the miniature six behind two.
#
# ## Predict

# %%
ratio = fe.predict("FLUX.1: how many times the weights of a single block has a double block?", 2.4)  # answer
last = fe.predict(
    "the text skips the last single block: the picture moves not (below 1 %) / a little (below 10 %) / much", "not"
)  # answer
needs = fe.predict("where does the image need to hear the text more? double / single", "single")  # answer
order = fe.predict("the MLP reads after the attention and not beside it: not / a little / much", "much")  # answer

# %% [markdown]
# ## Six matrices become two
#
# A transformer block usually multiplies by six matrices: q, k, v, the projection behind the attention, and the
# MLP's two. q, k, v and the first of the MLP's all read the same tokens here, so they can be one.

# %% exercise="single.fuse"

# %% [markdown]
# At the other end, `linear2` reads what attention and MLP have made, laid end to end. A product with a row of two
# parts is a sum of two products, so `linear2` holds two layers and the addition between them.

# %% exercise="single.split"

# %% [markdown]
# Try both on the trained block: take its matrices apart and put them together again.

# %%
config = pipe.flux.config
dim, hidden = config.hidden_size, config.mlp_hidden
block = pipe.flux.single_blocks[2]
print("linear1", tuple(block.linear1.weight.shape), "=", [dim, dim, dim, hidden], "rows that read", dim)
print("linear2", tuple(block.linear2.weight.shape), "=", dim, "rows that read", [dim, hidden])


def cut(linear: nn.Linear, sizes: list[int]) -> list[nn.Linear]:
    """A linear layer as several, by its rows."""
    parts = []
    for weight, bias in zip(linear.weight.split(sizes), linear.bias.split(sizes)):
        parts.append(nn.Linear(linear.in_features, len(weight)))
        parts[-1].weight.data, parts[-1].bias.data = weight, bias
    return parts


with torch.no_grad():
    x, heard, inner = (torch.randn(7, n).to(device, pipe.dtype) for n in (dim, dim, hidden))
    six = torch.cat([layer(x) for layer in cut(block.linear1, [dim, dim, dim, hidden])], dim=-1)
    print("one wide product is the four narrow ones:", torch.allclose(block.linear1(x), six, atol=1e-5))
    if passed:
        again = fuse(*cut(block.linear1, [dim, dim, dim, hidden]))
        print("cut and fused again, linear1 is the same to the bit:", torch.equal(again.weight, block.linear1.weight))
        proj, narrow = split(block.linear2, dim)
        both = proj(heard) + narrow(inner)
        whole = block.linear2(torch.cat([heard, inner], dim=-1))
        print("linear2 is two layers and a sum:", torch.allclose(whole, both, atol=1e-4))

# %% [markdown]
# So the fusion changes no number. It saves trips: a GPU is asked twice for a wide product instead of six times
# for a narrower one. What does change the function is that the MLP no longer reads what the attention has
# added: the two work **in parallel** on the same input (arXiv 2302.05442 does so in a vision transformer).
#
# ## Build it

# %% exercise="single.block"

# %% [markdown]
# Yours against the library's, with trained weights and the tokens of a real step:

# %%
names = ("single.2.x", "single.2.attn.rope", "single.2.norm", "single.2.modulated", "single.2.mlp_hidden", "vec")
with fe.record(*names, steps=10) as rec:
    pipe(prompt, seed=4, progress=False)
x, rope, normed, modulated, inner, vec = (rec[name].at(step=0).tensor.to(device)[None] for name in names)
rope = rope[None]  # [1, 1, L + N, d / 2]: the same for every head
words = pipe.prompt_encoder.t5_tokenizer.length
print("text and image as one:", tuple(x.shape), "of which", words, "are text")

with torch.no_grad():
    theirs = block(x, block.plan(vec), rope, words)
    if passed:
        mine = Block(dim, config.num_heads, hidden).to(device, pipe.dtype)
        mine.load_state_dict(block.state_dict())
        far = (mine(x, mine.plan(vec), rope) - theirs).norm() / theirs.norm()
        print("farthest from the library's below 1 in 100,000:", bool(far < 1e-5))

# %% [markdown]
# One more thing to settle. A common caption of the block's diagram says that in the single stream the MLP's modulation
# is not computed. There is one (shift, scale, gate) and not two, but the MLP does read modulated tokens, and its
# output does pass the gate: attention and MLP **share** the one modulation.

# %%
with torch.no_grad():
    print(
        "numbers a channel from vec: a double block",
        len(pipe.flux.double_blocks[0].img_mod.lin.bias) // dim,
        "a stream, a single block",
        len(block.modulation.lin.bias) // dim,
    )
    for name, y in {"modulated": modulated, "only normalised": normed}.items():
        made = F.gelu(block.linear1(y)[..., 3 * dim :], approximate="tanh")
        print(f"the MLP's hidden numbers come from the {name} tokens:", torch.allclose(made, inner, atol=1e-3))

# %% [markdown]
# ## What merging saves

# %%
with meta_init():  # names and shapes only
    dev = FluxConfig.variant("dev")
    double, single = (sum(p.numel() for p in kind(dev).parameters()) for kind in (DoubleStreamBlock, SingleStreamBlock))
print(f"double block {double:,} · single block {single:,}")
ratio.against(double / single)
print(f"FLUX.1's blocks: {(19 * double + 38 * single) / 1e9:.1f} B; all 57 of them double: {57 * double / 1e9:.1f} B")

# %% [markdown]
# ## See it
#
# You can cut `linear2` in two, so you know exactly what each half adds. Beside the size of the tokens it is added to:

# %%
from fluxedu.widgets.contributions import contributions, over_tokens, shares

sizes, given, _ = shares(pipe, prompt, seed=4, progress=False)
step, first = 10, config.depth
of = {"image": slice(words, None), "text": slice(0, words)}
share = {}  # [block, part] each, parts being attention, MLP, together
for name, tokens in of.items():
    added, there = given.tensor[first:, :, step], sizes.tensor[first:, step, None]
    share[name] = over_tokens(added, tokens) / over_tokens(there, tokens)

fig, axes = plt.subplots(1, 2, figsize=(8.4, 3), layout="constrained", sharey=True)
places = torch.arange(len(sizes.coords["block"]) - first)
for ax, (name, values) in zip(axes, share.items()):
    for i, (part, colour) in enumerate((("attention", "#0072B2"), ("MLP", "#D55E00"))):
        ax.bar(places + 0.36 * i - 0.18, 100 * values[:, i], 0.36, label=part, color=colour)
    ax.set_xlabel(f"single block, {name} tokens")
axes[0].set_ylabel("added, percent of the token")
axes[1].legend()
fig.suptitle("In every single block the image changes at least twice as much as the text", fontsize=11)
plt.show()
more = (share["image"] > share["text"])[:, 2]
print("in every single block the image changes more than the text:", bool(more.all()))
print("attention and MLP apart, at least twice as much:", bool((share["image"] >= 2 * share["text"])[:, :2].all()))

# %% [markdown]
# That is the use of merged weights here: the text changes much less. It is mostly a page that the image goes on reading.
# (Not only: hold the text still, and below the background turns out another.)
#
# The explorer shows all blocks and steps. Move over the table (Tab, then the arrow keys; or the mouse). Where do
# attention and MLP pull the same way, where do they work against each other, and where in the picture?

# %%
contributions(pipe, prompt, seed=4, progress=False)

# %% [markdown]
# ## Put yours into the trained model
#
# All six single blocks are now yours, with the trained weights. The picture must stay the same.

# %%
if passed:
    with fe.swap("single.*", lambda old: Block(dim, config.num_heads, hidden), pipe):
        again = pipe(prompt, seed=4, progress=False)
    far = (again.latents - picture.latents).norm() / picture.latents.norm()
    print("the latent stays the same to 1 in 1,000:", bool(far < 1e-3))
else:
    print("solve the exercises above first; then run this cell again")

# %% [markdown]
# ## Break it
#
# First a block with the same weights and the MLP behind the attention, as in a double block. Then the halves, cut out
# in turn. Then the text: it stands still, or the image does not hear it.

# %%
from fluxedu.instruments.interventions import ablate
from fluxedu.models.attention import attend, normed_qkv


class InTurn(SingleStreamBlock):
    """Attention first, then the MLP on what came of it."""

    def forward(self, x: Tensor, mods: Tensor, rope: Tensor, words: int = 0) -> Tensor:
        (mod,), d = self.modulation.split(mods), x.shape[-1]
        attn_weight, mlp_weight = self.linear2.weight[:, :d], self.linear2.weight[:, d:]
        qkv = self.linear1(modulate(normalised(x), mod.shift, mod.scale))[..., : 3 * d]
        qkv = normed_qkv(self.probe, self.norm, *split_heads(qkv, 3, self.num_heads))
        x = x + mod.gate * F.linear(attend(*qkv, rope, words, self), attn_weight, self.linear2.bias)
        inner = self.linear1(modulate(normalised(x), mod.shift, mod.scale))[..., 3 * d :]  # the new x
        return x + mod.gate * F.linear(F.gelu(inner, approximate="tanh"), mlp_weight)


@contextmanager
def without(columns: slice):
    """All single blocks with these columns of `linear2` at 0."""
    with ExitStack() as stack:
        for i, old in enumerate(pipe.flux.single_blocks):
            new = copy.deepcopy(old)
            new.linear2.weight.data[:, columns] = 0
            stack.enter_context(fe.swap(f"single.{i}", new, pipe))
        yield


def deaf(weights, ctx):
    """The image's patches look at no text."""
    seen = weights.weights().clone()  # [B, H, L + N, L + N], a row a query
    seen[..., ctx.places("img"), ctx.places("txt")] = 0
    return seen / seen.sum(-1, keepdim=True)


breaks = {
    "MLP after attention": fe.swap("single.*", lambda old: InTurn(config), pipe),
    "no attention": without(slice(0, dim)),
    "no MLP": without(slice(dim, None)),
    "text stands still in the last": ablate(f"single.{config.depth_single_blocks - 1}", streams="txt"),
    "text stands still in all six": ablate("single.*", streams="txt"),
    "image hears no text, single": fe.intervene("single.*.attn.map", deaf),
    "image hears no text, double": fe.intervene("double.*.attn.map", deaf),
}
outs, moves = [picture], {}
for name, change in breaks.items():
    with change:
        outs.append(pipe(prompt, seed=4, progress=False))
    moves[name] = float((outs[-1].latents - picture.latents).norm() / picture.latents.norm())
    print(f"{name:30} the latent moves by {moves[name]:.0%}")


def word(move: float) -> str:
    return "not" if move < 0.01 else "a little" if move < 0.1 else "much"


last.against(word(moves["text stands still in the last"]))
order.against(word(moves["MLP after attention"]))
needs.against("single" if moves["image hears no text, single"] > moves["image hears no text, double"] else "double")

# %%
from textwrap import fill

fig, axes = plt.subplots(2, 4, figsize=(8.4, 4.9), layout="constrained")
for ax, out, name in zip(axes.flat, outs, ["as it is", *breaks]):
    ax.imshow(out.images[0])
    ax.set_title(fill(name, 20), fontsize=9)
    ax.axis("off")
fig.suptitle("Six blocks deaf to the text: no shapes. Six that leave it alone: the shapes stay", fontsize=11)
plt.show()

# %% [markdown]
# The last block's text changes nothing at all, because nobody reads it: behind the last block the text's tokens are
# dropped. FLUX computes them all the same.
#
# Attention and MLP side by side is not the better or the worse design; these weights were trained for it. A network
# trained for the other order would be as badly off in this one.
#
# ## In five lines
#
# 1. A single block treats text and image as one sequence with one set of weights.
# 2. linear1 is q, k, v and the MLP's first layer; linear2 is the projection, the MLP's second, and their sum.
# 3. Attention and MLP read the same tokens and share one shift, one scale and one gate.
# 4. A double block has 2.4 times the weights; 38 of 57 blocks are single.
# 5. In the miniature's single blocks the text changes much less than the image, and is read all the more.
#
# **People ask**: *why do attention-map tools leave the single blocks out?* (attention-map-diffusers 15,
# 21). Here `single.2.attn.map` is a site like any other, and the last picture but one says what you would
# miss. *Why is it `linear1` in one file and `proj_mlp` in another?* (diffusers 10450) Because layouts fuse differently: the official one
# keeps the matrix whole, diffusers cuts it in four. Notebook 09 goes from one to the other.
#
# **Read**: *Scaling Vision Transformers to 22 Billion Parameters*, arXiv 2302.05442, section 2 (parallel layers,
# QKNorm) · `black-forest-labs/flux`, `modules/layers.py`, `SingleStreamBlock` · ours:
# `fluxedu/models/blocks.py`, 55 lines.

# %%
fe.score()
