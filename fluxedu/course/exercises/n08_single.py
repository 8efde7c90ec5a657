"""Notebook 08: the single-stream block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, wrong
from fluxedu.course.exercises.n07_double import CONFIG, _random
from fluxedu.models.attention import QKNorm, rope_table, rotate, split_heads
from fluxedu.models.blocks import SingleStreamBlock
from fluxedu.models.modulation import Modulation, modulate, normalised
from fluxedu.sampling.latents import image_ids


def _layers() -> list[tuple]:
    g = torch.Generator().manual_seed(80)
    cases = []
    for dim, hidden in ((6, 15), (4, 4)):
        layers = tuple(_random(nn.Linear(dim, width), g) for width in (dim, dim, dim, hidden))
        cases.append((torch.randn(2, 3, dim, generator=g), *layers))
    return cases


def _apart(to_q: nn.Linear, to_k: nn.Linear, to_v: nn.Linear, to_hidden: nn.Linear):
    """The four of them, one after the other: what the fused layer must equal."""
    return lambda x: torch.cat([layer(x) for layer in (to_q, to_k, to_v, to_hidden)], dim=-1)


@exercise(
    "single.fuse",
    minutes=8,
    difficulty=1,
    cases=_layers,
    call=lambda answer, x, *layers: answer(*layers)(x),
    against=_apart,
    hints=(
        "Every output of a linear layer is one row of its weight. More outputs are more rows.",
        "`nn.Linear` keeps its weight as `[out, in]`, so `torch.cat([...])` along axis 0 puts the four below each "
        "other; the biases likewise.",
        "With `fused = nn.Linear(to_q.in_features, n)`: `fused.weight.data = torch.cat([l.weight for l in layers])`"
        ", and the same for `bias`.",
    ),
)
def fuse(to_q: nn.Linear, to_k: nn.Linear, to_v: nn.Linear, to_hidden: nn.Linear) -> nn.Linear:
    """Four linear layers that read the same tokens as one: its outputs are q, k, v and the MLP's hidden numbers.

    All four have `in_features` inputs and a bias. The order is q, k, v, hidden.
    """
    layers = [to_q, to_k, to_v, to_hidden]
    fused = nn.Linear(to_q.in_features, sum(layer.out_features for layer in layers))
    fused.weight.data = torch.cat([layer.weight for layer in layers])  # [3 D + M, D], a row an output
    fused.bias.data = torch.cat([layer.bias for layer in layers])
    return fused


@wrong("single.fuse", "the biases are missing: each output has its own, and they are stacked like the rows.")
def _no_bias(*layers):
    fused = fuse(*layers)
    fused.bias.data = torch.zeros_like(fused.bias)
    return fused


@wrong("single.fuse", "the MLP's rows come first; q, k and v stand before them.")
def _mlp_first(to_q, to_k, to_v, to_hidden):
    return fuse(to_hidden, to_q, to_k, to_v)


@wrong("single.fuse", "keys and values have changed places: the order is q, k, v.")
def _values_first(to_q, to_k, to_v, to_hidden):
    return fuse(to_q, to_v, to_k, to_hidden)


@wrong("single.fuse", "the weights are stacked, but the biases are in another order than the rows.")
def _biases_reversed(*layers):
    fused = fuse(*layers)
    fused.bias.data = torch.cat([layer.bias for layer in reversed(layers)])
    return fused


def _outputs() -> list[tuple]:
    g = torch.Generator().manual_seed(81)
    cases = []
    for dim, hidden in ((6, 15), (5, 7)):
        linear2 = _random(nn.Linear(dim + hidden, dim), g)
        cases.append((linear2, torch.randn(2, 3, dim, generator=g), torch.randn(2, 3, hidden, generator=g)))
    return cases


def _two_and_sum(answer, linear2, heard, hidden):
    proj, narrow = answer(linear2, heard.shape[-1])
    none = torch.zeros_like
    return proj(heard) - proj(none(heard)), narrow(hidden) - narrow(none(hidden)), proj(heard) + narrow(hidden)


def _by_zeros(linear2: nn.Linear, dim: int):
    """The same without cutting anything: the other half is fed zeros, the bias taken once."""
    before, behind = lambda x: F.pad(x, (0, linear2.in_features - dim)), lambda x: F.pad(x, (dim, 0))  # noqa: E731
    return lambda heard: linear2(before(heard)), lambda hidden: linear2(behind(hidden)) - linear2.bias


@exercise(
    "single.split",
    minutes=10,
    difficulty=2,
    cases=_outputs,
    call=_two_and_sum,
    against=_by_zeros,
    hints=(
        "Every input of a linear layer is one column of its weight: the first read the attention, the rest the MLP.",
        "`linear2.weight` is `[D, D + M]`; `weight[:, :dim]` are the attention's columns. A bias is added once, so "
        "only one of the two may have it.",
        "`proj = nn.Linear(dim, dim)`, `narrow = nn.Linear(linear2.in_features - dim, dim, bias=False)`; set their "
        "`weight.data`, and `proj.bias.data = linear2.bias`.",
    ),
)
def split(linear2: nn.Linear, dim: int) -> tuple[nn.Linear, nn.Linear]:
    """The other fusion, undone: two layers with `proj(heard) + narrow(hidden) = linear2([heard, hidden])`.

    `linear2` reads `dim` numbers of attention, then the MLP's hidden ones, and gives `dim`. Give back `(proj, narrow)`.
    """
    proj = nn.Linear(dim, dim)
    narrow = nn.Linear(linear2.in_features - dim, dim, bias=False)
    proj.weight.data, narrow.weight.data = linear2.weight[:, :dim], linear2.weight[:, dim:]  # [D, D], [D, M]
    proj.bias.data = linear2.bias.data
    return proj, narrow


@wrong("single.split", "both layers have the bias, so it is added twice.")
def _bias_twice(linear2, dim):
    proj, narrow = split(linear2, dim)
    narrow.bias = nn.Parameter(linear2.bias.data)
    return proj, narrow


@wrong("single.split", "the bias is lost: one of the two layers must have it.")
def _bias_lost(linear2, dim):
    proj, narrow = split(linear2, dim)
    proj.bias = None
    return proj, narrow


@wrong("single.split", "the columns are counted from the wrong end: linear2 reads the attention first, then the MLP.")
def _other_end(linear2, dim):
    proj, narrow = split(linear2, dim)
    proj.weight.data, narrow.weight.data = linear2.weight[:, -dim:], linear2.weight[:, :-dim]
    return proj, narrow


def _blocks() -> list[tuple]:
    cases = []
    for seed, batch, words, side in ((82, 2, 3, (4, 4)), (83, 1, 5, (2, 6))):
        g = torch.Generator().manual_seed(seed)
        state = _random(SingleStreamBlock(CONFIG), g).state_dict()
        ids = torch.cat([torch.zeros(words, 3), image_ids(*side)])
        rope = rope_table(ids, CONFIG.axes_dim).to(torch.complex64)
        x = 3 * torch.randn(batch, len(ids), 24, generator=g)
        cases.append((state, x, torch.randn(batch, 24, generator=g), rope))
    return cases


def _run(made, state, x, vec, rope):
    block = made(24, 2, 48)
    block.load_state_dict(state)
    return block(x, block.plan(vec), rope)


@exercise(
    "single.block",
    minutes=15,
    difficulty=3,
    cases=_blocks,
    call=_run,
    against=lambda dim, num_heads, hidden: SingleStreamBlock(CONFIG),
    hints=(
        "Normalise and modulate once; linear1 makes everything; attention and GELU work side by side; linear2 puts "
        "them together; the gate lets it in.",
        "`self.linear1(y).split(self.widths, dim=-1)` gives qkv and hidden; `split_heads(qkv, 3, self.num_heads)` "
        "gives q, k, v as `[B, H, N, d]`; `self.norm(q, k)` is the QKNorm, and comes before the turn.",
        "`heard = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v).transpose(1, 2).flatten(2)`, "
        "`hidden = F.gelu(hidden, approximate='tanh')`, and at the end "
        "`x + gate * self.linear2(torch.cat([heard, hidden], dim=-1))`.",
    ),
    stub='''
    class Block(nn.Module):
        """One sequence, attention and MLP side by side. `forward(x, mods, rope)`."""

        def __init__(self, dim: int, num_heads: int, mlp_hidden: int):
            super().__init__()
            self.num_heads, self.widths = num_heads, [3 * dim, mlp_hidden]
            self.linear1 = nn.Linear(dim, 3 * dim + mlp_hidden)
            self.linear2 = nn.Linear(dim + mlp_hidden, dim)
            self.norm = QKNorm(dim // num_heads)
            self.modulation = Modulation(dim, double=False)

        def plan(self, vec: Tensor) -> Tensor:  # [..., D] -> [..., 3 D]
            return self.modulation(vec)

        def forward(self, x: Tensor, mods: Tensor, rope: Tensor, words: int = 0) -> Tensor:
            shift, scale, gate = mods.unsqueeze(-2).chunk(3, dim=-1)  # each [B, 1, D]
            raise NotImplementedError("your turn")
    ''',
)
class Block(nn.Module):
    """The whole block: `forward(x, mods, rope)` gives the new `x [B, L + N, D]`, text and image alike.

    In the order of the work: `y = (1 + scale) * LN(x) + shift`, eps 1e-6 · `linear1(y)` is qkv `[B, L + N, 3 D]` and
    hidden `[B, L + N, M]` · QKNorm, the turn, attention · GELU of hidden, its tanh approximation · `linear2` of
    [attention, hidden] · `x + gate * that`. Write `forward`; `words` is not needed.
    """

    def __init__(self, dim: int, num_heads: int, mlp_hidden: int):
        super().__init__()
        self.num_heads, self.widths = num_heads, [3 * dim, mlp_hidden]
        self.linear1 = nn.Linear(dim, 3 * dim + mlp_hidden)
        self.linear2 = nn.Linear(dim + mlp_hidden, dim)
        self.norm = QKNorm(dim // num_heads)
        self.modulation = Modulation(dim, double=False)

    def plan(self, vec: Tensor) -> Tensor:  # [..., D] -> [..., 3 D]
        return self.modulation(vec)

    def forward(self, x: Tensor, mods: Tensor, rope: Tensor, words: int = 0) -> Tensor:
        shift, scale, gate = mods.unsqueeze(-2).chunk(3, dim=-1)  # each [B, 1, D]
        y = (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift
        qkv, hidden = self.linear1(y).split(self.widths, dim=-1)  # [B, L + N, 3 D], [B, L + N, M]
        q, k, v = split_heads(qkv, 3, self.num_heads)  # each [B, H, L + N, d]
        q, k = self.norm(q, k)
        heard = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
        heard = heard.transpose(1, 2).flatten(2)  # [B, H, L + N, d] -> [B, L + N, D]
        hidden = F.gelu(hidden, approximate="tanh")
        return x + gate * self.linear2(torch.cat([heard, hidden], dim=-1))


class _Changed(Block):
    """The block with its steps apart, so that a wrong answer changes one of them."""

    gelu = staticmethod(lambda hidden: F.gelu(hidden, approximate="tanh"))
    bent = staticmethod(lambda heard: heard)
    turned = staticmethod(rotate)
    normed = staticmethod(normalised)

    def qk(self, q, k):
        return self.norm(q, k)

    def added(self, heard, hidden):
        return self.linear2(torch.cat([heard, hidden], dim=-1))

    def step(self, x, gate, added):
        return x + gate * added

    def forward(self, x, mods, rope, words=0):
        shift, scale, gate = mods.unsqueeze(-2).chunk(3, dim=-1)
        qkv, hidden = self.linear1(modulate(self.normed(x), shift, scale)).split(self.widths, dim=-1)
        q, k, v = split_heads(qkv, 3, self.num_heads)
        q, k = self.qk(q, k)
        heard = F.scaled_dot_product_attention(self.turned(q, rope), self.turned(k, rope), v).transpose(1, 2).flatten(2)
        return self.step(x, gate, self.added(self.bent(heard), self.gelu(hidden)))


@wrong("single.block", "this is the exact GELU; FLUX was trained with its tanh approximation.")
class _Exact(_Changed):
    gelu = staticmethod(F.gelu)


@wrong("single.block", "the GELU bends the attention's numbers too; only the MLP's hidden ones go through it.")
class _BentAll(_Changed):
    bent = staticmethod(lambda heard: F.gelu(heard, approximate="tanh"))


@wrong("single.block", "linear2 reads the MLP's numbers first here; the attention's come first.")
class _OtherOrder(_Changed):
    def added(self, heard, hidden):
        return self.linear2(torch.cat([hidden, heard], dim=-1))


@wrong("single.block", "the gate blends, (1 - gate) x + gate f: in FLUX the stream is kept whole, x + gate f.")
class _Blend(_Changed):
    def step(self, x, gate, added):
        return (1 - gate) * x + gate * added


@wrong("single.block", "the QKNorm is missing: q and k are compared as linear1 made them.")
class _NoNorm(_Changed):
    def qk(self, q, k):
        return q, k


@wrong("single.block", "queries and keys are not turned by position.")
class _Unturned(_Changed):
    turned = staticmethod(lambda x, rope: x)


@wrong("single.block", "x itself is lost: a block adds to its stream and does not replace it.")
class _Replaced(_Changed):
    def step(self, x, gate, added):
        return gate * added


@wrong("single.block", "the tokens are modulated, but were not normalised first.")
class _Raw(_Changed):
    normed = staticmethod(lambda x: x)
