# %% [markdown]
# # 02b · Contrastive learning
#
# **What does CLIP's training teach its vector?** CLIP learned to find the caption of an image among many captions. You
# will write the loss of this task and the training step, train two tiny encoders for a few seconds, and then measure
# which details of a caption the trained encoders use, and what their vector contains besides.
#
# Afterwards you can write CLIP's loss and its gradient, train two encoders with it, and say what the agreement of image
# and caption shows about a vector and what it does not.
#
# 60 minutes · needs notebook 02

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.course import evidence
from fluxedu.loading import WEIGHTS
from fluxedu.nano.networks import CLIPModel, contrastive_loss
from fluxedu.nano.scenes import BACKGROUNDS, INVERSE, LETTERS, SHAPES, caption, relation_between, render, sample_scene
from fluxedu.nano.scenes import to_tensor, visible_colors
from fluxedu.widgets.similarity import similarity

device = course.begin()
pipe = fe.load(device=device)
nano_encoder = fe.load("nano", device=device).prompt_encoder
clip, tokenizer = nano_encoder.clip, nano_encoder.clip_tokenizer
course.where(pipe, "clip")

# %% [markdown]
# CLIP has two encoders ("towers"), one for images and one for text. FLUX uses only the text tower. The miniature's
# image tower ships with fluxedu, so this page measures the miniature's CLIP, whichever model you have loaded (only the
# explorer uses the CLIP of the loaded model).
#
# ## Predict
#
# For the last question we take images of two shapes and change one detail of their captions: another colour for one
# shape, another background, the two colours exchanged, or the two sides (left and right) exchanged. We say that CLIP
# notices a change if more than 90 % of the images match their own caption better than the changed one.

# %%
first_loss = fe.predict("What is the loss of 64 pairs if all 64 x 64 scores are equal?", 4.16)  # answer
matched = fe.predict("How many of 64 images does CLIP match to their own caption among 64? (Chance: 1.)", 60)  # answer
noticed = fe.predict(
    "Does CLIP notice the four changes, in this order: 'yes' or 'no' for each, as one text like “yes, no, no, yes”?",
    ["yes", "yes", "no", "no"],
)  # answer

# %% [markdown]
# ## Build it
#
# In every training batch each image has to find its caption among all captions, and each caption its image. Take two
# images $a_1, a_2$ and their captions $b_1, b_2$, all vectors of length 1 in the plane:

# %%
a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # two images
b = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])  # their captions
scores = 5 * a @ b.T  # one row per image; 5 is the temperature
by_image, by_caption = scores.softmax(dim=1), scores.softmax(dim=0)
for name, table in (("scores", scores), ("softmax of each row", by_image), ("softmax of each column", by_caption)):
    print(f"{name:23}", "   ".join("  ".join(f"{x:5.2f}" for x in row) for row in table.tolist()))
right_pairs = torch.cat([by_image.diagonal(), by_caption.diagonal()])
print(f"mean of -log over the {len(right_pairs)} right pairs: {float(-right_pairs.log().mean()):.2f}")

# %% [markdown]
# The right pairs stand on the diagonal. A row's softmax is the probability with which the image chooses each caption;
# a column's softmax is the probability with which the caption chooses each image. In general the score of image $i$ and
# caption $j$ is their cosine similarity times a learned factor $\tau$, the *temperature* (CLIP stores its logarithm;
# strictly, $\tau$ is the inverse of a temperature). The loss is the mean of two cross-entropies, one per direction:
#
# $$s_{ij} = \tau\, \frac{a_i \cdot b_j}{\lVert a_i \rVert \lVert b_j \rVert} \qquad
# \mathcal{L} = -\frac{1}{2N} \sum_{i=1}^{N} \left( \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}} +
# \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ji}}} \right)$$

# %% exercise="clip.contrast"

# %% [markdown]
# Two properties follow. If all scores are equal, every probability is $1/N$, and the loss is
#
# $$\mathcal{L} = -\log \frac{1}{N} = \log N$$
#
# And with $P$ for the softmax of the rows and $Q$ for that of the columns, the derivative for one score is
#
# $$\frac{\partial \mathcal{L}}{\partial s_{ij}} = \frac{1}{2N} \bigl( P_{ij} + Q_{ij} - 2\, \delta_{ij} \bigr)$$
#
# where $\delta_{ij}$ is 1 on the diagonal and 0 elsewhere. Gradient descent therefore raises the score of every right
# pair and lowers those of wrong pairs. The more probable a wrong pair is, the more its score is lowered.

# %%
equal_scores = torch.zeros(64, 64)
first_loss.against(float(F.cross_entropy(equal_scores, torch.arange(64))))

# %% [markdown]
# Now train with it. The image tower below sees 16 x 16 pixels. The text tower is as simple as can be: it averages one
# learned vector per token, so it does not even know the order of the words.


# %%
class TinyTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 128), nn.GELU(), nn.Linear(128, 32))
        self.text = nn.EmbeddingBag(clip.config.vocab_size, 32)
        self.log_temperature = nn.Parameter(torch.tensor(2.3))

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(images), self.text(ids), self.log_temperature.exp()


def draw_pairs(number: int, **kind) -> tuple[Tensor, list[str]]:
    """Images `[N, 3, 128, 128]` of random scenes, and a caption of each."""
    scenes = [sample_scene(rng, size=(128, 128), **kind) for _ in range(number)]
    return to_tensor(np.stack([render(scene) for scene in scenes])), [caption(scene, rng)[0] for scene in scenes]


rng = np.random.default_rng(2)  # the same scenes each time this cell runs
images, captions = draw_pairs(64, held_out=True)  # combinations that no training image has
images, ids = images.to(device), tokenizer(captions).to(device)
train_images, train_captions = draw_pairs(1024)
after_pairs = rng.bit_generator.state
train_images, train_ids = F.avg_pool2d(train_images, 8), tokenizer(train_captions)
own = torch.arange(64, device=device)

# %% exercise="clip.train_step"

# %% [markdown]
# The control has the same images and captions, but each image gets the caption of another image. (The tiny towers use
# float64, so that they end with the same numbers on every machine.)


# %%
@torch.enable_grad()  # a later cell turns gradients off
def train(train_ids: Tensor, steps: int = 300) -> tuple[TinyTowers, list[float]]:
    torch.manual_seed(0)
    tiny = TinyTowers().double()
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(train_ids), (64,))
        losses.append(train_step(tiny, contrast, optimizer, train_images[batch].double(), train_ids[batch]))
    return tiny, losses


def in_top_five(tiny: TinyTowers) -> int:
    """For how many of the 64 held-out images the own caption is among the five with the highest scores."""
    with torch.no_grad():
        a, b, _ = tiny(F.avg_pool2d(images.cpu(), 8).double(), ids.cpu())
    best = (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T).topk(5, dim=1).indices  # [64, 5]
    return int((best == own.cpu()[:, None]).any(dim=1).sum())


if fe.passed("clip.contrast", "clip.train_step"):
    fig, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
    top_five = {"untrained": in_top_five(train(train_ids, steps=0)[0])}
    for name, targets in (("own captions", train_ids), ("another image's captions", train_ids.roll(1, dims=0))):
        tiny, losses = train(targets)
        top_five[name] = in_top_five(tiny)
        ax.plot(losses, label=name)
        print(f"{name:25} loss {np.mean(losses[:5]):.1f} at first, {np.mean(losses[-20:]):.1f} at the end")
    ax.axhline(np.log(64), color="0.6", linestyle="--", label="log 64")
    ax.set(xlabel="training step", ylabel="loss")
    ax.set_title("With wrong captions the loss falls too, but less: the towers memorise pairs")
    ax.legend()
    plt.show()
    print("held-out images whose own caption is among the best five of 64 (chance: 5):")
    for name, count in top_five.items():
        print(f"{name:25} {count}")

# %% [markdown]
# At the start the loss is above $\log 64$, since the scores of random vectors differ and the temperature of 10 makes
# the towers too sure of them. Captions of another image can only be memorised: the loss falls, but nothing is learned
# that helps with new images. With their own captions, held-out images find theirs far more often than by chance.
#
# ## See it
#
# The miniature's CLIP was trained with the same loss, for longer: 800 batches of 64 pairs, images of 128 x 128 pixels,
# a convolutional image tower, and the text tower of notebook 02. There is one more matrix between CLIP's vector and
# the scores, the *projection* into the space that text and images share. FLUX leaves the projection out.

# %%
towers = CLIPModel().eval().requires_grad_(False)
shipped = load_file(WEIGHTS / "image_tower" / "model.safetensors")
text_tower = {f"text.{name}": w.float().cpu() for name, w in clip.state_dict().items()}
towers.load_state_dict({name: w.float() for name, w in shipped.items()} | text_tower)
towers.to(device)
_ = torch.set_grad_enabled(False)  # nothing is trained from here on


def embed_text(sentences: list[str]) -> Tensor:
    """Vectors of the sentences in the shared space, normalised to length 1: `[N, D]`."""
    return F.normalize(towers.text_projection_head(clip(tokenizer(sentences).to(device))[1]), dim=-1)


image_vectors = F.normalize(towers.image(images), dim=-1)  # [64, D]
pooled_vectors = clip(ids)[1]


def number_matched(text_vectors: Tensor) -> int:
    """How many of the 64 images have their highest score with their own caption."""
    return int(((image_vectors @ F.normalize(text_vectors, dim=-1).T).argmax(dim=1) == own).sum())


scores = image_vectors @ embed_text(captions).T  # [64, 64], one row per image
found_own = number_matched(embed_text(captions))
matched.against(found_own)
print("matched with the vector that FLUX gets, before the projection:", number_matched(pooled_vectors), "of 64")
if fe.passed("clip.contrast"):
    temperature = float(towers.temperature_head.exp().clamp(max=100))
    mine = contrast(towers.image(images), towers.text_projection_head(pooled_vectors), temperature)
    theirs = contrastive_loss(towers, images, ids)[0]
    course.compare("your loss and the one that trained the miniature", mine, theirs, within=1e-3)

# %% [markdown]
# People often say that CLIP's vector lives in a space shared with images. FLUX takes its vector one layer before that
# space, and the transformer makes its own use of it through a layer of its own (`vector_in`, notebook 05). Here are the
# scores of the first ten images and captions:

# %%
fig = plt.figure(figsize=(9.5, 4.4), layout="constrained")
left, right = fig.subfigures(1, 2, width_ratios=[1, 3.2])
for ax, image, i in zip(left.subplots(5, 2).flat, images, range(10)):
    ax.imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu())
    ax.set_title(i, fontsize=8)
    ax.axis("off")
ax = right.subplots()
heatmap = ax.imshow(scores[:10, :10].cpu(), cmap="cividis", vmin=-0.4, vmax=1, aspect="auto")
names = [f"{i}  {text if len(text) < 46 else text[:44] + '...'}" for i, text in enumerate(captions[:10])]
ax.set_yticks(range(10), names, fontsize=7)
ax.set_xticks(range(10))
ax.set_xlabel("caption")
ax.set_ylabel("image, with its caption")
fig.suptitle(f"Images match their own captions best (bright diagonal): {found_own} of 64 do")
fig.colorbar(heatmap, ax=ax, label="cosine similarity")
plt.show()

# %% [markdown]
# What does the match between image and caption depend on? Take an image of two shapes, its caption, and a caption with
# **one** detail changed: does the image score higher with its own caption? Guessing would be right in half of the
# cases.


# %%
def changed_caption(scene, change: str, k: int) -> str:
    """The scene's caption with one detail changed."""
    a, b = scene.objects
    colors, forms, side, background = [a.color, b.color], [a.form, b.form], relation_between(a, b), scene.background
    if change == "another colour":
        colors[0] = [c for c in visible_colors(background) if c not in colors][k % 3]
    elif change == "another background":
        background = [g for g in BACKGROUNDS if g != background][k % 5]
    elif change == "another shape":
        forms[0] = [f for f in SHAPES if f not in forms][k % 4]
    elif change == "colours exchanged":
        colors.reverse()
    elif change == "sides exchanged":
        side = INVERSE[side]
    return f"a {colors[0]} {forms[0]} {side} a {colors[1]} {forms[1]} on a {background} background"


rng.bit_generator.state = after_pairs  # the same scenes each time this cell runs
two_objects = []
while len(two_objects) < 120:
    scene = sample_scene(rng, size=(128, 128), count=2, held_out=True)
    if not any(o.form in LETTERS for o in scene.objects):
        two_objects.append(scene)
rendered = to_tensor(np.stack([render(scene) for scene in two_objects])).to(device)
vectors = F.normalize(towers.image(rendered), dim=-1)
own_score = (vectors * embed_text([changed_caption(scene, "", 0) for scene in two_objects])).sum(-1)  # cosine, [120]
all_changes = ("another colour", "another background", "another shape", "colours exchanged", "sides exchanged")
share = {}
for change in all_changes:
    changed = [changed_caption(scene, change, k) for k, scene in enumerate(two_objects)]
    changed_score = (vectors * embed_text(changed)).sum(-1)
    share[change] = float((own_score > changed_score).float().mean())

fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
ax.barh(list(share), [100 * value for value in share.values()], color="#0072B2")
ax.axvline(50, color="#D55E00", linestyle="--", label="chance")
ax.invert_yaxis()
ax.set_xlim(0, 100)
ax.set_xlabel("images that score higher with their own caption, %")
colour, sides = share["another colour"], share["sides exchanged"]
ax.set_title(f"The own caption scores higher: {colour:.0%} for another colour, {sides:.0%} for exchanged sides")
ax.legend(loc="lower right")
plt.show()
predicted_changes = ("another colour", "another background", "colours exchanged", "sides exchanged")
noticed.against(["yes" if share[change] > 0.9 else "no" for change in predicted_changes])

# %% [markdown]
# The match depends almost only on colours and background. The training may explain it: among 64 captions these two are
# mostly enough to find the right one. Two captions that differ only in the sides hardly ever meet in a batch, so the
# loss does not require the sides. The miniature is an extreme case (CLIP-L does tell shapes apart), but weakness with
# word order and with which attribute belongs to which object has been measured for large CLIP models too (arXiv
# 2204.03162, 2210.01936).
#
# Keep in mind what was measured: the *agreement of two towers*. It does not prove that the text vector lacks the other
# details. To find out what the vector contains, fit a linear map to it (a *probe*, which you will write in notebook
# 03b) that answers a question about the prompt, and test the map on other prompts. Here are four questions about 2,000
# prompts such as “a red circle left of a blue square”. We fit the probe on one half and test it on the other. For
# comparison we do the same with T5's vector of the first noun. The control has its answers shuffled, so its probe can
# only guess (in brackets 95 % intervals).

# %%
probes = evidence.load("pooled")["probes"]
for question, row in probes.items():
    print(f"{question} (chance {row['shuffled labels']['chance']:.0%})")
    for source, entry in row.items():
        print(f"    {source:30}", evidence.percent(entry))

# %% [markdown]
# So the vector contains more than the score uses. It says nearly always which colour is named first and which second,
# and the relation and the first shape clearly more often than by chance, though far from always. T5's vector of the
# first noun answers the three questions about its own object without an error, and names the second colour in half of
# the prompts.
#
# Try it yourself. Choose two prompts; then change a word of the second.

# %%
similarity(pipe)

# %% [markdown]
# ## Break it
#
# Notebook 02 changed three parts of CLIP: the token from which the vector is taken, the causal mask, and the activation
# function. What do these mistakes mean for the task?


# %%
class ExactMLP(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.fc1 = nn.Linear(old.fc1.in_features, old.fc1.out_features)
        self.fc2 = nn.Linear(old.fc2.in_features, old.fc2.out_features)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


broken = {"unchanged": pooled_vectors, "state of the first token": clip(ids)[0][:, 0]}
attentions = [layer.self_attn for layer in clip.text_model.encoder.layers]
for attention in attentions:
    attention.causal = False
broken["no causal mask"] = clip(ids)[1]
for attention in attentions:
    attention.causal = True
with fe.swap("clip.*.mlp", lambda old: ExactMLP(old), clip):
    broken["exact GELU"] = clip(ids)[1]
for name, vectors in broken.items():
    print(f"{name:26} matched: {number_matched(towers.text_projection_head(vectors)):2} of 64")

# %% [markdown]
# The state of the first token is the same for every prompt, so all images get the same caption and one of them is
# right, which is chance. The exact GELU does no harm here, which makes it a mistake that nobody notices.
#
# ## In five lines
#
# 1. CLIP's loss asks every image for its caption among N, and every caption for its image.
# 2. Its gradient raises the scores of right pairs and lowers those of wrong pairs, the probable ones most.
# 3. Of these 64 images, 61 find their caption with the vector after the projection; with the vector that FLUX takes,
#    before the projection, 1 does.
# 4. That task needs mostly colours and background, so exchanged colours or sides hardly change the match.
# 5. The agreement of two towers is not all that a vector contains; a probe finds more.
#
# **Questions people ask**: *What was CLIP trained on?* On 400 million pairs of image and text (arXiv 2103.00020), in
# batches of 32,768 pairs; ours on 51,200 pairs of scenes. *Why such large batches?* The more captions in a batch, the
# more similar the most similar wrong one, and the finer the details that the loss requires.
#
# **Read**: CLIP, arXiv 2103.00020 · the loss under its usual name, InfoNCE, arXiv 1807.03748 · Winoground,
# arXiv 2204.03162 · ours: `training/clip.py` and `fluxedu/nano/networks.py`.

# %%
fe.score()
