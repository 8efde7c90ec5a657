# %% [markdown]
# # 03 · T5's layers
#
# **How does T5 turn a prompt into one vector per token?** T5, FLUX's second text encoder, gives the tokens that every
# patch can attend to. You will build its parts and its loop over blocks, run the miniature with nothing but your code
# in T5, and see what small mistakes in these parts do to an image.
#
# Afterwards you can say how T5 differs from CLIP and from FLUX's own blocks, write its encoder from memory, and explain
# what padding does without a mask.
#
# 60 minutes · needs notebooks 00b and 02

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.models import CLIPTextEncoder, T5Encoder
from fluxedu.models.meta_init import meta_init
from fluxedu.models.t5 import T5GatedMLP, T5Norm
from fluxedu.nano.judge import detect
from fluxedu.nano.text_tasks import corrupt_spans
from fluxedu.nano.tokenizers import t5_tokenizer
from fluxedu.widgets.tokens import tokens

device = course.begin()
_ = torch.set_grad_enabled(False)  # nothing is trained here
pipe = fe.load(device=device)
t5, tokenizer = pipe.prompt_encoder.t5, pipe.prompt_encoder.t5_tokenizer
prompt = "a red circle left of a blue square on a white background"
reference = pipe(prompt, seed=4, progress=False)
ids = tokenizer([prompt]).to(device)
course.where(pipe, "t5", "in")

# %% [markdown]
# T5 was made to turn text into text, with an encoder that reads the input and a decoder that writes the output (arXiv
# 1910.10683). FLUX uses only the encoder. Its training task was to fill in missing words: some spans of a text are
# replaced by numbered marks, and the target lists what was removed. No images are involved.

# %%
word_tokenizer = t5_tokenizer()
marks = [word_tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(4)]
corrupted, target = corrupt_spans(word_tokenizer(prompt).input_ids, np.random.default_rng(6), marks)
print("input: ", *word_tokenizer.convert_ids_to_tokens(corrupted))
print("target:", *word_tokenizer.convert_ids_to_tokens(target))

# %% [markdown]
# ## Predict
#
# The last question is about *padding*, the tokens that fill a prompt up to a fixed length. T5 gets no mask in FLUX, so
# every token also attends to the padding. RMSNorm is T5's normalisation; the exact GELU has no tanh approximation.

# %%
times_larger = fe.predict(
    "How many times as many parameters as CLIP-L's text encoder has T5-XXL's encoder?", 39
)  # answer
unnoticed = fe.predict(
    "Which change is harder to notice: 'LayerNorm' instead of RMSNorm or 'erf', the exact GELU?", "erf"
)  # answer
padding_effect = fe.predict(
    "Without padding, the vectors of the prompt's tokens change 'not', 'a little' or 'a lot' (10 % or more)?", "a lot"
)  # answer

# %% [markdown]
# ## Build it

# %%
with meta_init():  # shapes only, no weights
    sizes = {"T5-XXL's encoder": T5Encoder(), "CLIP-L's text encoder": CLIPTextEncoder()}
sizes |= {"the miniature's T5": t5, "the miniature's CLIP": pipe.prompt_encoder.clip}
counts = {name: sum(p.numel() for p in network.parameters()) for name, network in sizes.items()}
for name, number in counts.items():
    print(f"{name:22} {number:13,} parameters")
times_larger.against(counts["T5-XXL's encoder"] / counts["CLIP-L's text encoder"])

# %% [markdown]
# T5 is a transformer like CLIP's, with five main differences: every token attends to every other; positions enter as a
# bias that is added to the attention scores (notebook 03b); the normalisation is RMSNorm; the MLP has a gate; and the
# scores are not divided by √d, where d is the width of a head. (Two smaller ones: its linear layers have no biases, and
# its activation is the GELU in its tanh approximation.) We begin with the normalisation. RMSNorm divides a token by its
# root mean square and multiplies by a learned weight $g$ per channel. Unlike LayerNorm it subtracts no mean and adds
# nothing. Take a vector of four numbers:

# %%
x = torch.tensor([3.0, 1.0, -1.0, 5.0])
print("mean:", float(x.mean()), "· root mean square:", float(x.square().mean().sqrt()))
print("RMSNorm:  ", [round(value, 2) for value in (x / 3).tolist()])
print("LayerNorm:", [round(value, 2) for value in F.layer_norm(x, (4,)).tolist()])

# %% [markdown]
# In general, for a token of $D$ channels, with a small $\epsilon$ against division by zero:
#
# $$\mathrm{RMSNorm}(x) = g \odot \frac{x}{\sqrt{\frac{1}{D} \sum_{c} x_c^2 + \epsilon}}$$

# %% exercise="t5.RMSNorm"

# %% [markdown]
# FLUX uses the same normalisation for its queries and keys. T5's MLP has three matrices: two map a token to the hidden
# width, and one maps it back. One of the two hidden vectors decides how much of the other passes:
#
# $$\mathrm{MLP}(x) = W_o \big( \mathrm{GELU}(W_0 x) \odot W_1 x \big)$$

# %% exercise="t5.GatedMLP"

# %% [markdown]
# The attention adds a bias $b_{ij}$ to the scores, and does not divide them by √d:
#
# $$P_{ij} = \mathrm{softmax}_j\big( q_i \cdot k_j + b_{ij} \big)$$
#
# Other transformers divide by √d because the product of two random vectors has the standard deviation √d, and large
# scores give most of the weight to one key. T5 initialises its queries with smaller weights instead.

# %%
q, k = torch.randn(2, 1000, 64, generator=torch.Generator().manual_seed(0))  # 1,000 queries and keys, d = 64
scores = q @ k.T
for name, table in (("not divided", scores), ("divided by √d", scores / 64**0.5)):
    first = float(table.softmax(dim=-1).amax(dim=-1).mean())
    print(f"{name:13}  standard deviation {float(table.std()):.0f}, mean of each query's largest weight {first:.0%}")

# %% exercise="t5.attend"

# %% [markdown]
# A block applies the two layers one after the other. Each gets the normalised tokens, and its output is added to the
# tokens (the *residual stream*):
#
# $$x \leftarrow x + \mathrm{Attention}(\mathrm{RMSNorm}(x), b), \qquad x \leftarrow x + \mathrm{MLP}(\mathrm{RMSNorm}(x))$$

# %% exercise="t5.encode"

# %% [markdown]
# ## See it
#
# Which tokens become similar, and after which block? Choose a layer and two tokens. The shades in each row show how
# similar its tokens are to the token chosen in the other row.

# %%
tokens(pipe, prompt)

# %% [markdown]
# ## Put your code into the trained model
#
# `fe.swap` replaces modules of the model by yours and copies the trained weights into them. Here it replaces the norm,
# the gated MLP and the attention in all blocks of T5. The class below only adds what your `attend` needs: it splits the
# heads, and it has the library's position bias. Then `fe.intervene` replaces the encoder's output by that of your loop.


# %%
class Attention(nn.Module):
    def __init__(self, old):
        super().__init__()
        c = old.config
        self.heads, self.bias = c.num_heads, old.bias  # only the first block's `bias` is called
        self.q = nn.Linear(c.d_model, c.num_heads * c.d_kv, bias=False)
        self.k = nn.Linear(c.d_model, c.num_heads * c.d_kv, bias=False)
        self.v = nn.Linear(c.d_model, c.num_heads * c.d_kv, bias=False)
        self.o = nn.Linear(c.num_heads * c.d_kv, c.d_model, bias=False)
        if hasattr(old, "relative_attention_bias"):
            self.relative_attention_bias = nn.Embedding(c.relative_attention_num_buckets, c.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # [B, L, D]
        q, k, v = (lin(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for lin in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v, bias).transpose(1, 2).flatten(2))  # [B, H, L, d] -> [B, L, H d]


class YourAttention(Attention):
    def attend(self, q, k, v, bias):
        return attend(q, k, v, bias)


if fe.passed("t5.RMSNorm", "t5.GatedMLP", "t5.attend", "t5.encode"):
    with (
        fe.swap("t5.*norm", lambda old: RMSNorm(len(old.weight), old.eps), pipe),
        fe.swap("t5.*.DenseReluDense", lambda old: GatedMLP(old.wi_0.in_features, old.wi_0.out_features), pipe),
        fe.swap("t5.*.SelfAttention", lambda old: YourAttention(old), pipe),
        fe.intervene("t5.states", lambda states, ctx: encode(t5, ids)),
    ):
        out = pipe(prompt, seed=4, progress=False)
    course.compare("the latent with your code and with the library's", out.latents, reference.latents, within=1e-3)

# %% [markdown]
# ## Break it
#
# **Small changes of the parts.** Each of these is a mistake that people make when they write T5 from memory. We measure
# how much it changes the vectors of 40 prompts, and draw one image.


# %%
class ScaledScores(Attention):
    def attend(self, q, k, v, bias):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))  # divides the scores by √d


class LayerNorm(T5Norm):
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)


class NoGate(T5GatedMLP):
    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh"))


class ExactGELU(T5GatedMLP):
    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x)) * self.wi_1(x))


breaks = {
    "scores divided by √d": ("t5.*.SelfAttention", lambda old: ScaledScores(old)),
    "no gate": ("t5.*.DenseReluDense", lambda old: NoGate(t5.config)),
    "LayerNorm": ("t5.*norm", lambda old: LayerNorm(len(old.weight), old.eps)),
    "GELU with erf": ("t5.*.DenseReluDense", lambda old: ExactGELU(t5.config)),
}
colors, forms = ("red", "green", "blue", "yellow", "purple"), ("circle", "square", "star", "ring")
prompts = [f"a {c} {f} {side} a cyan cross" for c in colors for f in forms for side in ("left of", "above")]
before = t5(tokenizer(prompts).to(device))
outs, medians = {"unchanged": reference}, {}
for name, (modules, replacement) in breaks.items():
    with fe.swap(modules, replacement, pipe):
        after = t5(tokenizer(prompts).to(device))
        outs[name] = pipe(prompt, seed=4, trajectory=False, progress=False)
    change = 100 * ((after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)).float().cpu()  # [40]
    medians[name] = float(change.median())
    low, middle, high = (
        f"{c:.2g}" if c < 1 else f"{c:.0f}" for c in change.quantile(torch.tensor([0, 0.5, 1])).tolist()
    )
    print(f"{name:22} changes the vectors by {middle} % ({low} to {high})")
unnoticed.against("erf" if medians["GELU with erf"] < medians["LayerNorm"] else "LayerNorm")

fig, axes = plt.subplots(1, 5, figsize=(9.5, 2.4), layout="constrained")
for ax, (name, out) in zip(axes, outs.items()):
    ax.imshow(out.images[0])
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle("Two of the four mistakes ruin this image, the other two are hardly visible in it")
plt.show()

# %% [markdown]
# The last two mistakes are the most dangerous: in this image nothing looks wrong, but LayerNorm changes the vectors by
# 14 %.
#
# **No padding.** The miniature's prompts are padded to 32 tokens, those of FLUX.1-dev to 512. What if T5
# encodes the prompt alone? (FLUX still gets the padding's vectors of the usual run.)

# %%
count = len(tokenizer.pieces(prompt))  # number of tokens that are not padding
padded, unpadded = t5(ids)[0], t5(ids[:, :count])[0]
change = float((unpadded - padded[:count]).norm() / unpadded.norm())
padding_effect.against("not" if change < 0.001 else "a little" if change < 0.1 else "a lot")
print(f"without padding, the {count} vectors of this prompt change by {change:.0%}")
states = padded.clone()
states[:count] = unpadded
with fe.intervene("sample.txt", lambda txt, ctx: states[None]):
    out = pipe(prompt, seed=4, progress=False)
for name, result in (("T5 with padding:   ", reference), ("T5 without padding:", out)):
    found = {f"{o.color} {o.form}" for o in detect(result.images[0]).objects}  # the judge: finds shapes by geometry
    print(name, ", ".join(sorted(found)))

# %% [markdown]
# The vectors change by a quarter, because each of the prompt's tokens also attended to the padding tokens, which are
# more numerous. Still, the same objects are drawn in this image. But the model has never been trained without padding,
# so adding a mask afterwards may also make images worse.
#
# ## In five lines
#
# 1. T5 gives one vector per token, and every token attends to every other, padding included.
# 2. RMSNorm divides by the root mean square; it subtracts no mean and adds no bias.
# 3. The MLP has a gate: the GELU of one hidden vector multiplies the other.
# 4. The scores have a position bias, and no factor 1/√d. Other choices would work too, but not with these weights.
# 5. Each layer gets the normalised tokens and adds its output to the tokens.
#
# **Questions people ask**: *Is there a padding mask?* (flux pull requests 507, 511 and 512 propose one) No, neither in
# T5 nor in FLUX: padding takes part like words. *How long may a prompt be?* 256 tokens for schnell, 512 for dev, 128
# for fill, padded to exactly that length. *Why two encoders?* They enter at different points: CLIP's single vector
# through the modulation, the same for every patch, and T5's tokens through attention, where each patch can attend to
# the words it needs.
#
# **Read**: T5, arXiv 1910.10683 · GLU variants, arXiv 2002.05202 · RMSNorm, arXiv 1910.07467 · padding in
# text-to-image models, arXiv 2501.06751 · `transformers`, `modeling_t5.py` · ours: `fluxedu/models/t5.py`.

# %%
fe.score()
