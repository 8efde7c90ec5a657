# %% [markdown]
# # 15 · The arena
#
# **Which model is better, and how sure are we?** Models are announced with bar charts in which they come first. The
# bars are made of votes: somebody sees two pictures of one prompt and says which is better. You will build what
# stands between the votes and the bars, with the intervals that the bars usually lack.
#
# Afterwards you can turn votes into strengths, say how far to trust them, choose the comparison that tells most, run
# an arena of your own, and name three questions that its numbers do not answer.
#
# 95 minutes, in two sittings: stop before “Which pair next?” · needs notebook 14

# %%
import json
import math
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import fluxedu as fe
from fluxedu import arena, course, plots
from fluxedu.arena.judges import choice
from fluxedu.arena.pairing import best_pairs, gains
from fluxedu.arena.rating import ELO, cells_of, chances, fit, information, rated, resampled, wins_of, with_prior
from fluxedu.nano.exam import questions
from fluxedu.nano.judge import judge
from fluxedu.nano.rivals import load_sd
from fluxedu.nano.scenes import BACKGROUNDS
from fluxedu.sampling.latents import draw_noise
from fluxedu.loading import WEIGHTS
from fluxedu.sampling.images import to_tensor

device = course.begin()
course.where(fe.load("nano"), "image")

# %% [markdown]
# For once only the last box is marked. An arena sees pictures; what made them is nobody's business until the votes
# are counted. (Here they are the miniature and its rivals, opened by name whatever model you draw with elsewhere.)
#
# ## Predict

# %%
luck = fe.predict("two equal models, 100 votes: one gets 60 or more in how many percent of the trials?", 6)  # answer
width = fe.predict("four times the votes: the interval is how many times as wide?", 0.5)  # answer
axes = "overall, prompt, size, typography, diversity, quality"
ahead = fe.predict(f"nano in 4 steps is rated above nano-base on one axis ({axes}): which?", "diversity")  # answer
circle = fe.predict("A beats B, B beats C and C beats A, nine times of ten: Elo between best and worst", 0)  # answer
rival = fe.predict(
    "of the same cost: which puts things on the asked side more often, U-Net (with CLIP) or FLUX (with T5)?", "FLUX"
)  # answer
spots = fe.predict(
    "spots all over: in how many percent of the pairs does the judge mind, on prompt following?", 0
)  # answer

# %% [markdown]
# ## One ballot
#
# Four contestants: the miniature, its base model with classifier-free guidance, and the miniature in 4 and in 2 steps.
# Only four prompts, so that this page runs in a minute; for a result that you would publish, take a hundred. What
# matters is here all the same: one prompt, one seed, two pictures, sides by chance, no names.

# %%
names = ["nano", "nano-base", "nano@4", "nano@2"]
folder = Path(tempfile.mkdtemp())
field = arena.Arena([arena.contestant(name, device) for name in names], folder / "votes.sqlite", prompts=4)

ballot = field.ballot("a visitor", "overall")
fig, axes = plt.subplots(1, 2, figsize=(5, 2.9), layout="constrained")
for ax, side, (image,) in zip(axes, ("left", "right"), field.sides(ballot)):
    ax.imshow(image)
    ax.set_title(side, fontsize=9)
    ax.axis("off")
fig.suptitle(f"“{ballot.prompt}”\n{arena.AXES['overall'].ask}", fontsize=9, wrap=True)
plt.show()

# %% [markdown]
# A vote is worth little. Two models that are exactly alike do not get 50 votes each of a hundred:

# %%
trials = [math.comb(100, k) / 2**100 for k in range(101)]
lopsided = sum(trials[k] for k in range(101) if abs(k - 50) >= 10)
luck.against(round(100 * lopsided))

# %% [markdown]
# Between equals, then, 60 to 40 or more comes one time in eighteen. A single such chart is a hint.
#
# ## From votes to strengths
#
# Why not simply count wins? Because who won how often depends on whom they met. Why not Elo, as in notebook 14?
# Because it forgets: the same votes in another order gave other ratings. Chess needs that, players improve. Models do
# not, so we may look at all votes at once and ask which strengths make them most probable. Bradley and Terry wrote
# the model down in 1952, and it is Elo's own: i is preferred to j with probability `sigmoid(s_i - s_j)`.

# %% exercise="arena.likelihood"

# %%
if passed:
    gap = torch.linspace(-1, 3, 201)
    fig, ax = plt.subplots(figsize=(6.2, 2.8), layout="constrained")
    for won, lost, colour in ((7, 3, "#E69F00"), (70, 30, "#0072B2")):
        votes = torch.tensor([[0.0, won], [lost, 0.0]])
        height = torch.stack([likelihood(torch.stack([g, torch.zeros(())]), votes) for g in gap])
        ax.plot(ELO * gap, (height - height.max()).exp(), color=colour, label=f"{won} of {won + lost} votes")
        print(f"{won} of {won + lost}: likeliest at {ELO * gap[height.argmax()]:.0f} Elo apart")
    ax.axvline(0, color="0.5", lw=1)
    ax.set(xlabel="difference of the two models, Elo", ylabel="likelihood / its top")
    ax.set_title("The same share of votes, a tenth as many: equality is not ruled out")
    ax.legend(fontsize=8)
    plt.show()
else:
    print("solve the exercise above first; then run this cell again")

# %% [markdown]
# One hill, whatever the votes: the logarithm is concave. Its slope along `s_i` is *the wins of i, less the wins to be
# expected*, and Elo's rule is one small step along it for each vote. With all votes in hand one can do better. Newton's
# method fits a parabola to the hill and jumps to the parabola's top.
# How sharply the hill bends is called the *information*; it is a table, because a vote on i and j is about both.

# %% exercise="arena.newton"

# %% [markdown]
# To see whether it finds the truth, we need votes of which the truth is known. These are simulated, from five strengths
# that we choose. The player at 0 gets the prior's games, one won and one lost against each model, as in the library.
# Without them the strength of someone who never lost would be infinite.

# %%
truth = np.array([0.9, 0.4, 0.0, -0.4, -0.9])


def simulated(strengths, votes, rng):
    """Wins [M, M] after `votes` on pairs chosen at random."""
    wins = np.zeros((len(strengths),) * 2)
    for _ in range(votes):
        i, j = rng.choice(len(strengths), 2, replace=False)
        won = rng.random() < 1 / (1 + math.exp(strengths[j] - strengths[i]))
        wins[(i, j) if won else (j, i)] += 1
    return wins


seen = simulated(truth, 200, np.random.default_rng(0))
if passed:
    table, best = with_prior(seen), fit(with_prior(seen))
    now = torch.zeros(5, dtype=torch.float64)
    for step in range(1, 5):
        now = newton(now, torch.from_numpy(table))
        off = float((now - torch.from_numpy(best)).abs().max())
        print(f"step {step}: off the top by less than", f"1e{math.ceil(math.log10(off))}" if off > 1e-9 else "1e-9")
    print("and the truth is nearer than 0.5 for every model:", bool(np.abs(best - truth).max() < 0.5))
else:
    print("solve the exercise above first; then run this cell again")

# %% [markdown]
# Each step doubles the number of right digits. (Where votes are few and lopsided a step may overshoot; the library cuts
# it off at 2 units of strength, which you can read in `fluxedu/arena/rating.py`, 170 lines.)
#
# ## How sure?
#
# Had other people voted, or the same people another day, the strengths would differ. We cannot ask them. But we can
# weigh the votes that we have anew, at random, and fit again: that is the bootstrap. The usual one draws votes with
# replacement, and it fails exactly where it is needed. Ten votes, all for one model: every redrawn set is the same ten
# votes, and the interval has no width. Rubin's way (1981) gives each vote an exponential weight instead, and the
# prior's games too; nothing is ever left out.

# %% exercise="arena.interval"

# %%
if passed:
    rng = np.random.default_rng(1)
    votes = [("A", "B", 1.0, 30), ("B", "A", 1.0, 15), ("B", "C", 1.0, 20), ("C", "B", 1.0, 12), ("A", "C", 0.5, 6)]
    drawn = fit(resampled(cells_of("ABC", votes), 3, 4000, rng))  # [4000, 3]: fitted again 4000 times
    mine, ours = interval(torch.from_numpy(drawn).float(), 0.95), rated("ABC", votes, rounds=4000)
    theirs = np.stack([ours.low, ours.high], axis=1)
    print("yours and the library's ends are within 15 points:", bool(np.abs(mine.numpy() - theirs).max() < 15))
else:
    print("solve the exercise above first; then run this cell again")

never = rated(["always", "never"], [("always", "never", 1.0, 10)])
print("10 of 10 votes, and the interval is wider than 200 points:", bool((never.high - never.low).min() > 200))

# %% [markdown]
# Does a 95 % interval hold the truth 95 times in 100? We can try, since these worlds are ours: 250 simulated arenas of
# five models and 60 votes each; and another 20 with 240 votes.

# %%
rng, right, truths = np.random.default_rng(2), [], 1000 + ELO * truth
spans = {60: [], 240: []}
for votes, worlds in ((60, 250), (240, 20)):
    for _ in range(worlds):
        drawn = simulated(truth, votes, rng)
        cells = [("ABCDE"[i], "ABCDE"[j], 1.0, int(drawn[i, j])) for i, j in zip(*np.nonzero(drawn))]
        got = rated("ABCDE", cells, rounds=300)
        spans[votes].append(float((got.high - got.low).mean()))
        right += [((got.low < truths) & (truths < got.high)).mean()] * (votes == 60)
print(f"95 % intervals held the truth in {100 * np.mean(right):.0f} % of {5 * len(right):,} cases")
width.against(round(float(np.mean(spans[240]) / np.mean(spans[60])), 1))

# %% [markdown]
# A root: for intervals of half the width you need four times the votes. That is the price list of every ranking.
#
# ## Which pair next?
#
# Then no vote should be wasted. Asking whether eight steps beat two tells nothing that we do not know. The
# information that a vote brings is `p (1 - p)`, most where the outcome is open; and where few votes are, it takes most
# from the uncertainty. Strengths are known only up to a common constant, so what counts is how uncertain they are
# around their mean: from the inverse of the information its mean row is taken off.

# %% exercise="arena.gain"

# %%
if passed:
    table, p = with_prior(seen), chances(fit(with_prior(seen)))
    covariance = np.linalg.inv(information(table, fit(table)))
    covariance = torch.from_numpy(covariance - covariance.mean(0))  # only what differs from the mean has a variance
    mine = torch.tensor([[float(gain(covariance, float(p[i, j]), i, j)) for j in range(5)] for i in range(5)])
    pairs = ~np.eye(5, dtype=bool)  # nobody meets himself
    print("yours and the library's gains agree:", bool(np.allclose(mine[pairs], gains(seen)[pairs], rtol=1e-4)))
    fig, axes = plt.subplots(1, 3, figsize=(7.6, 2.7), layout="constrained")
    tables = {"votes so far": seen + seen.T, "how open, p (1 - p)": (p * (1 - p))[:5, :5], "one more would tell": mine}
    for ax, (title, values) in zip(axes, tables.items()):
        ax.imshow(np.where(np.eye(5), np.nan, values), cmap="cividis")
        ax.set_title(title, fontsize=9)
        ax.set(xticks=range(5), yticks=range(5), xticklabels="ABCDE", yticklabels="ABCDE")
    fig.suptitle("Most is learnt where votes are few and the outcome is open (yellow: most)", fontsize=10)
    plt.show()
else:
    print("solve the exercise above first; then run this cell again")


def uncertainty(wins):
    """The summed variance of the strengths."""
    table = with_prior(wins)
    covariance = np.linalg.inv(information(table, fit(table)))
    return float(np.trace(covariance - covariance.mean(0)))


wide = 2 * truth  # models that are far apart, so that some questions are idle
after = {"most telling": [], "at random": []}
for world in range(8):
    rng = np.random.default_rng(world)
    for how in after:
        wins = np.zeros((5, 5))
        for _ in range(80):
            i, j = best_pairs(wins, rng)[0] if how == "most telling" else rng.choice(5, 2, replace=False)
            won = rng.random() < 1 / (1 + math.exp(wide[j] - wide[i]))
            wins[(i, j) if won else (j, i)] += 1
        after[how].append(uncertainty(wins))
spared = 1 - np.mean(after["most telling"]) / np.mean(after["at random"])
print("after 80 votes the variance is smaller when the most telling pair is asked:", bool(spared > 0.05))

# %% [markdown]
# `field.ballot` asks in this way, and lets chance decide between equal pairs and between the sides, so that a liking
# for the left one favours nobody.
#
# ## The judge votes
#
# On the six axes of the published comparison: overall, prompt following, three shapes of picture, letters, the
# difference of four pictures of one prompt, and cleanness. The scene world's judge answers by geometry; a tie is an
# answer too. Here it sees every pair of every prompt on every axis, so it is asked until nothing is left.

# %%
given = arena.judged(field, votes=1000)
print(f"{given} votes: 6 pairs x {given // 36} prompts x 6 axes")
results = {axis: field.ratings(axis, "judge") for axis in arena.AXES}
plots.elo(results["overall"].rows(), "Overall: two contestants are apart from the other two, and that is all")

# %%
plots.elo_axes({arena.AXES[axis].title: result.rows() for axis, result in results.items()})

# %%
rating = lambda axis, name: results[axis].rows()[name]["elo"]
ahead.against(", ".join(axis for axis in results if rating(axis, "nano@4") > rating(axis, "nano-base")))
low, high = results["diversity"].low, results["diversity"].high
print("but there the two intervals overlap:", bool(low[2] < high[1] and low[1] < high[2]))
low, high = results["overall"].low, results["overall"].high
print("overall, the intervals of nano and nano-base overlap:", bool(low[0] < high[1] and low[1] < high[0]))
print("overall, those of nano and nano@2 do not:", bool(low[0] > high[3]))

# %% [markdown]
# Here the miniature is first or level on every axis, but the order of the others changes with the axis. The one swap, on
# diversity, lies within the intervals; were it real, there would be a plain reason: diversity does not ask whether the
# prompt was followed, and things in wrong places are also in different ones. Ask what an axis can be won with, before
# you quote it.
#
# Read the intervals before the points. With 24 votes on an axis (each contestant takes part in 12) they are hundreds of
# points wide; an arrow at the edge says that one goes on. An overlap is not yet a tie, for two strengths move together
# and the interval of their difference is what decides; but it is no ranking either. And with six axes and six pairs you
# look at 36 differences: were all contestants equal, 36 × 5 % = 1.8 would look real at 95 %.
#
# ## Beside a Stable Diffusion
#
# The announcement of FLUX.1 sets it beside other models, and the text this course grew from beside Stable Diffusion.
# Nobody outside knows what either cost, so a lead may come from the design or from the bill. Here are two that cost the
# same: `sd`, a small Stable Diffusion, and `twin`, a FLUX of the miniature's size, both from nothing, with the same scenes,
# text encoders, autoencoder and optimizer, and as many minutes of one core. One run each, with the recipe of the
# miniature and nothing tuned for the U-Net but the weight of a helping loss (both also learn to name what lies in a
# patch), so a small lead would mean little. They differ as the two designs do:
#
# | | sd | twin |
# |---|---|---|
# | network | U-Net: convolutions, attention at its lower resolution | transformer: patches and words attend to each other |
# | words | CLIP's tokens, by cross-attention | T5's tokens beside the patches, CLIP's pooled vector |
# | learns | the noise, on the curved path of DDPM | the velocity, on a straight path |
# | samples | DDIM, classifier-free guidance | Euler, classifier-free guidance |
#
# A U-Net shrinks the picture step by step and widens it again, with bridges between the halves (arXiv 1505.04597).
# DDPM mixes `sqrt(a) picture + sqrt(1 - a) noise` with an `a` that falls over a thousand times (arXiv 2006.11239), so its
# path bends, and DDIM walks it back in few strides and without new noise (arXiv 2010.02502).

# %%
rivals = json.loads((WEIGHTS / "rivals.json").read_text())
rows = {name: of["exam"]["rows"] for name, of in rivals.items()}
print("right, % of 500 held-out prompts (20 steps, guidance 5)        sd          twin")


def sure(percent, n):
    """Half of a 95 % interval: sampling alone."""
    return 196 * math.sqrt(percent / 100 * (1 - percent / 100) / n)


for row in ("background", "colours", "shapes", "sizes", "letter", "relations", "everything"):
    of = [rows[name][row] for name in ("sd", "twin")]
    print(f"{row:54}", *(f"{one['percent']:6.1f} ± {sure(**one):3.1f}" for one in of))
print(f"{'diversity of four pictures of a prompt':54}", *(f"{rivals[n]['exam']['diversity']:12.2f}" for n in rows))
for name, of in rivals.items():
    print(f"{name:4} {of['parameters']:,} parameters, {of['minutes']} minutes, {of['steps'] * of['batch']:,} pictures")
better = max(rows, key=lambda name: rows[name]["relations"]["percent"])
rival.against({"sd": "U-Net", "twin": "FLUX"}[better])

fig, ax = plt.subplots(figsize=(5.6, 2.8), layout="constrained")
for name, colour in (("sd", "#D55E00"), ("twin", "#0072B2")):
    many = rivals[name]["by_steps"]
    y = [cell["percent"] for cell in many.values()]
    bars = [sure(**cell) for cell in many.values()]
    ax.errorbar(list(map(int, many)), y, bars, fmt="o-", color=colour, label=name, capsize=3)
ax.set(
    xscale="log", xticks=[4, 8, 20, 50], xticklabels=[4, 8, 20, 50], xlabel="steps", ylabel="wholly right, %", ylim=0
)
ax.minorticks_off()
ax.set_title("From 8 steps on the twin is ahead by far (200 prompts)")
ax.legend()
plt.show()

# %% [markdown]
# The bill is the same and the twin is ahead on every row. It is not steps that the U-Net lacks: nobody could tell its
# fifty from its eight. Into two rows we can look.
#
# **The ground.** DDPM's last time is not all noise: its `a` is not 0. In training the U-Net always saw what is left of
# the picture, and the ground's colour, the same in every cell, can be told from very little. Sampling begins at noise
# with nothing left, which to the U-Net says "a middling ground" (arXiv 2305.08891; so Stable Diffusion 1 hardly draws a
# black picture). Rectified flow begins at t = 1, where there is nothing but noise in training either. So hand the U-Net
# what it misses, a plain ground, as much of it as training would have left; and then, as a control, a wrong one.

# %%
sd = load_sd(device=device)
left = sd.scheduler.alphas_cumprod[-1]  # of the squared size, at the last of the thousand times
print(f"left of the picture at DDPM's last time: {float(left.sqrt()):.1%}; at rectified flow's: 0.0%")
few = [q for q in questions(300) if q.size == (128, 128) and q.claim.background][:12]
noise = torch.cat([draw_noise(q.seed, 16, 16, 16) for q in few])  # [12, 16, 16, 16]
asked = [q.claim.background for q in few]
colours = list(BACKGROUNDS)
wrong = [colours[(colours.index(ground) + 3) % 6] for ground in asked]


def begun(grounds):
    """Noise, and as much of these plain grounds as training would have left in it."""
    pictures = [to_tensor(np.full((128, 128, 3), BACKGROUNDS[ground], np.uint8)).to(device) for ground in grounds]
    with torch.no_grad():
        plain = torch.cat([sd.autoencoder.encode(picture) for picture in pictures]).cpu()
    return left.sqrt() * plain + (1 - left).sqrt() * noise


for name, begin in {"nothing but noise": noise, "the asked ground": begun(asked), "a wrong one": begun(wrong)}.items():
    images = sd([q.prompt for q in few], seed=0, begin=begin, progress=False).images
    is_now = lambda grounds: sum(  # noqa: E731
        bool(judge(image, replace(q.claim, background=ground)).background)
        for image, q, ground in zip(images, few, grounds)
    )
    as_handed = "" if begin is noise else f", as handed {is_now(wrong if name == 'a wrong one' else asked)}"
    print(f"begun at {name}: of {len(few)} grounds as asked {is_now(asked)}{as_handed}")
sides = rivals["sd"]["sides"]
print("of {relations} relations sd has {asked} on the asked side, {opposite} on the opposite one".format(**sides))

# %% [markdown]
# It mostly paints the ground that it was handed, whatever the words say: it has not learned to take the ground from the words,
# since in training the picture always told. That fits the schedule as the cause. The proof would be a U-Net whose last
# time is all noise, as the paper cited above proposes and rectified flow has it by itself.
#
# **Left and right.** Read the row with care: a thing that is missing counts as wrong as well. But where the U-Net draws both
# things, the opposite side is almost as frequent as the asked one, as the last line above counts. It reads CLIP, whose training
# asked which caption belongs to which picture (notebook 02); T5's asked for the facts of a caption (notebook 03). But
# network, words and path all differ here, and two models cannot say which of three it is. That would take a U-Net that
# reads T5: `fluxedu/nano/training/rivals.py` is where to begin. The same goes for shapes, of which CLIP holds little
# (notebook 02), and letters.
#
# Diversity is the U-Net's only lead, and you know what that is worth. (The twin's weights do not ship;
# `fluxedu train --variant twin` makes them. So below the miniature stands in, which has learned for far longer: look
# at the U-Net's mistakes, and do not read it as the contest.)

# %%
asked = [q for q in questions(200) if q.size == (128, 128)][:5]
how = {"seed": [q.seed for q in asked], "steps": 20, "trajectory": False, "progress": False}
prompts = [q.prompt for q in asked]
drawn = {"sd": sd(prompts, **how).images, "nano": fe.load("nano", device=device)(prompts, **how).images}
fig, axes = plt.subplots(2, 5, figsize=(7.6, 4.3), layout="constrained")
for ax, prompt in zip(axes[0], prompts):
    ax.set_title(textwrap.fill(prompt, 22), fontsize=7)
for row, (name, images) in zip(axes, drawn.items()):
    for ax, image in zip(row, images):
        ax.imshow(image)
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, fontsize=9)
    print(f"{name:5} wholly right: {sum(judge(i, q.claim).everything for i, q in zip(images, asked))} of {len(asked)}")
fig.suptitle("The same prompts and noise; nano has learned for far longer than either rival", fontsize=10)
plt.show()

# %% [markdown]
# ## You vote
#
# The judge counts shapes and colours. You see the rest. Nothing below says who drew what; the arrow keys answer left,
# right, and down for the same. Each vote is in the file before the next pair is shown.

# %%
arena.booth(field, voter="me")

# %% [markdown]
# When you have voted, `field.ratings("overall", "people").table()` counts people only. A whole class votes in the
# browser with `fluxedu arena serve`; `fluxedu arena table --figures .` draws the two figures above from its file.
#
# ## Break it
#
# Three ways to make these numbers say something false.
#
# **The axis does not see it.** A contestant is any function that draws. This one takes the miniature's picture and
# spots it; a patch below 25 pixels is dirt to the judge, not a thing.


# %%
def spotted(prompt, seed, height, width):
    """The miniature's picture with magenta spots of 4 x 4 pixels."""
    picture = np.array(field.gallery.picture("nano", prompt, seed, height, width))
    for y in range(6, height - 6, 16):
        for x in range(6, width - 6, 16):
            picture[y : y + 4, x : x + 4] = (255, 0, 255)
    return Image.fromarray(picture)


asked = field.questions("prompt")
pairs = [(field.gallery.picture("nano", q.prompt, q.seed, *q.size), spotted(q.prompt, q.seed, *q.size)) for q in asked]
minded = [choice("prompt", [plain], [dirty], q.claim) != "tie" for (plain, dirty), q in zip(pairs, asked)]
fig, axes = plt.subplots(1, 2, figsize=(5, 2.6), layout="constrained")
for ax, image in zip(axes, pairs[0]):
    ax.imshow(image)
    ax.axis("off")
fig.suptitle("On prompt following, these two are the same to the judge", fontsize=10)
plt.show()
spots.against(round(100 * sum(minded) / len(minded)))
clean = [choice("quality", [plain], [dirty], q.claim) == "left" for (plain, dirty), q in zip(pairs, asked)]
print(f"on cleanness it prefers the plain one in {sum(clean)} of {len(clean)}")

# %% [markdown]
# You minded at once. A rating holds for a judge *and a question*, and who trains against that question learns to spot.
#
# **Another four prompts.** The bootstrap weighs votes anew, never prompts: its interval says what would happen if the
# same prompts were voted on again. Suppose that ten people vote on these 24 pairs, all of the judge's mind. The
# intervals shrink as if 240 votes were 240 facts. Then leave out one prompt of the four.

# %%
rows = [r for r in field.votes.rows() if r["axis"] == "overall" and r["voter"] == "judge"]
share = {"left": 1.0, "right": 0.0, "tie": 0.5}


def by_ten(left_out=None):
    """Ratings when every vote is given ten times, without one of the prompts."""
    return rated(names, [(r["left"], r["right"], share[r["choice"]], 10) for r in rows if r["prompt"] != left_out])


ten, once = by_ten(), results["overall"]
narrow = (ten.high - ten.low).mean() / (once.high - once.low).mean()
print("the intervals are narrower:", bool(narrow < 0.8))
others = [by_ten(prompt).elo for prompt in dict.fromkeys(r["prompt"] for r in rows)]
outside = any(((elo < ten.low) | (elo > ten.high)).any() for elo in others)
print("without some prompt, some model leaves its interval:", outside)

# %% [markdown]
# Votes add up only if they are about different things; a hundred prompts with a vote each tell more than one prompt
# with a hundred votes. And models differ in *what* they are good at: letters, crowds, faces. A rating belongs to the prompts it was won on, and
# an arena in which people bring their own prompts measures what these people ask for.
#
# **A circle.** A strength is one number, so the model cannot say that A beats B, B beats C and C beats A.

# %%
beats = [("A", "B", 1.0, 90), ("B", "A", 1.0, 10), ("B", "C", 1.0, 90), ("C", "B", 1.0, 10)]
beats += [("C", "A", 1.0, 90), ("A", "C", 1.0, 10)]
round_trip = rated("ABC", beats)
circle.against(round(float(np.ptp(round_trip.elo))))


def surprise(names, votes):
    """The largest difference, over all pairs, of the share of wins that was seen and the one the strengths say."""
    wins = wins_of(cells_of(names, votes), len(names))
    games = wins + wins.T
    p = chances(fit(with_prior(wins)))[: len(names), : len(names)]
    return float(np.abs(wins / np.maximum(games, 1) - p)[games > 0].max())


print(f"the circle: a pair's share is off by {100 * surprise('ABC', beats):.0f} percentage points")
straight = [(a, b, 1.0, n) for a, b, n in (("A", "B", 75), ("B", "A", 25), ("B", "C", 75), ("C", "B", 25))]
straight += [("A", "C", 1.0, 90), ("C", "A", 1.0, 10)]
print("strengths in a line: off by less than 3:", bool(surprise("ABC", straight) < 0.03))

# %% [markdown]
# Three equal ratings with narrow intervals, and every pair is decided nine to one. The interval does not show that
# the model is wrong, for it is computed as if the model were right. What shows it is a look at the pairs themselves:
# compare each pair's share with what the strengths say.
#
# ## In five lines
#
# 1. A vote is about two pictures of one prompt, seen blind; sixty of a hundred comes between equals one time in eighteen.
# 2. The strengths are those that make the votes most probable; Newton finds them in a few steps, whatever the order.
# 3. Half the interval costs four times the votes, so ask about the pair that tells most.
# 4. Intervals cover other votes, not other prompts and not another judge.
# 5. A rating is one number; check the pairs before you believe that one number is enough.
#
# **People ask**: *is 20 Elo a lot?* It is preferred in 1 / (1 + 10^(-20/400)) = 53 % of pairs; look whether the intervals overlap. *Can I
# compare ratings of two arenas?* No: the mean is fixed at 1000 in each, and each has its own field, prompts and
# voters. *Why is a tie half a win?* Because it moves nothing between equals; Davidson (1970) gives ties a parameter
# of their own. *Which contestants may I enter?* Whatever draws:
# `arena.Contestant("mine", lambda prompt, seed, height, width: ...)`.
#
# **Read**: R. A. Bradley and M. E. Terry, *Rank analysis of incomplete block designs*, Biometrika 1952 · D. B. Rubin,
# *The Bayesian bootstrap*, Annals of Statistics 1981 · Chatbot Arena, arXiv 2403.04132 · ours:
# `fluxedu/arena/rating.py`, `fluxedu/arena/pairing.py`, `fluxedu/arena/judges.py`.

# %%
fe.score()
