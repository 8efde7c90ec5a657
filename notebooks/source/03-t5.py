# %% [markdown]
# # 03 · T5
#
# **What do T5's token vectors contain?** FLUX gives all text tokens the same position, so it cannot see their order.
# That the circle is red and stands on the left must therefore be contained *in the vector* of the token *circle*. T5,
# the second text encoder, puts it there. You will build T5's parts, put them into the trained model, read facts from
# the vectors after each block, and remove the one part that tells T5 about order.
#
# Afterwards you can say how T5 differs from CLIP and from FLUX's own blocks, read a relative position bias, and test
# with a probe whether a vector contains a fact.
#
# 60 minutes · needs notebook 00, and 02 helps

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.models.t5 import distance_buckets
from fluxedu.nano.judge import detect
from fluxedu.nano.scenes import COLORS, FORMS, caption, sample_scene
from fluxedu.nano.tokenizers import t5_tokenizer
from fluxedu.nano.text_tasks import TAGS, corrupt_spans, tag_labels
from fluxedu.widgets.tokens import layer_states, tokens

device = course.begin()
_ = torch.set_grad_enabled(False)  # nothing is trained here, except one linear map
pipe = fe.load(device=device)
t5, tokenizer = pipe.prompt_encoder.t5, pipe.prompt_encoder.t5_tokenizer
prompt = "a red circle left of a blue square on a white background"
reference = pipe(prompt, seed=4, progress=False)
count = len(tokenizer.pieces(prompt))  # number of tokens that are not padding
course.where(pipe, "t5", "in")

# %% [markdown]
# ## Predict
#
# A *probe* is a linear map from a vector to an answer. If it answers correctly for captions that it was not fitted to,
# the vector contains the fact. The probes below get the vector of a **shape's** token, such as *circle*, and answer a
# question about that object: its colour, or whether the caption says that it is left of something.
#
# The third question is about T5's *position bias*, a number that is added to each attention score and depends on the
# distance between the two tokens. The last question is about *padding*, the tokens that fill a prompt up to a fixed
# length.

# %%
colour_before = fe.predict(
    "Before any block, how often does the probe get the colour right: 12 (chance), 50 or 100 percent?", 12
)  # answer
first_fact = fe.predict(
    "Which does a shape's vector contain after fewer blocks: 'colour' or 'side'?", "colour"
)  # answer
order_visible = fe.predict(
    "Without the position bias, do T5's vectors for 'A left of B' and 'B left of A' differ: 'yes' or 'no'?", "no"
)  # answer
padding_effect = fe.predict(
    "Without padding, the words' vectors change 'not', 'a little' or 'a lot' (10 % or more)?", "a lot"
)  # answer

# %% [markdown]
# ## Build it
#
# T5 was made to turn text into text, with an encoder that reads the input and a decoder that writes the output. FLUX
# uses only the encoder.

# %%
from fluxedu.models import CLIPTextEncoder, T5Encoder
from fluxedu.models.meta_init import meta_init

with meta_init():  # shapes only, no weights
    sizes = {"T5-XXL's encoder": T5Encoder(), "CLIP-L's text encoder": CLIPTextEncoder()}
sizes |= {"the miniature's T5": t5, "the miniature's CLIP": pipe.prompt_encoder.clip}
for name, network in sizes.items():
    print(f"{name:22} {sum(p.numel() for p in network.parameters()):13,} parameters")

# %% [markdown]
# It is a transformer like CLIP's, with five differences. Every token attends to every other; positions enter as a bias
# that is added to the attention scores; the normalisation is RMSNorm; the MLP has a gate; and the scores are not
# divided by √d, where d is the width of a head. We begin with the normalisation. RMSNorm divides a token by its root mean
# square and multiplies by a learned weight $g$ per channel; unlike LayerNorm it subtracts no mean and adds nothing:
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
# The attention is the usual one, except that the scores are not divided by √d. (T5 initialises its queries with smaller
# weights instead.)

# %% exercise="t5.attend"

# %% [markdown]
# Now the position bias. T5 has no position vectors and no rotary positions. It has a table with one row per **bucket**
# (a range of distances between two tokens) and one column per attention head; the entry is added to the score. Each
# short distance has a bucket of its own, while several longer distances share one. With $b$ for the table's entry,
#
# $$P_{ij} = \mathrm{softmax}_j\big( q_i \cdot k_j + b_{\mathrm{bucket}(j - i)} \big)$$
#
# Only the difference $j - i$ enters, so the attention does not depend on where in the prompt a phrase stands.

# %% exercise="t5.buckets"

# %%
if fe.passed("t5.buckets"):
    c = t5.config
    yours = buckets(32, c.relative_attention_num_buckets, c.relative_attention_max_distance)
    print("buckets that differ from the library's:", int((yours != distance_buckets(32, c)).sum()), "of", yours.numel())
    full_size = buckets(513, 32, 128)
    print("buckets of keys 0 to 9 tokens after the first:", full_size[0, :10].tolist())
    print("buckets at 20, 40, 80, 127 and 512 tokens:    ", full_size[0, [20, 40, 80, 127, 512]].tolist())

# %% [markdown]
# One table serves all layers: the first layer owns it and the others receive its bias. T5-XXL, the encoder of FLUX.1,
# has the same table of 32 buckets up to a distance of 128, for 64 heads; the 512 tokens of FLUX.1-dev reach four times
# as far.
#
# ## See it
#
# Which distances do the heads of the miniature prefer?

# %%
first_attention = t5.encoder.block[0].attention
bias = first_attention.bias(32)[0].cpu()  # [H, 32, 32]
offsets = range(-12, 13)
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
for head, colour in enumerate(("#0072B2", "#D55E00", "#009E73", "#CC79A7")):
    ax.plot(offsets, [float(bias[head, 15, 15 + o]) for o in offsets], "o-", ms=3, color=colour, label=f"head {head}")
ax.axvline(0, color="0.7", linewidth=1)
ax.set_xlabel("position of the key minus position of the query, in tokens")
ax.set_ylabel("bias added to the score")
near = bias[:, 15, [13, 14, 16, 17]].amax(dim=1)
distant = bias[:, 15, [8, 9, 21, 22]].amax(dim=1)
prefer_near = int((near > distant).sum())
ax.set_title(f"{prefer_near} of {len(near)} heads prefer neighbours to tokens that are 6 or 7 tokens away")
ax.legend(fontsize=8)
plt.show()
print("heads that prefer a neighbour to every token at distance 6 or 7:", prefer_near, "of", len(near))

# %% [markdown]
# Now the probes. We generate captions with known facts, take the vector of every shape's token after each block, fit a
# linear map by least squares to some captions, and test it on others.


# %%
def states_by_layer(ids: Tensor) -> list[Tensor]:
    """The token vectors before any block, after each block, and after the last norm: `[B, L, D]` each."""
    x = t5.shared(ids)
    states, shared_bias = [x], t5.encoder.block[0].attention.bias(ids.shape[1])
    for block in t5.encoder.block:
        x = block(x, shared_bias)
        states.append(x)
    return [*states, t5.encoder.final_layer_norm(x)]


def shape_vectors(number: int) -> tuple[list[Tensor], Tensor]:
    """Vectors of the shapes' tokens by layer, `[N, D]` each, and the facts about their objects, `[N, 7]`."""
    captions = [caption(sample_scene(rng), rng) for _ in range(number)]
    ids = tokenizer([text for text, _ in captions])
    labels = torch.full((*ids.shape, len(TAGS)), -1)
    for row, (text, claim) in zip(labels, captions):
        pieces = tokenizer.pieces(text)
        row[: len(pieces)] = torch.from_numpy(tag_labels(claim, pieces))
    shape_ids = torch.tensor([tokenizer.fast.token_to_id("▁" + form) for form in FORMS[:6]])
    is_shape = torch.isin(ids, shape_ids) & (labels[..., 0] >= 0)
    return [x.cpu()[is_shape] for x in states_by_layer(ids.to(device))], labels[is_shape]


def probe_accuracy(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, classes: int) -> float:
    """Fit a linear probe to `train_x [N, D]` and `train_y [N]`; its accuracy on the test set."""
    size = train_x.norm(dim=-1).mean()
    x = F.pad(train_x / size, (0, 1), value=1.0).double()  # with a constant: [N, D + 1]
    weights = torch.linalg.solve(x.T @ x + 0.01 * torch.eye(x.shape[1]), x.T @ F.one_hot(train_y, classes).double())
    predictions = (F.pad(test_x / size, (0, 1), value=1.0).double() @ weights).argmax(dim=1)
    return float((predictions == test_y).float().mean())


rng = np.random.default_rng(3)
train_x, train_y = shape_vectors(500)
test_x, test_y = shape_vectors(200)
questions = {"which colour?": (0, len(COLORS)), "which size?": (2, 3), "left of something?": (3, 2)}
accuracy = {}
for question, (column, classes) in questions.items():
    by_block = zip(train_x, test_x)
    accuracy[question] = [probe_accuracy(a, train_y[:, column], b, test_y[:, column], classes) for a, b in by_block]

fig, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
names = ["embedding\nalone", *(f"after\nblock {i}" for i in range(len(t5.encoder.block))), "after the\nlast norm"]
for (question, values), colour, marker in zip(accuracy.items(), ("#0072B2", "#009E73", "#D55E00"), "os^"):
    ax.plot(names, [100 * v for v in values], f"{marker}-", color=colour, label=question, alpha=0.85)
ax.set_ylim(0, 103)
ax.set_ylabel("probe accuracy, %")
colour, side = accuracy["which colour?"], accuracy["left of something?"]


def blocks_needed(values: list[float]) -> int:
    """The number of blocks after which the accuracy is above 95 %."""
    return next((i for i, value in enumerate(values) if value > 0.95), len(values))


ax.set_title(
    f"For 95 % accuracy, the colour needs {blocks_needed(colour)} block and the side {blocks_needed(side)} blocks"
)
ax.legend(fontsize=8, loc="lower right")
plt.show()
colour_before.against(min((12, 50, 100), key=lambda percent: abs(percent - 100 * colour[0])))
first_fact.against("colour" if blocks_needed(colour) < blocks_needed(side) else "side")
print("blocks needed for 95% accuracy: colour", blocks_needed(colour), "· side", blocks_needed(side))

# %% [markdown]
# Before any block the token *circle* has the same vector in every caption, so its colour can only be guessed. (The side
# can be guessed better: most objects are not left of anything, so the answer “no” is usually right.) The colour is in
# the neighbouring token, and one block is enough to copy it. The side needs more blocks: the model has to find that
# there is a *left of*, and then which object it belongs to.
#
# The miniature's T5 was trained with this in mind: besides filling in missing words it had to name the colour, size and
# sides of every object (see `training/t5.py`). FLUX.1's T5-XXL was trained only to fill in missing words, in a very
# large amount of text (arXiv 1910.10683). An example of that task: some spans of the text are replaced by numbered
# marks, and the target lists what was removed. No images are involved, whereas CLIP is trained on pairs of image and
# text.

# %%
word_tokenizer = t5_tokenizer()
marks = [word_tokenizer.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(4)]
corrupted, target = corrupt_spans(word_tokenizer(prompt).input_ids, np.random.default_rng(6), marks)
print("input: ", *word_tokenizer.convert_ids_to_tokens(corrupted))
print("target:", *word_tokenizer.convert_ids_to_tokens(target))

# %% [markdown]
# Which tokens become similar, and after which block? Choose a layer and two tokens. The shades in each row show how
# similar its tokens are to the token chosen in the other row.

# %%
tokens(pipe, prompt)

# %% [markdown]
# ## Put your code into the trained model
#
# `fe.swap` replaces modules of the model by yours and copies the trained weights into them. Here it replaces the norm,
# the gated MLP and the attention in all blocks of T5. The class below only adds what your `attend` and `buckets` need:
# it splits the heads and owns the table.


# %%
class Attention(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.config = c = old.config
        self.q = nn.Linear(c.d_model, c.num_heads * c.d_kv, bias=False)
        self.k = nn.Linear(c.d_model, c.num_heads * c.d_kv, bias=False)
        self.v = nn.Linear(c.d_model, c.num_heads * c.d_kv, bias=False)
        self.o = nn.Linear(c.num_heads * c.d_kv, c.d_model, bias=False)
        if hasattr(old, "relative_attention_bias"):  # only in the first layer
            self.relative_attention_bias = nn.Embedding(c.relative_attention_num_buckets, c.num_heads)

    def bias(self, length: int) -> Tensor:  # [1, H, L, L]
        rows = buckets(length, self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance)
        table = self.relative_attention_bias
        return table(rows.to(table.weight.device)).permute(2, 0, 1)[None]

    def split_heads(self, x: Tensor) -> Tensor:  # [B, L, H d] -> [B, H, L, d]
        return x.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # [B, L, D]
        q, k, v = self.split_heads(self.q(x)), self.split_heads(self.k(x)), self.split_heads(self.v(x))
        return self.o(attend(q, k, v, bias).transpose(1, 2).flatten(2))  # [B, H, L, d] -> [B, L, H d]


if fe.passed("t5.RMSNorm", "t5.GatedMLP", "t5.attend", "t5.buckets"):
    with (
        fe.swap("t5.*norm", lambda old: RMSNorm(len(old.weight), old.eps), pipe),
        fe.swap("t5.*.DenseReluDense", lambda old: GatedMLP(old.wi_0.in_features, old.wi_0.out_features), pipe),
        fe.swap("t5.*.SelfAttention", lambda old: Attention(old), pipe),
    ):
        out = pipe(prompt, seed=4, progress=False)
    course.compare("the latent with your code and with the library's", out.latents, reference.latents, within=1e-3)

# %% [markdown]
# ## Break it
#
# **No bias.** Without the table T5 has no information about order. Two prompts with the same words then get the same
# vectors, only in another order; and since FLUX does not see the order of text tokens, both must give the same image.

# %%
A = prompt
B = "a blue square left of a red circle on a white background"
ids = tokenizer([A, B]).to(device)
same_words = ids[0, :count].sort().values.equal(ids[1, :count].sort().values)
order = [ids[row].argsort(stable=True) for row in (0, 1)]  # sorts both prompts' tokens in the same way


def difference_without_order(states: Tensor) -> float:
    """Relative difference between the two prompts' vectors, whatever the order of their tokens."""
    a, b = (states[row][order[row]] for row in (0, 1))
    return float((a - b).norm() / b.norm())


table = first_attention.relative_attention_bias.weight
original_table = table.clone()
with_bias = t5(ids)
table.zero_()
without_bias = t5(ids)
table.copy_(original_table)
assert same_words, "the two prompts must have the same words"
print(f"with the bias, the vectors of the same words differ by {difference_without_order(with_bias):.0%}")
print(f"without the bias, they differ by {difference_without_order(without_bias):.0%}")
order_visible.against("no" if difference_without_order(without_bias) < 1e-4 else "yes")


def draw(text: str, states: Tensor, seed: int = 4):
    """The result for a prompt whose T5 vectors are replaced by `states`."""
    with fe.intervene("sample.txt", lambda x, ctx: states[None]):
        return pipe(text, seed=seed, progress=False)


fig, axes = plt.subplots(1, 4, figsize=(9, 2.7), layout="constrained")
outs = [draw(A, with_bias[0]), draw(A, with_bias[1]), draw(A, without_bias[0]), draw(A, without_bias[1])]
names = ["red circle left of\nblue square", "blue square left of\nred circle"] * 2
for ax, out, name, setting in zip(axes, outs, names, ("with bias", "with bias", "no bias", "no bias")):
    ax.imshow(out.images[0])
    ax.set_title(f"{name}\n{setting}", fontsize=9)
    ax.axis("off")
fig.suptitle("Without the position bias both prompts give the same image")
plt.show()
same = (outs[2].latents - outs[3].latents).norm() / outs[3].latents.norm()
print(f"without the bias, the latents of both prompts differ by {same:.1%}")

# %% [markdown]
# (CLIP got the first prompt for all four images, so that only T5 makes a difference.) This is what people mean by *T5
# has encoded the order in its vectors*. The bias is the only way in which the order enters.
#
# **Small changes of the parts.** Each of these is a mistake that people make when they write T5 from memory.


# %%
def relative_change(states: Tensor) -> float:
    return float((states - with_bias).norm() / with_bias.norm())


class ScaledScores(Attention):
    def bias(self, length):
        rows = distance_buckets(length, self.config, self.o.weight.device)
        return self.relative_attention_bias(rows).permute(2, 0, 1)[None]

    def forward(self, x, bias):
        q, k, v = self.split_heads(self.q(x)), self.split_heads(self.k(x)), self.split_heads(self.v(x))
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # divides the scores by the root of d
        return self.o(heads.transpose(1, 2).flatten(2))


class LayerNorm(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(len(old.weight))), old.eps

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)


class MLP(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.wi_0 = nn.Linear(old.wi_0.in_features, old.wi_0.out_features, bias=False)
        self.wi_1 = nn.Linear(old.wi_1.in_features, old.wi_1.out_features, bias=False)
        self.wo = nn.Linear(old.wo.in_features, old.wo.out_features, bias=False)


class NoGate(MLP):
    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh"))


class ExactGELU(MLP):
    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x)) * self.wi_1(x))


breaks = {
    "scores divided by √d": ("t5.*.SelfAttention", ScaledScores),
    "no gate": ("t5.*.DenseReluDense", NoGate),
    "LayerNorm": ("t5.*norm", LayerNorm),
    "GELU with erf": ("t5.*.DenseReluDense", ExactGELU),
}
outs = {"unchanged": reference}
for name, (modules, replacement) in breaks.items():
    with fe.swap(modules, lambda old: replacement(old), pipe):
        states = t5(ids)
    outs[name] = draw(A, states[0])
    change = relative_change(states)
    print(f"{name:22} changes the vectors by", f"{change:.2%}" if change < 0.01 else f"{change:.0%}")

fig, axes = plt.subplots(1, 5, figsize=(9.5, 2.4), layout="constrained")
for ax, (name, out) in zip(axes, outs.items()):
    ax.imshow(out.images[0])
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle("Two of the four mistakes ruin the image, the other two are hardly visible")
plt.show()

# %% [markdown]
# The last two mistakes are the most dangerous: nothing looks wrong, but every image is slightly different from what it
# should be.
#
# **No padding.** The miniature's prompts are padded to 32 tokens, those of FLUX.1-dev to 512. T5 gets no mask in FLUX,
# so every word also attends to the padding. What happens without it?

# %%
unpadded = t5(ids[:1, :count])[0]  # the words only
change = float((unpadded - with_bias[0, :count]).norm() / unpadded.norm())
padding_effect.against("not" if change < 0.001 else "a little" if change < 0.1 else "a lot")
states = with_bias[0].clone()
states[:count] = unpadded
out = draw(A, states)
objects = [{(t.color, t.form) for t in detect(o.images[0]).objects} for o in (reference, out)]  # found by the judge
for name, found in zip(("with padding:   ", "without padding:"), objects):
    print(name, ", ".join(sorted(f"{color} {form}" for color, form in found)))

# %% [markdown]
# The vectors change by a quarter, because each of the prompt's 13 tokens also attended to 19 padding tokens. Still, the
# same objects are drawn in this image. But a model that was trained with padding has never worked without it, neither in the text
# encoder nor in its own attention. Adding a mask afterwards is not a free improvement.
#
# ## In five lines
#
# 1. T5 gives one vector per token, and every token attends to every other.
# 2. Order enters through a bias on the scores, one number per distance and head; without it T5 cannot see the order.
# 3. T5 has RMSNorm, a gated MLP, and scores without 1/√d. Other choices would work too, but not with these weights.
# 4. In the miniature the vector of a shape's token contains its colour after one block, and its side after three.
# 5. FLUX needs that, because it cannot see the order of the text tokens itself.
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
