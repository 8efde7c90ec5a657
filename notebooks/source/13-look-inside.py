# %% [markdown]
# # 13 · Look inside
#
# **Which part does what?** A network has no labels. You find out what a part is for by looking at what it hands on,
# by cutting it, and by putting in its place what it said about another prompt. You will do all three, and find the
# place from which the colour of a circle is really read. It is not where one would look first.
#
# Afterwards you can measure whether a map of attention points at the right thing, run a patching experiment and say
# what it does and does not show, and write your own reduction for the recorder.
#
# 80 minutes, in two sittings: stop before “What the picture is so far” · needs notebooks 06 to 08, 10 and 11

# %%
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import fluxedu as fe
from fluxedu import course
from fluxedu.instruments import lenses
from fluxedu.instruments.interventions import positions
from fluxedu.instruments.lenses.run import blocks_of
from fluxedu.instruments.named import Named
from fluxedu.instruments.reductions import Value, made
from fluxedu.nano.exam import questions
from fluxedu.nano.judge import read
from fluxedu.nano.scenes import LETTERS, Scene, Thing, thing_map
from fluxedu.widgets.bench import bench, told

device = course.begin()
pipe = fe.load(device=device)
prompt, other = "a red circle left of a blue square", "a green circle left of a blue square"
asked = {"seed": 4, "steps": 6, "progress": False}  # few steps, many experiments
picture = pipe(prompt, **asked)
blocks, words = blocks_of(pipe), pipe.prompt_encoder.t5_tokenizer.length
patches = picture.latents[0, 0].numel() // 4  # 64
course.where(pipe, "double", "single")

# %% [markdown]
# ## Predict
#
# Two of these are about the pair of prompts above, which differ in one word. Both pictures begin with the same noise.

# %%
vital = fe.predict("without which block does the picture go furthest? first / middle / last", "middle")  # answer
word = fe.predict("one vector of the second prompt replaced, the circle turns red: which word's?", "circle")  # answer
last = fe.predict("the first prompt's words put in before the last block: the circle is red / green", "green")  # answer
pads = fe.predict("does hiding all padding from attention move the picture? hardly / a little / much", "much")  # answer

# %% [markdown]
# ## Does a word look at its thing?
#
# The first instrument only looks. `fe.record` keeps what passes at a site; here, for every patch, how much of its
# attention goes to two words, averaged over heads, in the later steps.

# %%
with fe.record("*.attn.map", tokens=["circle", "square"], reduce="head-mean", steps=slice(3, None)) as rec:
    out = pipe(prompt, **asked)
print(rec["double.0.attn.map"])
same = torch.equal(out.latents, picture.latents)
print("looking changes no bit of the picture:", same)

# %% [markdown]
# A bright map proves nothing: you will see a circle in it because you know that there is one. So measure. Of four
# prompts that training never saw we ask, for every noun, where its map is bright, and the judge says where the thing
# is. `share` is the part of each patch that the thing covers.


# %%
def share_of(found, rows, columns):
    """The part of every patch that a thing the judge has found covers: [rows, columns]."""
    thing = Thing(found.form, found.color, found.size, found.x, found.y, found.radius)
    covered = thing_map(Scene("white", (thing,), 16 * rows, 16 * columns)) >= 0  # [16 rows, 16 columns], pixels
    return torch.tensor(covered.reshape(rows, 16, columns, 16).mean((1, 3))).float()


maps, shares = [], []
for q in [q for q in questions(60) if len(q.claim.things) > 1][:4]:
    names = [f"{color} {'letter ' if form in LETTERS else ''}{form}" for color, form, _ in q.claim.things]
    ask = {"seed": q.seed, "height": q.size[0], "width": q.size[1], "steps": 8, "progress": False}
    with fe.record("sample.image") as drawn:
        seen = lenses.word_maps(pipe, q.prompt, names, at_steps=slice(3, None), **ask)  # [block, word, row, column]
    pixels = drawn["sample.image"].tensor.float().permute(1, 2, 0)  # [H, W, 3]
    things = read(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()).things
    for i, (color, form, _) in enumerate(q.claim.things):
        found = [t for t in things if (t.color, t.form) == (color, form)]
        if len(found) == 1:  # what was not drawn cannot be pointed at
            maps.append(seen.tensor[:, i])
            shares.append(share_of(found[0], *seen.shape[2:]))
print("nouns to score, eight or more:", len(maps) >= 8)

# %% exercise="inside.points"

# %%
done = bool(passed)

# %% exercise="inside.iou"
# Half of the peak is a convention, and so is 0.15. Whoever reports an IoU of attention maps must say both.

# %%
done = done and bool(passed)
if done and maps:
    # a map of each block in place of a map of each word: [block, row, column]
    hits = torch.stack([points(m, s.expand_as(m)) for m, s in zip(maps, shares)]).mean(0)  # [block]
    overlap = torch.stack([iou(m, s.expand_as(m)) for m, s in zip(maps, shares)]).mean(0)
    chance = torch.stack([(s > 0.1).float().mean() for s in shares]).mean()
    best = int((hits + overlap).argmax())
    fig, ax = plt.subplots(figsize=(6.6, 2.8), layout="constrained")
    ax.plot(100 * hits, "o-", color="#0072B2", label="brightest patch on the thing")
    ax.plot(100 * overlap, "s-", color="#D55E00", label="overlap (IoU)")
    ax.axhline(100 * chance, color="0.5", ls="--", label="a patch chosen blindly")
    ax.set_xticks(range(len(blocks)), blocks, fontsize=8)
    ax.set(ylabel="percent", ylim=(0, 105), xlabel="block")
    ax.set_title(f"Nouns point best at their things in {blocks[best]}")
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.show()
    print("the best block points better than chance by a factor of three or more:", bool(hits[best] > 3 * chance))
elif done:
    print("the judge found none of the nouns' things")  # with another model, perhaps
else:
    print("solve the two exercises above first; then run this cell again")

# %% [markdown]
# Pointing well is something the maps have; it does not say that the network *uses* them. And the blocks differ: a
# figure that averages all blocks, as many tools draw it, mixes the good ones with those that point nowhere.
#
# ## A reduction of your own
#
# A whole map is 96 × 96 numbers a head here; in FLUX.1 24 × 4,608 × 4,608 of 2 bytes, a gigabyte a block. So the recorder reduces where
# the value is. You have used `"head-mean"`; the next one you write. The question: do heads look at one token or at
# many?

# %% exercise="inside.spread"

# %%
if passed:
    mine, exact = (fe.record("*.attn.map", reduce=how, steps=3) for how in (spread, "entropy"))
    with mine, exact:
        pipe(prompt, **asked)
    name = "single.0.attn.map"
    error = (mine[name].tensor / exact[name].tensor.exp() - 1).abs().max()
    print("yours, from the whole map, and the library's, without it, differ by less than 0.1 %:", bool(error < 1e-3))
    counts = torch.stack([mine[f"{b}.attn.map"].tensor[0, :, words:].mean(-1) for b in blocks])  # [block, head]
    fig, ax = plt.subplots(figsize=(6.6, 2.6), layout="constrained")
    shown = ax.imshow(counts.T, cmap="viridis", vmin=1, vmax=words + patches, aspect="auto")
    for (i, j), count in np.ndenumerate(counts.numpy()):
        ax.text(i, j, f"{count:.0f}", ha="center", va="center", color="white" if count < 55 else "black", fontsize=8)
    ax.set_xticks(range(len(blocks)), blocks, fontsize=8)
    ax.set(ylabel="head", xlabel="block")
    ax.set_title("Some heads look at a handful of tokens, others at most of the 96")
    fig.colorbar(shown, label="tokens")
    plt.show()
else:
    print("solve the exercise above first; then run this cell again")

# %% [markdown]
# ## Cut it
#
# The second instrument cuts. Take away what one block adds, draw again, and see how far the picture goes; then leave
# the block in, but tell it that all patches are in one place. Stable Flow calls the blocks of the first experiment
# *vital* (arXiv 2411.14430); FreeFlux did the like of the second, by shifting the places (arXiv
# 2503.16153). `lenses.vital_layers` and
# `lenses.position_dependence` do the same over several seeds.


# %%
def distance(out):
    """How far a run's latent is from the first prompt's, as a share of its length."""
    return float((out.latents - picture.latents).norm() / picture.latents.norm())


one_place = positions(torch.zeros_like)  # ids [N, 3] -> ids
gone, moved = [], []
for block in blocks:
    with fe.ablate(block):
        gone.append(distance(pipe(prompt, **asked)))
    with fe.intervene(f"{block}.attn.rope", one_place):
        moved.append(distance(pipe(prompt, **asked)))

fig, ax = plt.subplots(figsize=(6.6, 2.8), layout="constrained")
x = np.arange(len(blocks))
ax.bar(x - 0.2, 100 * np.array(gone), 0.4, color="#0072B2", label="without the block")
ax.bar(x + 0.2, 100 * np.array(moved), 0.4, color="#E69F00", label="all patches in one place")
ax.set_xticks(x, blocks, fontsize=8)
ax.set(xlabel="block", ylabel="distance / length of\nthe latent, percent")
ax.set_title("Every block matters, and so do the places in each")
ax.legend(fontsize=8)
plt.show()
furthest = int(np.argmax(gone))
vital.against("first" if furthest == 0 else "last" if furthest == len(blocks) - 1 else "middle")
print("the last block goes further without itself than without its places:", bool(gone[-1] > moved[-1]))

# %% [markdown]
# Cutting has a weakness. A network that has never met a missing block may fail for that reason alone, and a large
# distance cannot tell "this block made the circle" from "what came out is no longer anything the next block
# understands". Look at the pictures before you believe the bars; the bench below shows them all.
#
# ## What the picture is so far
#
# The last layer turns tokens into a velocity, and a velocity foresees a picture, `x − t·v`. Nothing stops us from
# asking the last layer after *every* block. This is our own adaptation of the logit lens to a flow; the
# last layer was trained to read the last block only, so the early ones are a guess at best.

# %%
foreseen = lenses.x0_by_block(pipe, prompt, at_steps=4, **asked)  # [block, step, channel, row, column], a latent each
fig, axes = plt.subplots(1, len(blocks), figsize=(10, 1.7), layout="constrained")
for ax, block, latent in zip(axes, blocks, foreseen.tensor[:, 0]):
    with torch.no_grad():
        pixels = pipe.autoencoder.decode(latent[None].to(device, pipe.dtype))[0].float().cpu()
    ax.imshow((pixels.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0))
    ax.set(xticks=[], yticks=[])
    ax.set_title(block, fontsize=9)
time = foreseen.coords["step"][0]
fig.suptitle(f"From block to block the picture foreseen gets clearer (t = {time:.1f})", fontsize=11)
plt.show()

# %% [markdown]
# ## Put in what it said elsewhere
#
# The third instrument is the sharpest. Run both prompts; then run the second again, but at one place go on with the
# value from the first. If the circle turns red, what makes it red passes there. The value has been
# computed by the network itself, so nothing strange is fed in.

# %% exercise="inside.transplant"

# %% [markdown]
# How much of the way did the picture go? 0 is the run of the second prompt as it was, 1 that of the first.

# %%
asked = asked | {"steps": 8}  # a few more, so that both pictures are clean
picture, theirs = pipe(prompt, **asked), pipe(other, **asked)
way = picture.latents - theirs.latents  # from the second prompt's latent to the first's


def recovered(out):
    """The share of the way that a run has gone, along the line from one latent to the other."""
    return float(((out.latents - theirs.latents) * way).sum() / way.square().sum())


home = TemporaryDirectory(ignore_cleanup_errors=True)  # `to=` a folder: of FLUX.1-dev this is 13 GB
with fe.record("double.*.img", "double.*.txt", "single.*.x", "sample.txt", to=f"{home.name}/source") as source:
    pipe(prompt, **asked)


def put_in(site, places):
    """At one site, put in the tokens at `places` from the first prompt's run, step by step."""
    values = {when.step: value.tensor for when, value in source.entries(site)}
    change = lambda x, ctx: transplant(x, values[ctx.step].to(x).reshape(x.shape), places)
    return fe.intervene(site, change)


pieces = pipe.prompt_encoder.t5_tokenizer.pieces(other)
if passed:
    turned = []
    for piece in ("▁green", "▁circle", "▁left", "▁blue", "▁square"):
        with put_in("sample.txt", [pieces.index(piece)]):
            out = pipe(other, **asked)
        red = any(t.color == "red" for t in read(out.images[0]).things)
        turned += [piece.strip("▁")] if red else []
        tens = 10 * round(10 * recovered(out))
        print(f"{piece:9} {tens:4} % of the way; the judge reads: {told(read(out.images[0]))}")
    word.against(turned[0] if turned else "none")
else:
    print("solve the exercise above first; then run this cell again")

# %% [markdown]
# You may have looked for the colour in the word that names it. But T5 has mixed the words: the vector at *circle* is
# the vector of a red circle, and that is the one the picture reads. This is why editing one word's vector, or hiding
# one word from attention, so often does less than people expect.
#
# Now the same in depth: put in the first prompt's words, or its picture, as they come into each block.

# %%
if passed:
    places = {"words": list(range(words)), "picture": list(range(words, words + patches))}
    shares_of, colours = {}, {}
    for part, tokens in places.items():
        row, seen = [], []
        for block in blocks:
            double = block.startswith("double")
            site = f"{block}.{'txt' if part == 'words' else 'img'}" if double else f"{block}.x"
            with put_in(site, [t - words * (part == "picture") for t in tokens] if double else tokens):
                out = pipe(other, **asked)
            row.append(recovered(out))
            seen.append(next((t.color for t in read(out.images[0]).things if t.form == "circle"), "none"))
        shares_of[part], colours[part] = row, seen
    fig, ax = plt.subplots(figsize=(6.6, 2.8), layout="constrained")
    for (part, row), colour, mark in zip(shares_of.items(), ("#0072B2", "#D55E00"), "os"):
        ax.plot(100 * np.array(row), f"{mark}-", color=colour, label=f"the first prompt's {part}")
    ax.axhline(0, color="0.7", lw=1)
    ax.set_xticks(range(len(blocks)), blocks, fontsize=8)
    ax.set(xlabel="put in as they come into this block", ylabel="percent of the way")
    crossing = next((b for b, c in zip(blocks, colours["picture"]) if c == "red"), "no block")
    ax.set_title(f"The words decide the colour; from {crossing} on it is in the picture's tokens")
    ax.legend(fontsize=8)
    plt.show()
    last.against("red" if colours["words"][-1] == "red" else "green")
else:
    print("solve the exercise above first; then run this cell again")

# %% [markdown]
# At each step the words are read in the blocks before the colour turns, and then hardly any more: what they say has been handed over
# to the picture's tokens, and the first prompt's words come too late. The next step begins anew with the words as
# they were.
#
# Read it with care. A place whose value *suffices* to turn the circle red need not be the only one, and what was put
# in is a run's whole stream, not "the colour". That needs controls: another pair of prompts, another seed.
#
# ## The bench
#
# All of it under your hand, drawn beforehand: choose a block and what is done to it. Ask it a question first (is
# there a block whose heads can go while the block cannot?), guess, and only then look.

# %%
bench(pipe, prompt, other, seed=4, progress=False)

# %% [markdown]
# ## Break it
#
# Two oddities of such networks. First, single numbers out of all proportion ("massive activations", arXiv
# 2510.11538).

# %%
large = lenses.massive_activations(pipe, prompt, at_step=3, **asked)  # axes block, what
size, usual, token, channel = large.tensor.T
fig, ax = plt.subplots(figsize=(6.6, 2.5), layout="constrained")
ax.semilogy(size, "o-", color="#D55E00", label="the largest number")
ax.semilogy(usual, "s-", color="0.5", label="the median size")
ax.set_xticks(range(len(blocks)), blocks, fontsize=8)
ax.set(xlabel="after this block", ylabel="size")
ax.set_title("One number is far larger than the median, and stays so in the single blocks")
ax.legend(fontsize=8, loc="center right")
plt.show()
said = pipe.prompt_encoder.t5_tokenizer.pieces(prompt)
where = [*said, *["<pad>"] * (words - len(said)), *["a patch"] * patches][int(token[-1])]
print("more than 50 times the median:", bool(size[-1] > 50 * usual[-1]))
there = set(zip(*(of[pipe.flux.config.depth :].tolist() for of in (token, channel))))
print("the same token and channel in all single blocks:", len(there) == 1)
print("what kind of token it is:", where)

# %% [markdown]
# Second, padding. FLUX masks none, so most of our text tokens are nothing but filling, and patches may look at them
# all the same. Cut both, and a few words for comparison.

# %%
print(f"text tokens that are padding: {words - len(pieces)} of {words}")
padding = lenses.padding_mass(pipe, prompt, **asked)  # axes block, step
most = float(padding.tensor.mean(1).max())  # the mean over steps, of the block that gives most
print(f"their share of the picture's attention, in the block that gives them most: about {5 * round(20 * most)} %")


def without_it(x, ctx):
    """The massive number set to 0."""
    new = x.clone()
    new[:, int(token[-1]), int(channel[-1])] = 0
    return new


cuts = {
    "the massive number": fe.intervene("single.0.x", without_it),
    "all padding": fe.ablate("*.attn.map", tokens=list(range(len(pieces), words))),
    "the word red": fe.ablate("*.attn.map", tokens=["red"]),
    "the word circle": fe.ablate("*.attn.map", tokens=["circle"]),
    "the word left": fe.ablate("*.attn.map", tokens=["left"]),
}
far = {}
for name, cut in cuts.items():
    with cut:
        out = pipe(prompt, **asked)
    far[name] = distance(out)
    fives = 5 * round(20 * far[name])
    print(f"without {name:19} the picture moves by about {fives:2} %; the judge reads: {told(read(out.images[0]))}")
pads.against("hardly" if far["all padding"] < 0.02 else "a little" if far["all padding"] < 0.2 else "much")

# %% [markdown]
# Cut the most conspicuous number and the background, of which the prompt says nothing, turns from grey to black, while the
# circle and the square stay; with other seeds hardly a pixel notices. Padding moves as much, and says nothing. And
# without *red* the circle stays red, which you now know why. Distance alone is not importance: look at the pictures.
#
# ## In five lines
#
# 1. Recording shows what passes, cutting what is needed, patching what suffices: three questions, three instruments.
# 2. A map of attention is a claim about a place, so hold it against the place: pointing and overlap, block by block.
# 3. Words are read in the earlier blocks, here up to `single.2`; after that the patches carry what they said.
# 4. T5 mixes words, so the colour of the circle is in the vector of *circle*.
# 5. A large number may matter for one seed and not for another, and padding does.
#
# **People ask**: *how do I get the attention maps?* (EraseAnything 2: no `output_attentions`). From
# queries, keys and the log-sum-exp of the fused kernel, exactly and only where you ask: `fe.record("*.attn.map",
# ...)`. *Why are mine black, or without the single blocks?* (attention-map-diffusers 27; 15, 21). Those tools replace another library's attention; here every block has its own site. *Hooks and
# `torch.compile`?* (pytorch 117758). A module hook added afterwards is silently ignored; a site is not, because
# recording switches compiled code off for as long as it lasts. *Is padding masked?* (flux pull requests 507, 511, 512.) No, see
# above; arXiv 2501.06751 measures it in the large models.
#
# **Read**: Stable Flow, arXiv 2411.14430 · FreeFlux, arXiv 2503.16153 · activation patching, arXiv 2202.05262 ·
# Massive activations, arXiv 2510.11538 · Padding Tone, arXiv 2501.06751 · `black-forest-labs/flux`,
# `modules/layers.py` (what there is to be looked at) · ours: `fluxedu/instruments/`, begin with `interventions.py`.

# %%
fe.score()
