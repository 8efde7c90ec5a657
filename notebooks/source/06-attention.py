# %% [markdown]
# # 06 · Attention
#
# **How does a token choose which tokens it gets information from?** Attention is the only part of a block in which a
# patch (an image token) gets information from words or from other patches. You will compute it by hand for three
# tokens, write it with an explicit softmax, add FLUX's QKNorm, and put your code into the trained model.
#
# Afterwards you can name each axis of q, k and v, explain why FLUX's attention scores stay bounded, and say what
# happens without the normalisation.
#
# 60 minutes · needs notebook 04

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.models import attention as library

device = course.begin()
pipe = fe.load(device=device)
flux = pipe.flux
prompt = "a red circle left of a blue square"
reference = pipe(prompt, seed=4, progress=False)
course.where(pipe, "double", "single")

# %% [markdown]
# Every block has one attention over text and image tokens together: 32 text tokens and 64 patches here, 512 and 4,096
# in FLUX.1-dev at 1024 × 1024.
#
# ## Predict
#
# For every token, attention computes a *query*, a *key* and a *value*; each query is compared with all keys. *QKNorm*
# is a normalisation of queries and keys, which you will write below. We call attention *sharper* if fewer tokens get
# most of it, and *flatter* if it is spread more evenly.

# %%
query_length = fe.predict(
    "QKNorm gives a query of 32 numbers the root mean square 1. What is the length of this vector?", 5.66
)  # answer
scaled_with_norm = fe.predict(
    "Queries and keys are multiplied by 10 before QKNorm. Is attention 'unchanged', 'sharper' or 'flatter'?",
    "unchanged",
)  # answer
scaled_without_norm = fe.predict(
    "They are multiplied by 10, but not normalised afterwards: 'unchanged', 'sharper' or 'flatter'?", "sharper"
)  # answer

# %% [markdown]
# ## Three tokens
#
# Three tokens have queries, keys and values of d = 4 numbers. The *score* of a query and a key is their dot product,
# divided by the root of d. The softmax turns the scores of one query into weights that sum to 1. Before you run the
# cell, compute the scores of the third token, and which token it attends to most.

# %%
q = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0], [1, 1, 1, 1]])  # [3, 4], one row per token
k = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 2]])
v = torch.tensor([[10.0, 0, 0, 0], [0, 10, 0, 0], [0, 0, 10, 10]])
scores = q @ k.T / 4**0.5  # [3, 3], one row per query, one column per key
weights = scores.exp() / scores.exp().sum(-1, keepdim=True)  # the softmax
print("token   scores            weights              output")
for i in range(3):
    rows = (
        " ".join(f"{number:{spec}}" for number in table[i])
        for table, spec in ((scores, "4.1f"), (weights, "5.2f"), (weights @ v, "4.1f"))
    )
    print(f"{i + 1:5}   {'   '.join(rows)}")
print(
    "with q and k ten times as long, the weights of token 3:",
    [round(w, 2) for w in (100 * scores[2]).softmax(-1).tolist()],
)

# %% [markdown]
# Token 1 attends mostly to itself, and so its output is mostly its own value. Token 3 attends mostly to itself, too,
# but gives a fifth of its attention to each of the others. If q and k are ten times as long, scores are a hundred times
# as large, and nearly all attention goes to a single token.
#
# ## Build it
#
# In general, for query $i$,
#
# $$P_{ij} = \frac{e^{q_i \cdot k_j / \sqrt d}}{\sum_{j'} e^{q_i \cdot k_{j'} / \sqrt d}} \qquad o_i = \sum_j P_{ij}\, v_j$$
#
# This happens several times in parallel, in *heads* of d numbers each.

# %% exercise="attention.attend"

# %% [markdown]
# Dividing by the root of d keeps the scores at the same size for every d. For two vectors of d independent numbers with
# mean 0 and variance 1, the d products are independent too, so their variances add up:
#
# $$\mathrm{Var}(q \cdot k) = \sum_{c=1}^{d} \mathrm{Var}(q_c k_c) = d \qquad \Rightarrow \qquad
# \mathrm{std}\left(\frac{q \cdot k}{\sqrt d}\right) = 1$$
#
# Without the division, the softmax of wide heads would nearly always select a single token.

# %%
for d in (8, 32, 128):
    products = (torch.randn(20_000, d) * torch.randn(20_000, d)).sum(-1)
    print(
        f"d = {d:3}: standard deviation of q·k {products.std():3.0f}, divided by sqrt(d) {products.std() / d**0.5:.0f}"
    )

# %% [markdown]
# ## QKNorm
#
# Training can still make queries and keys longer. In large models this happened (arXiv 2302.05442). Then the softmax
# selects one token, and its gradient vanishes. FLUX normalises every query and key before they are
# multiplied: $\hat q = q / \mathrm{rms}(q)$, so that the length of $q$ has no effect (apart from $\varepsilon =
# 10^{-6}$ under the root). Then each channel is multiplied by a learned number, $g_q$ for queries and $g_k$ for keys. A
# vector of d numbers whose root mean square is 1 has the length $\sqrt d$. So a score can never exceed a bound, however
# long training makes the queries and keys (Cauchy-Schwarz):
#
# $$\frac{|(g_q \odot \hat q) \cdot (g_k \odot \hat k)|}{\sqrt d} \le \max|g_q| \cdot \max|g_k| \cdot
# \frac{\lVert \hat q \rVert\, \lVert \hat k \rVert}{\sqrt d} \le \max|g_q| \cdot \max|g_k| \cdot \sqrt d$$
#
# The rotation of notebook 04 comes after the normalisation. It keeps lengths, so the bound remains.

# %% exercise="attention.qknorm"
# Source: arXiv 2302.05442, which reports that large vision transformers diverged in training without it.

# %%
with fe.record("double.1.img_attn.q", "double.1.img_attn.q_norm", steps=8) as rec:  # values at two points in the model
    pipe(prompt, seed=4, progress=False)
before, after = (rec[f"double.1.img_attn.{name}"].tensor[0] for name in ("q", "q_norm"))  # [5, 64, 32]
scale = flux.double_blocks[1].img_attn.norm.query_norm.scale.detach().cpu()
rms_before, rms_after = before.square().mean(-1).sqrt(), (after / scale).square().mean(-1).sqrt()
print("queries:", list(before.shape), "= heads, patches, numbers per head")
print(f"root mean square of the queries before: {rms_before.min():.1f} to {rms_before.max():.1f}")
print(f"after, without the learned scale:       {rms_after.min():.2f} to {rms_after.max():.2f}")
query_length.against(round(float((after / scale).norm(dim=-1).mean()), 2))

# %% [markdown]
# How close do the scores come to the bound? We record queries and keys of all blocks in 40 short runs (5 prompts, 8
# seeds each). `double.1.img_attn.q` above is before QKNorm; `double.1.attn.q`, for text and image together, is after
# QKNorm and rotation.

# %%
five = [
    prompt,
    "a green star",
    "a yellow ring above a pink cross",
    "a pink triangle on a black background",
    "an orange square",
]
prompts = [p for p in five for _ in range(8)]
with fe.record("*.attn.[qk]", steps=2) as rec:
    runs = pipe(prompts, seed=list(range(8)) * 5, steps=4, progress=False)
for block in [f"double.{i}" for i in range(2)] + [f"single.{i}" for i in range(6)]:
    q, k = (rec[f"{block}.attn.{x}"].tensor.float() for x in "qk")  # [40, 1, 5, 96, 32], 1 step
    largest = float((q @ k.transpose(-1, -2)).abs().max()) / 32**0.5
    kind, i = block.split(".")
    module = getattr(flux, f"{kind}_blocks")[int(i)]
    norms = [module.norm] if kind == "single" else [module.txt_attn.norm, module.img_attn.norm]
    g_q, g_k = (max(float(getattr(n, name).scale.abs().max()) for n in norms) for name in ("query_norm", "key_norm"))
    print(f"{block}: largest score {largest:3.0f}, bound {g_q * g_k * 32**0.5:3.0f}")

# %% [markdown]
# ## From tokens to heads
#
# One linear layer computes q, k and v of all heads at once. Most mistakes in attention are made in the line that splits
# its output, because a wrong split often still has a valid shape.

# %% exercise="attention.stream"

# %%
row = torch.arange(3 * 2 * 4)  # the 3 D numbers of one token, with H = 2 and d = 4
q_row, k_row, v_row = row.unflatten(-1, (3, 2, -1))
print("of the numbers 0 ... 23, head 1 of k gets", k_row[1].tolist())

# %% [markdown]
# ## Put your code into the trained model
#
# `fe.swap` replaces modules by yours and copies the trained weights into them. Here it puts your `SelfAttention` into
# both streams of every double block, and your `QKNorm` into every single block. In the single blocks, your `attend`
# computes the output of all heads: `fe.intervene` passes it the rotated queries and keys and the values, and continues
# with its result. The image must stay the same.

# %%
inputs = {}


def keep(value, ctx):
    inputs[ctx.site] = value
    return value


def my_heads(heads, ctx):
    block = ctx.site.removesuffix(".heads")
    return attend(inputs[f"{block}.attn.q"], inputs[f"{block}.attn.k"], inputs[f"{block}.v"])


if fe.passed("attention.attend", "attention.stream", "attention.qknorm"):
    with fe.swap("double.*_attn", SelfAttention, flux), fe.swap("single.*.norm", QKNorm, flux):
        with fe.intervene("single.*.attn.[qk]", "single.*.v", keep), fe.intervene("single.*.heads", my_heads):
            out = pipe(prompt, seed=4, progress=False)
    course.compare("the latent with your code and with the library's", out.latents, reference.latents, within=1e-3)

# %% [markdown]
# ## Break it: queries and keys ten times as long
#
# The *entropy* of a row of weights measures how widely a query spreads its attention: 0 if it attends to a single
# token, log 96 = 4.6 if it attends to all 96 equally:
#
# $$H_i = -\sum_j P_{ij} \log P_{ij}$$
#
# (`reduce="entropy"` stores it in place of the map.) We take one state of each of the 40 runs. For each state we
# compute the mean over all blocks, heads and queries: first with QKNorm as it is, then with a version that multiplies
# by the learned scale but does not normalise (medians and, in brackets, ranges of the 40).

# %%
from fluxedu.sampling.latents import image_ids, pack, text_ids

x, time = pack(runs.trajectory.latents[2]).to(device), runs.trajectory.times[2].to(device).expand(40)
text = pipe.prompt_encoder(prompts)
img_ids, txt_ids = image_ids(*runs.latents.shape[-2:]).to(device), text_ids(text.txt.shape[1]).to(device)
guidance = torch.tensor([pipe.defaults.guidance], device=device).expand(40)


class ScaleOnly(nn.Module):
    """The learned scale of a QKNorm, without the normalisation."""

    def __init__(self, old: nn.Module):
        super().__init__()
        self.query_norm, self.key_norm = old.query_norm, old.key_norm

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q * self.query_norm.scale, k * self.key_norm.scale


def entropies(factor):
    """The mean entropy of the attention of each of the 40 states, with queries and keys multiplied by `factor`."""
    multiply = fe.intervene("double.*_attn.[qk]", "single.?.[qk]", lambda x, ctx: factor * x)
    with torch.no_grad(), multiply, fe.record("*.attn.map", reduce="entropy") as rec:
        flux(x, img_ids, text.txt, txt_ids, time, text.pooled, guidance)
    return torch.stack([rec[site].tensor[0].mean((1, 2)) for site in rec]).mean(0)  # [40]


factors = (0.1, 0.3, 1.0, 3.0, 10.0)
with_norm = torch.stack([entropies(factor) for factor in factors])  # [5, 40]
with fe.swap("*.norm", lambda old: ScaleOnly(old), flux):
    scale_only = torch.stack([entropies(factor) for factor in factors])
for factor, *rows in zip(factors, with_norm, scale_only):
    a, b = (f"{row.median():.1f} ({row.min():.1f} to {row.max():.1f})" for row in rows)
    print(f"times {factor:4}: entropy with QKNorm {a}, without normalisation {b}")


def in_words(change):
    return "unchanged" if abs(change) < 0.05 else "sharper" if change < 0 else "flatter"


scaled_with_norm.against(in_words(float((with_norm[4] - with_norm[2]).median())))
scaled_without_norm.against(in_words(float((scale_only[4] - scale_only[2]).median())))

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
for rows, colour, name in (
    (with_norm, "#0072B2", "with QKNorm"),
    (scale_only, "#D55E00", "scale only, no normalisation"),
):
    ax.semilogx(factors, rows.median(1).values.numpy(), "o-", color=colour, label=name)
    ax.fill_between(factors, rows.amin(1).numpy(), rows.amax(1).numpy(), color=colour, alpha=0.3)
ax.set(xlabel="factor of queries and keys", ylabel="entropy of a row (nats)", ylim=(0, 4.8))
ax.set_xticks(factors, [f"{factor:g}" for factor in factors])
fig.suptitle("Without QKNorm, longer queries and keys make attention sharper")
ax.legend()
plt.show()

# %% [markdown]
# Multiplying both by ten multiplies every score by a hundred, as in the example with three tokens. With the
# normalisation, the length of a query or key has no effect; only the learned scale, one number per channel and the same
# for all tokens, determines how sharp the attention can be.
#
# ## In five lines
#
# 1. `softmax(q k^T / sqrt(d)) v`, separately in each head; a row of weights belongs to a query and sums to 1.
# 2. Dividing by the root of d keeps the spread of scores the same for every d.
# 3. QKNorm divides every query and key by its root mean square, in float32, and multiplies by a learned number per
#    channel.
# 4. So no score exceeds max|g_q| max|g_k| sqrt(d), whatever the length of queries and keys.
# 5. `qkv` holds the numbers in the order 3 × H × d.
#
# **Questions people ask**: *Why RMSNorm and not LayerNorm?* It needs no mean and no shift; the bound holds for a
# LayerNorm without a shift, too. *Do text and image share the scales?* Not in double blocks, where each stream has its
# own QKNorm; a single block has one for all tokens.
#
# **Read**: Attention Is All You Need, arXiv 1706.03762 · QKNorm at scale, arXiv 2302.05442 ·
# `black-forest-labs/flux`, `modules/layers.py` (`QKNorm`, `SelfAttention`) · ours: `fluxedu/models/attention.py`.

# %%
fe.score()
