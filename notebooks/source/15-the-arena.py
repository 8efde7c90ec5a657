# %% [markdown]
# # 15 · The arena
#
# **Which model is better, and how sure are we?** New models are announced with bar charts in which they come first. The
# bars are computed from votes: somebody sees two images of the same prompt and says which is better. You will build
# what lies between the votes and the bars, including the intervals that the bars usually lack.
#
# Afterwards you can turn votes into ratings, say how far to trust them, choose the most informative next comparison,
# run an arena of your own, and name three questions that its numbers do not answer.
#
# 125 minutes, in two sittings: stop before “Which pair should be compared next?” · needs notebook 14

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
from fluxedu.arena.match import preference
from fluxedu.arena.rating import ELO, add_prior, bootstrap_tables, fisher_information, fit, rank_pairs, rate, tally
from fluxedu.arena.rating import variance_reduction, win_matrix, win_probabilities
from fluxedu.loading import WEIGHTS
from fluxedu.nano.exam import questions as exam_prompts
from fluxedu.nano.judge import judge
from fluxedu.nano.scenes import BACKGROUNDS
from fluxedu.arena.stable_diffusion import load_sd
from fluxedu.sampling.images import to_tensor
from fluxedu.sampling.latents import draw_noise

device = course.begin()
course.where(fe.load("nano"), "image")

# %% [markdown]
# This time only the last box is highlighted. An arena compares images; which model made them stays hidden until the
# votes are counted. (The *contestants*, the models that are compared, are the miniature and its baselines. They are
# loaded by name, whatever model you use elsewhere.)
#
# ## Predict
#
# *Elo* points measure the difference of two models: 400 points mean that one is preferred ten times as often as the
# other. An *interval* around a rating says how uncertain it is. Votes are collected on six *axes*, which are different
# questions about two images: which one is better overall, follows the prompt better, and so on. The *judge* is a
# program that finds shapes and colours in an image by geometry, and can vote on each axis.

# %%
chance_result = fe.predict(
    "Two models are equal. In what percentage of trials does one of them get 60 or more of 100 votes?", 6
)  # answer
interval_width = fe.predict("With four times as many votes, how many times as wide is an interval?", 0.5)  # answer
axes = "overall, prompt, size, typography, diversity, quality"
exchanged_axis = fe.predict(f"On which axis is nano in 4 steps rated above nano-base? {axes}", "diversity")  # answer
cycle_difference = fe.predict(
    "A beats B, B beats C, and C beats A, in 9 of 10 votes each. How many Elo points from best to worst?", 0
)  # answer
better_relations = fe.predict(
    "After equal training, which network more often draws an object on the correct side? U-Net / FLUX", "FLUX"
)  # answer
noticed_spots = fe.predict(
    "Spots are added to one image of each pair. In what percentage of votes on “prompt” does the judge notice?", 0
)  # answer

# %% [markdown]
# ## One ballot
#
# Four contestants: the miniature, its base model with classifier-free guidance, and the miniature in 4 and in 2 steps.
# There are only four prompts, so that this notebook runs in a minute; use a hundred for a result that you want to
# publish. One comparison is called a *ballot*: two images of one prompt and one seed, on random sides and without
# names.

# %%
names = ["nano", "nano-base", "nano@4", "nano@2"]
folder = Path(tempfile.mkdtemp())
my_arena = arena.Arena([arena.contestant(name, device) for name in names], folder / "votes.sqlite", prompts=4)

ballot = my_arena.ballot("a visitor", "overall")
fig, axes = plt.subplots(1, 2, figsize=(5, 2.9), layout="constrained")
for ax, side, (image,) in zip(axes, ("left", "right"), my_arena.sides(ballot)):
    ax.imshow(image)
    ax.set_title(side, fontsize=9)
    ax.axis("off")
fig.suptitle(f"“{ballot.prompt}”\n{arena.AXES['overall'].question}", fontsize=9, wrap=True)
plt.show()

# %% [markdown]
# A single vote tells us little. Two models that are exactly equal rarely get exactly 50 votes each out of 100:

# %%
chance_of = [math.comb(100, k) / 2**100 for k in range(101)]
lopsided = sum(chance_of[k] for k in range(101) if abs(k - 50) >= 10)
chance_result.against(round(100 * lopsided))

# %% [markdown]
# So between equal models, a result of 60 to 40 or a clearer one occurs by chance one time in eighteen. One such result
# is a hint, and no more.
#
# ## From votes to ratings
#
# Why not simply count wins? Because the number of wins depends on the opponents. Why not use Elo's rule, as in notebook
# 14? Because its result depends on the order of the votes. In chess this is wanted, because players improve. Models do
# not, so we may use all votes at once and ask which *strengths* make them most probable. The statistical model was
# published by Bradley and Terry in 1952, and Elo's rule is based on it too. Every model has a strength $s_i$, and with
# the sigmoid function $\sigma$,
#
# $$P(i \text{ is preferred to } j) = \frac{e^{s_i}}{e^{s_i} + e^{s_j}} = \sigma(s_i - s_j), \qquad
# \sigma(x) = \frac{1}{1 + e^{-x}}$$
#
# Let $w_{ij}$ be how often i was preferred to j. Votes are independent, so their probabilities are multiplied, and the
# logarithm of the product is a sum:
#
# $$\log L = \sum_{i,j} w_{ij}\, \log \sigma(s_i - s_j)$$
#
# Strengths times 400 / log 10 are Elo points, since odds of ten to one are a difference of log 10 in strength.

# %% exercise="arena.likelihood"

# %%
if fe.passed("arena.likelihood"):
    gaps = torch.linspace(-1, 3, 201)
    fig, ax = plt.subplots(figsize=(6.2, 2.8), layout="constrained")
    for won, lost, colour in ((7, 3, "#E69F00"), (70, 30, "#0072B2")):
        wins = torch.tensor([[0.0, won], [lost, 0.0]])
        log_l = torch.stack([likelihood(torch.stack([gap, torch.zeros(())]), wins) for gap in gaps])
        ax.plot(ELO * gaps, (log_l - log_l.max()).exp(), color=colour, label=f"{won} of {won + lost} votes")
        print(f"{won} of {won + lost}: most likely difference {ELO * gaps[log_l.argmax()]:.0f} Elo")
    ax.axvline(0, color="0.5", lw=1)
    ax.set(xlabel="difference of the two models, Elo", ylabel="likelihood / its maximum")
    ax.set_title("7 of 10 votes are compatible with equal models, 70 of 100 are not")
    ax.legend(fontsize=8)
    plt.show()

# %% [markdown]
# To find the maximum we need the derivatives. Those of the sigmoid are
#
# $$\frac{d}{dx} \log \sigma(x) = 1 - \sigma(x), \qquad \frac{d}{dx}\, \sigma(x) = \sigma(x)\, (1 - \sigma(x))$$
#
# Write $p_{ij} = \sigma(s_i - s_j)$ and $n_{ij} = w_{ij} + w_{ji}$ for the number of votes on the pair. The strength
# $s_i$ occurs in the terms of $w_{ij}$, with a plus, and in those of $w_{ji}$, with a minus, and $1 - p_{ji} = p_{ij}$:
#
# $$g_i = \frac{\partial \log L}{\partial s_i} = \sum_j \bigl( w_{ij} (1 - p_{ij}) - w_{ji}\, p_{ij} \bigr)
# = \sum_j (w_{ij} - n_{ij}\, p_{ij})$$
#
# This is *the number of wins of i minus the expected number of wins*. At the maximum the two are equal for every model.
# Elo's rule is one small step along this gradient per vote. A second derivative says how sharp the maximum is. Only
# $p_{ij}$ in $g_i$ depends on the strengths, so
#
# $$I_{ii} = -\frac{\partial g_i}{\partial s_i} = \sum_j n_{ij}\, p_{ij} (1 - p_{ij}), \qquad
# I_{ij} = -\frac{\partial g_i}{\partial s_j} = -n_{ij}\, p_{ij} (1 - p_{ij})$$
#
# The matrix $I$ is called the *information*. It is a matrix because a vote on i and j is about both. It has no negative
# eigenvalue, so the log-likelihood is concave and has one maximum, whatever the votes. Newton's method approximates the
# function by a parabola with this gradient and this curvature, and jumps to the parabola's maximum:
#
# $$s \leftarrow s + I^{-1} g$$
#
# For two models, of which the second has the fixed strength 0, all of these are plain numbers. Check the first line by
# hand: at $s = 0$ we have $p = ½$, so $g = 7 - 10 · ½$ and $I = 10 · ½ · ½$.

# %%
s = 0.0
for step in range(1, 4):
    p = 1 / (1 + math.exp(-s))
    g, information = 7 - 10 * p, 10 * p * (1 - p)
    s += g / information
    print(
        f"step {step}: g = {g:5.2f}, I = {information:.2f}, new strength {s:.3f}; the maximum is {math.log(7 / 3):.3f}"
    )

# %% [markdown]
# Now write the step for any number of models.

# %% exercise="arena.newton"

# %% [markdown]
# To test whether this finds the truth, we need votes for which the truth is known. These are simulated, from five
# strengths of our choice. To make every strength finite, the library adds a *prior*: one more player with strength 0,
# against whom each model has won one game and lost one. Without it, the strength of a model that never lost would be
# infinite.

# %%
truth = np.array([0.9, 0.4, 0.0, -0.4, -0.9])


def simulate(strengths, votes, rng):
    """Wins [M, M] after `votes` votes on random pairs."""
    wins = np.zeros((len(strengths),) * 2)
    for _ in range(votes):
        i, j = rng.choice(len(strengths), 2, replace=False)
        won = rng.random() < 1 / (1 + math.exp(strengths[j] - strengths[i]))
        wins[(i, j) if won else (j, i)] += 1
    return wins


simulated = simulate(truth, 200, np.random.default_rng(0))
if fe.passed("arena.newton"):
    table, best = add_prior(simulated), fit(add_prior(simulated))
    strengths = torch.zeros(5, dtype=torch.float64)
    for step in range(1, 5):
        strengths = newton(strengths, torch.from_numpy(table))
        error = float((strengths - torch.from_numpy(best)).abs().max())
        print(f"step {step}: error below", f"1e{math.ceil(math.log10(error))}" if error > 1e-9 else "1e-9")
    print("the truth: ", *(f"{value:5.1f}" for value in truth))
    print("the fit:   ", *(f"{value:5.1f}" for value in best))

# %% [markdown]
# Each step doubles the number of correct digits. The fit is not the truth, though: after these 200 votes the second
# model comes out before the first. How far to trust such numbers is the next question. (With few and one-sided votes a
# step may overshoot; the library limits it to 2 units of strength, see `fluxedu/arena/rating.py`.)
#
# ## How sure are we?
#
# If other people had voted, or the same people on another day, the strengths would be different. With many votes, the
# fitted strengths vary like a normal distribution whose covariance is the inverse of the information, which gives the
# textbook's interval of 95 %:
#
# $$s_i \pm 1.96 \sqrt{(I^{-1})_{ii}}$$
#
# For 7 wins in 10 votes, $I = 10 · 0.7 · 0.3 = 2.1$, so the interval is ± 1.96 / √2.1 = ± 1.35 units of strength,
# or ± 235 Elo points. For 70 in 100 it is ± 74. (Compare this with the two curves above.)
#
# With few votes the distribution is not normal. We cannot ask other people, but we can change the existing votes at
# random and fit again, many times: this is the *bootstrap*. The usual bootstrap
# draws votes with replacement. It fails when there are few votes: if all of ten votes are for one model, every draw is
# the same ten votes, and the interval has no width. Rubin's Bayesian bootstrap (1981) gives each vote, and each game of
# the prior, a random weight from an exponential distribution, so that no vote is ever left out.

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
low, high = one_sided.low[0], one_sided.high[0]
print(f"10 of 10 votes: the winner's interval is {round(low, -1):.0f} to {round(high, -1):.0f}")

# %% [markdown]
# The two intervals are from different random weights, so their ends may differ by some points.
#
# Does a 95 % interval contain the truth 95 times in 100? In simulations we can check: 150 simulated arenas with five
# models and 60 votes each, and another 20 with 240 votes.

# %%
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
# The width is inversely proportional to the square root of the number of votes: an interval of half the width needs
# four times as many votes.
#
# ## Which pair should be compared next?
#
# So no vote should be wasted. A vote on whether eight steps are better than two tells us nothing new. Let $p$ be the
# probability that i is preferred to j. A vote on i and j adds the information $w = p\,(1 - p)$ about $s_i - s_j$, which
# is largest if the result is open, $p = ½$. It reduces the uncertainty most where there were few votes before.
# Strengths are defined only up to a common constant, so we look at their covariance around their mean: the inverse of
# the information, with the mean subtracted from its rows and from its columns,
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
    fig.suptitle("One more vote gains most where votes are few and the result is open (yellow: most)", fontsize=10)
    plt.show()


spread_out = 2 * truth  # models that are far apart, so that some comparisons are useless
variances = {"most informative": [], "random": []}
for trial in range(40):
    rng = np.random.default_rng(trial)
    for how in variances:
        wins = np.zeros((5, 5))
        for _ in range(80):
            i, j = rank_pairs(wins, rng)[0] if how == "most informative" else rng.choice(5, 2, replace=False)
            won = rng.random() < 1 / (1 + math.exp(spread_out[j] - spread_out[i]))
            wins[(i, j) if won else (j, i)] += 1
        variances[how].append(float(np.trace(centred_covariance(wins))))
for how, values in variances.items():
    low, median, high = np.quantile(values, (0.1, 0.5, 0.9))
    print(f"{how:16} summed variance after 80 votes: {median:.2f} (8 of 10 arenas: {low:.2f} to {high:.2f})")
smaller = sum(a < b for a, b in zip(*variances.values()))
print(f"the most informative pairs gave the smaller variance in {smaller} of 40 simulated arenas")

# %% [markdown]
# The advantage is modest, and in a single arena luck can hide it. `my_arena.ballot` chooses pairs in this way. Pairs
# that are equally informative, and the sides, are chosen at random, so a preference for the left side does not favour
# any model.
#
# ## The judge votes
#
# The announcement of FLUX.1 compares models on six axes: overall, prompt following, images of three sizes, letters,
# diversity of four images of one prompt, and visual quality. Here the judge votes on all of them, by geometry; a tie is
# a possible vote too. It votes on every pair of contestants, for every prompt and on every axis.

# %%
votes_cast = arena.judge_votes(my_arena, 1000, axes=["overall", "prompt", "size"])

# %%
votes_cast += arena.judge_votes(my_arena, 1000, axes=["typography", "diversity", "quality"])
print(f"{votes_cast} votes: 6 pairs x {votes_cast // 36} prompts x 6 axes")
results = {axis: my_arena.ratings(axis, "judge") for axis in arena.AXES}
plots.elo(results["overall"].rows(), "Overall: nano and nano-base are rated above nano in 4 and in 2 steps")

# %%
plots.elo_axes({arena.AXES[axis].title: result.rows() for axis, result in results.items()})

# %%
elo_of = lambda axis, name: results[axis].rows()[name]["elo"]
exchanged_axis.against(", ".join(axis for axis in results if elo_of(axis, "nano@4") > elo_of(axis, "nano-base")))
for axis in ("overall", "diversity"):
    for name, row in results[axis].rows().items():
        low, high = round(row["low"], -1), round(row["high"], -1)
        print(f"{axis:10} {name:10} interval {low:5.0f} to {high:5.0f}")

# %% [markdown]
# With these four prompts the miniature is first, or level with the first, on every axis, but the order of the others
# depends on the axis. On diversity, nano in 4 steps is rated above nano-base, but the two intervals overlap. (With 480
# votes, in `fluxedu/nano/weights/README.md`, the order is the same, and the intervals still overlap.) If the difference
# were real, there would be a simple explanation: the axis does not ask whether the prompt was followed, and objects in
# wrong positions are also in different positions. Ask what makes a model win on an axis before you quote its rating.
#
# Look at the intervals before you look at the ratings. With 24 votes per axis (each contestant is in 12 of them) the
# intervals are hundreds of points wide; an arrow at the edge means that an interval continues. Overlapping intervals do
# not show that two models are equal: their strengths are correlated, so one would need the interval of the difference.
# But they do not show a ranking either. And with six axes and six pairs you look at 36 differences: even if all
# contestants were equal, 36 × 5 % = 1.8 of these differences would appear significant at the level of 95 %.
#
# ## A comparison with Stable Diffusion
#
# The announcement of FLUX.1 compares it with other models. What each of them cost to train has not been published, so
# the better results may come from the design or from the budget. Here are two models of equal cost: `sd`, a small
# Stable Diffusion, and `twin`, a FLUX of the miniature's size. Both were trained from scratch, with the same scenes,
# text encoders, autoencoder and optimiser, and for the same number of minutes on one core. There is one training run of
# each, with the miniature's settings. Only one setting was tuned for the U-Net, the weight of an auxiliary loss (both
# models also learn to classify what is in a patch). So a small difference would mean little. The two models differ in
# these points:
#
# | | sd | twin |
# |---|---|---|
# | network | U-Net: convolutions, attention at its lower resolution | transformer: joint attention of patches and text |
# | text | CLIP's tokens, by cross-attention | T5's tokens next to the patches, CLIP's pooled vector |
# | predicts | the noise, on the curved paths of DDPM | the velocity, on straight paths |
# | sampling | DDIM, classifier-free guidance | Euler, classifier-free guidance |
#
# A *U-Net* reduces the resolution step by step and increases it again, with skip connections between the halves (arXiv
# 1505.04597). *DDPM* mixes `sqrt(a) image + sqrt(1 - a) noise` with an `a` that falls over a thousand times (arXiv
# 2006.11239), so its paths are curved. *DDIM* follows them back in few steps and without new noise (arXiv 2010.02502).

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
diversities = [baselines[name]["exam"]["diversity"] for name in rows]
print(f"{'diversity of four images of a prompt':54}", *(f"{diversity:14.2f}" for diversity in diversities))
for name, model in baselines.items():
    trained_on = model["steps"] * model["batch"]
    print(f"{name:4} {model['parameters']:,} parameters, {model['minutes']} minutes, {trained_on:,} images")
better = max(rows, key=lambda name: rows[name]["relations"]["percent"])
better_relations.against({"sd": "U-Net", "twin": "FLUX"}[better])

fig, ax = plt.subplots(figsize=(5.6, 2.8), layout="constrained")
for name, colour in (("sd", "#D55E00"), ("twin", "#0072B2")):
    by_steps = baselines[name]["by_steps"]
    percent = [cell["percent"] for cell in by_steps.values()]
    bars = np.abs(np.array([wilson(**cell) for cell in by_steps.values()]).T - percent)
    ax.errorbar(list(map(int, by_steps)), percent, bars, fmt="o-", color=colour, label=name, capsize=3)
ax.set(
    xscale="log",
    xticks=[4, 8, 20, 50],
    xticklabels=[4, 8, 20, 50],
    xlabel="steps",
    ylabel="images entirely right, %",
    ylim=0,
)
ax.minorticks_off()
right_at_20 = {name: baselines[name]["by_steps"]["20"]["percent"] for name in ("sd", "twin")}
ax.set_title(
    f"In 20 steps {right_at_20['twin']:.0f} % of the twin's images are right, {right_at_20['sd']:.0f} % of sd's"
)
ax.legend()
plt.show()

# %% [markdown]
# The cost is the same, and in these two runs the twin is ahead in every row but diversity. More steps do not help the
# U-Net: its fifty steps are no better than its eight. We can examine two of the rows.
#
# **The background.** At the last of DDPM's times the state is not pure noise: `a` is not 0. In training, the U-Net
# always received a weak trace of the image, and the colour of the background, which is the same in every cell, can be
# read from a very weak trace. Sampling starts from noise without such a trace, which the U-Net takes for a medium
# background (arXiv 2305.08891; this is why Stable Diffusion 1 hardly ever generates a black image). Rectified flow
# starts at t = 1, where the state is pure noise in training, too. So we give the U-Net what is missing: a trace of a
# plain background, as strong as in training. As a control, we give it the trace of a wrong background.

# %%
sd = load_sd(device=device)
a_last = sd.scheduler.alphas_cumprod[-1]  # the squared weight of the image at the last of the thousand times
print(f"weight of the image at DDPM's last time: {float(a_last.sqrt()):.1%}; at rectified flow's: 0.0%")
test_prompts = [q for q in exam_prompts(300) if q.size == (128, 128) and q.claim.background][:12]
noise = torch.cat([draw_noise(q.seed, 16, 16, 16) for q in test_prompts])  # [12, 16, 16, 16]
prompt_backgrounds = [q.claim.background for q in test_prompts]
colours = list(BACKGROUNDS)
wrong_backgrounds = [colours[(colours.index(background) + 3) % 6] for background in prompt_backgrounds]


def noise_with(backgrounds):
    """The noise with a trace of these plain backgrounds, as strong as in training."""
    images = [to_tensor(np.full((128, 128, 3), BACKGROUNDS[name], np.uint8)).to(device) for name in backgrounds]
    with torch.no_grad():
        plain = torch.cat([sd.autoencoder.encode(image) for image in images]).cpu()
    return a_last.sqrt() * plain + (1 - a_last).sqrt() * noise


def count_backgrounds(images, backgrounds):
    """How many images have these backgrounds, according to the judge."""
    claims = [replace(q.claim, background=name) for q, name in zip(test_prompts, backgrounds)]
    return sum(bool(judge(image, claim).background) for image, claim in zip(images, claims))


starts = {
    "noise only": noise,
    "trace of the right one": noise_with(prompt_backgrounds),
    "trace of a wrong one": noise_with(wrong_backgrounds),
}
for name, start in starts.items():
    images = sd([q.prompt for q in test_prompts], seed=0, begin=start, progress=False).images
    as_wrong = (
        f"; as in the trace: {count_backgrounds(images, wrong_backgrounds)}" if name == "trace of a wrong one" else ""
    )
    count = count_backgrounds(images, prompt_backgrounds)
    print(f"{name:22} backgrounds as in the prompt: {count} of {len(test_prompts)}{as_wrong}")
sides = baselines["sd"]["sides"]
print("sd, {relations} relations: {asked} objects on the right side, {opposite} on the opposite side".format(**sides))

# %% [markdown]
# The U-Net mostly draws the background of the trace, whatever the prompt says: it has not learned to take it from the
# prompt, since in training the state always revealed it. This suggests that the schedule is the cause. To prove it, one
# would have to train a U-Net whose last time is pure noise, as the cited paper proposes and as it always is in
# rectified flow.
#
# **Left and right.** Read the row *relations* with care: a missing object counts as wrong too. But where the U-Net
# draws both objects, the opposite side is almost as frequent as the right one, as the last line above shows. The U-Net
# gets its text from CLIP, which was trained to match captions with images (notebook 02); our T5 was trained to answer
# questions about a caption (notebook 03). But the two models differ in the network, the text encoder and the path, so
# the comparison does not show which of the three is the cause. To find out, one could train a U-Net with T5; begin with
# `training/baselines.py`. The same holds for shapes, about which CLIP's score says little (notebook 02), and for
# letters.
#
# Diversity is the only row in which the U-Net is ahead, and images that do not follow the prompt tend to be more
# diverse, as explained above. (The twin's weights are not included; `fluxedu train --variant twin` trains them. In the
# next figure the miniature takes its place, which was trained for far longer. So look at the U-Net's mistakes, and do
# not take the figure for a comparison.)

# %%
five_prompts = [q for q in exam_prompts(200) if q.size == (128, 128)][:5]
settings = {"seed": [q.seed for q in five_prompts], "steps": 20, "trajectory": False, "progress": False}
prompts = [q.prompt for q in five_prompts]
images_of = {"sd": sd(prompts, **settings).images, "nano": fe.load("nano", device=device)(prompts, **settings).images}
fig, axes = plt.subplots(2, 5, figsize=(7.6, 4.3), layout="constrained")
for ax, prompt in zip(axes[0], prompts):
    ax.set_title(textwrap.fill(prompt, 22), fontsize=7)
for row, (name, images) in zip(axes, images_of.items()):
    for ax, image in zip(row, images):
        ax.imshow(image)
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(name, fontsize=9)
    right = sum(judge(image, q.claim).everything for image, q in zip(images, five_prompts))
    print(f"{name:5} images entirely right: {right} of {len(five_prompts)}")
fig.suptitle("The same prompts and noise; nano was trained for far longer than sd", fontsize=10)
plt.show()

# %% [markdown]
# ## You vote
#
# The judge counts shapes and colours. You see more than that. Nothing below shows which model made an image. Vote for a
# side with the left and right arrow keys, and for a tie with the down arrow. Each vote is stored before the next pair
# is shown.

# %%
arena.booth(my_arena, voter="me")

# %% [markdown]
# When you have voted, `my_arena.ratings("overall", "people").table()` counts the votes of people only. A whole class
# votes in the browser with `fluxedu arena serve`; `fluxedu arena table --figures .` draws the two figures above from
# its votes.
#
# ## Break it
#
# There are three ways in which these numbers can mislead.
#
# **No axis covers everything.** A contestant is any function that generates images. This one takes the miniature's
# image and adds spots; the judge ignores areas below 25 pixels.


# %%
def spotted(prompt, seed, height, width):
    """The miniature's image with magenta spots of 4 x 4 pixels."""
    image = np.array(my_arena.gallery.image("nano", prompt, seed, height, width))
    for y in range(6, height - 6, 16):
        for x in range(6, width - 6, 16):
            image[y : y + 4, x : x + 4] = (255, 0, 255)
    return Image.fromarray(image)


prompt_axis = my_arena.questions("prompt")  # the prompts of the axis “prompt following”
pairs = [
    (my_arena.gallery.image("nano", q.prompt, q.seed, *q.size), spotted(q.prompt, q.seed, *q.size)) for q in prompt_axis
]
noticed = [preference("prompt", [plain], [dirty], q.claim) != "tie" for (plain, dirty), q in zip(pairs, prompt_axis)]
fig, axes = plt.subplots(1, 2, figsize=(5, 2.6), layout="constrained")
for ax, image in zip(axes, pairs[0]):
    ax.imshow(image)
    ax.axis("off")
fig.suptitle(
    f"On prompt following, the judge calls a tie in {len(noticed) - sum(noticed)} of {len(noticed)} such pairs",
    fontsize=10,
)
plt.show()
noticed_spots.against(round(100 * sum(noticed) / len(noticed)))
cleaner = [preference("quality", [plain], [dirty], q.claim) == "left" for (plain, dirty), q in zip(pairs, prompt_axis)]
print(f"on visual quality it prefers the one without spots in {sum(cleaner)} of {len(cleaner)} pairs")

# %% [markdown]
# You noticed the spots at once. A rating is valid for one judge *and one question*. A model that is trained to win on
# this question learns to exploit whatever the question ignores.
#
# **Other prompts.** The bootstrap gives new weights to votes, never to prompts: its interval says what would happen if
# other people voted on the same prompts. Suppose that ten people vote on these 24 pairs, and all agree with the judge.
# The intervals shrink as if these were 240 independent votes. But what happens if we leave out one of the four prompts?

# %%
rows = [r for r in my_arena.votes.rows() if r["axis"] == "overall" and r["voter"] == "judge"]
left_score = {"left": 1.0, "right": 0.0, "tie": 0.5}


def ten_times(left_out=None):
    """Ratings when every vote counts ten times, without one of the prompts."""
    return rate(names, [(r["left"], r["right"], left_score[r["choice"]], 10) for r in rows if r["prompt"] != left_out])


ten_votes, one_vote = ten_times(), results["overall"]
width = {name: float((some.high - some.low).mean()) for name, some in (("one", one_vote), ("ten", ten_votes))}
print(f"mean width of an interval: {width['one']:.0f} points with one vote per pair, {width['ten']:.0f} with ten")
without_one = [ten_times(prompt).elo for prompt in dict.fromkeys(r["prompt"] for r in rows)]
outside = sum(int(((elo < ten_votes.low) | (elo > ten_votes.high)).sum()) for elo in without_one)
print(f"with one prompt left out, {outside} of {len(without_one) * len(names)} ratings are outside their interval")

# %% [markdown]
# Votes add information only if they are independent; a hundred prompts with one vote each tell more than one prompt
# with a hundred votes. And models differ in *what* they are good at: letters, crowds, faces. A rating belongs to the
# prompts that it was measured with, and an arena in which people bring their own prompts measures what these people ask
# for.
#
# **A cycle.** A strength is one number, so strengths cannot represent that A beats B, B beats C and C beats A.

# %%
cycle = [("A", "B", 1.0, 90), ("B", "A", 1.0, 10), ("B", "C", 1.0, 90), ("C", "B", 1.0, 10)]
cycle += [("C", "A", 1.0, 90), ("A", "C", 1.0, 10)]
cycle_difference.against(round(float(np.ptp(rate("ABC", cycle).elo))))


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
# The three ratings are equal and their intervals narrow, although in every pair one contestant wins nine times in ten.
# The intervals do not show that the Bradley-Terry model is wrong here, because they are computed under the assumption
# that it is right. The pairs do show it: compare the observed share of wins in each pair with the predicted one.
#
# ## In five lines
#
# 1. A vote compares two images of one prompt blindly. Between equal models, 1 result in 18 is 60 to 40 or clearer.
# 2. Fitted strengths make the votes most probable; Newton finds them in a few steps, whatever the order of the votes.
# 3. Half the interval needs four times as many votes, so compare the most informative pair next.
# 4. Intervals cover the uncertainty from the votes, but not from the choice of prompts or of the judge.
# 5. A rating is a single number per model; check the pairs before you believe that this is enough.
#
# **Questions people ask**: *Is 20 Elo a lot?* The model is preferred in 1 / (1 + 10^(-20/400)) = 53 % of pairs; check
# whether the intervals overlap. *Can I compare the ratings of two arenas?* No: the mean is fixed at 1000 in each, and
# each has its own contestants, prompts and voters. *Why is a tie half a win?* Because it does not change equal ratings;
# Davidson (1970) gives ties a parameter of their own. *Which contestants may I enter?* Anything that generates images:
# `arena.Contestant("mine", lambda prompt, seed, height, width: ...)`.
#
# **Read**: R. A. Bradley and M. E. Terry, *Rank analysis of incomplete block designs*, Biometrika 1952 · D. B. Rubin,
# *The Bayesian bootstrap*, Annals of Statistics 1981 · Chatbot Arena, arXiv 2403.04132 · ours:
# `fluxedu/arena/rating.py`, `fluxedu/arena/match.py`.

# %%
fe.score()
