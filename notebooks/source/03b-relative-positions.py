# %% [markdown]
# # 03b · Relative positions and probes
#
# **What do T5's token vectors contain?** FLUX gives all text tokens the same position, so it cannot see their order.
# That the circle is red and stands on the left must therefore be contained *in the vectors*; we look for it in that of
# the token *circle*. You will write the part that tells T5 about order, read facts from the vectors with a linear
# map, and write a fact into a vector.
#
# Afterwards you can compute a relative position bias, test with a probe and a control whether a vector contains a fact,
# and say why reading a fact is not yet a proof that the model uses it.
#
# 60 minutes · needs notebook 03

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fluxedu as fe
from fluxedu import course
from fluxedu.course import evidence
from fluxedu.models.t5 import distance_buckets
from fluxedu.nano.judge import detect
from fluxedu.nano.scenes import COLORS, SHAPES
from fluxedu.nano.text_tasks import captions_with_facts

device = course.begin()
_ = torch.set_grad_enabled(False)  # nothing is trained here, except linear maps
pipe = fe.load(device=device)
t5, tokenizer = pipe.prompt_encoder.t5, pipe.prompt_encoder.t5_tokenizer
prompt = "a red circle left of a blue square on a white background"
course.where(pipe, "t5", "in")

# %% [markdown]
# ## Predict
#
# A *probe* is a linear map from a vector to an answer. If it answers correctly for captions that it was not fitted to,
# the vector contains the fact. The probes below get the vector of a **shape's** token, such as *circle*, and answer a
# question about that object: its colour, or whether the caption says that it is left of something.
#
# The third question is about T5's *position bias*, a number that is added to each attention score and depends on the
# distance between the two tokens.

# %%
colour_before = fe.predict(
    "Before any block, which is nearest to the percentage of right colours: 12 (chance), 50 or 100?", 12
)  # answer
first_fact = fe.predict(
    "Which does a shape's vector contain after fewer blocks: 'colour' or 'side'?", "colour"
)  # answer
order_visible = fe.predict(
    "Without the position bias, do T5's vectors for “A left of B” and “B left of A” differ: 'yes' or 'no'?", "no"
)  # answer

# %% [markdown]
# ## Build it
#
# T5 has no position vectors and no rotary positions. It has a table with one row per **bucket** (a range of distances
# between two tokens) and one column per attention head; the entry is added to the score. Each short distance has a
# bucket of its own, while several longer distances share one. With $b$ for the table's entry,
#
# $$P_{ij} = \mathrm{softmax}_j\big( q_i \cdot k_j + b_{\mathrm{bucket}(j - i)} \big)$$
#
# Only the difference $j - i$ enters, so the attention does not depend on where in the prompt a phrase stands. Adding
# $b$ multiplies a key's weight by $e^b$ before the row is normalised. Here are three keys with equal products, and a
# bias that prefers the previous token:

# %%
products = torch.zeros(3)  # q·k of one query, token 2, with the keys of tokens 0, 1 and 2
bias_by_offset = {-2: 0.0, -1: 1.0, 0: -1.0}  # key's position minus query's position
bias = torch.tensor([bias_by_offset[key - 2] for key in range(3)])
print("weights without the bias:", [round(w, 2) for w in products.softmax(0).tolist()])
print("weights with the bias:   ", [round(w, 2) for w in (products + bias).softmax(0).tolist()])

# %% [markdown]
# Now the buckets. In each direction, let $n$ be half the number of that direction's buckets. Distances below $n$ have a
# bucket each. For longer distances, up to $m$, the bucket number grows with the logarithm of the distance $r$:
#
# $$\mathrm{bucket}(r) = n + \left\lfloor n\, \frac{\log(r / n)}{\log(m / n)} \right\rfloor \qquad (n \le r < m)$$

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
# ## Put your code into the trained model
#
# At the site `bias` of T5's first block, `fe.intervene` replaces the bias by one from your buckets and the trained
# table. The image must stay the same. Then we plot which distances the heads prefer.

# %%
first_attention = t5.encoder.block[0].attention
reference = pipe(prompt, seed=4, progress=False)


def bias_from_buckets(old: Tensor, ctx) -> Tensor:
    """The bias `[1, H, L, L]`, from your buckets."""
    rows = buckets(old.shape[-1], t5.config.relative_attention_num_buckets, t5.config.relative_attention_max_distance)
    return first_attention.relative_attention_bias(rows.to(old.device)).permute(2, 0, 1)[None]


if fe.passed("t5.buckets"):
    with fe.intervene("t5.*.bias", bias_from_buckets):
        out = pipe(prompt, seed=4, progress=False)
    course.compare("the latent with your buckets and with the library's", out.latents, reference.latents, within=1e-3)

# %%
bias = first_attention.bias(32)[0].cpu()  # [H, 32, 32]
offsets = range(-12, 13)
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
for head, colour in enumerate(("#0072B2", "#D55E00", "#009E73", "#CC79A7")):
    ax.plot(offsets, [float(bias[head, 15, 15 + o]) for o in offsets], "o-", ms=3, color=colour, label=f"head {head}")
ax.axvline(0, color="0.7", linewidth=1)
ax.set(xlabel="position of the key minus position of the query, in tokens", ylabel="bias added to the score")
near, distant = bias[:, 15, [13, 14, 16, 17]].amax(dim=1), bias[:, 15, [8, 9, 21, 22]].amax(dim=1)
prefer_near = int((near > distant).sum())
ax.set_title(f"{prefer_near} of {len(near)} heads prefer neighbours to tokens that are 6 or 7 tokens away")
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## See it
#
# Now the probes. Let $X$ have one row per training vector, with a 1 appended, and $Y$ the right answers, 1 for the
# right class and 0 for the others. The probe minimises the squared error, plus a small penalty $\lambda$ on the weights
# (a *ridge*), so that it cannot use directions that hardly vary. Setting the derivative to zero gives its weights:
#
# $$\min_W \lVert X W - Y \rVert^2 + \lambda \lVert W \rVert^2 \quad\Longrightarrow\quad
# W = (X^T X + \lambda I)^{-1} X^T Y$$

# %% exercise="t5.probe"

# %% [markdown]
# We generate captions with known facts, take the vector of every shape's token after each block, fit your probe to
# some captions, and test it on others. The control gets shuffled answers, so it can only guess.


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
    ids, is_shape, facts = captions_with_facts(tokenizer, number, rng)
    return [x.cpu()[is_shape] for x in states_by_layer(ids.to(device))], facts


def accuracy_by_block(targets: Tensor, column: int, classes: int) -> np.ndarray:
    """The accuracy of your probe on the test captions, in percent, for each depth."""
    accuracies = []
    for x, test in zip(train_x, test_x):
        size = x.norm(dim=-1).mean()
        guesses = probe((x / size).double(), targets, (test / size).double(), classes, 0.01).argmax(dim=1)
        accuracies.append(100 * float((guesses == test_y[:, column]).double().mean()))
    return np.array(accuracies)


rng = np.random.default_rng(3)
train_x, train_y = shape_vectors(500)
test_x, test_y = shape_vectors(200)
if fe.passed("t5.probe"):
    fig, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
    names = ["embedding\nalone", *(f"after\nblock {i}" for i in range(len(t5.encoder.block))), "after the\nlast norm"]
    needed = {}  # number of blocks for an accuracy above 95 %
    questions = {"which colour?": (0, len(COLORS)), "which size?": (2, 3), "left of something?": (3, 2)}
    for line, (question, (column, classes)) in enumerate(questions.items()):
        answers = train_y[:, column]
        values = accuracy_by_block(answers, column, classes)
        shuffled = [answers[torch.randperm(len(answers))] for _ in range(5)]
        control = np.mean([accuracy_by_block(targets, column, classes) for targets in shuffled], axis=0)
        ax.plot(names, values, "os^"[line] + "-", color=f"C{line}", label=question)
        ax.plot(names, control, "os^"[line] + ":", color=f"C{line}", alpha=0.5)
        needed[question] = int((values > 95).argmax())
        print(
            f"{question:18}",
            *(f"{v:4.0f}" for v in values),
            f"%   control: {control.min():.0f} to {control.max():.0f} %",
        )
        if question == "which colour?":
            colour_before.against(min((12, 50, 100), key=lambda percent: abs(percent - values[0])))
    colour, side = needed["which colour?"], needed["left of something?"]
    first_fact.against("colour" if colour < side else "side")
    ax.set(ylim=(0, 103), ylabel="probe accuracy, %")
    ax.set_title(f"For 95 % accuracy, the colour needs {colour} block and the side {side} (dotted: control)")
    ax.legend(fontsize=8, loc="lower right")
    plt.show()

# %% [markdown]
# Before any block the token *circle* has the same vector in every caption, so its colour can only be guessed. (The side
# can be guessed better: most objects are not left of anything, so “no” is usually right, for the control too.) The
# colour is in the neighbouring token, and one block is enough to copy it. The side needs more blocks: the model has to
# find that there is a *left of*, and then which object it belongs to.
#
# The miniature's T5 was trained with this in mind: it also had to name the colour, size and sides of every object (see
# `training/t5.py`). FLUX.1's T5-XXL was trained only to fill in missing words.
#
# ## Write a fact into a vector
#
# A probe shows that a fact *can be read*. Does FLUX read it? Change the fact in the vector of one token and look at the
# image. The direction is the difference of two means: vectors of shapes that are green, minus vectors of the same
# shapes when they are red.

# %% exercise="t5.steer"

# %%
others = [f"{form} {side} a blue cross" for form in SHAPES for side in ("left of", "right of", "above", "below")]
noun = len(tokenizer.pieces("a red circle")) - 2  # the last token before the end token
red, green = (t5(tokenizer([f"a {color} {text}" for text in others]).to(device))[:, noun] for color in ("red", "green"))
tests = ["a red circle left of a blue square", "a red star above a yellow ring", "a red triangle below a purple cross"]
settings = {"seed": [0, 0, 0], "steps": 8, "trajectory": False, "progress": False}
if fe.passed("t5.steer"):
    with fe.intervene("sample.txt", lambda txt, ctx: steer(txt, noun, red, green)):
        steered = pipe(tests, **settings).images
    fig, axes = plt.subplots(2, 3, figsize=(6, 4.4), layout="constrained")
    for ax, image, text in zip(axes.flat, pipe(tests, **settings).images + steered, tests * 2):
        ax.imshow(image)
        ax.set_title(text, fontsize=7)
        ax.axis("off")
    fig.suptitle("Moving one token's vector from red to green recolours its shape (below)", fontsize=10)
    plt.show()
    for text, image in zip(tests, steered):
        print(f"{text:36} steered:", ", ".join(sorted(f"{o.color} {o.form}" for o in detect(image).objects)))

# %% [markdown]
# Is it a rule? Here are 40 other prompts, each with its own seed and with other colours. One control adds a random
# vector of the same length. (In brackets 95 % intervals.)

# %%
for change, row in evidence.load("recolour").items():
    print(change)
    for what, entry in row.items():
        print(f"    {what:38}", evidence.percent(entry))

# %% [markdown]
# So the miniature takes a shape's colour from the vector of the shape's token. The fact that the probe reads there is
# contained in a direction that is also used: the difference of means.
#
# ## Break it
#
# Without the bias T5 has no information about order. Two prompts with the same words then get the same vectors, only in
# another order; and since FLUX does not see the order of text tokens, both must give the same image if CLIP's vector is
# the same.

# %%
A = prompt
B = "a blue square left of a red circle on a white background"
ids = tokenizer([A, B]).to(device)
order = ids.argsort(dim=1, stable=True)  # sorts both prompts' tokens in the same way
assert ids[0, order[0]].equal(ids[1, order[1]]), "the two prompts must have the same words"


def difference_without_order(states: Tensor) -> float:
    """Relative difference between the two prompts' vectors, whatever the order of their tokens."""
    a, b = (states[row][order[row]] for row in (0, 1))
    return float((a - b).norm() / b.norm())


with_bias = t5(ids)
with fe.intervene("t5.*.bias", lambda bias, ctx: 0 * bias):
    without_bias = t5(ids)
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
# (CLIP got the first prompt for all four images, so that only T5 makes a difference.) The bias is the only way in which
# the order enters T5.
#
# ## In five lines
#
# 1. Order enters T5 through a bias on the scores, one number per bucket of distances and head.
# 2. Without the bias T5 cannot see the order of the words, and its tokens give FLUX no order.
# 3. In the miniature the vector of a shape's token contains its colour after one block, and its side after three.
# 4. A probe needs a control and captions that it was not fitted to; it shows what can be read, not what is used.
# 5. Moving one token's vector along a difference of means recolours the shape: this fact is used.
#
# **Questions people ask**: *Why are all of FLUX's text ids zero?* (flux issue 71) The usual explanation is that T5's
# vectors contain the order already. *Why not move along the
# probe's weights?* They separate the classes, but do not have to lie on the line from one class to the other (arXiv
# 2306.03341 compares both directions in a language model).
#
# **Read**: T5, arXiv 1910.10683, section 2.1 · relative positions, arXiv 1803.02155 · probes and their controls, arXiv
# 1909.03368 · `transformers`, `modeling_t5.py` · ours: `fluxedu/models/t5.py` and `evidence/recolour.py`.

# %%
fe.score()
