# %% [markdown]
# # 15 · The arena
#
# **Which model is better?** New models are announced with bar charts in which they come first. The bars are computed
# from votes: somebody sees two images of the same prompt and says which is better. You will build what lies between
# the votes and the bars.
#
# Afterwards you can turn votes into ratings with Elo's rule and with the Bradley-Terry model, derive the gradient and
# the information matrix of its likelihood, and say which of the two ratings depends on the order of the votes.
#
# 60 minutes · needs notebook 12; notebook 15b continues

# %%
import math
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fluxedu as fe
from fluxedu import arena, course
from fluxedu.arena.rating import ELO, add_prior, fit, win_matrix
from fluxedu.widgets.blind import blind

device = course.begin()
course.where(fe.load("nano"), "image")

# %% [markdown]
# This time only the last box is highlighted. An arena compares images; which model made them stays hidden until the
# votes are counted. (The models that are compared are the miniature, with several numbers of steps, and its base model.
# They are loaded by name, whatever model you use elsewhere.)
#
# ## Predict
#
# *Elo* points measure the difference of two models: 400 points mean that one is preferred ten times as often as the
# other.

# %%
chance_result = fe.predict(
    "Two models are equal. In what percentage of trials does one of them get 60 or more of 100 votes?", 6
)  # answer
preferred_share = fe.predict(
    "One model has 450 Elo points more. In what percentage of pairs is it preferred?", 93
)  # answer
order_matters = fe.predict(
    "The same votes in another order: does a rating by Elo's rule change: 'yes' or 'no'?", "yes"
)  # answer
never_lost = fe.predict(
    "A model won 10 of 10 votes. Is its most likely strength 'finite' or 'infinite'?", "infinite"
)  # answer

# %% [markdown]
# ## One ballot
#
# Four models are compared: the miniature in 8, 4 and 2 steps, each of which counts as a model of its own, and its base
# model with classifier-free guidance in 8 steps.
# There are eight prompts; use a hundred for a result that you want to publish. One comparison is called a *ballot*: two
# images of one prompt and one seed, on random sides and without names.

# %%
names = ["nano@8", "nano-base@8", "nano@4", "nano@2"]
folder = Path(tempfile.mkdtemp())
my_arena = arena.Arena([arena.contestant(name, device) for name in names], folder / "votes.sqlite", prompts=8)

ballot = my_arena.ballot("a visitor", "overall")
fig, axes = plt.subplots(1, 2, figsize=(5, 2.9), layout="constrained")
for ax, side, (image,) in zip(axes, ("left", "right"), my_arena.sides(ballot)):
    ax.imshow(image)
    ax.set_title(side, fontsize=9)
    ax.axis("off")
fig.suptitle(f"“{ballot.prompt}”\n{arena.AXES['overall'].question}", fontsize=9, wrap=True)
plt.show()

# %% [markdown]
# A single vote tells us little. Even a hundred votes rarely split into exactly 50 and 50 if two models are equal: one
# of them gets $k$ votes with the probability $\binom{100}{k} / 2^{100}$.

# %%
chance_of = [math.comb(100, k) / 2**100 for k in range(101)]
lopsided = sum(chance_of[k] for k in range(101) if abs(k - 50) >= 10)
chance_result.against(round(100 * lopsided))

# %% [markdown]
# So if two models are equal, one of them gets 60 or more of 100 votes in 1 of 18 trials, by chance.
#
# Now all votes. Here the *judge* votes, the program that finds shapes and colours in an image by geometry: the image
# that satisfies more claims of its prompt wins; if both satisfy equally many, the one that is drawn more cleanly wins;
# if the difference is small, it is a tie.

# %%
votes_cast = arena.judge_votes(my_arena, 1000, axes=["overall"])
votes = my_arena.outcomes("overall", "judge")  # (model on the left, on the right, score of the left one, number)
print(f"{votes_cast} votes: 6 pairs of models x 8 prompts")
wins = win_matrix(arena.rating.tally(names, votes), len(names))  # [4, 4]: how often the row's model was preferred
print(f"{'preferred to':13}", *(f"{name:>11}" for name in names))
for name, row in zip(names, wins):
    print(f"{name:13}", *(f"{number:11g}" for number in row))

# %% [markdown]
# ## Elo's rule
#
# The announcement of FLUX.1 shows Elo ratings. In Elo's rule, each vote changes two ratings, according to how
# surprising its result is. With ratings $a$ and $b$ and a score $s$ of 1, 0 or ½ (a tie) for a,
#
# $$p_a = \frac{1}{1 + 10^{(b - a)/400}}, \qquad a' = a + k\,(s - p_a), \qquad b' = b - k\,(s - p_a)$$

# %% exercise="arena.elo"

# %% [markdown]
# We take the same votes in 200 random orders.

# %%
preferred_share.against(round(100 / (1 + 10 ** (-450 / 400))))

if fe.passed("arena.elo"):
    rng, final = np.random.default_rng(0), []
    single_votes = [(a, b, score) for a, b, score, number in votes for _ in range(number)]
    for _ in range(200):
        rating = dict.fromkeys(names, 1000.0)
        for i in rng.permutation(len(single_votes)):
            a, b, score = single_votes[i]
            rating[a], rating[b] = elo(rating[a], rating[b], score)
        final.append([rating[name] for name in names])
    lowest, highest = np.min(final, axis=0), np.max(final, axis=0)
    fig, ax = plt.subplots(figsize=(6.6, 2.4), layout="constrained")
    ax.hlines(names, lowest, highest, color="#56B4E9", lw=8)
    ax.axvline(1000, color="0.5", lw=1)
    widest = 10 * round((highest - lowest).max() / 10)
    ax.set(
        xlabel="Elo rating after the same votes",
        title=f"The order of the votes moves a rating by up to {widest} points",
    )
    ax.invert_yaxis()
    plt.show()
    order_matters.against("yes" if widest > 0 else "no")
    for name, low, high in zip(names, lowest, highest):
        print(f"{name:11} {round(low, -1):5.0f} to {round(high, -1):5.0f}, depending on the order")

# %% [markdown]
# In chess this is wanted, because players improve. Models do not improve while they are compared.
#
# Our judge does not know what looks good. You do: vote yourself, without knowing which model made which image. Choose a
# side for each numbered pair; the ratings are updated by Elo's rule after each vote.

# %%
prompts = my_arena.questions("overall")
images_of = {name: [my_arena.gallery.image(name, q.prompt, q.seed, *q.size) for q in prompts[:4]] for name in names}
blind(images_of, [q.prompt for q in prompts[:4]], pairs=8)

# %% [markdown]
# ## The Bradley-Terry model
#
# Why not simply count wins? Because their number depends on the opponents. Instead we use all votes at once and ask
# which *strengths* of the models make them most probable. The statistical model was published by Bradley and Terry in
# 1952, and Elo's rule is based on it too. Every model has a strength $s_i$, and with the sigmoid function $\sigma$,
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
        pair = torch.tensor([[0.0, won], [lost, 0.0]])
        log_l = torch.stack([likelihood(torch.stack([gap, torch.zeros(())]), pair) for gap in gaps])
        ax.plot(ELO * gaps, (log_l - log_l.max()).exp(), color=colour, label=f"{won} of {won + lost} votes")
        print(f"{won} of {won + lost}: most likely difference {ELO * gaps[log_l.argmax()]:.0f} Elo")
    ax.axvline(0, color="0.5", lw=1)
    ax.set(xlabel="difference of the two models, Elo", ylabel="likelihood / its maximum")
    ax.set_title("7 of 10 votes are compatible with equal models, 70 of 100 are not")
    ax.legend(fontsize=8)
    plt.show()

# %% [markdown]
# ## Derivatives
#
# To find the maximum we need derivatives. Those of the sigmoid are
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
# Elo's rule is one small step along this gradient per vote.

# %% exercise="arena.gradient"

# %% [markdown]
# The second derivatives say how sharp the maximum is. Only $p_{ij}$ in $g_i$ depends on the strengths, so
#
# $$I_{ii} = -\frac{\partial g_i}{\partial s_i} = \sum_j n_{ij}\, p_{ij} (1 - p_{ij}), \qquad
# I_{ij} = -\frac{\partial g_i}{\partial s_j} = -n_{ij}\, p_{ij} (1 - p_{ij})$$
#
# The matrix $I$ is called the *information*. It is a matrix because a vote on i and j is about both. It has no negative
# eigenvalue, so the log-likelihood is concave: there is no second maximum at which a search could stop.

# %% exercise="arena.information"

# %% [markdown]
# Newton's method approximates the log-likelihood by a parabola with this gradient and this curvature, and jumps to the
# parabola's maximum:
#
# $$s \leftarrow s + I^{-1} g$$
#
# For two models, of which the second has the fixed strength 0, all of these are plain numbers. Check the first line by
# hand: at $s = 0$ we have $p = ½$, so $g = 7 - 10 · ½$ and $I = 10 · ½ · ½$.

# %%
s = 0.0
for step in range(1, 4):
    p = 1 / (1 + math.exp(-s))
    g, curvature = 7 - 10 * p, 10 * p * (1 - p)
    s += g / curvature
    print(f"step {step}: g = {g:5.2f}, I = {curvature:.2f}, new strength {s:.3f}; the maximum is {math.log(7 / 3):.3f}")

# %% [markdown]
# Now the step for any number of models. Only differences of strengths matter, so one strength has to be fixed, that of
# the last model.

# %% exercise="arena.newton"

# %% [markdown]
# Which model is the last? The library adds an imaginary one with strength 0, against which each model has won one vote
# and lost one. This is a *prior*: without it, some strengths could become infinite, as you will see below. We start all
# strengths at 0 and compare each step with the library's fit.

# %%
if fe.passed("arena.elo", "arena.gradient", "arena.information", "arena.newton"):
    table = torch.from_numpy(add_prior(wins))  # [5, 5]
    best = torch.from_numpy(fit(add_prior(wins)))  # [4]
    strengths = torch.zeros(5, dtype=torch.float64)
    for step in range(1, 6):
        strengths = newton(strengths, gradient(strengths, table), information(strengths, table))
        error = float((strengths[:4] - best).abs().max())
        print(f"step {step}: error", f"{error:.1g}" if error > 1e-9 else "below 1e-9")
    points = 1000 + ELO * (strengths[:4] - strengths[:4].mean()).numpy()
    fig, ax = plt.subplots(figsize=(6.6, 2.6), layout="constrained")
    ax.hlines(names, lowest, highest, color="#56B4E9", lw=8, label="Elo's rule, 200 orders")
    ax.plot(points, names, "D", color="#D55E00", label="Bradley-Terry, any order")
    ax.set(
        xlabel="points", title=f"The same {len(single_votes)} votes: a range of Elo ratings, one Bradley-Terry rating"
    )
    ax.invert_yaxis()
    ax.legend(fontsize=8)
    plt.show()
    for name, value in zip(names, points):
        print(f"{name:11} {round(value, -1):5.0f} points")

# %% [markdown]
# Near the maximum, each step doubles the number of correct digits. The differences are larger than those by Elo's rule:
# with k = 32, a rating moves by at most 32 points per vote, and each model has only 24 votes. The ranking rests on
# eight prompts; how far to trust such numbers is the subject of notebook 15b.
#
# ## Break it
#
# Leave out the prior. A model has won all of ten votes against the second one, whose strength is fixed at 0.

# %%
if fe.passed("arena.gradient", "arena.information", "arena.newton"):
    one_sided = torch.tensor([[0.0, 10.0], [0.0, 0.0]], dtype=torch.float64)
    strengths = torch.zeros(2, dtype=torch.float64)
    for step in range(1, 13):
        strengths = newton(strengths, gradient(strengths, one_sided), information(strengths, one_sided))
        if step in (1, 2, 4, 8, 12):
            print(
                f"step {step:2}: strength {strengths[0]:5.2f}, information {information(strengths, one_sided)[0, 0]:.0e}"
            )
    never_lost.against("infinite" if strengths[0] > 10 else "finite")
    with_prior = ELO * fit(add_prior(one_sided.numpy()))
    print(f"with the prior, the difference is {with_prior[0] - with_prior[1]:.0f} Elo points")

# %% [markdown]
# Each step adds about 1, for ever: the likelihood grows with the strength and has no maximum, while the information
# falls to 0.
#
# A second way to break it is to start far from the maximum. The parabola is a good approximation only near the point
# where it touches, and a step may overshoot. With 7 wins in 10 votes the maximum is at 0.85; we start further and
# further away.

# %%
for start in (1.0, 2.0, 3.0, 4.0):
    s = start
    p = 1 / (1 + math.exp(-s))
    s += (7 - 10 * p) / (10 * p * (1 - p))
    print(f"start {start:g}: after one step {s:6.2f}, a distance of {abs(s - math.log(7 / 3)):5.2f} from the maximum")

# %% [markdown]
# This is why the library limits a step to 2 units of strength (`fluxedu/arena/rating.py`).
#
# ## In five lines
#
# 1. A vote compares two images of one prompt blindly. Between equal models, in 1 of 18 trials one gets 60 or more of
#    100 votes.
# 2. Elo's rule changes ratings vote by vote, so the result depends on the order of the votes.
# 3. Bradley-Terry strengths make all votes most probable, in whatever order they were cast.
# 4. The gradient is wins minus expected wins; the information is the curvature; Newton's step is I⁻¹g.
# 5. A model that never lost needs a prior.
#
# **Questions people ask**: *Is 20 Elo a lot?* The model is preferred in 1 / (1 + 10^(-20/400)) = 53 % of pairs. *Why is
# a tie half a win?* Because it does not change equal ratings; Davidson (1970) gives ties a parameter of their own.
# *Which models may I enter?* Anything that generates images:
# `arena.Contestant("mine", lambda prompt, seed, height, width: ...)`.
#
# **Read**: R. A. Bradley and M. E. Terry, *Rank analysis of incomplete block designs*, Biometrika 1952 · A. E. Elo,
# *The Rating of Chessplayers*, 1978 · ours: `fluxedu/arena/rating.py`.

# %%
fe.score()
