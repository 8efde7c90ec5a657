# %% [markdown]
# # 08 · The single-stream block
#
# **Why merge the streams?** After its double-stream blocks (notebook 07), FLUX concatenates text and image tokens into
# one sequence and processes both with one set of weights; attention and MLP run in parallel. In this notebook you will
# show that the block's two wide matrices are the usual six in a different arrangement, write the block, and put it into
# the trained model.
#
# Afterwards you can split the two wide matrices and put them together again, measure what attention and MLP each
# contribute, and say what the text tokens are needed for in these blocks.
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
from fluxedu.course import evidence
from fluxedu.models import FluxConfig
from fluxedu.models.attention import QKNorm, rotate, split_heads
from fluxedu.models.blocks import DoubleStreamBlock, SingleStreamBlock
from fluxedu.models.meta_init import meta_init
from fluxedu.models.modulation import Modulation

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square"
original = pipe(prompt, seed=4, progress=False)
course.where(pipe, "single")


def relative_change(out) -> float:
    """The distance of a run's final latent from the original one, divided by the length of the original."""
    return float((out.latents - original.latents).norm() / original.latents.norm())


# %% [markdown]
# FLUX.1 has 38 single-stream blocks after its 19 double-stream blocks. The miniature has six after two.
#
# ## Predict
#
# We call a change of the final latent “none” if it is below 1 % of the latent's length, “small” below 10 %, and “large”
# otherwise.

# %%
weights_ratio = fe.predict(
    "How many times as many weights as a single block does a double block of FLUX.1 have?", 2.4
)  # answer
last_update = fe.predict(
    "The last single block does not update the text tokens. How large is the change? none / small / large", "none"
)  # answer
text_needed = fe.predict(
    "In which blocks is the change larger if patches may not attend to text? double / single", "single"
)  # answer
serial_effect = fe.predict(
    "The MLP runs after the attention, not in parallel. How large is the change? none / small / large", "large"
)  # answer

# %% [markdown]
# ## Six matrices become two
#
# A transformer block usually multiplies by six matrices: those for queries, keys and values (q, k, v), the output
# projection of the attention, and the two of the MLP (two linear layers with an activation function in between). Here
# q, k, v and the first layer of the MLP all read the same tokens, so these four can be one layer, `linear1`.

# %% exercise="single.fuse"

# %% [markdown]
# `linear2` reads the attention output and the MLP's hidden layer, concatenated. For a concatenated input, a matrix
# product is the sum of two smaller products:
#
# $$W_2 \begin{bmatrix} a \\ h \end{bmatrix} = W_a\, a + W_h\, h \qquad \text{with} \qquad W_2 = [\,W_a \;\; W_h\,]$$
#
# So `linear2` contains two layers, and adds their outputs.

# %% exercise="single.split"

# %% [markdown]
# Try both on a trained block: split its matrices and fuse them again.

# %%
config = pipe.flux.config
dim, mlp_hidden = config.hidden_size, config.mlp_hidden
block = pipe.flux.single_blocks[2]
print("linear1", tuple(block.linear1.weight.shape), "=", [dim, dim, dim, mlp_hidden], "outputs,", dim, "inputs")
print("linear2", tuple(block.linear2.weight.shape), "=", dim, "outputs,", [dim, mlp_hidden], "inputs")


def split_rows(linear: nn.Linear, sizes: list[int]) -> list[nn.Linear]:
    """Several linear layers, each with some of the outputs of `linear`."""
    layers = []
    for weight, bias in zip(linear.weight.split(sizes), linear.bias.split(sizes)):
        layer = nn.Linear(linear.in_features, len(weight))
        layer.weight.data, layer.bias.data = weight, bias
        layers.append(layer)
    return layers


with torch.no_grad():
    x, attn_out, hidden = (torch.randn(7, n).to(device, pipe.dtype) for n in (dim, dim, mlp_hidden))
    q_k_v_mlp = split_rows(block.linear1, [dim, dim, dim, mlp_hidden])
    separate = torch.cat([layer(x) for layer in q_k_v_mlp], dim=-1)
    course.compare("linear1 and four separate layers", block.linear1(x), separate)
    if fe.passed("single.fuse", "single.split"):
        fused = fuse(*q_k_v_mlp)
        differing = int((fused.weight != block.linear1.weight).sum())
        print("weights of linear1 that splitting and fusing have changed:", differing, "of", fused.weight.numel())
        attn_proj, mlp_proj = split(block.linear2, dim)
        separate = attn_proj(attn_out) + mlp_proj(hidden)
        fused = block.linear2(torch.cat([attn_out, hidden], dim=-1))
        course.compare("linear2 and the sum of two layers", fused, separate)

# %% [markdown]
# Fusing matrices does not change the result. It saves overhead: a GPU computes two wide products instead of six narrow
# ones. Another difference from a usual block does change the result: the MLP does not read the output of the attention.
# Both run **in parallel** on the same input (arXiv 2302.05442 does this in a vision transformer). With shift, scale and
# gate from the modulation, and LN for layer normalisation, the block computes
#
# $$y = (1 + \text{scale}) \cdot \mathrm{LN}(x) + \text{shift}, \qquad
# x' = x + \text{gate} \cdot W_2\,[\,\mathrm{attention}(y),\; \mathrm{GELU}(W_1\, y)\,]$$
#
# where $W_1$ are the rows of `linear1` that compute the MLP's hidden layer; biases are left out.
#
# ## Build it
#
# Two more parts return from earlier notebooks: *QKNorm* normalises the queries and keys of each head (notebook 06), and
# *RoPE* rotates them by angles that depend on their positions (notebook 04).

# %% exercise="single.block"

# %% [markdown]
# Compare your block with the library's, using trained weights and the tokens of a real step. `fe.record` stores the
# values at named points of the model, called *sites*:

# %%
names = ("single.2.x", "single.2.attn.rope", "single.2.norm", "single.2.modulated", "single.2.mlp_hidden", "vec")
with fe.record(*names, steps=10) as rec:
    pipe(prompt, seed=4, progress=False)
x, rope, normed, modulated, hidden, vec = (rec[name].at(step=0).tensor.to(device)[None] for name in names)
rope = rope[None]  # [1, 1, L + N, d / 2]: the same for every head
txt_len = pipe.prompt_encoder.t5_tokenizer.length
print("one sequence of text and image tokens:", tuple(x.shape), "of which", txt_len, "are text")

with torch.no_grad():
    expected = block(x, block.plan(vec), rope, txt_len)
    if fe.passed("single.block"):
        my_block = Block(dim, config.num_heads, mlp_hidden).to(device, pipe.dtype)
        my_block.load_state_dict(block.state_dict())
        course.compare("your block and the library's", my_block(x, my_block.plan(vec), rope), expected)

# %% [markdown]
# A common misunderstanding: a diagram of the block that is often copied says that the modulation of the MLP is not
# computed in the single stream. There is one (shift, scale, gate) and not two, but the MLP does read modulated tokens,
# and its output is multiplied by the gate: attention and MLP **share** one modulation.

# %%
with torch.no_grad():
    per_stream = len(pipe.flux.double_blocks[0].img_mod.lin.bias) // dim
    per_block = len(block.modulation.lin.bias) // dim
    print("modulation vectors:", per_stream, "per stream of a double block,", per_block, "per single block")
    for name, y in {"modulated": modulated, "only normalised": normed}.items():
        computed = F.gelu(block.linear1(y)[..., 3 * dim :], approximate="tanh")
        off_by = float((computed - hidden).norm() / hidden.norm())
        print(
            f"the hidden layer, computed from the {name} tokens, differs from the block's by {off_by:.2f} of its length"
        )

# %% [markdown]
# ## What merging saves
#
# With an MLP of $4D$ hidden units, and without biases and the norms' scales, a stream of a double block has the matrices
# for q, k, v ($3D^2$), the attention's projection ($D^2$), the MLP ($8D^2$) and six modulation vectors ($6D^2$). A single
# block has `linear1` ($7D^2$), `linear2` ($5D^2$) and three modulation vectors ($3D^2$):
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
# Since `linear2` can be split, we know exactly what attention and MLP each add to a token. Here is the size of what
# each adds (its root mean square), divided by the size of the token, at one step of the run:

# %%
from fluxedu.widgets.contributions import contributions, measure_contributions, rms_over_tokens

sizes, added, _ = measure_contributions(pipe, prompt, seed=4, progress=False)
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
    print(f"{third}: image / text, absolute {min(absolute):.1f} to {max(absolute):.1f}, "
          f"relative {min(relative):.1f} to {max(relative):.1f} (medians of 40 runs)")  # fmt: skip

# %% [markdown]
# In absolute terms a block adds about as much to text tokens as to image tokens, in every part of the run. The large
# difference on the right is made by the denominator: text tokens enter these blocks 1.6 to 8 times as large, and
# grow during the run. So do not conclude from the first figure that the text tokens hardly change.
#
# The explorer shows all blocks and steps. Move over the table with the mouse, or with Tab and the arrow keys. In which
# blocks, and in which part of the image, do attention and MLP change the tokens in the same direction, and where in
# opposite directions?

# %%
contributions(pipe, prompt, seed=4, progress=False)

# %% [markdown]
# ## Put your code into the trained model
#
# `fe.swap` replaces all six single blocks by yours, with the trained weights. The image must stay the same.

# %%
if fe.passed("single.block"):
    with fe.swap("single.*", lambda old: Block(dim, config.num_heads, mlp_hidden), pipe):
        out = pipe(prompt, seed=4, progress=False)
    course.compare("the latent with your blocks and with the library's", out.latents, original.latents, within=1e-3)

# %% [markdown]
# ## Break it
#
# First, we let the MLP run after the attention, as in a double block, with the same weights. Then we remove the
# attention, and then the MLP. Finally we change the role of the text: single blocks do not update the text tokens, or
# image patches may not attend to text.

# %%
from fluxedu.instruments.ablation import ablate


class MLPAfterAttention(SingleStreamBlock):
    """First the attention, then the MLP on its result, with the weights of a single block."""

    def forward(self, x: Tensor, mods: Tensor, rope: Tensor, txt_len: int = 0) -> Tensor:
        shift, scale, gate = mods.unsqueeze(-2).chunk(3, dim=-1)  # each [B, 1, D]
        attn_weight, mlp_weight = self.linear2.weight[:, :dim], self.linear2.weight[:, dim:]

        y = (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift
        q, k, v = split_heads(self.linear1(y)[..., : 3 * dim], 3, self.num_heads)  # each [B, H, L + N, d]
        q, k = self.norm(q, k)
        attn_out = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
        attn_out = attn_out.transpose(1, 2).flatten(2)  # [B, L + N, D]
        x = x + gate * F.linear(attn_out, attn_weight, self.linear2.bias)

        y = (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift  # of the new x
        hidden = F.gelu(self.linear1(y)[..., 3 * dim :], approximate="tanh")
        return x + gate * F.linear(hidden, mlp_weight)


@contextmanager
def zero_columns(columns: slice):
    """Set these columns of `linear2` to 0 in all single blocks."""
    with ExitStack() as stack:
        for i, old in enumerate(pipe.flux.single_blocks):
            new = copy.deepcopy(old)
            new.linear2.weight.data[:, columns] = 0
            stack.enter_context(fe.swap(f"single.{i}", new, pipe))
        yield


def no_attention_to_text(attention_map, ctx):
    """Set the attention from image patches to text tokens to 0, and rescale each row to sum to 1."""
    weights = attention_map.weights().clone()  # [B, H, L + N, L + N], one row per query
    weights[..., ctx.stream_slice("img"), ctx.stream_slice("txt")] = 0
    return weights / weights.sum(-1, keepdim=True)


interventions = {
    "MLP after attention": fe.swap("single.*", lambda old: MLPAfterAttention(config), pipe),
    "no attention": zero_columns(slice(0, dim)),
    "no MLP": zero_columns(slice(dim, None)),
    "text not updated, last block": ablate(f"single.{config.depth_single_blocks - 1}", streams="txt"),
    "text not updated, all six": ablate("single.*", streams="txt"),
    "no attention to text, single": fe.intervene("single.*.attn.map", no_attention_to_text),
    "no attention to text, double": fe.intervene("double.*.attn.map", no_attention_to_text),
}
outs, changes = [original], {}
for name, intervention in interventions.items():
    with intervention:
        outs.append(pipe(prompt, seed=4, progress=False))
    changes[name] = relative_change(outs[-1])
    print(f"{name:30} the latent changes by {changes[name]:.0%}")


def in_words(size: float) -> str:
    return "none" if size < 0.01 else "small" if size < 0.1 else "large"


last_update.against(in_words(changes["text not updated, last block"]))
serial_effect.against(in_words(changes["MLP after attention"]))
by_kind = {kind: changes[f"no attention to text, {kind}"] for kind in ("single", "double")}
text_needed.against(max(by_kind, key=by_kind.get))

# %%
from textwrap import fill

fig, axes = plt.subplots(2, 4, figsize=(8.4, 4.9), layout="constrained")
for ax, out, name in zip(axes.flat, outs, ["original", *interventions]):
    ax.imshow(out.images[0])
    ax.set_title(fill(name, 20), fontsize=9)
    ax.axis("off")
fig.suptitle(
    "Seed 4: if patches cannot attend to text, the latent changes by "
    f"{by_kind['single']:.0%} in the single blocks and by {by_kind['double']:.0%} in the double blocks",
    fontsize=10,
)
plt.show()

# %% [markdown]
# Without attention to text in the single blocks, both shapes are missing. Updating the text in the last block has no
# effect at all, because the result is not used: after the last block the text tokens are discarded. FLUX computes them
# nevertheless.
#
# The experiment does not show that running attention and MLP in parallel is better than the usual order, only that
# these weights were trained for it. A network trained with the usual order would probably fail in the same way if they
# ran in parallel.
#
# The sizes above were measured with 40 prompts. Everything in this section comes from one prompt and one seed: change
# both before you rely on a number. There are six single blocks and two double blocks, so the last two lines do not
# compare one block with one block.
#
# ## In five lines
#
# 1. A single block processes text and image as one sequence, with one set of weights.
# 2. linear1 computes q, k, v and the MLP's hidden layer; linear2 applies both output projections and adds the results.
# 3. Attention and MLP read the same tokens and share one shift, one scale and one gate.
# 4. A double block has 2.4 times as many weights; 38 of FLUX.1's 57 blocks are single.
# 5. In this run, image patches need the text in the single blocks. The last block's update of the text is not used.
#
# **Questions people ask**: *Why do attention-map tools leave out the single blocks?* (attention-map-diffusers issues 15
# and 21) They need not: here `single.2.attn.map` is a site like any other, and the images above show that much of the
# text's influence is in the single blocks. *Why is it `linear1` in one file and
# `proj_mlp` in another?* (diffusers issue 10450) The official layout keeps the four layers in one matrix, diffusers
# stores them separately. Notebook 09 converts one into the other.
#
# **Read**: *Scaling Vision Transformers to 22 Billion Parameters*, arXiv 2302.05442, section 2 (parallel layers,
# QKNorm) · `black-forest-labs/flux`, `modules/layers.py`, `SingleStreamBlock` · ours: `fluxedu/models/blocks.py`.

# %%
fe.score()
