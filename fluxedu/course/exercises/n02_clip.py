"""Notebook 02: CLIP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxedu.course.exercise import exercise, wrong
from fluxedu.models.clip import CLIPAttention
from fluxedu.models.clip import quick_gelu as our_gelu


def _numbers() -> list[tuple]:
    g = torch.Generator().manual_seed(1)
    return [(torch.linspace(-4, 4, 33),), (2 * torch.randn(2, 3, 5, generator=g),)]


@exercise(
    "clip.quick_gelu",
    minutes=4,
    difficulty=1,
    cases=_numbers,
    against=our_gelu,
    hints=(
        "It is a gate: x times a number between 0 and 1 that grows with x.",
        "`torch.sigmoid` is the gate; 1.702 makes it steep.",
        "`return x * torch.sigmoid(1.702 * x)`.",
    ),
)
def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation: every number times the sigmoid of 1.702 times itself. Any shape."""
    return x * torch.sigmoid(1.702 * x)


@wrong("clip.quick_gelu", "that is the exact GELU, with the error function; CLIP was trained with the quick one.")
def _exact(x):
    return F.gelu(x)


@wrong("clip.quick_gelu", "that is the tanh approximation, which FLUX's and T5's MLPs use; CLIP's is the quick one.")
def _tanh(x):
    return F.gelu(x, approximate="tanh")


@wrong("clip.quick_gelu", "that is SiLU: the 1.702 inside the sigmoid is missing.")
def _silu(x):
    return F.silu(x)


@wrong("clip.quick_gelu", "the factor 1.702 belongs inside the sigmoid only.")
def _outside(x):
    return 1.702 * x * torch.sigmoid(1.702 * x)


_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


def _sequences() -> list[tuple]:
    g = torch.Generator().manual_seed(2)
    cases = []
    for batch, length, dim, heads in ((2, 5, 12, 3), (1, 7, 8, 2)):
        weights = {f"{name}.weight": 0.8 * torch.randn(dim, dim, generator=g) for name in _LAYERS}
        weights |= {f"{name}.bias": torch.randn(dim, generator=g) for name in _LAYERS}
        cases.append((torch.randn(batch, length, dim, generator=g), heads, weights))
    return cases


def _tried(answer: type[nn.Module], x: Tensor, heads: int, weights: dict[str, Tensor]) -> Tensor:
    module = answer(x.shape[-1], heads)
    module.load_state_dict(weights)
    return module(x)


@exercise(
    "clip.CausalAttention",
    minutes=15,
    difficulty=2,
    cases=_sequences,
    call=_tried,
    against=CLIPAttention,
    stub='''
    class CausalAttention(nn.Module):
        """Self-attention in which a token sees itself and what stands before it: `[B, L, D] -> [B, L, D]`.

        Scores are divided by the root of a head's width. The tokens that lie ahead must get a share of exactly 0.
        """

        def __init__(self, dim: int, num_heads: int):
            super().__init__()
            self.num_heads = num_heads
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                self.add_module(name, nn.Linear(dim, dim))

        def forward(self, x: Tensor) -> Tensor:  # [B, L, D]
            b, n, _ = x.shape
            q, k, v = (  # [B, H, L, d] each
                proj(x).reshape(b, n, self.num_heads, -1).transpose(1, 2)
                for proj in (self.q_proj, self.k_proj, self.v_proj)
            )
            raise NotImplementedError("your turn: scores, mask, softmax, sum of values, out_proj")
    ''',
    hints=(
        "Whoever lies ahead of the query must not be looked at. Setting a share to 0 afterwards leaves rows that do "
        "not sum to 1; setting its score to minus infinity before the softmax does both.",
        "`torch.ones(n, n, dtype=torch.bool).triu(1)` is True where the key lies ahead; `masked_fill` puts "
        "`-torch.inf` there. A head's width is `q.shape[-1]`.",
        "`scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5`, mask it, then "
        "`heads = scores.softmax(dim=-1) @ v`, and `self.out_proj(heads.transpose(1, 2).reshape(x.shape))`.",
    ),
)
class CausalAttention(nn.Module):
    """Self-attention in which a token sees itself and what stands before it: `[B, L, D] -> [B, L, D]`.

    Scores are divided by the root of a head's width. The tokens that lie ahead must get a share of exactly 0.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            self.add_module(name, nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D]
        b, n, _ = x.shape
        q, k, v = (  # [B, H, L, d] each
            proj(x).reshape(b, n, self.num_heads, -1).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, H, L, L], a row a query
        ahead = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        heads = scores.masked_fill(ahead, -torch.inf).softmax(dim=-1) @ v  # [B, H, L, d]
        return self.out_proj(heads.transpose(1, 2).reshape(x.shape))  # heads side by side again, [B, L, D]


class _Attention(nn.Module):
    """The same with the places where people slip as switches."""

    scale, over, woven = True, -1, True

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        for name in _LAYERS:
            self.add_module(name, nn.Linear(dim, dim))

    def seen(self, n):
        return torch.ones(n, n, dtype=torch.bool).tril()

    def shares(self, scores):
        return scores.masked_fill(~self.seen(scores.shape[-1]), -torch.inf).softmax(dim=self.over)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (
            proj(x).reshape(b, n, self.num_heads, -1).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] if self.scale else x.shape[-1]) ** -0.5
        heads = self.shares(scores) @ v
        return self.out_proj((heads.transpose(1, 2) if self.woven else heads).reshape(x.shape))


@wrong("clip.CausalAttention", "every token sees every other: the mask is missing.")
class _Unmasked(_Attention):
    def seen(self, n):
        return torch.ones(n, n, dtype=torch.bool)


@wrong("clip.CausalAttention", "the mask is the wrong way round: your tokens see what lies ahead, not what is behind.")
class _Forward(_Attention):
    def seen(self, n):
        return torch.ones(n, n, dtype=torch.bool).triu()


@wrong(
    "clip.CausalAttention",
    "the shares are cut after the softmax, so a row no longer sums to 1; cut the scores before it.",
)
class _CutAfter(_Attention):
    def shares(self, scores):
        return scores.softmax(dim=-1) * self.seen(scores.shape[-1])


@wrong(
    "clip.CausalAttention", "a score of 0 is not a share of 0: e to the 0 is 1. What lies ahead needs minus infinity."
)
class _Zeroed(_Attention):
    def shares(self, scores):
        return (scores * self.seen(scores.shape[-1])).softmax(dim=-1)


@wrong("clip.CausalAttention", "the scores are divided by the root of the whole width; take that of one head.")
class _WholeWidth(_Attention):
    scale = False


@wrong(
    "clip.CausalAttention",
    "the heads are put together without transposing first, so numbers of different tokens get mixed.",
)
class _Unwoven(_Attention):
    woven = False


def _states() -> list[tuple]:
    g = torch.Generator().manual_seed(3)
    ids = torch.tensor([[8, 3, 2, 9, 9, 9], [8, 4, 4, 5, 1, 9], [8, 9, 9, 9, 9, 9]])
    more = torch.tensor([[20, 31, 7, 25, 7, 7, 7], [20, 7, 7, 7, 7, 7, 7]])  # the end is not the largest id here
    return [(torch.randn(3, 6, 4, generator=g), ids, 9), (torch.randn(2, 7, 5, generator=g), more, 7)]


@exercise(
    "clip.pooled",
    minutes=8,
    difficulty=2,
    cases=_states,
    hints=(
        "For each prompt, find the place of its first end token; then take from each row the state at that place.",
        "`(ids == end)` is True at every end token, and `argmax` of whole numbers gives the first of the largest. One "
        "index a row: pair `torch.arange(batch)` with the places.",
        "`first = (ids == end).int().argmax(dim=1)`, then `states[torch.arange(len(ids)), first]`.",
    ),
)
def pooled(states: Tensor, ids: Tensor, end: int) -> Tensor:
    """The one vector of each prompt: `states [B, L, D]` at the **first** `end` token of `ids [B, L]`, as `[B, D]`.

    CLIP pads with the same token, so a row ends in many of them; and prompts have different lengths.
    """
    first = (ids == end).int().argmax(dim=1)  # [B]
    return states[torch.arange(len(ids), device=ids.device), first]


@wrong("clip.pooled", "you take the last token, which is padding; the first end token is the one that counts.")
def _last(states, ids, end):
    return states[:, -1]


@wrong("clip.pooled", "you take the first token, which has seen nothing but itself.")
def _first(states, ids, end):
    return states[:, 0]


@wrong("clip.pooled", "you average over the tokens; CLIP picks one.")
def _mean(states, ids, end):
    return states.mean(dim=1)


@wrong(
    "clip.pooled",
    "you look for the largest id: right for a vocabulary that ends with the end token, wrong for any other.",
)
def _largest(states, ids, end):
    return states[torch.arange(len(ids)), ids.argmax(dim=1)]


@wrong("clip.pooled", "you take the token before the end, the last word; the end token itself has read that word too.")
def _last_word(states, ids, end):
    return states[torch.arange(len(ids)), (ids == end).int().argmax(dim=1) - 1]


def _pairs() -> list[tuple]:
    g = torch.Generator().manual_seed(4)
    return [
        (3 * torch.randn(5, 8, generator=g), 0.5 * torch.randn(5, 8, generator=g), 10.0),
        (torch.randn(3, 4, generator=g), 2 * torch.randn(3, 4, generator=g), 2.5),
    ]


def _by_hand(pictures: Tensor, captions: Tensor, temperature: float) -> Tensor:
    """Term by term, as the paper says it: minus the logarithm of the share of the right one, both ways."""
    n, terms = len(pictures), []
    score = [
        [temperature * F.cosine_similarity(p, c, dim=0).double() for c in captions] for p in pictures
    ]  # [picture][caption]
    for i in range(n):
        row = torch.stack(score[i])
        column = torch.stack([score[j][i] for j in range(n)])
        terms += [row.exp().sum().log() - row[i], column.exp().sum().log() - column[i]]
    return torch.stack(terms).mean().float()


@exercise(
    "clip.contrast",
    minutes=12,
    difficulty=3,
    cases=_pairs,
    against=_by_hand,
    hints=(
        "Make a table of scores, a row a picture, a column a caption. The right answers lie on its diagonal; so it is "
        "a classification, once over each row and once over each column.",
        "`F.normalize(x, dim=-1)` makes a matrix product give cosines. `F.cross_entropy(scores, right)` wants the "
        "right column of each row: `torch.arange(len(scores))`. The transposed table asks the other way round.",
        "`scores = temperature * F.normalize(pictures, dim=-1) @ F.normalize(captions, dim=-1).T`, then the mean of "
        "`F.cross_entropy(scores, right)` and `F.cross_entropy(scores.T, right)`.",
    ),
)
def contrast(pictures: Tensor, captions: Tensor, temperature: float) -> Tensor:
    """CLIP's loss for N pictures and their captions, `[N, D]` each, row i belonging to row i: one number.

    The score of a pair is `temperature` times its cosine. Every picture must find its caption among the N (softmax
    over captions), and every caption its picture; the loss is the mean of the two cross-entropies.
    """
    scores = temperature * F.normalize(pictures, dim=-1) @ F.normalize(captions, dim=-1).T  # [N, N]
    right = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


@wrong("clip.contrast", "the vectors are not normalised, so long ones win whatever they say.")
def _long(pictures, captions, temperature):
    scores = temperature * pictures @ captions.T
    right = torch.arange(len(scores))
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


@wrong("clip.contrast", "only pictures look for captions; captions must look for pictures too.")
def _one_way(pictures, captions, temperature):
    scores = temperature * F.normalize(pictures, dim=-1) @ F.normalize(captions, dim=-1).T
    return F.cross_entropy(scores, torch.arange(len(scores)))


@wrong("clip.contrast", "you divide by the temperature; here it multiplies (CLIP keeps the factor, not its inverse).")
def _divided(pictures, captions, temperature):
    scores = F.normalize(pictures, dim=-1) @ F.normalize(captions, dim=-1).T / temperature
    right = torch.arange(len(scores))
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


@wrong("clip.contrast", "the two cross-entropies are added; take their mean.")
def _summed(pictures, captions, temperature):
    return 2 * contrast(pictures, captions, temperature)


@wrong("clip.contrast", "you normalise over the batch; each vector must have length 1 by itself (dim=-1).")
def _over_batch(pictures, captions, temperature):
    scores = temperature * F.normalize(pictures, dim=0) @ F.normalize(captions, dim=0).T
    right = torch.arange(len(scores))
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
