# %% [markdown]
# # 08 · The single-stream block
#
# **How do two wide matrices replace six?** After its double-stream blocks (notebook 07), FLUX concatenates text and
# image tokens into one sequence and processes both with one set of weights; attention and MLP run in parallel. In this
# notebook you will show that the block's two wide matrices are the usual six in a different arrangement, write the
# block, and put it into the trained model.
#
# Afterwards you can split the two wide matrices and put them together again, write the block, and say how the attention
# changes when two parts of a matrix are exchanged.
#
# 60 minutes · needs notebooks 06b and 07

# %%
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from IPython.display import display
from torch import Tensor, nn

import fluxedu as fe
from fluxedu import course
from fluxedu.course import evidence
from fluxedu.models.attention import QKNorm, rotate, split_heads
from fluxedu.models.modulation import Modulation

device = course.begin()
pipe = fe.load(device=device)
prompt = "a red circle left of a blue square"
original = pipe(prompt, seed=4, progress=False)
course.where(pipe, "single")

# %% [markdown]
# FLUX.1 has 38 single-stream blocks after its 19 double-stream blocks. The miniature has six after two.
#
# ## Predict
#
# The *hidden layer* of the MLP is what comes out of its first linear layer. The *judge* is a program that reads shapes,
# colours and positions from an image.

# %%
linear2_inputs = fe.predict(
    "A token has D = 160 numbers, the MLP's hidden layer 4 D. How many per token does the second matrix read?", 800
)  # answer
exchanged = fe.predict(
    "Queries and keys change places in all single blocks. Of 40 images, are 'none', 'some' or 'most' right?", "none"
)  # answer

# %% [markdown]
# ## Six matrices become two
#
# A transformer block usually multiplies by six matrices: those for queries, keys and values (q, k, v), the output
# projection of the attention, and the two of the MLP (two linear layers with an activation function in between). Here
# q, k, v and the first layer of the MLP all read the same tokens, so these four can be one layer, `linear1`.

# %% exercise="single.fuse"

# %% [markdown]
# `linear2` reads the attention output and the MLP's hidden layer, concatenated. For a concatenated input, a matrix
# product is the sum of two smaller products:
#
# $$W_2 \begin{bmatrix} a \\ h \end{bmatrix} = W_a\, a + W_h\, h \qquad \text{with} \qquad W_2 = [\,W_a \;\; W_h\,]$$
#
# So `linear2` contains two layers, and adds their outputs.

# %% exercise="single.split"

# %% [markdown]
# Try both on a trained block: split its matrices and fuse them again. In one formula, with the rows of four matrices on
# top of each other,
#
# $$\begin{bmatrix} q \\ k \\ v \\ h \end{bmatrix} = \begin{bmatrix} W_q \\ W_k \\ W_v \\ W_1 \end{bmatrix} y +
# \begin{bmatrix} b_q \\ b_k \\ b_v \\ b_1 \end{bmatrix}$$

# %%
config = pipe.flux.config
dim, mlp_hidden = config.hidden_size, config.mlp_hidden
block = pipe.flux.single_blocks[2]
print("linear1", tuple(block.linear1.weight.shape), "=", [dim, dim, dim, mlp_hidden], "outputs,", dim, "inputs")
print("linear2", tuple(block.linear2.weight.shape), "=", dim, "outputs,", [dim, mlp_hidden], "inputs")
linear2_inputs.against(block.linear2.in_features)


def split_rows(linear: nn.Linear, sizes: list[int]) -> list[nn.Linear]:
    """Several linear layers, each with some of the outputs of `linear`."""
    layers = []
    for weight, bias in zip(linear.weight.split(sizes), linear.bias.split(sizes)):
        layer = nn.Linear(linear.in_features, len(weight))
        layer.weight.data, layer.bias.data = weight, bias
        layers.append(layer)
    return layers


with torch.no_grad():
    x, attn_out, hidden = (torch.randn(7, n).to(device, pipe.dtype) for n in (dim, dim, mlp_hidden))
    q_k_v_mlp = split_rows(block.linear1, [dim, dim, dim, mlp_hidden])
    separate = torch.cat([layer(x) for layer in q_k_v_mlp], dim=-1)
    course.compare("linear1 and four separate layers", block.linear1(x), separate)
    if fe.passed("single.fuse", "single.split"):
        fused = fuse(*q_k_v_mlp)
        differing = int((fused.weight != block.linear1.weight).sum())
        print("weights of linear1 that splitting and fusing have changed:", differing, "of", fused.weight.numel())
        attn_proj, mlp_proj = split(block.linear2, dim)
        separate = attn_proj(attn_out) + mlp_proj(hidden)
        fused = block.linear2(torch.cat([attn_out, hidden], dim=-1))
        course.compare("linear2 and the sum of two layers", fused, separate)

# %% [markdown]
# Fusing matrices does not change the result. It saves overhead: a GPU computes two wide products instead of six narrow
# ones. Another difference from a usual block does change the result: the MLP does not read the output of the attention.
# Both run **in parallel** on the same input (arXiv 2302.05442 does this in a vision transformer). With shift, scale and
# gate from the modulation, and LN for layer normalisation, the block computes
#
# $$y = (1 + \text{scale}) \cdot \mathrm{LN}(x) + \text{shift}, \qquad
# x' = x + \text{gate} \cdot W_2\,[\,\mathrm{attention}(y),\; \mathrm{GELU}(W_1\, y)\,]$$
#
# where $W_1$ are the rows of `linear1` that compute the MLP's hidden layer; biases are left out.
#
# ## Build it
#
# Parts of three notebooks return: *QKNorm* normalises the queries and keys of each head (06), *RoPE* rotates them by
# angles that depend on their positions (04), and the attention over text and image is that of notebook 06b. It is
# given; here it needs no concatenation, since there is only one sequence.

# %% exercise="single.block"

# %% [markdown]
# Compare your block with the library's, using trained weights and the tokens of a real step. `fe.record` stores the
# values at named points of the model, called *sites*:

# %%
names = ("single.2.x", "single.2.attn.rope", "single.2.norm", "single.2.modulated", "single.2.mlp_hidden", "vec")
with fe.record(*names, steps=10) as rec:  # index 0 is step 10
    pipe(prompt, seed=4, progress=False)
x, rope, normed, modulated, hidden, vec = (rec[name].at(step=0).tensor.to(device)[None] for name in names)
rope = rope[None]  # [1, 1, L + N, d / 2]: the same for every head
txt_len = pipe.prompt_encoder.t5_tokenizer.length
print("one sequence of text and image tokens:", tuple(x.shape), "of which", txt_len, "are text")

with torch.no_grad():
    expected = block(x, block.plan(vec), rope, txt_len)
    if fe.passed("single.block"):
        my_block = Block(dim, config.num_heads, mlp_hidden).to(device, pipe.dtype)
        my_block.load_state_dict(block.state_dict())
        course.compare("your block and the library's", my_block(x, my_block.plan(vec), rope), expected)

# %% [markdown]
# You saw in notebook 05b that a single block has no *second* modulation for its MLP; here you can check what it does. A
# diagram that is often copied says that the modulation of the MLP is not computed in the single stream. There is one
# (shift, scale, gate) and not two, but the MLP does read modulated tokens, and its output is multiplied by the gate:
# attention and MLP **share** one modulation.

# %%
with torch.no_grad():
    per_stream = len(pipe.flux.double_blocks[0].img_mod.lin.bias) // dim
    per_block = len(block.modulation.lin.bias) // dim
    print("modulation vectors:", per_stream, "per stream of a double block,", per_block, "per single block")
    for name, y in {"modulated": modulated, "normalised but not modulated": normed}.items():
        computed = F.gelu(block.linear1(y)[..., 3 * dim :], approximate="tanh")
        off_by = float((computed - hidden).norm() / hidden.norm())
        print(
            f"the hidden layer, computed from the {name} tokens, differs from the block's by {off_by:.2f} of its length"
        )

# %% [markdown]
# ## Put your code into the trained model
#
# `fe.swap` replaces all six single blocks by yours, with the trained weights. The image must stay the same.

# %%
if fe.passed("single.block"):
    with fe.swap("single.*", lambda old: Block(dim, config.num_heads, mlp_hidden), pipe):
        out = pipe(prompt, seed=4, progress=False)
    course.compare("the latent with your blocks and with the library's", out.latents, original.latents, within=1e-3)

# %% [markdown]
# ## Break it
#
# `fuse` trusts the order of its arguments. Exchange queries and keys: all shapes fit, and no error is raised. What does
# the attention compute then? Its scores are products of queries and keys, and products do not depend on the order:
#
# $$S'_{ij} = \frac{k_i \cdot q_j}{\sqrt d} = \frac{q_j \cdot k_i}{\sqrt d} = S_{ji}$$
#
# (apart from the norms, whose scales are different for q and k). The table of scores is transposed: each token now
# attends to the tokens whose queries match its key. Try it with your functions in the trained model, with eight seeds:

# %%
if fe.passed("single.fuse", "single.block"):
    with ExitStack() as stack:
        for i, old in enumerate(pipe.flux.single_blocks):
            new = Block(dim, config.num_heads, mlp_hidden).to(device, pipe.dtype)
            new.load_state_dict(old.state_dict())
            to_q, to_k, to_v, proj_mlp = split_rows(old.linear1, [dim, dim, dim, mlp_hidden])
            new.linear1 = fuse(to_k, to_q, to_v, proj_mlp)
            stack.enter_context(fe.swap(f"single.{i}", new, pipe))
        out = pipe(prompt, seed=list(range(8)), steps=8, trajectory=False, progress=False)
    right = pipe(prompt, seed=list(range(8)), steps=8, trajectory=False, progress=False)
    display(fe.plots.film_strip({"as trained": right.images, "exchanged": out.images}))

# %% [markdown]
# The same with 40 prompts, each with its own seed, and the judge (share of images in which everything is right, with a
# 95 % interval). The controls: nothing is exchanged, and other seeds.

# %%
parts = evidence.load("parts")
for name in ("nothing", "another seed", "q and k exchanged", "k and v exchanged"):
    print(f"{name:20} right: {evidence.percent(parts[name]['everything right'])}")
share = parts["q and k exchanged"]["everything right"]["value"]
exchanged.against("none" if share == 0 else "most" if share > 0.5 else "some")

# %% [markdown]
# A wrong order of rows is a common mistake in programs that convert weights; notebook 09b has more of them. What single
# blocks contribute, and what is lost without them, is the topic of notebook 08b.
#
# ## In five lines
#
# 1. A single block processes text and image as one sequence, with one set of weights.
# 2. linear1 computes q, k, v and the MLP's hidden layer: four layers that read the same tokens.
# 3. linear2 applies both output projections and adds the results.
# 4. Attention and MLP read the same tokens and share one shift, one scale and one gate.
# 5. Exchanging queries and keys transposes the table of scores; the shapes do not show this mistake.
#
# **Questions people ask**: *Why is it `linear1` in one file and `proj_mlp` in another?* (diffusers issue 10450) The
# official layout keeps the four layers in one matrix, diffusers stores them separately. Notebook 09b converts one into
# the other. *Is there no modulation of the MLP in a single block?* There is: it is the attention's, as measured above.
#
# **Read**: *Scaling Vision Transformers to 22 Billion Parameters*, arXiv 2302.05442, section 2 (parallel layers,
# QKNorm) · `black-forest-labs/flux`, `modules/layers.py`, `SingleStreamBlock` · ours: `fluxedu/models/blocks.py`.

# %%
fe.score()
