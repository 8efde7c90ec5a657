# %% [markdown]
# # 04 · Rotary positions
#
# **How does a token know where it is?** Attention compares every token with every other and does not use the order.
# FLUX encodes positions by *rotating* queries and keys (the vectors that attention compares). This is called RoPE,
# rotary position embedding. You will write it in a few lines, put it into the trained model, and then break it in five
# ways.
#
# Afterwards you can compute the rotation of any token, say what happens (and why) when all positions are shifted, and
# tell which part of an attention head depends on rows and which on columns.
#
# 60 minutes · needs notebook 00b

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import fluxedu as fe
from fluxedu import course, widgets
from fluxedu.models.attention import rope_table
from fluxedu.models.attention import rotate as library_rotate
from fluxedu.nano.exam import questions as exam_prompts
from fluxedu.nano.judge import judge
from fluxedu.instruments.interventions import positions as change_positions
from fluxedu.sampling.latents import image_ids

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square"
reference = pipe(prompt, seed=4, progress=False)
course.where(pipe, "double", "single")

# %% [markdown]
# The rotation happens inside every block, just before queries are multiplied by keys. Nothing else in the transformer
# depends on the position of a patch (the 2 × 2 latent cells of one image token): without the rotation, the transformer
# could not tell one order of the patches from another.
#
# ## Predict
#
# Each token has a *position id* of three numbers: frame, row and column. Attention works in several *heads*, each with
# its own queries and keys, which are vectors of 32 numbers in the miniature. For the first two questions, a change of
# the velocity (the network's output) below 1 % counts as 'not', and below 10 % as 'a little'.

# %%
rows_shifted = fe.predict(
    "All tokens, text too, move down by 5 rows. How much does the velocity change: 'not', 'a little' or 'much'?", "not"
)  # answer
doubled = fe.predict(
    "All position ids are multiplied by 2. How much does the velocity change: 'not', 'a little' or 'much'?", "much"
)  # answer
rolled_image = fe.predict(
    "Each patch gets the id from 3 columns further right, and the noise from there. What is drawn: 'rolled image' or "
    "'no image'?",
    "rolled image",
)  # answer
frame_numbers = fe.predict("How many of a head's 32 numbers are rotated according to the frame?", 4)  # answer

# %% [markdown]
# ## Build it
#
# The 32 numbers of a query or key form 16 pairs, and each pair belongs to one of the three coordinates. We begin with
# the position ids. (FLUX makes them in `prepare`, `sampling.py` lines 45-48 of `black-forest-labs/flux` at commit
# 802fb47; the line numbers below are of the same commit.)

# %% exercise="rope.ids"

# %% [markdown]
# Each pair rotates at its own frequency. Pair $i$ of a coordinate that has $d$ numbers, at position $m$, rotates by the
# angle
#
# $$\varphi_i(m) = m\, \omega_i, \qquad \omega_i = \theta^{-2i/d}, \qquad \theta = 10\,000$$
#
# The first pair has $\omega_0 = 1$, so it makes a full turn every $2\pi \approx 6.3$ positions; the last one hardly
# moves. Together the pairs are like the hands of a clock: no two positions have the same combination of angles.

# %% exercise="rope.angles"

# %% [markdown]
# Rotating a point of the plane by the angle $\varphi$ is a multiplication by the matrix
#
# $$R(\varphi) = \begin{pmatrix} \cos\varphi & -\sin\varphi \\ \sin\varphi & \cos\varphi \end{pmatrix}$$
#
# The query at position $m$ and the key at position $n$ become $R(m\omega)\, q$ and $R(n\omega)\, k$, and attention
# takes their product. The transpose of a rotation is the rotation back, and angles add up, so
#
# $$\bigl(R(m\omega)\, q\bigr)^T R(n\omega)\, k = q^T R(m\omega)^T R(n\omega)\, k
# = q^T R\bigl((n - m)\,\omega\bigr)\, k$$
#
# The positions themselves cancel; only their difference is left. Try it with one pair of frequency 1:


# %%
def rotation(angle: float) -> Tensor:
    """The matrix R(angle), [2, 2]."""
    a = torch.tensor(angle)
    return torch.stack([torch.stack([a.cos(), -a.sin()]), torch.stack([a.sin(), a.cos()])])


q, k = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
print("without rotation the score is", float(q @ k))
for m, n in ((2.0, 5.0), (7.0, 10.0), (5.0, 2.0)):
    q_m, k_n = rotation(m) @ q, rotation(n) @ k
    rotated = "   ".join(f"({a:5.2f}, {b:5.2f})" for a, b in (q_m.tolist(), k_n.tolist()))
    print(f"query at {m:2g}, key at {n:2g}: {rotated}   score {float(q_m @ k_n):.2f}")

# %% [markdown]
# The two vectors of the first line differ from those of the second, but their scores are equal, since the key is three
# positions after the query in both. In the third line it is three positions *before* the query.

# %% exercise="rope.rotate"
# Source: RoFormer (arXiv 2104.09864). Llama, in most libraries, pairs `x[i]` with `x[i + d/2]`.

# %% [markdown]
# Compare yours with the library's, which stores the rotations as complex numbers:

# %%
config = pipe.flux.config
print("numbers of a head per axis:", dict(zip(("frame", "row", "column"), config.axes_dim)))
frame_numbers.against(config.axes_dim[0])

positions = image_ids(16, 16)  # [64, 3]: 16 x 16 latent cells are 8 x 8 patches
table = rope_table(positions, config.axes_dim)  # complex [1, 64, 16]
x = torch.randn(1, config.num_heads, 64, config.head_dim)  # [1, 5, 64, 32]
if fe.passed("rope.angles", "rope.rotate"):
    mine = torch.cat([angles(positions[:, axis], dim, 10_000.0) for axis, dim in enumerate(config.axes_dim)], dim=-1)
    course.compare("your rotation and the library's", rotate(x, mine), library_rotate(x, table))

# %% [markdown]
# ## See it
#
# A pair of numbers is a point in the plane, which rotates as the position grows. Fast pairs distinguish neighbours,
# slow pairs distinguish near from far.

# %%
pairs = config.axes_dim[2] // 2  # the 7 pairs of the column axis
angle = rope_table(torch.tensor([[0.0, 0.0, c] for c in range(64)]), config.axes_dim)[0, :, -pairs:].angle()
fig, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
heatmap = ax.imshow(angle.T, aspect="auto", cmap="twilight", vmin=-torch.pi, vmax=torch.pi)
ax.set_xlabel("column of the patch")
ax.set_ylabel("pair")
ax.set_title("Fast pairs (top) and slow pairs (bottom) together give every column its own angles")
fig.colorbar(heatmap, label="angle in radians")
plt.show()

# %% [markdown]
# Now all three coordinates. The score of two whole vectors is the sum over their pairs. With $a$ for the coordinate and
# $q_{a,i}$ for pair $i$ of the query among those of coordinate $a$,
#
# $$\tilde q \cdot \tilde k = \sum_a \sum_i q_{a,i}^T\, R\bigl((n_a - m_a)\, \omega_{a,i}\bigr)\, k_{a,i}$$
#
# so a score depends on how many rows and how many columns lie between query and key, and on nothing else about their
# positions. Move the query and the key in the explorer below, and compare. (Tab to an image, then use the arrow keys;
# or use the mouse.)

# %%
widgets.positions(pipe)

# %% [markdown]
# The explorer starts with a query and a key of ones. For these the formula becomes $2 \sum_a \sum_i \cos((n_a - m_a)\,
# \omega_{a,i})$, which is highest where both have the same position. With a trained query and key the maximum may be
# anywhere: a head can learn to attend to "the patch to my left".
#
# The first transformers *added* a position vector $p_m$, made of sines and cosines, to each token (arXiv 1706.03762):
#
# $$(q + p_m) \cdot (k + p_n) = q \cdot k + q \cdot p_n + p_m \cdot k + p_m \cdot p_n$$
#
# Only the last product depends on the difference alone (here without the learned matrices that make q and k from a
# token; with these matrices, not even the last product does); the two in the middle depend on the position of a single
# token. We compute both kinds of score for one random query and key, three positions apart, for fifteen positions of
# the query.

# %%
dim = config.axes_dim[2]
q, k = torch.randn(2, dim, generator=torch.Generator().manual_seed(0)).double()
waves = rope_table(torch.tensor([[0.0, 0.0, c] for c in range(64)]), config.axes_dim)[0, :, -dim // 2 :]  # cos + i sin
q_pairs, k_pairs = torch.view_as_complex(q.view(-1, 2)), torch.view_as_complex(k.view(-1, 2))
scores_added, scores_rotated = [], []
for m in range(0, 60, 4):  # the key is always three positions after the query
    p_m, p_n = (torch.view_as_real(wave).flatten() for wave in (waves[m], waves[m + 3]))
    scores_added.append(float((q + p_m) @ (k + p_n)))
    scores_rotated.append(float((q_pairs * waves[m] * (k_pairs * waves[m + 3]).conj()).real.sum()))
for name, scores in {"rotated": scores_rotated, "added": scores_added}.items():
    print(f"{name:7} at distance three the score is between {min(scores):.2f} and {max(scores):.2f}")

# %% [markdown]
# A rotation is defined for every position, also for positions that no training image had. Can the network draw at these
# positions? The miniature was trained on images of 15,000 to 18,500 pixels with no side above 192. We ask it for four
# times as many pixels, and let the *judge* (a program that checks by geometry what was drawn) count the correct images.
# The prompts are those of the miniature's exam, which it has not seen in training; `claim` lists what a correct image
# must show. There is one seed for each prompt.

# %%
requests = [request for request in exam_prompts(200) if request.size == (128, 128)][:12]
for side in (128, 256):
    prompts, seeds = [r.prompt for r in requests], [r.seed for r in requests]
    images = pipe(prompts, seed=seeds, height=side, width=side, steps=8, trajectory=False, progress=False).images
    correct = sum(judge(image, r.claim).everything for image, r in zip(images, requests))
    print(f"{side} x {side}: {correct} of {len(requests)} images are entirely correct")

# %% [markdown]
# The angles extend to new positions, but the ability to draw does not. New distances need not be the only reason: four
# times as many image tokens also share each softmax. (We also tried all ids halved, in the range of the training, in a
# run that is not shown: none of 12 images at 256 × 256 was correct.) Rotary positions make other sizes *possible*; only
# training makes them good.
#
# ## Put your code into the trained model
#
# A *site* is a named point in the model. At the site `attn.rope` every block receives its rotations. `fe.intervene`
# replaces them by yours, computed from your `ids` and your `angles`. (All text tokens have the position id (0, 0, 0).)
# The image must stay the same.

# %%
if fe.passed("rope.ids", "rope.angles"):
    rows, columns = (cells // 2 for cells in reference.latents.shape[-2:])
    img_ids = ids(rows, columns)  # [64, 3]
    txt_ids = torch.zeros(pipe.prompt_encoder.t5_tokenizer.length, 3)
    all_ids = torch.cat([txt_ids, img_ids])
    all_angles = torch.cat(
        [angles(all_ids[:, axis], dim, 10_000.0) for axis, dim in enumerate(config.axes_dim)], dim=-1
    )
    yours = torch.polar(torch.ones_like(all_angles), all_angles)[None].to(device)
    with fe.intervene("*.attn.rope", lambda rope, ctx: yours.to(rope.dtype)):
        out = pipe(prompt, seed=4, progress=False)
    course.compare("the final latent with your rotations and without", out.latents, reference.latents, within=1e-3)

# %% [markdown]
# Since only the ids carry positions, the order of the tokens itself means nothing. Let $f$ be the network, $x$ the
# image tokens, $p$ their ids, and $\Pi$ any permutation. Attention is a sum over all keys, in whatever order, and
# everything else treats each token by itself, so
#
# $$f(\Pi x, \Pi p) = \Pi\, f(x, p)$$
#
# Test it: tell every patch that it is three columns further right, and give it the noise from there.

# %% exercise="rope.roll"

# %%
if fe.passed("rope.roll"):
    noise = reference.trajectory.latents[0]  # [1, 16, 16, 16]; a patch is 2 x 2 latent cells
    with fe.intervene("*.attn.rope", change_positions(lambda ids: roll(ids, 3))):
        rolled = pipe(prompt, latents=noise.roll(-6, dims=-1), progress=False)
    fig, axes = plt.subplots(1, 2, figsize=(4.6, 2.4), layout="constrained")
    for ax, image, name in zip(axes, (reference.images[0], rolled.images[0]), ("ids as usual", "ids rolled")):
        ax.imshow(image)
        ax.set_title(name, fontsize=9)
        ax.axis("off")
    fig.suptitle("Rolled ids and noise: the same image, cut elsewhere", fontsize=9)
    plt.show()
    rolled_back = rolled.latents.roll(6, dims=-1)
    difference = float((rolled_back - reference.latents).norm() / reference.latents.norm())
    rolled_image.against("rolled image" if difference < 0.01 else "no image")
    course.compare("the latent, rolled back, and the usual one", rolled_back, reference.latents, within=1e-3)

# %% [markdown]
# ## Break it
#
# We change the position ids in five ways (`change_positions` turns a function of the ids into an intervention on the
# rotations). Decide for each, by the formula above, whether a difference of positions changes. We measure how much the
# velocity changes in the middle of a run of four steps, for five prompts and eight seeds each (n = 40), and print the
# median and the range. (`latents=` and `times=` start a run at that state; `stop_after=0` ends it after its first
# step.)

# %%
down = torch.tensor([0.0, 5.0, 0.0])
breaks = {
    "all rows + 5": change_positions(lambda ids: ids + down, text=lambda ids: ids + down),
    "all ids × 2": change_positions(lambda ids: 2 * ids),
    "no rows": change_positions(lambda ids: ids * torch.tensor([1.0, 0.0, 1.0])),
    "no columns": change_positions(lambda ids: ids * torch.tensor([1.0, 1.0, 0.0])),
    "mirrored": change_positions(lambda ids: torch.stack([ids[:, 0], ids[:, 1], ids[:, 2].max() - ids[:, 2]], dim=1)),
}
shapes = ("circle", "star", "triangle", "cross", "ring")
five_prompts = [f"a red {shape} {side} a blue square" for shape, side in zip(shapes, ["left of", "above"] * 3)]
runs = {"seed": list(range(8)) * 5, "decode": False, "progress": False}
prompts = [text for text in five_prompts for _ in range(8)]
trajectory = pipe(prompts, steps=4, **runs).trajectory
state, times = trajectory.latents[2], trajectory.times[2:]  # [40, 16, 16, 16]; from t = 0.75
unchanged = trajectory.velocities[2].flatten(1).float()  # [40, 4096]
changes = {}
for name, change in breaks.items():
    with fe.intervene("*.attn.rope", change):
        v = pipe(prompts, latents=state, times=times, stop_after=0, **runs).trajectory.velocities[0].flatten(1)
    changes[name] = (v - unchanged).norm(dim=1) / unchanged.norm(dim=1)  # [40]
    low, median, high = (float(changes[name].quantile(share)) for share in (0, 0.5, 1))
    print(f"{name:14} the velocity changes by {median:.0%} (from {low:.0%} to {high:.0%})")

medians = [float(change.quantile(0.5)) for change in changes.values()]
for guess, change in zip((rows_shifted, doubled), medians):
    guess.against("not" if change < 0.01 else "a little" if change < 0.1 else "much")

outs = [reference]
for change in breaks.values():
    with fe.intervene("*.attn.rope", change):
        outs.append(pipe(prompt, seed=4, trajectory=False, progress=False))
fig, axes = plt.subplots(1, 6, figsize=(10, 2.1), layout="constrained")
for ax, out, name in zip(axes, outs, ["unchanged", *breaks]):
    ax.imshow(out.images[0])
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle(
    f"A shift of all rows changes nothing; the others change the velocity by {min(medians[1:]):.0%} or more (medians)",
    fontsize=10,
)
plt.show()

# %% [markdown]
# A shift of **all** positions in the same direction has no effect. Multiplying all of them changes every difference
# that is not 0. The images are those of one seed. Can you explain the ones without rows and without columns?
#
# <details><summary>Answer</summary>Without rows, all patches of a column have the same position, so the image repeats
# from top to bottom; without columns it repeats from left to right.</details>
#
# ## In five lines
#
# 1. A position id is (frame, row, column); it is (0, 0, 0) for every text token.
# 2. Each pair of a head's numbers is rotated by one coordinate times the pair's frequency.
# 3. A score depends only on differences of positions.
# 4. FLUX pairs neighbouring numbers, Llama the two halves of a vector. The idea is the same, but the weights differ.
# 5. The frame is 0 in text-to-image; Kontext uses it to tell a reference image from the target.
#
# **Questions people ask**: *Why are all text ids zero?* (flux issue 71) The usual explanation is that T5's vectors
# already contain the order; the transformer cannot see the order of text tokens, as notebook 00 showed by shuffling
# them. *In which precision are the angles computed?* The official code's first version used float64; since commit
# 4343061 it uses the type of the position ids, which is float32 (`math.py` line 17). diffusers 0.42 and our library use
# float64. In bfloat16 positions would become indistinguishable: 257 is rounded to 256.
#
# **Read**: RoFormer, arXiv 2104.09864 · `black-forest-labs/flux`, `modules/layers.py` lines 11-25 (`EmbedND`) and
# `math.py` lines 15-30 (`rope`, `apply_rope`) · ours: `fluxedu/models/attention.py`.

# %%
fe.score()
