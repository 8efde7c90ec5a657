# %% [markdown]
# # 15b · How sure are we?
#
# **How far can a rating be trusted?** Notebook 15 turned votes into ratings. Here you will give each rating the
# interval that announcements usually lack, choose the most informative next comparison, and look for what intervals do
# not cover.
#
# Afterwards you can say how sure a ranking is, plan the next vote, run an arena of your own, and name three questions
# that its numbers do not answer.
#
# 60 minutes · needs notebook 15, and diffusers (`pip install diffusers`)

# %%
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import fluxedu as fe
from fluxedu import arena, course, plots
from fluxedu.arena.match import preference
from fluxedu.arena.rating import ELO, add_prior, bootstrap_tables, fisher_information, fit, rank_pairs, rate, tally
from fluxedu.arena.rating import variance_reduction, win_matrix, win_probabilities
from fluxedu.arena.stable_diffusion import load_sd
from fluxedu.course import evidence
from fluxedu.loading import WEIGHTS
from fluxedu.nano.exam import questions as exam_prompts
from fluxedu.nano.judge import judge
from fluxedu.nano.scenes import BACKGROUNDS
from fluxedu.sampling.images import to_tensor
from fluxedu.sampling.latents import draw_noise

device = course.begin()
pipe = fe.load("nano", device=device)
course.where(pipe, "image")

# %% [markdown]
# ## Predict
#
# An *interval* around a rating says how uncertain it is. Votes are collected on six *axes*, which are different
# questions about two images: which one is better overall, follows the prompt better, and so on. The *judge* is the
# program that finds shapes and colours in an image by geometry; it can vote on each axis. A *U-Net*, the network of
# Stable Diffusion, is made of convolutions that halve the resolution step by step and double it again, with skip
# connections between the two halves (arXiv 1505.04597).

# %%
interval_width = fe.predict("With four times as many votes, how many times as wide is an interval?", 0.5)  # answer
axes = "'overall', 'prompt', 'size', 'typography', 'diversity' or 'quality'"
exchanged_axis = fe.predict(f"On which axis is nano in 4 steps rated above nano-base: {axes}?", "diversity")  # answer
cycle_difference = fe.predict(
    "A beats B, B beats C, and C beats A, in 9 of 10 votes each. Are the three ratings 'equal' or 'different'?", "equal"
)  # answer
better_relations = fe.predict(
    "After equal training, which network more often draws an object on the correct side: the 'U-Net' or 'FLUX'?", "FLUX"
)  # answer
noticed_spots = fe.predict(
    "Spots are added to one image of each pair. On “prompt”, does the judge notice 'most' or 'few' of them?", "few"
)  # answer

# %% [markdown]
# ## An interval
#
# If other people had voted, or the same people on another day, the strengths would be different. With many votes, the
# fitted strengths vary like a normal distribution whose covariance is the inverse of the information $I$ (notebook 15),
# which gives the textbook's interval of 95 %:
#
# $$s_i \pm 1.96 \sqrt{(I^{-1})_{ii}}$$
#
# For 7 wins in 10 votes, $I = 10 · 0.7 · 0.3 = 2.1$, so the interval is ± 1.96 / √2.1 = ± 1.35 units of strength,
# or ± 235 Elo points. For 70 in 100 it is ± 74. (Compare this with the two curves in notebook 15.)
#
# With few votes the distribution is not normal. We cannot ask other people, but we can change the existing votes at
# random and fit again, many times: this is the *bootstrap*. The usual bootstrap draws votes with replacement, and fails
# if all of ten votes are for one model: every draw is the same ten votes, so the interval has no width. Rubin's
# Bayesian bootstrap (1981) gives each vote, also those of the prior, a random weight from an exponential distribution,
# so that no vote is ever left out.

# %% exercise="arena.interval"

# %%
if fe.passed("arena.interval"):
    rng = np.random.default_rng(1)
    votes = [("A", "B", 1.0, 30), ("B", "A", 1.0, 15), ("B", "C", 1.0, 20), ("C", "B", 1.0, 12), ("A", "C", 0.5, 6)]
    draws = fit(bootstrap_tables(tally("ABC", votes), 3, 4000, rng))  # [4000, 3]: fitted 4000 times
    mine = interval(torch.from_numpy(draws).float(), 0.95).numpy()
    library = rate("ABC", votes, rounds=4000)
    library_interval = np.stack([library.low, library.high], axis=1)
    for name, my_ends, ends in zip("ABC", mine, library_interval):
        (a, b), (c, d) = (np.round(some, -1) for some in (my_ends, ends))
        print(f"{name}: your interval {a:.0f} to {b:.0f}, the library's {c:.0f} to {d:.0f} (rounded to tens)")

one_sided = rate(["always", "never"], [("always", "never", 1.0, 10)])
print(
    f"10 of 10 votes: the winner's interval is {round(one_sided.low[0], -1):.0f} to {round(one_sided.high[0], -1):.0f}"
)

# %% [markdown]
# (The ends may differ by some points, since the random weights differ.) Does a 95 % interval contain the truth 95 times
# in 100? In simulations we know the truth: five strengths of our choice, 150 simulated arenas with 60 votes each, and
# another 20 with 240.

# %%
truth = np.array([0.9, 0.4, 0.0, -0.4, -0.9])


def simulate(strengths, votes, rng, informative=False):
    """Wins [M, M] after `votes` votes, on random pairs or on the most informative ones."""
    wins = np.zeros((len(strengths),) * 2)
    for _ in range(votes):
        i, j = rank_pairs(wins, rng)[0] if informative else rng.choice(len(strengths), 2, replace=False)
        won = rng.random() < 1 / (1 + math.exp(strengths[j] - strengths[i]))
        wins[(i, j) if won else (j, i)] += 1
    return wins


rng, contains, true_elo = np.random.default_rng(2), [], 1000 + ELO * truth
widths = {60: [], 240: []}
for votes, arenas in ((60, 150), (240, 20)):
    for _ in range(arenas):
        wins = simulate(truth, votes, rng)
        counted = [("ABCDE"[i], "ABCDE"[j], 1.0, int(wins[i, j])) for i, j in zip(*np.nonzero(wins))]
        result = rate("ABCDE", counted, rounds=300)
        widths[votes].append(float((result.high - result.low).mean()))
        contains += [((result.low < true_elo) & (true_elo < result.high)).mean()] * (votes == 60)
print(f"95 % intervals contained the truth in {100 * np.mean(contains):.0f} % of {5 * len(contains):,} cases")
interval_width.against(round(float(np.mean(widths[240]) / np.mean(widths[60])), 1))

# %% [markdown]
# The width falls with the square root of the number of votes: an interval of half the width needs four times as many.
#
# ## Which pair should be compared next?
#
# Votes are expensive, so choose the pair that tells most. Let $p$ be the probability that i is preferred to j. A vote
# on i and j adds the information $w = p\,(1 - p)$ about $s_i - s_j$, which is largest if the result is open, $p = ½$.
# It reduces the uncertainty most where the difference of the two strengths is least certain, which depends on all
# votes, not only on those of this pair. Strengths are defined only up to a common constant, so we look at their
# covariance around their mean: the inverse of the information, with the mean subtracted from its rows and from its
# columns,
#
# $$C = P\, I^{-1} P, \qquad P_{ij} = \delta_{ij} - \tfrac{1}{M}$$
#
# where $\delta_{ij}$ is 1 for $i = j$ and 0 otherwise, and $M$ is the number of models. $C$ is symmetric. Let $d$ be
# the vector that is 1 at i, −1 at j and 0 elsewhere. One more vote adds $w\, d\, d^T$ to the information. If $C$ is
# the inverse of the information, it becomes
#
# $$(C^{-1} + w\, d\, d^T)^{-1} = C - \frac{w\, (C d)(C d)^T}{1 + w\, d^T C d}$$
#
# The right-hand side also holds for the covariance around the mean, which has no inverse.

# %% exercise="arena.gain"


# %%
def centred_covariance(wins):
    """The covariance of the strengths around their mean, [M, M], which is symmetric."""
    table = add_prior(wins)
    centre = np.eye(len(wins)) - 1 / len(wins)  # subtracts the mean
    return centre @ np.linalg.inv(fisher_information(table, fit(table))) @ centre


if fe.passed("arena.gain"):
    simulated = simulate(truth, 200, np.random.default_rng(0))
    p = win_probabilities(fit(add_prior(simulated)))
    covariance = torch.from_numpy(centred_covariance(simulated))
    mine = torch.tensor([[float(gain(covariance, float(p[i, j]), i, j)) for j in range(5)] for i in range(5)])
    pairs = ~np.eye(5, dtype=bool)  # a model is not compared with itself
    library = variance_reduction(simulated)
    course.compare("your gains and the library's", mine[pairs], torch.from_numpy(library[pairs]), within=1e-4)
    fig, axes = plt.subplots(1, 3, figsize=(7.6, 2.7), layout="constrained")
    tables = {
        "votes so far": simulated + simulated.T,
        "information of a vote, p (1 - p)": (p * (1 - p))[:5, :5],
        "gain of one more vote": mine,
    }
    for ax, (title, values) in zip(axes, tables.items()):
        ax.imshow(np.where(np.eye(5), np.nan, values), cmap="cividis")
        ax.set_title(title, fontsize=9)
        ax.set(xticks=range(5), yticks=range(5), xticklabels="ABCDE", yticklabels="ABCDE")
    fig.suptitle("One more vote gains most for A and B: few votes and an open result (yellow: most)", fontsize=10)
    plt.show()


spread_out = 2 * truth  # models that are far apart, so that some comparisons are useless
variances = {"most informative": [], "random": []}
for trial in range(40):
    for how, values in variances.items():
        wins = simulate(spread_out, 80, np.random.default_rng(trial), how == "most informative")
        values.append(float(np.trace(centred_covariance(wins))))
for how, values in variances.items():
    low, median, high = np.quantile(values, (0.1, 0.5, 0.9))
    print(f"{how:16} summed variance after 80 votes: {median:.2f} (8 of 10 arenas: {low:.2f} to {high:.2f})")
smaller = sum(a < b for a, b in zip(*variances.values()))
print(f"the most informative pairs gave the smaller variance in {smaller} of 40 simulated arenas")

# %% [markdown]
# The advantage is modest, and in a single arena luck can hide it. The library's arenas choose pairs in this way, and
# the sides at random.
#
# ## The judge votes
#
# The announcement of FLUX.1 compares models on six axes: overall, prompt following, images of three sizes, letters,
# diversity of four images of one prompt, and visual quality. The judge votes on all of them, by geometry; a tie is a
# possible vote too. Its 480 votes, 80 on each axis, are stored with the miniature; `fluxedu arena run nano nano-base
# nano@4 nano@8 --count 480` repeats them.

# %%
stored = json.loads((WEIGHTS / "arena.json").read_text())  # axis -> model -> elo, low, high, votes
plots.elo_axes({arena.AXES[axis].title: models for axis, models in stored.items()})

# %%
exchanged = [axis for axis, models in stored.items() if models["nano@4"]["elo"] > models["nano-base"]["elo"]]
exchanged_axis.against(", ".join(exchanged))
for axis in ("overall", "diversity"):
    for name, row in stored[axis].items():
        print(f"{axis:10} {name:10} {row['elo']:5.0f}, interval {row['low']:5.0f} to {row['high']:5.0f}")

# %% [markdown]
# nano in 4 steps is far behind on every axis but diversity, where it is first, though the intervals overlap. If that
# difference is real, there is a simple explanation: the axis does not ask whether the prompt was followed, and objects
# in wrong positions are also in different positions. Ask what makes a model win on an axis before you quote its rating.
#
# Overlapping intervals show neither a ranking nor that two models are equal: their strengths are correlated, so one
# would need the interval of the difference. And with six axes and six pairs you look at 36 differences: even if all
# models were equal, 36 × 5 % = 1.8 of them would appear significant at the level of 95 %.
#
# Now an arena of your own: four prompts, so 24 votes of the judge on one axis.

# %%
names = ["nano@8", "nano-base@8", "nano@4", "nano@2"]
file = Path(tempfile.mkdtemp()) / "votes.sqlite"
my_arena = arena.Arena([arena.contestant(name, device) for name in names], file, prompts=4)
votes_cast = arena.judge_votes(my_arena, 1000, axes=["overall"])
result = my_arena.ratings("overall", "judge")
plots.elo(result.rows(), f"Overall, {votes_cast} votes: the intervals are hundreds of points wide")

# %% [markdown]
# ## A comparison with Stable Diffusion
#
# The announcement of FLUX.1 compares it with other models. The cost of training each of them has not been published, so
# the better results may come from the design or from the budget. Here are two models of equal cost: `sd`, a small
# Stable Diffusion, and `twin`, a FLUX of the miniature's size. Both were trained from scratch, with the same scenes,
# text encoders, autoencoder and optimiser, and for about the same time on one core (95 and 93 minutes). There is one
# training run of each, with the miniature's settings (only the weight of an auxiliary loss was tuned for the U-Net), so
# a small difference would mean little.
#
# | | sd | twin |
# |---|---|---|
# | network | U-Net: convolutions, attention at its lower resolution | transformer: joint attention of patches and text |
# | text | CLIP's tokens, by cross-attention | T5's tokens next to the patches, CLIP's pooled vector |
# | predicts | the noise, on the curved paths of DDPM | the velocity, on straight paths |
# | sampling | DDIM, classifier-free guidance | Euler, classifier-free guidance |
#
# *DDPM* (arXiv 2006.11239) mixes image $x_0$ and noise $\varepsilon$ with an $a_t$ that falls from almost 1 to
# almost 0 in a thousand steps of time, so its paths are curved; *DDIM* follows them back in few steps, without new
# noise (arXiv 2010.02502). Rectified flow mixes them on a straight line:
#
# $$x_t = \sqrt{a_t}\; x_0 + \sqrt{1 - a_t}\; \varepsilon \quad \text{(DDPM)}, \qquad
# x_t = (1 - t)\, x_0 + t\, \varepsilon \quad \text{(rectified flow)}$$

# %%
baselines = json.loads((WEIGHTS / "baselines.json").read_text())
rows = {name: model["exam"]["rows"] for name, model in baselines.items()}
print("right, % of 500 held-out prompts (20 steps, guidance 5)  sd              twin")


def wilson(percent, n):
    """The 95 % interval of a percentage of n prompts (Wilson, 1927); other training runs are not included."""
    p, z = percent / 100, 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * (centre - half) / (1 + z * z / n), 100 * (centre + half) / (1 + z * z / n)


for row in ("background", "colours", "shapes", "sizes", "letter", "relations", "everything"):
    cells = [rows[name][row] for name in ("sd", "twin")]
    ends = [wilson(**cell) for cell in cells]
    print(f"{row:52}", *(f"{c['percent']:3.0f} ({a:3.0f} to {b:3.0f})" for c, (a, b) in zip(cells, ends)))
print(f"{'diversity of four images of a prompt':54}", *(f"{m['exam']['diversity']:14.2f}" for m in baselines.values()))
for name, m in baselines.items():
    print(f"{name:4} {m['parameters']:,} parameters, {m['minutes']} minutes, {m['steps'] * m['batch']:,} images")
sd_relations, twin_relations = (rows[name]["relations"]["percent"] for name in ("sd", "twin"))
better_relations.against("FLUX" if twin_relations > sd_relations else "U-Net")

fig, ax = plt.subplots(figsize=(5.6, 2.8), layout="constrained")
for name, colour in (("sd", "#D55E00"), ("twin", "#0072B2")):
    by_steps = baselines[name]["by_steps"]
    percent = [cell["percent"] for cell in by_steps.values()]
    bars = np.abs(np.array([wilson(**cell) for cell in by_steps.values()]).T - percent)
    ax.errorbar(list(map(int, by_steps)), percent, bars, fmt="o-", color=colour, label=name, capsize=3)
ax.set(xlabel="steps", ylabel="images entirely right, %", ylim=0, xticks=[4, 8, 20, 50])
ax.set_title("More steps help the twin up to 20, and do not help sd (200 prompts each)")
ax.legend()
plt.show()

# %% [markdown]
# At the same cost, the twin of these two runs is ahead in every row but diversity. We can examine two of the rows.
#
# **The background.** At the last of DDPM's times the state is not pure noise: $a_t$ is not 0. In training, the U-Net
# always received a weak copy (a *trace*) of the image, from which the colour of the background can be read. Sampling
# starts from noise without a trace (arXiv 2305.08891; this is why Stable Diffusion 1 almost never generates a black
# image). Rectified flow starts from pure noise in training, too. So we give the U-Net a trace of a plain background, as
# strong as in training, and as a control that of a wrong one. `python -m evidence backgrounds` did so for eighty
# prompts; we repeat four.

# %%
table = evidence.load("backgrounds")
for start, row in table.items():
    print(f"{start:23} the background of the prompt: {evidence.percent(row['as in the prompt'])}")
as_in_trace = table["trace of a wrong one"]["as in the wrong trace"]
print(f"{'':23} the background of the trace:  {evidence.percent(as_in_trace)}")

sd = load_sd(device=device)
a_last = sd.scheduler.alphas_cumprod[-1]  # the squared weight of the image at the last of the thousand times
print(f"weight of the image at DDPM's last time: {float(a_last.sqrt()):.1%}; at rectified flow's: 0.0%")
test_prompts = [q for q in exam_prompts(80) if q.size == (128, 128) and q.claim.background][:4]
noise = torch.cat([draw_noise(q.seed, 16, 16, 16) for q in test_prompts])  # [4, 16, 16, 16]
colours = list(BACKGROUNDS)
right = [q.claim.background for q in test_prompts]
wrong = [colours[(colours.index(background) + 3) % 6] for background in right]
fig, axes = plt.subplots(3, 4, figsize=(5.6, 4.4), layout="constrained")
for row, (name, backgrounds) in zip(axes, {"no trace": None, "right trace": right, "wrong trace": wrong}.items()):
    start = noise
    if backgrounds is not None:
        plain = [to_tensor(np.full((128, 128, 3), BACKGROUNDS[b], np.uint8)).to(device) for b in backgrounds]
        with torch.no_grad():
            plain = torch.cat([sd.autoencoder.encode(image) for image in plain]).cpu()
        start = a_last.sqrt() * plain + (1 - a_last).sqrt() * noise
    images = sd([q.prompt for q in test_prompts], seed=0, begin=start, progress=False).images
    for ax, image, q in zip(row, images, test_prompts):
        ax.imshow(image)
        ax.set(xticks=[], yticks=[])
        ax.set_title(q.claim.background if backgrounds is None else "", fontsize=8)
    row[0].set_ylabel(name, fontsize=9)
fig.suptitle("The U-Net takes the background from the trace in its noise, not from the prompt", fontsize=10)
plt.show()
sides = baselines["sd"]["sides"]
print("sd, first 200 prompts, {relations} relations (above and below included):".format(**sides), end=" ")
print("{asked} as in the prompt, {opposite} the other way round, the rest neither".format(**sides))

# %% [markdown]
# The U-Net mostly draws the background of the trace, whatever the prompt says. This suggests that the schedule is the
# cause. To prove it, one would have to train a U-Net whose last time is pure noise, as the cited paper proposes.
#
# **Which side?** A missing object counts as wrong in the row *relations*, too. But where the U-Net draws both
# objects, the opposite side is almost as frequent as the correct one, as the last line above shows. The cause may be
# the network, the text encoder (CLIP was trained to match captions with images, notebook 02b, our T5 to answer
# questions about a caption, notebook 03b) or the path: the models differ in all three. A U-Net trained with T5 would
# help to find out (`training/baselines.py`).

# %% [markdown]
# ## You vote
#
# The judge counts shapes and colours. You see more than that. Vote for a side with the left and right arrow keys, and
# for a tie with the down arrow. Each vote is stored before the next pair is shown.

# %%
arena.booth(my_arena, voter="me")

# %% [markdown]
# When you have voted, `my_arena.ratings("overall", "people").table()` counts the votes of people only. A whole class
# votes in the browser with `fluxedu arena serve`, and `fluxedu arena table --figures .` draws its ratings.
#
# ## Break it
#
# There are three ways in which these numbers can mislead.
#
# **No axis covers everything.** For an arena, a model is any function that generates images. This one takes the
# miniature's image (in 4 steps, for forty prompts) and adds spots; the judge ignores areas below 25 pixels.


# %%
def spotted(image):
    """An image with magenta spots of 4 x 4 pixels."""
    image = np.array(image)
    for y in range(6, image.shape[0] - 6, 16):
        for x in range(6, image.shape[1] - 6, 16):
            image[y : y + 4, x : x + 4] = (255, 0, 255)
    return Image.fromarray(image)


pairs = []
for q in exam_prompts(160)[:40]:
    plain = pipe(q.prompt, seed=q.seed, height=q.size[0], width=q.size[1], steps=4, trajectory=False, progress=False)
    pairs.append((plain.images[0], spotted(plain.images[0]), q.claim))
noticed = [preference("prompt", [plain], [dirty], claim) != "tie" for plain, dirty, claim in pairs]
cleaner = [preference("quality", [plain], [dirty], claim) == "left" for plain, dirty, claim in pairs]
fig, axes = plt.subplots(1, 2, figsize=(5, 2.6), layout="constrained")
for ax, image in zip(axes, pairs[0]):
    ax.imshow(image)
    ax.axis("off")
fig.suptitle(
    f"On prompt following, the judge votes 'tie' in {len(noticed) - sum(noticed)} of {len(noticed)} such pairs",
    fontsize=10,
)
plt.show()
noticed_spots.against("most" if sum(noticed) > len(noticed) / 2 else "few")
print(f"on visual quality it prefers the one without spots in {sum(cleaner)} of {len(cleaner)} pairs")

# %% [markdown]
# You noticed the spots at once. (The judge notices them only in a few pairs, where a shape is so poor after four
# steps that, with spots on it, the judge finds another shape or none.) A rating is valid for one judge *and one
# question*. A model that is trained to win on this question may win by changing things that the question does not ask
# about.
#
# **Other prompts.** The bootstrap gives new weights to votes, never to prompts. Suppose that ten people vote on the 24
# pairs of your arena, and all agree with the judge. These count as 240 independent votes. But
# what happens if we leave out one of the four prompts?

# %%
rows = [r for r in my_arena.votes.rows() if r["axis"] == "overall" and r["voter"] == "judge"]
left_score = {"left": 1.0, "right": 0.0, "tie": 0.5}


def ten_times(left_out=None):
    """Ratings when every vote counts ten times, without one of the prompts."""
    return rate(names, [(r["left"], r["right"], left_score[r["choice"]], 10) for r in rows if r["prompt"] != left_out])


ten_votes = ten_times()
width = {name: float((some.high - some.low).mean()) for name, some in (("one", result), ("ten", ten_votes))}
print(f"mean width of an interval: {width['one']:.0f} points with one vote per pair, {width['ten']:.0f} with ten")
without_one = [ten_times(prompt).elo for prompt in dict.fromkeys(r["prompt"] for r in rows)]
outside = sum(int(((elo < ten_votes.low) | (elo > ten_votes.high)).sum()) for elo in without_one)
print(f"with one prompt left out, {outside} of {len(without_one) * len(names)} ratings are outside their interval")

# %% [markdown]
# (By the square root, 405 points would become 128. But the two best contestants lost no vote to the others, so votes
# limit the distance from below only; its upper limit comes from the prior, however many votes there are.)
#
# Votes add information only if they are independent: a hundred prompts with one vote each tell more than one prompt
# with a hundred votes.
#
# **A cycle.** A strength is one number, so strengths cannot represent that A beats B, B beats C and C beats A.

# %%
cycle = [("A", "B", 1.0, 90), ("B", "A", 1.0, 10), ("B", "C", 1.0, 90), ("C", "B", 1.0, 10)]
cycle += [("C", "A", 1.0, 90), ("A", "C", 1.0, 10)]
cycle_difference.against("equal" if np.ptp(rate("ABC", cycle).elo) < 1 else "different")


def largest_misfit(names, votes):
    """The largest difference, over all pairs, between the observed share of wins and the predicted one."""
    wins = win_matrix(tally(names, votes), len(names))
    games = wins + wins.T
    p = win_probabilities(fit(add_prior(wins)))[: len(names), : len(names)]
    return float(np.abs(wins / np.maximum(games, 1) - p)[games > 0].max())


print(f"in the cycle, a pair's share is off by {100 * largest_misfit('ABC', cycle):.0f} percentage points")
in_order = [(a, b, 1.0, n) for a, b, n in (("A", "B", 75), ("B", "A", 25), ("B", "C", 75), ("C", "B", 25))]
in_order += [("A", "C", 1.0, 90), ("C", "A", 1.0, 10)]
print(f"for models that can be ordered it is off by {100 * largest_misfit('ABC', in_order):.0f}")

# %% [markdown]
# The three ratings are equal and their intervals narrow, although in every pair one model wins nine times in ten. The
# intervals cannot show that the Bradley-Terry model is wrong here, because they assume that it is right. The pairs do
# show it: compare the observed share of wins in each pair with the predicted one.
#
# ## In five lines
#
# 1. An interval of half the width needs four times as many votes, so compare the most informative pair next.
# 2. The bootstrap gives intervals without the assumption that strengths are normally distributed.
# 3. Intervals cover the uncertainty from the votes, but not from the choice of prompts or of the judge.
# 4. At equal cost, one FLUX was far ahead of one U-Net; three differences between them could be the reason.
# 5. A rating is a single number per model; check the pairs before you believe that this is enough.
#
# **Questions people ask**: *Can I compare the ratings of two arenas?* No: the mean is fixed at 1000 in each, and each
# has its own models, prompts and voters. *How many votes do I need?* Choose the width that you need, run a few
# votes, and scale: the width falls with the square root of their number.
#
# **Read**: D. B. Rubin, *The Bayesian bootstrap*, Annals of Statistics 1981 · Chatbot Arena, arXiv 2403.04132 · ours:
# `fluxedu/arena/rating.py`, `fluxedu/arena/match.py`.

# %%
fe.score()
