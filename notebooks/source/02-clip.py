# %% [markdown]
# # 02 · CLIP's text encoder
#
# **How does a whole prompt become one vector?** FLUX encodes a prompt twice. CLIP, the first text encoder, gives a
# single vector for the whole prompt, the *pooled vector*. You will build the parts that make this vector, put them into
# the trained model, and measure what the image takes from it.
#
# Afterwards you can say which token the vector is taken from and why, explain a causal mask with numbers, and say what
# CLIP's prompt and what T5's prompt contribute to an image.
#
# 60 minutes · needs notebook 00b

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.course import evidence
from fluxedu.nano.judge import detect

device = course.begin()
_ = torch.set_grad_enabled(False)  # nothing is trained here
pipe = fe.load(device=device)
clip, tokenizer = pipe.prompt_encoder.clip, pipe.prompt_encoder.clip_tokenizer
prompt = "a red circle left of a blue square"
course.where(pipe, "clip", "vec")

# %% [markdown]
# CLIP's vector is added to the embeddings of the time and the guidance scale. The sum is called `vec`, and every block
# of the transformer computes its shifts, scales and gates from it (notebook 05b). The vector is not a token, so no
# patch can attend to it.
#
# ## Predict

# %%
earlier_changes = fe.predict(
    "Another word ends the prompt. Which token vectors before it change in CLIP: 'none', 'some' or 'all'?", "none"
)  # answer
other_states = fe.predict(
    "All of CLIP's token states but that of the first end token are replaced by noise. Is the image the same: 'yes' "
    "or 'no'?",
    "yes",
)  # answer
drawn_prompt = fe.predict(
    "T5 and CLIP get different prompts. Whose prompt is drawn: 'T5', 'CLIP' or 'neither'?", "T5"
)  # answer

# %% [markdown]
# ## Build it
#
# CLIP's text encoder is a small transformer. Each layer has attention and an MLP (two linear layers with an activation
# function in between), and both outputs are added to their input. It differs from other transformers in two details.
# The first is an activation function that is cheap to compute. The GELU weights a number $x$ by the probability
# $\Phi(x)$ that a standard normal number is smaller than $x$; a logistic function $\sigma$ with the factor 1.702 is
# never more than 0.01 away from this probability:
#
# $$\mathrm{GELU}(x) = x\, \Phi(x) \approx x\, \sigma(1.702\, x), \qquad \sigma(z) = \frac{1}{1 + e^{-z}}$$

# %% exercise="clip.quick_gelu"

# %% [markdown]
# The second is a causal mask: a token attends only to itself and to the tokens **before** it, as in a language model
# that generates text. Here is attention among three tokens, first without a mask. Each row belongs to one query. Its
# scores are the products with the three keys, divided by the root of the vectors' width, and the softmax turns them
# into weights that sum to 1:

# %%
q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # three queries of width 2
k = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])  # three keys
scores = q @ k.T / 2**0.5
mask = torch.tensor([[0.0, -torch.inf, -torch.inf], [0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
print("scores, weights without a mask, weights with the mask:")
for row, free, masked in zip(scores, scores.softmax(dim=-1), (scores + mask).softmax(dim=-1)):
    print("   ".join("  ".join(f"{x:.2f}" for x in part.tolist()) for part in (row, free, masked)))

# %% [markdown]
# The mask is added to the scores. Since $e^{-\infty} = 0$, a masked key gets a weight of exactly 0, and the remaining
# weights of the row grow so that they sum to 1 again. The first token attends only to itself. The third row has no
# masked key, so it does not change. As a formula, with $d$ for the width of a head:
#
# $$P_{ij} = \mathrm{softmax}_j\left(\frac{q_i \cdot k_j}{\sqrt d} + M_{ij}\right), \qquad
# M_{ij} = \begin{cases} 0 & j \le i \\ -\infty & j > i \end{cases}$$
#
# CLIP never generates text. The mask has another consequence here: only the last token can have information about the
# whole prompt.
#
# Each key also has a *value*, and the output for a query is the sum of the values, weighted by its row of $P$. Several
# *heads* do this side by side, each with a part of the channels of q, k and v. Before each layer, a LayerNorm subtracts
# from every token the mean of its channels and divides by their standard deviation.

# %% exercise="clip.CausalAttention"

# %%
if fe.passed("clip.CausalAttention"):
    theirs = clip.text_model.encoder.layers[0].self_attn
    mine = CausalAttention(clip.config.hidden_size, clip.config.num_attention_heads).to(device, pipe.dtype)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, clip.config.hidden_size).to(device, pipe.dtype)
    course.compare("your attention and the library's", mine(x), theirs(x))

# %% [markdown]
# CLIP adds an end token to the prompt, and the pooled vector $v$ is the state of that token after the last LayerNorm.
# CLIP also fills short prompts with end tokens, the *padding*, so it matters **which** end token is taken. With $x_i$
# for the state of token $i$ after the last layer:
#
# $$v = \mathrm{LayerNorm}(x_e), \qquad e = \min\,\{\, i : \mathrm{id}_i = \mathrm{end} \,\}$$

# %% exercise="clip.pooled"

# %%
ids = tokenizer([prompt, "a letter K"]).to(device)
print("ids of the prompt:", ids[0, :12].tolist(), "...")
print("the end token is", clip.config.eos_token_id, "· a vector has", clip.config.hidden_size, "numbers")
states, vector = clip(ids)
if fe.passed("clip.pooled"):
    course.compare("your pooled vectors and the library's", pooled(states, ids, clip.config.eos_token_id), vector)

# %% [markdown]
# FLUX.1 does the same with CLIP-L: 12 layers, 77 token positions, a vector of 768 numbers.
#
# ## See it
#
# The effect of the causal mask: we replace the last word and measure how much each token's vector changes, in CLIP and
# in T5, which has no mask.

# %%
other = prompt.replace("square", "star")
encoder = pipe.prompt_encoder
changes = {}
for name, network, its_tokenizer in (("CLIP", clip, tokenizer), ("T5", encoder.t5, encoder.t5_tokenizer)):
    out = network(its_tokenizer([prompt, other]).to(device))
    before, after = out[0] if name == "CLIP" else out  # [L, D] each; CLIP returns (states, pooled)
    pieces = [piece.replace("</w>", "").lstrip("▁") for piece in its_tokenizer.pieces(prompt)]
    changes[name] = (pieces, ((after - before).norm(dim=-1) / before.norm(dim=-1))[: len(pieces)].float().cpu())

fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
for ax, (name, (pieces, change)) in zip(axes, changes.items()):
    ax.bar(range(len(pieces)), 100 * change, color=["#D55E00" if piece == "square" else "#0072B2" for piece in pieces])
    ax.set_xticks(range(len(pieces)), [piece.strip("<|>") for piece in pieces], rotation=60)
    ax.set_title(name)
axes[0].set_ylabel("change of the vector, %")
n_t5 = len(changes["T5"][0])
fig.suptitle(f"“square” becomes “star”: in CLIP only this and later tokens change, in T5 all {n_t5} tokens do")
plt.show()
pieces, change = changes["CLIP"]
changed_position = pieces.index("square")
changed = change[:changed_position] > 1e-5
earlier_changes.against("all" if changed.all() else "some" if changed.any() else "none")
print("number of T5's tokens that stay the same:", int((changes["T5"][1] < 1e-3).sum()))

# %% [markdown]
# ## Put your code into the trained model
#
# `fe.swap` replaces modules by yours and copies the trained weights into them. Here it puts your attention, and an MLP
# with your activation function, into every layer of CLIP. `fe.intervene` replaces the value at a *site* (a named point
# in the model) by the result of your pooling. The image must stay the same.


# %%
class MLP(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.fc1 = nn.Linear(old.fc1.in_features, old.fc1.out_features)
        self.fc2 = nn.Linear(old.fc2.in_features, old.fc2.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


clip_states = {}


def remember(states, ctx):
    clip_states["latest"] = states
    return states


def your_pooling(vector, ctx):
    return pooled(clip_states["latest"], tokenizer([prompt]).to(device), clip.config.eos_token_id)


reference = pipe(prompt, seed=4, progress=False)
if fe.passed("clip.quick_gelu", "clip.CausalAttention", "clip.pooled"):
    with (
        fe.swap("clip.*.self_attn", lambda old: CausalAttention(old.q_proj.in_features, old.num_heads), pipe),
        fe.swap("clip.*.mlp", lambda old: MLP(old), pipe),
        fe.intervene("clip.states", remember),
        fe.intervene("clip.pooled", your_pooling),
    ):
        out = pipe(prompt, seed=4, progress=False)
    course.compare("the latent with your code and with the library's", out.latents, reference.latents, within=1e-3)

# %% [markdown]
# CLIP also produces one state per token, and Stable Diffusion used all of them. FLUX uses one. Replace all others by
# noise, and the image stays the same to the last bit:

# %%
end = pipe.prompt_encoder.clip_tokenizer.pieces(prompt).index("<|endoftext|>")


def noise_except_end(states, ctx):
    """Noise in place of the states [1, 32, 96], except that of the end token."""
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
    noise[:, end] = states[:, end]
    return noise


with fe.intervene("clip.states", noise_except_end):
    out = pipe(prompt, seed=4, progress=False)
largest = float((out.latents - reference.latents).abs().max())
print(f"the latent changes by at most {largest:g}")
other_states.against("yes" if largest == 0 else "no")

# %% [markdown]
# ## Break it
#
# **The wrong token, no mask, another activation function.** None of these three mistakes raises an error. We measure
# how much they change the pooled vectors of 40 captions.


# %%
class ExactMLP(MLP):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


colors, forms = ("red", "green", "blue", "yellow", "purple"), ("circle", "square", "star", "ring")
captions = [f"a {c} {f} {side} a cyan cross" for c in colors for f in forms for side in ("left of", "above")]
caption_ids = tokenizer(captions).to(device)
states, vectors = clip(caption_ids)
with fe.swap("clip.*.mlp", lambda old: ExactMLP(old), clip):
    exact_gelu = clip(caption_ids)[1]
layers = [layer.self_attn for layer in clip.text_model.encoder.layers]
for attention in layers:
    attention.causal = False
unmasked = clip(caption_ids)[1]
for attention in layers:
    attention.causal = True


def relative_change(x: Tensor, y: Tensor) -> str:
    """The median over captions and the range of the relative difference between two sets of vectors."""
    change = 100 * ((x - y).norm(dim=1) / y.norm(dim=1)).float().cpu()
    return f"{change.median():.1f} % ({change.min():.1f} to {change.max():.1f})"


print("without the mask the vectors change by", relative_change(unmasked, vectors))
print("with the exact GELU they change by    ", relative_change(exact_gelu, vectors))
others = torch.arange(1, len(captions) + 1) % len(captions)  # each caption is compared with the next
print("two captions differ, at the end token, by  ", relative_change(vectors[others], vectors))
print("two captions differ, at the first token, by", relative_change(states[others, 0], states[:, 0]))

# %% [markdown]
# The first token is the worst choice. It attends only to itself, so its state is the same for every prompt. Code that
# searches for the end token's id and does not find it may silently take position 0; ours raises an error. Notebook 02b
# measures what these mistakes mean for the task that CLIP was trained for.
#
# **Two prompts.** T5 gets one prompt and CLIP another. Which of the two is drawn?

# %%
A, B = "a red circle on a white background", "a blue square on a black background"
texts = {name: pipe.prompt_encoder([name]) for name in (A, B)}
outs = {}
for t5_prompt in (A, B):
    for clip_prompt in (A, B):
        with fe.intervene("sample.pooled", lambda x, ctx: texts[clip_prompt].pooled):
            outs[t5_prompt, clip_prompt] = pipe(t5_prompt, seed=0, progress=False)

fig, axes = plt.subplots(1, 4, figsize=(9, 2.8), layout="constrained")
for ax, ((t5_prompt, clip_prompt), out) in zip(axes, outs.items()):
    ax.imshow(out.images[0])
    ax.set_title(f"T5: {' '.join(t5_prompt.split()[1:3])}\nCLIP: {' '.join(clip_prompt.split()[1:3])}", fontsize=9)
    ax.axis("off")
fig.suptitle("The image follows T5's prompt; CLIP's prompt changes neither shape, colour nor background here")
plt.show()

v = {pair: out.trajectory.velocities[0] for pair, out in outs.items()}  # of the first step, from the same noise
by_clip, by_t5 = (float((v[pair] - v[A, A]).norm() / v[A, A].norm()) for pair in ((A, B), (B, A)))
print(f"exchanging CLIP's prompt changes the first velocity by {by_clip:.0%}, exchanging T5's by {by_t5:.0%}")
detected = detect(outs[A, B].images[0])  # the judge: finds shapes and colours by geometry
found_in_image = (detected.background, *((o.color, o.form) for o in detected.objects))
expected = {"T5": ("white", ("red", "circle")), "CLIP": ("black", ("blue", "square"))}
drawn_prompt.against(next((name for name, scene in expected.items() if found_in_image == scene), "neither"))

# %% [markdown]
# These are four images. Is it a rule? We draw 40 images of two shapes. T5 gets prompt A, CLIP gets prompt B. For each
# image the *judge*, a program of this course that finds shapes and colours, checks 5 *claims* (single statements, such
# as the colour of one shape) of A and 5 of B. Control: both encoders get A. Some claims of B are then true by chance.
# (In brackets, here and on later pages, a 95 % interval: how far the share may be off with so few images. Claims about
# one image are not independent, so here the true interval is wider.)

# %%
for whose, entry in evidence.load("pooled")["claims that hold"].items():
    print(f"{whose:44} true: {evidence.percent(entry)}")

# %% [markdown]
# In the miniature the pooled vector does not decide what is drawn, or where: that comes from T5's tokens.
# How much FLUX.1 depends on its pooled vector is a separate question (arXiv 2602.09268 studies it). The vector cannot
# tell patches apart directly, because it gives the same shifts, scales and gates to all of them.
#
# ## In five lines
#
# 1. CLIP's text encoder is causal: a token attends to itself and to earlier tokens only.
# 2. So the end token is the first one that has attended to the whole prompt.
# 3. FLUX takes that token's state after the last LayerNorm: one vector. The other states are not used.
# 4. Short prompts are padded with end tokens; the first of them counts.
# 5. In FLUX the vector acts through modulation, which is the same for every patch. T5's tokens (notebook 03) are what
#    patches can attend to.
#
# **Questions people ask**: *Is CLIP's output pooled?* (flux issue 64) Yes, at the first end token; the states of the
# other tokens are not used. *Is a long prompt truncated?* CLIP has 77 token positions, and what does not fit is
# dropped, in the official code without a warning (diffusers logs one); T5 still gets it. *Can CLIP and T5 get different
# prompts?* Yes; you have just done so.
#
# **Read**: CLIP, arXiv 2103.00020 · GELU, arXiv 1606.08415 · `transformers`, `modeling_clip.py`, which the official
# code uses · ours: `fluxedu/models/clip.py`.

# %%
fe.score()
