# %% [markdown]
# # 03 · T5
#
# **What do word vectors know?** To FLUX the words of a prompt are a bag: all text tokens have the same position. That
# a circle is the red one and stands on the left must be *inside* its vector. T5 puts it there. You will build its
# parts, put them into the trained model, ask the vectors what they know, block by block, and take away the one thing
# that tells T5 about order.
#
# Afterwards you can say how T5 differs from CLIP and from FLUX's own blocks, read a relative position bias, and probe
# a vector for a fact.
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
from fluxedu.nano.judge import read
from fluxedu.nano.scenes import COLORS, FORMS, caption, sample_scene
from fluxedu.nano.tokenizers import t5_tokenizer
from fluxedu.nano.training.t5 import TAGS, corrupt, tags_of
from fluxedu.widgets.tokens import by_layer, tokens

device = course.begin()
_ = torch.set_grad_enabled(False)  # nothing is trained here, except one linear map
pipe = fe.load(device=device)
t5, tokenizer = pipe.prompt_encoder.t5, pipe.prompt_encoder.t5_tokenizer
prompt = "a red circle left of a blue square on a white background"
picture = pipe(prompt, seed=4, progress=False)
count = len(tokenizer.pieces(prompt))  # the tokens that are no padding
course.where(pipe, "t5", "in")

# %% [markdown]
# ## Predict
#
# A *probe* is a linear map from a vector to an answer. If it is right on captions it was not fitted to, the vector
# holds the fact. The probes below look at the token of a **shape**, such as *circle*, and are asked for that thing's
# colour, or whether it is said to be left of something.

# %%
alone = fe.predict("colours read off shapes' tokens before any block: 12 (chance) / 50 / 100 percent", 12)  # answer
sides = fe.predict("what does T5 put into a shape's token first: colour / side", "colour")  # answer
mirrored = fe.predict("without the position bias: do 'A left of B' and 'B left of A' differ? yes / no", "no")  # answer
pads = fe.predict("without padding the words' vectors: stay / move a little / move a lot", "move a lot")  # answer

# %% [markdown]
# ## Build it
#
# T5 was made to turn text into text, with an encoder that reads and a decoder that writes. FLUX takes the encoder.

# %%
from fluxedu.models import CLIPTextEncoder, T5Encoder
from fluxedu.models.meta_init import meta_init

with meta_init():  # the shapes without the numbers
    sizes = {"T5-XXL's encoder": T5Encoder(), "CLIP-L's text encoder": CLIPTextEncoder()}
sizes |= {"the miniature's T5": t5, "the miniature's CLIP": pipe.prompt_encoder.clip}
for name, network in sizes.items():
    print(f"{name:22} {sum(p.numel() for p in network.parameters()):13,} parameters")

# %% [markdown]
# It is a transformer like CLIP's, with five differences. Every token sees every other; places are told by a bias on
# the scores; the norm is an RMSNorm; the MLP has a gate; and the scores are not divided by √d. First the norm.

# %% exercise="t5.RMSNorm"

# %%
done = bool(passed)

# %% [markdown]
# FLUX meets the same norm again on its queries and keys. The MLP is wider than it looks: two matrices lead up, one
# down.

# %% exercise="t5.GatedMLP"

# %%
done = done and passed

# %% [markdown]
# Attention as always, except that the scores are taken as they are. (T5 was begun with smaller queries instead.)

# %% exercise="t5.attend"

# %%
done = done and passed

# %% [markdown]
# And the bias. T5 has no position vectors and turns nothing. It has a table, a row for each **bucket** of distances
# and a column for each head; what stands there is added to the score. Near distances have a bucket each, far ones
# share.

# %% exercise="t5.buckets"

# %%
done = done and passed
if passed:
    c = t5.config
    yours = buckets(32, c.relative_attention_num_buckets, c.relative_attention_max_distance)
    print("yours are the library's:", bool(torch.equal(yours, distance_buckets(32, c))))
    far = buckets(513, 32, 128)
    print("first token, keys 0 to 9 ahead:      ", far[0, :10].tolist())
    print("tokens 20, 40, 80, 127, 512 ahead:   ", far[0, [20, 40, 80, 127, 512]].tolist())

# %% [markdown]
# One table serves all layers: the first layer owns it and the others are handed its bias. In T5-XXL, FLUX.1's, it is
# the same table of 32 buckets up to a distance of 128, for 64 heads; FLUX.1-dev's 512 tokens reach four times as far.
#
# ## See it
#
# What did the heads of the miniature learn to look for?

# %%
owner = t5.encoder.block[0].attention
bias = owner.bias(32)[0].cpu()  # [H, 32, 32]
offsets = range(-12, 13)
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
for head, colour in enumerate(("#0072B2", "#D55E00", "#009E73", "#CC79A7")):
    ax.plot(offsets, [float(bias[head, 15, 15 + o]) for o in offsets], "o-", ms=3, color=colour, label=f"head {head}")
ax.axvline(0, color="0.7", linewidth=1)
ax.set_xlabel("place of the key minus place of the query, in tokens")
ax.set_ylabel("added to the score")
ax.set_title("Every head prefers near tokens, most of all the neighbours")
ax.legend(fontsize=8)
plt.show()
near = bias[:, 15, [13, 14, 16, 17]].amax(dim=1)
distant = bias[:, 15, [8, 9, 21, 22]].amax(dim=1)
favour = int((near > distant).sum())
print("heads that favour a neighbour over all that is 6 or 7 tokens away:", favour, "of", len(near))

# %% [markdown]
# Now the probes. Captions with their facts are made by the hundred; the vectors of every shape's token are taken after
# each block, and a linear map is fitted by least squares on some captions and tried on others.


# %%
def layers(ids: Tensor) -> list[Tensor]:
    """The token vectors before any block, after each, and after the last norm: `[B, L, D]` each."""
    x = t5.shared(ids)
    kept, shared_bias = [x], t5.encoder.block[0].attention.bias(ids.shape[1])
    for block in t5.encoder.block:
        x = block(x, shared_bias)
        kept.append(x)
    return [*kept, t5.encoder.final_layer_norm(x)]


def facts(number: int) -> tuple[list[Tensor], Tensor]:
    """Shapes' token vectors by layer, `[N, D]` each, and the facts of their things, `[N, 7]`."""
    captions = [caption(sample_scene(rng), rng) for _ in range(number)]
    ids = tokenizer([text for text, _ in captions])
    labels = torch.full((*ids.shape, len(TAGS)), -1)
    for row, (text, claim) in zip(labels, captions):
        pieces = tokenizer.pieces(text)
        row[: len(pieces)] = torch.from_numpy(tags_of(claim, pieces))
    shapes = torch.tensor([tokenizer.fast.token_to_id("▁" + form) for form in FORMS[:6]])
    here = torch.isin(ids, shapes) & (labels[..., 0] >= 0)
    return [x.cpu()[here] for x in layers(ids.to(device))], labels[here]


def probe(vectors: Tensor, answers: Tensor, other: Tensor, wanted: Tensor, classes: int) -> float:
    """Fit on `vectors [N, D]` and `answers [N]`; the share of `wanted` that is read off `other`."""
    x = F.pad(vectors / vectors.norm(dim=-1).mean(), (0, 1), value=1.0).double()  # with a constant: [N, D + 1]
    map_ = torch.linalg.solve(x.T @ x + 0.01 * torch.eye(x.shape[1]), x.T @ F.one_hot(answers, classes).double())
    y = F.pad(other / vectors.norm(dim=-1).mean(), (0, 1), value=1.0).double()
    return float(((y @ map_).argmax(dim=1) == wanted).float().mean())


rng = np.random.default_rng(3)
seen, known = facts(500)
unseen, true = facts(200)
questions = {"which colour?": (0, len(COLORS)), "which size?": (2, 3), "left of something?": (3, 2)}
share = {}
for question, (column, classes) in questions.items():
    pairs = zip(seen, unseen)  # layer by layer
    share[question] = [probe(a, known[:, column], b, true[:, column], classes) for a, b in pairs]

fig, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
names = ["words\nalone", *(f"after\nblock {i}" for i in range(len(t5.encoder.block))), "after the\nlast norm"]
for (question, values), colour, mark in zip(share.items(), ("#0072B2", "#009E73", "#D55E00"), "os^"):
    ax.plot(names, [100 * v for v in values], f"{mark}-", color=colour, label=question, alpha=0.85)
ax.set_ylim(0, 103)
ax.set_ylabel("tokens read right, %")
ax.set_title("A shape's token learns its colour in the first block, its side later")
ax.legend(fontsize=8, loc="lower right")
plt.show()
colour, side = share["which colour?"], share["left of something?"]
alone.against(min((12, 50, 100), key=lambda percent: abs(percent - 100 * colour[0])))


def first(values: list[float]) -> int:
    """After how many blocks nineteen of twenty are right."""
    return next((i for i, value in enumerate(values) if value > 0.95), len(values))


sides.against("colour" if first(colour) < first(side) else "side")
print("blocks until 95% are right: colour", first(colour), "· side", first(side))

# %% [markdown]
# Before any block the token *circle* is the word *circle* and nothing else, so its colour is a guess. (Its side is
# guessed better, because most things are left of nothing: always saying no is right for most.) The colour
# stands next door and is fetched at once. The side takes more: that there is a *left of* must be read first, and
# then whose it is.
#
# The miniature's T5 was trained with this in mind: beside filling in missing words it had to name the colour, size and
# sides of every thing, which `fluxedu/nano/training/t5.py` explains. FLUX.1's T5-XXL learned from missing words in a
# great deal of text (arXiv 1910.10683). This is what such a lesson looks like: spans go, a numbered mark stands for each,
# and the answer lists what went. No picture is in it anywhere, where CLIP was taught by nothing else.

# %%
words = t5_tokenizer()
marks = [words.convert_tokens_to_ids(f"<extra_id_{i}>") for i in range(4)]
corrupted, wanted = corrupt(words(prompt).input_ids, np.random.default_rng(6), marks)
print("read: ", *words.convert_ids_to_tokens(corrupted))
print("write:", *words.convert_ids_to_tokens(wanted))

# %% [markdown]
# Which words come together, and when? Choose a layer and two tokens; each row is shaded by what is like the other
# row's choice.

# %%
tokens(pipe, prompt)

# %% [markdown]
# ## Put yours into the trained model
#
# Your norm, your gated MLP and an attention made of your `attend` and your `buckets` take the places of T5's, in all
# blocks. The attention's class is only the frame: it splits heads and owns the table.


# %%
class Attention(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.config = c = old.config
        for name in ("q", "k", "v"):
            self.add_module(name, nn.Linear(c.d_model, c.num_heads * c.d_kv, bias=False))
        self.o = nn.Linear(c.num_heads * c.d_kv, c.d_model, bias=False)
        if hasattr(old, "relative_attention_bias"):  # the first layer's
            self.relative_attention_bias = nn.Embedding(c.relative_attention_num_buckets, c.num_heads)

    def bias(self, length: int) -> Tensor:  # [1, H, L, L]
        rows = buckets(length, self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance)
        table = self.relative_attention_bias
        return table(rows.to(table.weight.device)).permute(2, 0, 1)[None]

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # [B, L, D]
        heads = self.config.num_heads
        q, k, v = (proj(x).unflatten(-1, (heads, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        return self.o(attend(q, k, v, bias).transpose(1, 2).flatten(2))  # [B, H, L, d] -> [B, L, H d]


if done:
    with (
        fe.swap("t5.*norm", lambda old: RMSNorm(len(old.weight), old.eps), pipe),
        fe.swap("t5.*.DenseReluDense", lambda old: GatedMLP(old.wi_0.in_features, old.wi_0.out_features), pipe),
        fe.swap("t5.*.SelfAttention", lambda old: Attention(old), pipe),
    ):
        again = pipe(prompt, seed=4, progress=False)
    far = (again.latents - picture.latents).norm() / picture.latents.norm()
    print("the latent stays the same to 1 in 1,000:", bool(far < 1e-3))
else:
    print("solve the exercises above first; then run this cell again")

# %% [markdown]
# ## Break it
#
# **No bias.** Set the table to zero and T5 has no idea of order left. Two prompts with the same words then give the
# same vectors, token for token, only in another order; and since FLUX is blind to that order, they must give one
# picture.

# %%
A = prompt
B = "a blue square left of a red circle on a white background"
ids = tokenizer([A, B]).to(device)
same_words = ids[0, :count].sort().values.equal(ids[1, :count].sort().values)
order = [ids[row].argsort(stable=True) for row in (0, 1)]  # bring both prompts' tokens into one order


def apart(states: Tensor) -> float:
    """How far the two prompts' bags of vectors are from each other, beside their size."""
    a, b = (states[row][order[row]] for row in (0, 1))
    return float((a - b).norm() / b.norm())


table = owner.relative_attention_bias.weight
kept = table.clone()
with_bias = t5(ids)
table.zero_()
without = t5(ids)
table.copy_(kept)
print("the two prompts have the same words:", same_words)
print("with the bias their vectors are the same bag:", apart(with_bias) < 1e-4)
print("without it:", apart(without) < 1e-4)
mirrored.against("no" if apart(without) < 1e-4 else "yes")


def drawn(text: str, states: Tensor, seed: int = 4):
    """The picture of a prompt, with other T5 vectors in the place of its own."""
    with fe.intervene("sample.txt", lambda x, ctx: states[None]):
        return pipe(text, seed=seed, progress=False)


fig, axes = plt.subplots(1, 4, figsize=(9, 2.7), layout="constrained")
outs = [drawn(A, with_bias[0]), drawn(A, with_bias[1]), drawn(A, without[0]), drawn(A, without[1])]
names = ["red circle left of\nblue square", "blue square left of\nred circle"] * 2
for ax, out, name, bias_is in zip(axes, outs, names, ("bias", "bias", "no bias", "no bias")):
    ax.imshow(out.images[0])
    ax.set_title(f"{name}\n{bias_is}", fontsize=9)
    ax.axis("off")
fig.suptitle("Without the bias both sentences give one and the same picture")
plt.show()
same = (outs[2].latents - outs[3].latents).norm() / outs[3].latents.norm()
print("no bias, both prompts: the latent is the same to 1 in 100:", bool(same < 0.01))

# %% [markdown]
# (CLIP read the first prompt for all four, so that T5 alone makes the difference.) This is what is meant by: *T5 has
# put the order into the vectors*. The bias is the only door by which it came in.
#
# **Small changes of the parts.** Each is a mistake that somebody makes when they write T5 from memory.


# %%
def moved(states: Tensor) -> float:
    return float((states - with_bias).norm() / with_bias.norm())


class Scaled(Attention):
    def bias(self, length):
        rows = distance_buckets(length, self.config, self.o.weight.device)
        return self.relative_attention_bias(rows).permute(2, 0, 1)[None]

    def forward(self, x, bias):
        heads = self.config.num_heads
        q, k, v = (proj(x).unflatten(-1, (heads, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # divides by the root of d
        return self.o(mixed.transpose(1, 2).flatten(2))


class WithMean(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(len(old.weight))), old.eps

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, None, self.eps)


class MLP(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.wi_0, self.wi_1, self.wo = (
            nn.Linear(m.in_features, m.out_features, bias=False) for m in (old.wi_0, old.wi_1, old.wo)
        )


class NoGate(MLP):
    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh"))


class Exact(MLP):
    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x)) * self.wi_1(x))


breaks = {
    "scores divided by √d": ("t5.*.SelfAttention", Scaled),
    "no gate": ("t5.*.DenseReluDense", NoGate),
    "LayerNorm": ("t5.*norm", WithMean),
    "GELU with erf": ("t5.*.DenseReluDense", Exact),
}
outs = {"as it is": picture}
for name, (where, new) in breaks.items():
    with fe.swap(where, lambda old: new(old), pipe):
        states = t5(ids)
    outs[name] = drawn(A, states[0])
    by = moved(states)
    size = "much: over a third" if by > 1 / 3 else "a little: over a twentieth" if by > 0.05 else "less than 1 in 1,000"
    print(f"{name:22} the vectors move {size}")

fig, axes = plt.subplots(1, 5, figsize=(9.5, 2.4), layout="constrained")
for ax, (name, out) in zip(axes, outs.items()):
    ax.imshow(out.images[0])
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle("Two of the four mistakes ruin the picture, two can hardly be seen")
plt.show()

# %% [markdown]
# The last two are the dangerous ones: nothing looks wrong, and every picture is a little other than it should be.
#
# **No padding.** The miniature's prompts are padded to 32 tokens, FLUX.1-dev's to 512. T5 is given no mask, so every
# word looks at the padding too. What if it were not there?

# %%
short = t5(ids[:1, :count])  # the words only
shift = float((short[0] - with_bias[0, :count]).norm() / short.norm())
pads.against("stay" if shift < 0.001 else "move a little" if shift < 0.1 else "move a lot")
unpadded = with_bias[0].clone()
unpadded[:count] = short[0]
out = drawn(A, unpadded)
things = [{(t.color, t.form) for t in read(o.images[0]).things} for o in (picture, out)]
print("with the words' vectors of the unpadded prompt the same things are drawn:", things[0] == things[1])

# %% [markdown]
# The vectors move by a quarter, because each of the 13 words also attended to 19 paddings, and the picture hardly minds. But a model that was trained with padding has
# never seen it gone, in the text encoder or in its own attention; adding a mask is no free improvement.
#
# ## In five lines
#
# 1. T5 gives a vector per token, and every token has read every other.
# 2. Order comes in by a bias on the scores, a number for each distance and head; without it a prompt is a bag.
# 3. RMSNorm, a gated MLP, scores without 1/√d: other choices would do, but the weights fit only these.
# 4. The vector of a shape's word holds its colour after one block, its side after a few.
# 5. FLUX needs that: it cannot see the order of the tokens itself.
#
# **People ask**: *Is there a padding mask?* (flux pull requests 507, 511 and 512 propose one) No, neither in T5 nor in FLUX: padding takes
# part like words. *How long may a prompt be?* 256 tokens for schnell, 512 for dev, 128 for fill, padded to exactly
# that. *Why two encoders?* One says what kind of picture it is and the other which thing is where; notebook 02
# measured how little the first knows of that.
#
# **Read**: T5, arXiv 1910.10683 · GLU variants, arXiv 2002.05202 · RMSNorm, arXiv 1910.07467 · padding in
# text-to-image models, arXiv 2501.06751 · `transformers`, `modeling_t5.py` · ours: `fluxedu/models/t5.py`.

# %%
fe.score()
