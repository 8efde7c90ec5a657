# %% [markdown]
# # 07 · The double-stream block
#
# **Why two streams?** In its first blocks FLUX keeps text and image apart: each has its own weights, and they meet
# in one attention. You will write the block, one stream written once and used twice, and put it into the trained
# model; then you take one stream's weights away and see what they were for.
#
# Afterwards you can say what the two streams share and what they do not, what two sets of weights cost, and what
# feeds each of them.
#
# 50 minutes · needs notebooks 05 and 06

# %%
import copy
from contextlib import ExitStack, contextmanager

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.models import FluxConfig
from fluxedu.models.attention import SelfAttention
from fluxedu.models.blocks import MLP, DoubleStreamBlock
from fluxedu.models.meta_init import meta_init
from fluxedu.models.modulation import Modulation
from fluxedu.models.attention import rotate

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square"
picture = pipe(prompt, seed=4, progress=False)
course.where(pipe, "double")

# %% [markdown]
# FLUX.1 has 19 of these blocks, the miniature two. Everything that is not attention happens to each token for
# itself, so text and image can go through different weights everywhere but there.
#
# ## Predict

# %%
work = fe.predict("two streams have twice the weights: how many times the multiplications?", 1)  # answer
larger = fe.predict("after the double blocks: whose tokens are larger? text / image", "text")  # answer
feeds = fe.predict("what adds more to the text's tokens in the last double block? attention / MLP", "MLP")  # answer
borrowed = fe.predict("the text takes the image's weights: the picture moves not / a little / much", "much")  # answer

# %% [markdown]
# ## Build it
#
# A stream does two things: it **enters** the attention and it **leaves** it. Both are functions of one stream, so
# you write each once. `mod` holds the six modulations of notebook 05.

# %% exercise="double.enter"

# %% [markdown]
# Here is the only place where text and image meet. To the attention they are one row of tokens, the text first; it
# cannot tell which stream made a query or a key.

# %% exercise="double.joint"

# %% exercise="double.leave"
# The gate multiplies what is added. It does not blend, as some descriptions have it: the stream itself
# always passes whole.

# %% [markdown]
# Now the block: the same three parts twice, and your three functions. `plan` makes the modulations of both streams
# from `vec`; the model calls it once a step, ahead of the blocks.

# %% exercise="double.block"

# %% [markdown]
# Yours against the library's, with trained weights and the tokens of a real step:

# %%
config = pipe.flux.config
block = pipe.flux.double_blocks[1]
with fe.record("double.1.img", "double.1.txt", "double.1.attn.rope", "vec", steps=10) as rec:
    pipe(prompt, seed=4, progress=False)
img, txt, vec = (rec[name].at(step=0).tensor[None].to(device) for name in ("double.1.img", "double.1.txt", "vec"))
rope = rec["double.1.attn.rope"].at(step=0).tensor[None, None].to(device)
print("image", tuple(img.shape), "· text", tuple(txt.shape), "· vec", tuple(vec.shape), "· turns", tuple(rope.shape))

with torch.no_grad():
    theirs = block(img, txt, block.plan(vec), rope)
    if passed:
        mine = Block(config.hidden_size, config.num_heads, config.mlp_hidden).to(device, pipe.dtype)
        mine.load_state_dict(block.state_dict())
        ours = mine(img, txt, mine.plan(vec), rope)
        far = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs))
        print("farthest from the library's below 1 in 100,000:", far < 1e-5)

# %% [markdown]
# ## What two streams cost
#
# Weights, yes. Work, no: a token goes through one set of weights, whichever it is. Count the multiplications of the
# block as it is, and with the image's weights for both.

# %%
from torch.utils.flop_counter import FlopCounterMode


def sharing(old: nn.Module, kept: str, parts: tuple[str, ...] = ("mod", "attn", "mlp")) -> nn.Module:
    """A copy of a double block in which the other stream's parts are the `kept` stream's."""
    new = copy.deepcopy(old)
    other = {"img": "txt", "txt": "img"}[kept]
    for part in parts:
        setattr(new, f"{other}_{part}", getattr(new, f"{kept}_{part}"))
    return new


counted = {}
for name, one in {"two streams": block, "one set of weights": sharing(block, "img")}.items():
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        one(img, txt, one.plan(vec), rope)
    counted[name] = flops.get_total_flops()
    print(f"{name:18} {sum(p.numel() for p in one.parameters()):>9,} weights, {counted[name]:,} operations")
work.against(counted["two streams"] / counted["one set of weights"])

with meta_init():  # names and shapes only
    official = DoubleStreamBlock(FluxConfig.variant("dev"))
print(f"a double block of FLUX.1 has {sum(p.numel() for p in official.parameters()):,}, half of them the text's")

# %% [markdown]
# At 1024 × 1024, FLUX.1-dev has 4,096 image tokens and 512 of text: half of the block's weights work for a ninth of
# the tokens. Why pay for that in memory?
#
# ## See it
#
# Because the two streams carry different things. Follow the size of a token, the root mean square of its numbers,
# through all blocks of the miniature.

# %%
from fluxedu.widgets.contributions import over_tokens, shares

sizes, given, _ = shares(pipe, prompt, seed=4, progress=False)
words = pipe.prompt_encoder.t5_tokenizer.length
step, blocks = 10, sizes.coords["block"]
of = {"text": slice(0, words), "image": slice(words, None)}
colours = {"text": "#0072B2", "image": "#D55E00"}

fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.3), layout="constrained", width_ratios=[1.15, 1])
for name, tokens in of.items():
    left.plot(over_tokens(sizes.tensor[:, step], tokens), "o-", label=name, color=colours[name])
left.set_xticks(range(len(blocks)), [b.replace(".", "\n") for b in blocks], fontsize=8)
left.set_xlabel("block that the token enters")
left.set_ylabel("root mean square of a token")
left.set_ylim(bottom=0)
left.legend()
left.set_title("Text tokens grow several times as large as image tokens", fontsize=10)

bars = {f"{name}\n{part}": float(over_tokens(given.tensor[1, i, step], tokens))
        for name, tokens in of.items() for i, part in enumerate(("attention", "MLP"))}  # fmt: skip
right.bar(list(bars), list(bars.values()), color=[colours[label.split("\n")[0]] for label in bars])
right.set_ylabel("size of what double.1 adds")
right.set_title("The text is fed by its MLP", fontsize=10)
plt.show()

entering = [float(over_tokens(sizes.tensor[config.depth, step], tokens)) for tokens in of.values()]
larger.against("text" if entering[0] > entering[1] else "image")
feeds.against("MLP" if bars["text\nMLP"] > bars["text\nattention"] else "attention")

# %% [markdown]
# T5's vectors come in large and are the same in every step; the double blocks' text side works them over, mostly
# each token for itself. The image's tokens come in small, as noise, and the first block's attention writes more on
# them than they had. One set of weights would have to be right for both.
#
# The explorer has all of it: choose what shades words and patches, then move through blocks and time (Tab, then the
# arrow keys; or the mouse). In `double.1`, shade by *attention adds*: which words hear most? Then by *MLP adds*.

# %%
from fluxedu.widgets.streams import streams

streams(pipe, prompt, seed=4, progress=False)

# %% [markdown]
# ## Put yours into the trained model
#
# `fe.swap` replaces both double blocks of the running pipeline with yours and gives them the trained weights, by
# name. The picture must stay the same.

# %%
if passed:
    with fe.swap("double.*", lambda old: Block(config.hidden_size, config.num_heads, config.mlp_hidden), pipe):
        again = pipe(prompt, seed=4, progress=False)
    far = (again.latents - picture.latents).norm() / picture.latents.norm()
    print("the latent stays the same to 1 in 1,000:", bool(far < 1e-3))
else:
    print("solve the exercises above first; then run this cell again")

# %% [markdown]
# ## Break it
#
# Take something from both double blocks and draw the same seed again. The distance is that of the final latents, as
# a share of the right one's length; for a measure, the first line is an unrelated picture.

# %%
from fluxedu.instruments.interventions import ablate


@contextmanager
def shared(kept: str, *parts: str):
    """All double blocks with the `kept` stream's parts for both streams."""
    with ExitStack() as stack:
        for i, old in enumerate(pipe.flux.double_blocks):
            stack.enter_context(fe.swap(f"double.{i}", sharing(old, kept, parts), pipe))
        yield


def deaf(weights, ctx):
    """The image's patches look at no text."""
    seen = weights.weights().clone()  # [B, H, L + N, L + N], a row a query
    seen[..., ctx.places("img"), ctx.places("txt")] = 0
    return seen / seen.sum(-1, keepdim=True)


breaks = {
    "text by the image's weights": shared("img", "mod", "attn", "mlp"),
    "image by the text's weights": shared("txt", "mod", "attn", "mlp"),
    "only the MLPs shared": shared("img", "mlp"),
    "the text stands still": ablate("double.*", streams="txt"),
    "the image stands still": ablate("double.*", streams="img"),
    "the image hears no text": fe.intervene("double.*.attn.map", deaf),
}
outs, moves = [picture], {}


def away(name: str, out) -> None:
    """How far a picture is from the right one."""
    moves[name] = float((out.latents - picture.latents).norm() / picture.latents.norm())
    print(f"{name:28} " + (f"{moves[name]:.0%}" if moves[name] < 3 else "more than 300%"))


away("another prompt and seed", pipe("a green triangle", seed=9, progress=False))
for name, change in breaks.items():
    with change:
        outs.append(pipe(prompt, seed=4, progress=False))
    away(name, outs[-1])

moved = moves["text by the image's weights"]
borrowed.against("much" if moved > 0.1 else "a little" if moved > 0.01 else "not")

# %%
from textwrap import fill

fig, axes = plt.subplots(1, 7, figsize=(11, 2.3), layout="constrained")
for ax, out, name in zip(axes, outs, ["as it is", *breaks]):
    ax.imshow(out.images[0])
    ax.set_title(fill(name, 16), fontsize=9)
    ax.axis("off")
fig.suptitle("A stream cannot live on the other's weights", fontsize=11)
plt.show()

# %% [markdown]
# Sharing everything is worse than cutting a stream out: weights that were made for other numbers do harm. And look at
# the last picture. When the image hears no text in these blocks, the whole scene comes nevertheless, only shifted: the
# single blocks that follow look at the text as well. That is for the next notebook.
#
# The distance is mostly background. With the text still it is larger than with the image still, and yet a red and a
# purple thing are drawn in the one, and neither thing in the other. Look at the pictures as well.
#
# ## In five lines
#
# 1. A double block is one stream's code used twice: enter, one attention in common, leave.
# 2. Streams share no weights, and they meet in the attention alone.
# 3. Two sets of weights double the memory and leave the work as it was.
# 4. In the miniature the text's tokens are the larger ones and are fed mostly by their MLP; the image's are fed by
#    attention in the first block, and by both alike in the second.
# 5. A residual step is x + gate · f(x), attention first, then the MLP on the new x.
#
# **People ask**: *where does FLUX say why?* It hardly does: it came without a report (flux issue 68), and the later one on Kontext (arXiv
# 2506.15742) has a section on the architecture, not its reasons. The design is MMDiT's,
# from *Scaling Rectified Flow Transformers* (arXiv 2403.03206), which compares it with one set of weights for both.
# *How do
# I get an attention map out?* (attention-map-diffusers 11). Not with a forward hook: the softmax is inside the fused kernel.
# `fe.record("double.1.attn.map")` computes it exactly from q, k and the kernel's log-sum-exp. *Is the padding
# masked?* (flux pull requests 507, 511, 512.) No: it is in the attention like any word, and the text sizes above include it.
#
# **Read**: *Scaling Rectified Flow Transformers*, arXiv 2403.03206, section 4 · `black-forest-labs/flux`,
# `modules/layers.py`, `DoubleStreamBlock` · ours: `fluxedu/models/blocks.py`, 78 lines.

# %%
fe.score()
