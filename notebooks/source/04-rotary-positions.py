# %% [markdown]
# # 04 · Rotary positions
#
# **How does a token know where it is?** Attention compares every token with every other and has no notion of order.
# FLUX encodes positions by *rotating* queries and keys (the vectors that attention compares). This is called RoPE,
# rotary position embedding. You will write it in a few lines, put it into the trained model, and then break it in four
# ways.
#
# Afterwards you can compute the rotation of any token, say what happens (and why) when all positions are shifted, and
# tell which part of an attention head depends on rows and which on columns.
#
# 55 minutes · needs notebook 00

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
all_shifted = fe.predict(
    "All position ids grow by 5. How much does the velocity change: 'not', 'a little' or 'much'?", "not"
)  # answer
image_shifted = fe.predict(
    "Only the image's position ids grow by 5. How much does the velocity change: 'not', 'a little' or 'much'?", "much"
)  # answer
frame_numbers = fe.predict("How many of a head's 32 numbers are rotated according to the frame?", 4)  # answer

# %% [markdown]
# ## Build it
#
# The 32 numbers of a query or key form 16 pairs, and each pair belongs to one of the three coordinates. We begin with
# the position ids.

# %% exercise="rope.ids"

# %% [markdown]
# Each pair rotates at its own frequency: the first makes a full turn about every six positions, the last hardly moves.
# Together the pairs are like the hands of a clock: no two positions have the same combination of angles.

# %% exercise="rope.angles"

# %% exercise="rope.rotate"
# Source: RoFormer (arXiv 2104.09864). Llama, in most libraries, pairs `x[i]` with `x[i + d/2]`: the same idea with
# other pairs, so the weights of one do not work with the other.

# %% [markdown]
# Compare yours with the library's, which stores the rotations as complex numbers:

# %%
config = pipe.flux.config
print("numbers of a head per axis:", dict(zip(("frame", "row", "column"), config.axes_dim)))
frame_numbers.against(config.axes_dim[0])

positions = image_ids(16, 16)  # [64, 3]
table = rope_table(positions, config.axes_dim)  # complex [1, 64, 16]
x = torch.randn(1, config.num_heads, 64, config.head_dim)  # [1, 5, 64, 32]
if passed:
    mine = torch.cat([angles(positions[:, axis], dim, 10_000.0) for axis, dim in enumerate(config.axes_dim)], dim=-1)
    error = (rotate(x, mine) - library_rotate(x, table)).abs().max()
    print("largest difference from the library's is below 1 in 100,000:", bool(error < 1e-5))

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
# Now the main property of RoPE. Move the query and the key in the explorer below: their score depends only on the
# **difference** of their positions, because rotating both by the same angle does not change their product. (Tab to an
# image, then use the arrow keys; or use the mouse.)

# %%
widgets.positions(pipe)

# %% [markdown]
# The explorer starts with a query and a key of ones. For these the score is highest where both have the same position.
# With the distance it falls in waves, one wave per full turn of the fastest pair. With a trained query and key the
# maximum may be anywhere: a head can learn to attend to "the patch to my left".
#
# The first transformers *added* a position vector, made of sines and cosines, to each token (arXiv 1706.03762). Then
# the score is a sum of four products, and two of them depend on the position of a single token rather than on the
# difference.

# %%
dim = config.axes_dim[2]
q, k = torch.randn(2, dim, generator=torch.Generator().manual_seed(0)).double()
angle = rope_table(torch.tensor([[0.0, 0.0, c] for c in range(64)]), config.axes_dim)[0, :, -dim // 2 :].angle()
wave = torch.polar(torch.ones_like(angle), angle)  # [64, dim/2]: cosine and sine as one complex number
scores_added, scores_rotated = [], []
for position in range(0, 60, 4):  # query and key are always three positions apart
    wave_q, wave_k = wave[position], wave[position + 3]
    q_added, k_added = q + torch.view_as_real(wave_q).flatten(), k + torch.view_as_real(wave_k).flatten()
    scores_added.append(float(q_added @ k_added))
    q_rotated, k_rotated = torch.view_as_complex(q.view(-1, 2)) * wave_q, torch.view_as_complex(k.view(-1, 2)) * wave_k
    scores_rotated.append(float((q_rotated * k_rotated.conj()).real.sum()))
print("rotated: the score at distance three is the same at every position:", np.ptp(scores_rotated) < 1e-4)
print(
    "added: it varies by more than half of its mean size:",
    np.ptp(scores_added) > 0.5 * np.abs(scores_added).mean(),
)

# %% [markdown]
# A rotation is defined for every position, also for positions that no training image had. Can the network draw at these
# positions? The miniature was trained on images of 15,000 to 18,500 pixels with no side above 192. We ask it for four
# times as many pixels, and let the *judge* (a program that checks by geometry what was drawn) count the correct images.
# The prompts are those of the miniature's exam, which it has not seen in training; `claim` lists what a correct image
# must show.

# %%
requests = [request for request in exam_prompts(100) if request.size == (128, 128)][:8]
for side in (128, 256):
    size = {"height": side, "width": side}
    outs = [pipe(r.prompt, seed=r.seed, **size, steps=12, trajectory=False, progress=False) for r in requests]
    correct = sum(judge(out.images[0], r.claim).everything for out, r in zip(outs, requests))
    print(f"{side} x {side}: more than half of the images are entirely correct:", correct > len(requests) / 2)

# %% [markdown]
# The angles extend to new positions, but the ability to draw does not: the network never learned what a score at such a
# distance means, and with four times as many patches every softmax is shared among more tokens. Rotary positions make
# other sizes *possible*; only training makes them good.
#
# ## Put your code into the trained model
#
# A *site* is a named point in the model. At the site `attn.rope` every block receives its rotations. `fe.intervene`
# replaces them by yours, computed from your `ids` and your `angles`. (All text tokens have the position id (0, 0, 0).)
# The image must stay the same.

# %%
if passed:
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
    difference = (out.latents - reference.latents).norm() / reference.latents.norm()
    print("the latent stays the same, to 1 in 1,000:", bool(difference < 1e-3))
else:
    print("solve the exercises above first; then run this cell again")

# %% [markdown]
# ## Break it
#
# We change the position ids in five ways; the first should have no effect. For each we measure how much the velocity
# changes at one step of a run, and look at the final image.

# %%
from fluxedu.instruments.interventions import positions as change_positions

breaks = {
    "all ids + 5": change_positions(lambda ids: ids + 5, text=lambda ids: ids + 5),
    "image ids + 5": change_positions(lambda ids: ids + 5),
    "no rows": change_positions(lambda ids: ids * torch.tensor([1.0, 0.0, 1.0])),
    "no columns": change_positions(lambda ids: ids * torch.tensor([1.0, 1.0, 0.0])),
    "mirrored": change_positions(lambda ids: torch.stack([ids[:, 0], ids[:, 1], ids[:, 2].max() - ids[:, 2]], dim=1)),
}
step = 8  # of 20
outs, changes = [reference], []
for name, change in breaks.items():
    with fe.intervene("*.attn.rope", change):
        outs.append(pipe(prompt, seed=4, progress=False))
    with (
        fe.intervene("*.attn.rope", change),
        fe.intervene("sample.x", lambda x, ctx: reference.trajectory.latents[ctx.step]),
    ):
        v = pipe(prompt, seed=4, progress=False).trajectory.velocities[step]
    changes.append(float((v - reference.trajectory.velocities[step]).norm() / v.norm()))
    print(f"{name:18} the velocity changes by {changes[-1]:.0%}")


# %%
def in_words(change):
    return "not" if change < 0.01 else "a little" if change < 0.1 else "much"


all_shifted.against(in_words(changes[0]))
image_shifted.against(in_words(changes[1]))

fig, axes = plt.subplots(1, 6, figsize=(10, 2.1), layout="constrained")
for ax, out, name in zip(axes, outs, ["unchanged", *breaks]):
    ax.imshow(out.images[0])
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle(
    f"Shifting all ids changes nothing; each other change alters the velocity by {min(changes[1:]):.0%} or more",
    fontsize=10,
)
plt.show()

# %% [markdown]
# A shift of **all** positions has no effect. A shift of the image alone changes its distance to the text, and that does
# change the network's output. Look at the images without rows and without columns. Can you explain them?
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
# them. *Why are the angles computed in float64?* With fewer digits, positions become indistinguishable: in bfloat16,
# 257 is rounded to 256.
#
# **Read**: RoFormer, arXiv 2104.09864 · `black-forest-labs/flux`, `modules/layers.py` (`EmbedND`) and `math.py`
# (`rope`, `apply_rope`) · ours: `fluxedu/models/attention.py`.

# %%
fe.score()
