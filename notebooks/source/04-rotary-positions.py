# %% [markdown]
# # 04 · Rotary positions
#
# **How does a token know where it is?** Attention compares every token with every other and sees no order at
# all. FLUX tells places by *turning* queries and keys: a few lines that you will write, put into the
# trained model, and then break in four ways.
#
# Afterwards you can build the turn of any token, say what a shift of all positions does (and why), and tell
# which part of a head reads rows and which columns.
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
from fluxedu.nano.exam import questions
from fluxedu.nano.judge import judge
from fluxedu.sampling.latents import image_ids

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square"
picture = pipe(prompt, seed=4, progress=False)
course.where(pipe, "double", "single")

# %% [markdown]
# The turn happens inside every block, just before queries meet keys. Nothing else in the transformer knows where
# a patch is: the patches come in as a list.
#
# ## Predict
#
# Three guesses, to be scored below. All are about the same network and the same picture.

# %%
shifted = fe.predict(
    "all positions grow by 5: what happens to the velocity? nothing / a little / much", "nothing"
)  # answer
image_only = fe.predict(
    "the image's positions grow by 5, the text's do not: nothing / a little / much", "much"
)  # answer
frame = fe.predict("how many of a head's 32 numbers are turned by the frame axis?", 4)  # answer

# %% [markdown]
# ## Build it
#
# A token's position has three coordinates, (frame, row, column). A head of the miniature has 32 numbers, 16 pairs;
# some pairs belong to each coordinate. First the positions themselves.

# %% exercise="rope.ids"

# %% [markdown]
# Each pair turns at its own speed: the first once in about six steps, the last hardly at all. So the pairs
# together are like the hands of a clock, and no two places look the same.

# %% exercise="rope.angles"

# %% exercise="rope.rotate"
# Source: RoFormer (arXiv 2104.09864). Llama, in most libraries, pairs `x[i]` with `x[i + d/2]`: the same idea, other
# neighbours, and weights that do not fit.

# %% [markdown]
# Yours against the library's, whose table holds the turns as complex numbers:

# %%
config = pipe.flux.config
print("numbers of a head by axis:", dict(zip(("frame", "row", "column"), config.axes_dim)))
frame.against(config.axes_dim[0])

positions = image_ids(16, 16)  # [64, 3]
table = rope_table(positions, config.axes_dim)  # complex [1, 64, 16]
x = torch.randn(1, config.num_heads, 64, config.head_dim)  # [1, 5, 64, 32]
if passed:
    mine = torch.cat([angles(positions[:, axis], dim, 10_000.0) for axis, dim in enumerate(config.axes_dim)], dim=-1)
    error = (rotate(x, mine) - library_rotate(x, table)).abs().max()
    print("largest difference from the library's below 1 in 100,000:", bool(error < 1e-5))

# %% [markdown]
# ## See it
#
# A pair is a point that turns as the position grows. Fast pairs tell neighbours apart, slow ones tell near from far.

# %%
pairs = config.axes_dim[2] // 2  # the columns', 7
turn = rope_table(torch.tensor([[0.0, 0.0, c] for c in range(64)]), config.axes_dim)[0, :, -pairs:].angle()
fig, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
shown = ax.imshow(turn.T, aspect="auto", cmap="twilight", vmin=-torch.pi, vmax=torch.pi)
ax.set_xlabel("column of the patch")
ax.set_ylabel("pair")
ax.set_title("Fast pairs above, slow pairs below: together they name every column")
fig.colorbar(shown, label="angle in radians")
plt.show()

# %% [markdown]
# Now the point of it all. Move the query and the key: the score depends on the **difference** of their places only,
# because turning both by the same angle changes no product. (Tab to a picture, then the arrow keys; or the mouse.)

# %%
widgets.positions(pipe)

# %% [markdown]
# With a query and a key of ones only (what the explorer begins with) the score is highest where the two are in one
# place, and falls off in ripples, one for each turn of the fast pair. With a trained query and key the hill
# may be anywhere: a head can look for "the patch to my left".
#
# The first transformers did it otherwise: they *added* a wave of the position to the token (arXiv 1706.03762). Then the
# score is four products, and two of them know where a token stands, not how far the other is.

# %%
dim = config.axes_dim[2]
q, k = torch.randn(2, dim, generator=torch.Generator().manual_seed(0)).double()
wave = lambda place: torch.polar(
    torch.ones_like(angle_of[place]), angle_of[place]
)  # cosines and sines, as complex numbers
angle_of = rope_table(torch.tensor([[0.0, 0.0, c] for c in range(64)]), config.axes_dim)[0, :, -dim // 2 :].angle()
added, turned = [], []
for place in range(0, 60, 4):  # query and key always three apart
    a, b = (torch.view_as_real(wave(c)).flatten() for c in (place, place + 3))
    added.append(float((q + a) @ (k + b)))
    a, b = (torch.view_as_complex(x.view(-1, 2)) * wave(c) for x, c in ((q, place), (k, place + 3)))
    turned.append(float((a * b.conj()).real.sum()))
print("turned, the score of two that stay three apart is one number:", np.ptp(turned) < 1e-4)
print("added, it depends on where they are, by more than its own half:", np.ptp(added) > 0.5 * np.abs(added).mean())

# %% [markdown]
# A turn has an angle for every place, also for places that no training picture had. Does the network then draw there?
# The miniature was trained on pictures of 15,000 to 18,500 pixels, no side above 192. Ask it for four times as many.

# %%
asked = [q for q in questions(100) if q.size == (128, 128)][:8]
for side in (128, 256):
    drawn = [
        pipe(q.prompt, seed=q.seed, height=side, width=side, steps=12, trajectory=False, progress=False) for q in asked
    ]
    right = sum(judge(out.images[0], q.claim).everything for out, q in zip(drawn, asked))
    print(f"{side} x {side}: everything is right in more than half of the pictures:", right > len(asked) / 2)

# %% [markdown]
# The angles go on, the skill does not: a score at a distance that was never trained is a guess, and with four times as
# many patches every softmax is shared among more. Turning makes other sizes *possible*; training makes them good. (And
# nothing here is a position of text put to another use: text stands at (0, 0, 0), and the three axes are the
# picture's own, counted from 0 in patches, not halved.)
#
# ## Put yours into the trained model
#
# `attn.rope` is the site where every block receives its turns. Replace them with yours, computed from your `ids` and
# your `angles`: the picture must stay the same.

# %%
if passed:
    rows, columns = (cells // 2 for cells in picture.latents.shape[-2:])
    grid = ids(rows, columns)  # [64, 3]
    text = torch.zeros(pipe.prompt_encoder.t5_tokenizer.length, 3)
    both = torch.cat([text, grid])
    every = torch.cat([angles(both[:, axis], dim, 10_000.0) for axis, dim in enumerate(config.axes_dim)], dim=-1)
    yours = torch.polar(torch.ones_like(every), every)[None].to(device)
    with fe.intervene("*.attn.rope", lambda turns, ctx: yours.to(turns.dtype)):
        again = pipe(prompt, seed=4, progress=False)
    far = (again.latents - picture.latents).norm() / picture.latents.norm()
    print("the latent stays the same to 1 in 1,000:", bool(far < 1e-3))
else:
    print("solve the exercises above first; then run this cell again")

# %% [markdown]
# ## Break it
#
# Five changes of the positions, of which the first should break nothing, each measured by how far the network's velocity moves at one state of a run,
# and by the picture.

# %%
from fluxedu.instruments.interventions import positions as moved

breaks = {
    "all positions + 5": moved(lambda ids: ids + 5, text=lambda ids: ids + 5),
    "the image's + 5": moved(lambda ids: ids + 5),
    "no rows": moved(lambda ids: ids * torch.tensor([1.0, 0.0, 1.0])),
    "no columns": moved(lambda ids: ids * torch.tensor([1.0, 1.0, 0.0])),
    "mirrored": moved(lambda ids: torch.stack([ids[:, 0], ids[:, 1], ids[:, 2].max() - ids[:, 2]], dim=1)),
}
state = 8  # of 20 steps
outs, moves = [picture], []
for name, change in breaks.items():
    with fe.intervene("*.attn.rope", change):
        outs.append(pipe(prompt, seed=4, progress=False))
    with (
        fe.intervene("*.attn.rope", change),
        fe.intervene("sample.x", lambda x, ctx: picture.trajectory.latents[ctx.step]),
    ):
        v = pipe(prompt, seed=4, progress=False).trajectory.velocities[state]
    moves.append(float((v - picture.trajectory.velocities[state]).norm() / v.norm()))
    print(f"{name:18} the velocity moves by {moves[-1]:.0%}")

# %%
word = lambda move: "nothing" if move < 0.01 else "a little" if move < 0.1 else "much"
shifted.against(word(moves[0]))
image_only.against(word(moves[1]))

fig, axes = plt.subplots(1, 6, figsize=(10, 2.1), layout="constrained")
for ax, out, name in zip(axes, outs, ["as it is", *breaks]):
    ax.imshow(out.images[0])
    ax.set_title(name, fontsize=9)
    ax.axis("off")
fig.suptitle("The same words and noise: only what was said of the places is wrong", fontsize=10)
plt.show()

# %% [markdown]
# A shift of **everything** is invisible. Shift the image alone and its distance to the text changes, and that the
# network does notice. Compare the pictures without rows and without columns with the prompt, and say why.
#
# <details><summary>Answer</summary>Without rows, all patches of a column have the same position, so what is drawn repeats
# down the picture; without columns it repeats along a row.</details>
#
# ## In five lines
#
# 1. A position is (frame, row, column); text has (0, 0, 0) for every token.
# 2. Each pair of a head's numbers is turned by one coordinate times its own frequency.
# 3. A score depends on differences of positions only.
# 4. FLUX pairs neighbours; Llama's halves are the same idea with other weights.
# 5. Frame is 0 in text-to-image: a spare axis, which Kontext uses to tell a reference picture from the target.
#
# **People ask**: *why are all text ids zero?* (flux issue 71). Because T5 has put the order into the vectors already;
# to the transformer text is a bag, which notebook 00 showed by shuffling it. *Why float64?* A position times a
# frequency loses digits: with ids in bfloat16, 257 is the first that cannot be told from its neighbour.
#
# **Read**: RoFormer, arXiv 2104.09864 · `black-forest-labs/flux`, `modules/layers.py` (`EmbedND`) and `math.py` (`rope`,
# `apply_rope`) · ours: `fluxedu/models/attention.py`, 54 lines.

# %%
fe.score()
