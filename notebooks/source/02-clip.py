# %% [markdown]
# # 02 · CLIP
#
# **What is one vector of text good for?** FLUX reads a prompt twice. CLIP, the first reader, hands on a single vector
# for the whole of it. You will build the parts that make this vector, put them into the trained model, use the vector
# for what it was trained for, finding the caption of a picture, and then measure what it does not know.
#
# Afterwards you can say which token the vector is taken from and why, write CLIP's loss, and tell which half of
# a prompt a picture owes to CLIP.
#
# 55 minutes · needs notebook 00

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.nano.judge import read
from fluxedu.nano.scenes import BACKGROUNDS, INVERSE, LETTERS, SHAPES, caption, relation_between, render, sample_scene
from fluxedu.nano.scenes import visible_colors
from fluxedu.nano.training.autoencoder import to_tensor
from fluxedu.nano.training.clip import CLIP, loss_of
from fluxedu.loading import WEIGHTS
from fluxedu.widgets.similarity import similarity

device = course.begin()
_ = torch.set_grad_enabled(False)  # nothing is trained here
pipe = fe.load(device=device)
clip, tokenizer = pipe.prompt_encoder.clip, pipe.prompt_encoder.clip_tokenizer
prompt = "a red circle left of a blue square"
course.where(pipe, "clip", "vec")

# %% [markdown]
# CLIP's vector joins the time and the guidance in one sum, `vec`, from which every block of the transformer gets its
# shifts, scales and gates. It is no token: no patch can look at it.
#
# ## Predict

# %%
earlier = fe.predict("the last word of a prompt changes: how many of the tokens before it change in CLIP?", 0)  # answer
found = fe.predict("of 64 pictures, how many find their caption among 64 by CLIP? chance finds 1", 60)  # answer
tells = fe.predict(
    "does CLIP notice another: [colour, background, order of colours, side]? yes or no each", ["yes", "yes", "no", "no"]
)  # answer
drawn_from = fe.predict("T5 and CLIP read different prompts: whose is drawn? T5 / CLIP / neither", "T5")  # answer

# %% [markdown]
# ## Build it
#
# CLIP's text encoder is a small transformer: attention, MLP, both added to what was there. Two things in it are its
# own. The first is a cheap activation.

# %% exercise="clip.quick_gelu"

# %%
bent = passed

# %% [markdown]
# The second: a token sees only what stands **before** it, as in a model that writes text. CLIP never writes any. But
# the mask makes one token special: the last one, which alone has seen everything.

# %% exercise="clip.CausalAttention"

# %%
attended = passed
if attended:
    theirs = clip.text_model.encoder.layers[0].self_attn
    mine = CausalAttention(clip.config.hidden_size, clip.config.num_attention_heads).to(device, pipe.dtype)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, clip.config.hidden_size).to(device, pipe.dtype)
    print("yours is the library's, to 1 in 10,000:", bool((mine(x) - theirs(x)).abs().max() < 1e-4))

# %% [markdown]
# So the vector is taken at the end token, after the last LayerNorm. The end is also what CLIP pads with, which is why
# it matters **which** end token.

# %% exercise="clip.pooled"

# %%
pooling = passed
ids = tokenizer([prompt, "a letter K"]).to(device)
print("ids of the prompt:", ids[0, :12].tolist(), "...")
print("the end token is", clip.config.eos_token_id, "· a vector has", clip.config.hidden_size, "numbers")
states, vector = clip(ids)
if pooling:
    print("yours is the library's:", bool(torch.equal(pooled(states, ids, clip.config.eos_token_id), vector)))

# %% [markdown]
# In FLUX.1 it is the same with CLIP-L's numbers: 12 layers, 77 places, a vector of 768. CLIP itself goes on with one
# more matrix, the projection into the space that it shares with pictures. FLUX leaves that out.
#
# That space is what CLIP was trained for. Two towers, one for text and one for pictures, must agree: of a batch, each
# picture has to find its caption and each caption its picture.

# %% exercise="clip.contrast"

# %% [markdown]
# The miniature's picture tower ships with it, though FLUX has no use for it. Here are 64 pictures with captions; each
# holds something that training never saw. (They are shown to the miniature's two towers, whatever model you have opened.)

# %%
towers = CLIP().eval().requires_grad_(False)
shipped = load_file(WEIGHTS / "image_tower" / "model.safetensors")
reader = fe.load("nano", device=device).prompt_encoder
small, cut = reader.clip, reader.clip_tokenizer
text_tower = {f"text.{name}": w.float().cpu() for name, w in small.state_dict().items()}
towers.load_state_dict({name: w.float() for name, w in shipped.items()} | text_tower)
towers.to(device)

rng = np.random.default_rng(2)
scenes = [sample_scene(rng, size=(128, 128), held_out=True) for _ in range(64)]
captions = [caption(scene, rng)[0] for scene in scenes]
images = to_tensor(np.stack([render(scene) for scene in scenes])).to(device)  # [64, 3, 128, 128]


def describe(sentences: list[str]) -> Tensor:
    """Sentences in the shared space, of length 1: `[N, D]`."""
    return F.normalize(towers.text_projection_head(small(cut(sentences).to(device))[1]), dim=-1)


seen = F.normalize(towers.image(images), dim=-1)  # [64, D]
scores = seen @ describe(captions).T  # [64, 64], a row a picture
right = scores.argmax(dim=1) == torch.arange(64, device=device)
found.against(int(right.sum()))
bare = seen @ F.normalize(small(cut(captions).to(device))[1], dim=-1).T  # without CLIP's projection
bare_right = int((bare.argmax(dim=1) == torch.arange(64, device=device)).sum())
print("by the vector as FLUX gets it, without the projection, fewer than 8 do:", bare_right < 8)
if passed:
    temperature = float(towers.temperature_head.exp().clamp(max=100))
    ids = cut(captions).to(device)
    theirs = loss_of(towers, images, ids)[0]
    mine = contrast(towers.image(images), towers.text_projection_head(small(ids)[1]), temperature)
    print("your loss is the one it was trained with, to 1 in 1,000:", bool((mine - theirs).abs() < 1e-3 * theirs))

# %% [markdown]
# Mind the line about the projection. CLIP's vector is often said to live in one space with pictures. FLUX's is taken
# one step before that space; the transformer makes its own use of it through `vector_in`.
#
# ## See it
#
# Ten of the pictures and their captions:

# %%
fig = plt.figure(figsize=(9.5, 4.4), layout="constrained")
few, table = fig.subfigures(1, 2, width_ratios=[1, 3.2])
for ax, image, i in zip(few.subplots(5, 2).flat, images, range(10)):
    ax.imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu())
    ax.set_title(i, fontsize=8)
    ax.axis("off")
ax = table.subplots()
shown = ax.imshow(scores[:10, :10].cpu(), cmap="cividis", vmin=-0.4, vmax=1, aspect="auto")
names = [f"{i}  {words if len(words) < 46 else words[:44] + '...'}" for i, words in enumerate(captions[:10])]
ax.set_yticks(range(10), names, fontsize=7)
ax.set_xticks(range(10))
ax.set_xlabel("caption")
ax.set_ylabel("picture, with its caption")
fig.suptitle("Bright on the diagonal: a picture and its own caption agree")
fig.colorbar(shown, ax=ax, label="cosine")
plt.show()

# %% [markdown]
# The mask at work: change the last word, and see how far each token's vector moves, in CLIP and in T5, which has no
# mask.

# %%
other = prompt.replace("square", "star")
encoder = pipe.prompt_encoder
moves = {}
for name, network, pieces_of in (("CLIP", clip, tokenizer), ("T5", encoder.t5, encoder.t5_tokenizer)):
    out = network(pieces_of([prompt, other]).to(device))
    before, after = out[0] if name == "CLIP" else out  # [L, D] each; CLIP gives (states, pooled)
    pieces = [piece.replace("</w>", "").lstrip("▁") for piece in pieces_of.pieces(prompt)]
    moves[name] = (pieces, ((after - before).norm(dim=-1) / before.norm(dim=-1))[: len(pieces)].float().cpu())

fig, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
for ax, (name, (pieces, move)) in zip(axes, moves.items()):
    ax.bar(range(len(pieces)), 100 * move, color=["#D55E00" if piece == "square" else "#0072B2" for piece in pieces])
    ax.set_xticks(range(len(pieces)), [piece.strip("<|>") for piece in pieces], rotation=60)
    ax.set_title(name)
axes[0].set_ylabel("the vector moves, %")
fig.suptitle("“square” becomes “star”: in CLIP only it and what follows moves, in T5 every token does")
plt.show()
pieces, move = moves["CLIP"]
changed = pieces.index("square")
earlier.against(int((move[:changed] > 1e-5).sum()))
print("tokens of T5 that stay as they were:", int((moves["T5"][1] < 1e-3).sum()))

# %% [markdown]
# Now the question of this notebook. A picture of two shapes, its caption, and a caption with **one** thing changed:
# does the picture prefer its own? A coin would be right in half of the cases.


# %%
def sentence(scene, change: str, k: int) -> str:
    """The scene in words, with one thing changed."""
    a, b = scene.things
    colors, forms, side, ground = [a.color, b.color], [a.form, b.form], relation_between(a, b), scene.background
    if change == "another colour":
        colors[0] = [c for c in visible_colors(ground) if c not in colors][k % 3]
    elif change == "another ground":
        ground = [g for g in BACKGROUNDS if g != ground][k % 5]
    elif change == "another shape":
        forms[0] = [f for f in SHAPES if f not in forms][k % 4]
    elif change == "colours exchanged":
        colors.reverse()
    elif change == "sides exchanged":
        side = INVERSE[side]
    return f"a {colors[0]} {forms[0]} {side} a {colors[1]} {forms[1]} on a {ground} background"


pairs = []
while len(pairs) < 120:
    scene = sample_scene(rng, size=(128, 128), count=2, held_out=True)
    if not any(thing.form in LETTERS for thing in scene.things):
        pairs.append(scene)
two = F.normalize(towers.image(to_tensor(np.stack([render(scene) for scene in pairs])).to(device)), dim=-1)
own = (two * describe([sentence(scene, "", 0) for scene in pairs])).sum(-1)  # cosine with its own caption, [120]
changes = ("another colour", "another ground", "another shape", "colours exchanged", "sides exchanged")
share = {}
for change in changes:
    wrong = (two * describe([sentence(scene, change, k) for k, scene in enumerate(pairs)])).sum(-1)
    share[change] = float((own > wrong).float().mean())

fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
ax.barh(list(share), [100 * value for value in share.values()], color="#0072B2")
ax.axvline(50, color="#D55E00", linestyle="--", label="a coin")
ax.invert_yaxis()
ax.set_xlim(0, 100)
ax.set_xlabel("pictures that prefer their own caption, %")
ax.set_title("The vector knows which colours are there, not whose they are, nor who is where")
ax.legend(loc="lower right")
plt.show()
asked = ("another colour", "another ground", "colours exchanged", "sides exchanged")
tells.against(["yes" if share[change] > 0.9 else "no" for change in asked])

# %% [markdown]
# It is nearly perfect and nearly blind. Think of the training: among 64 captions, colours and ground are mostly
# enough to find the right one. Two captions that differ in the sides alone hardly ever meet in a batch, so
# nothing asks for the sides. The miniature is an extreme case (CLIP-L does know shapes), but that word order and
# belonging are weak in CLIP's vectors has been measured on large models too (arXiv 2204.03162, 2210.01936).
#
# See for yourself. Choose two prompts; then change a word of the second.

# %%
similarity(pipe)

# %% [markdown]
# ## Put yours into the trained model
#
# Your attention and an MLP with your activation take the place of CLIP's in every layer; your pooling decides what
# FLUX gets. The picture must be the one it was.


# %%
class MLP(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.fc1 = nn.Linear(old.fc1.in_features, old.fc1.out_features)
        self.fc2 = nn.Linear(old.fc2.in_features, old.fc2.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x)))


seen_states = {}


def remember(states, ctx):
    seen_states["now"] = states
    return states


def by_yours(vector, ctx):
    return pooled(seen_states["now"], tokenizer([prompt]).to(device), clip.config.eos_token_id)


picture = pipe(prompt, seed=4, progress=False)
if bent and attended and pooling:
    with (
        fe.swap("clip.*.self_attn", lambda old: CausalAttention(old.q_proj.in_features, old.num_heads), pipe),
        fe.swap("clip.*.mlp", lambda old: MLP(old), pipe),
        fe.intervene("clip.states", remember),
        fe.intervene("clip.pooled", by_yours),
    ):
        again = pipe(prompt, seed=4, progress=False)
    far = (again.latents - picture.latents).norm() / picture.latents.norm()
    print("the latent stays the same to 1 in 1,000:", bool(far < 1e-3))
else:
    print("solve the exercises above first; then run this cell again")

# %% [markdown]
# CLIP gives one state a token as well, and Stable Diffusion read them all. FLUX reads one. Put noise into every
# other, and the picture is the same to the last bit:

# %%
end = pipe.prompt_encoder.clip_tokenizer.pieces(prompt).index("<|endoftext|>")


def all_but_the_end(states, ctx):
    """The states [1, 32, 96], noise in all of them but one."""
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
    noise[:, end] = states[:, end]
    return noise


with fe.intervene("clip.states", all_but_the_end):
    again = pipe(prompt, seed=4, progress=False)
print("only the end token's state is used:", torch.equal(again.latents, picture.latents))

# %% [markdown]
# ## Break it
#
# **The wrong token, no mask, another activation.** Each is a mistake that runs without a complaint.


# %%
def finds(vectors: Tensor) -> int:
    """How many of the 64 pictures find their caption by these pooled vectors."""
    words = F.normalize(towers.text_projection_head(vectors), dim=-1)
    return int(((seen @ words.T).argmax(1) == torch.arange(64, device=device)).sum())


class ExactMLP(MLP):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


all_ids = cut(captions).to(device)
states, vector = small(all_ids)
first = states[:, 0]
for layer in small.text_model.encoder.layers:
    layer.self_attn.causal = False
unmasked = small(all_ids)[1]
for layer in small.text_model.encoder.layers:
    layer.self_attn.causal = True
with fe.swap("clip.*.mlp", lambda old: ExactMLP(old), small):
    exact = small(all_ids)[1]


def far(x: Tensor) -> float:
    return float((x - vector).norm() / vector.norm())


print("taken at the first token, all 64 captions have one vector:", bool((first - first[0]).abs().max() < 1e-5))
print("   pictures that find theirs: at most", finds(first))
print("without the mask the vectors move by more than a fifth:", far(unmasked) > 0.2)
print("with the exact GELU they move by less than a hundredth, but they move:", 0.001 < far(exact) < 0.01)

# %% [markdown]
# The first is the worst. The first token has seen only itself, so it is the same whatever the prompt says. Codes that
# look for the end token's id and do not find it silently take place 0; ours raises an error.
#
# **Two readers, two prompts.** T5 reads one prompt, CLIP another. Whose picture is it?

# %%
A, B = "a red circle on a white background", "a blue square on a black background"
texts = {name: pipe.prompt_encoder([name]) for name in (A, B)}
outs = {}
for t5_reads in (A, B):
    for clip_reads in (A, B):
        with fe.intervene("sample.pooled", lambda x, ctx: texts[clip_reads].pooled):
            outs[t5_reads, clip_reads] = pipe(t5_reads, seed=0, progress=False)

fig, axes = plt.subplots(1, 4, figsize=(9, 2.8), layout="constrained")
for ax, ((t5_reads, clip_reads), out) in zip(axes, outs.items()):
    ax.imshow(out.images[0])
    ax.set_title(f"T5: {' '.join(t5_reads.split()[1:3])}\nCLIP: {' '.join(clip_reads.split()[1:3])}", fontsize=9)
    ax.axis("off")
fig.suptitle("The picture is T5's; CLIP's vector changes no shape, no colour, no ground")
plt.show()

v = {pair: out.trajectory.velocities[0] for pair, out in outs.items()}  # of the first step, from the same noise
by_clip, by_t5 = (float((v[pair] - v[A, A]).norm() / v[A, A].norm()) for pair in ((A, B), (B, A)))
print("the first velocity moves, CLIP's prompt exchanged: less than 15%:", by_clip < 0.15)
print("                            T5's prompt exchanged: more than 50%:", by_t5 > 0.5)
mixed = read(outs[A, B].images[0])
sees = (mixed.background, *((thing.color, thing.form) for thing in mixed.things))
wanted = {"T5": ("white", ("red", "circle")), "CLIP": ("black", ("blue", "square"))}
drawn_from.against(next((who for who, what in wanted.items() if sees == what), "neither"))

# %% [markdown]
# In the miniature, then, one vector is good for little more than a general bearing; what is drawn and where comes in
# through T5's tokens. How much FLUX.1 owes to it is a question of its own (arXiv 2602.09268 looks into it). It cannot
# be more than one vector can hold: the same shifts, scales and gates for every patch.
#
# ## In five lines
#
# 1. CLIP's text encoder is causal; the end token is the only one that has read the whole prompt.
# 2. FLUX takes that token's state after the last LayerNorm, without CLIP's projection: one vector.
# 3. The vector was trained to find captions, and it does.
# 4. It holds what was needed for that: here colours and background, little of the shapes, nothing of whose or which side.
# 5. It steers modulation, the same for every patch; the arrangement must come from T5, the next notebook.
#
# **People ask**: *Is CLIP's output pooled?* (flux issue 64) Yes, at the first end token; the vectors of the other
# tokens are thrown away. *What did CLIP learn from?* 400 million pairs of picture and text (arXiv 2103.00020); ours from
# 51,200 pairs of scenes. *Is a long prompt cut?* CLIP has 77 places, and what does not fit is cut without a word; T5
# still reads it. *Can I give CLIP one prompt and T5 another?* Yes; you just did.
#
# **Read**: CLIP, arXiv 2103.00020 · Winoground, arXiv 2204.03162 · `transformers`, `modeling_clip.py`, which the
# official code uses · ours: `fluxedu/models/clip.py`.

# %%
fe.score()
