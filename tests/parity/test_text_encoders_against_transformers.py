"""CLIP's and T5's text encoders compute what transformers' do.

Every bound is derived from the case itself: see rounding.py.
"""

import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from oracle import examples, gradients, randomise, worst_gradient
from rounding import Exact, worst_error

from fluxedu.models import CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder


def gradients_of(model, output, seed):
    """The gradient of a random weighting of ``output()``, by every parameter."""
    out = output()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    model.zero_grad()
    (out * weights.to(out.dtype)).sum().backward()
    return gradients(model.named_parameters())


def to_float64(state):
    return {name: x.double() for name, x in state.items()}


# --- CLIP -----------------------------------------------------------------------------------------


@st.composite
def clip_prompts(draw):
    """A config, ids ``[B, L]`` with one or more end-of-text tokens in every row, and a seed."""
    heads = draw(st.integers(1, 4))
    positions = draw(st.integers(3, 77))
    config = CLIPTextConfig(
        vocab_size=draw(st.integers(5, 90)),
        hidden_size=heads * draw(st.integers(1, 12)),
        intermediate_size=draw(st.integers(1, 70)),
        num_hidden_layers=draw(st.integers(1, 4)),
        num_attention_heads=heads,
        max_position_embeddings=positions,
        layer_norm_eps=draw(st.sampled_from((1e-5, 1e-2))),
        eos_token_id=draw(st.sampled_from((0, 1, 3, 4))),  # not 2: there transformers pools at the largest id
    )
    length, batch = draw(st.integers(1, positions)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    for row in ids:
        row[torch.randint(length, (2,), generator=generator)] = config.eos_token_id
    return config, ids, seed


def rename(tensors, theirs):
    """Our tensors under their names: transformers 5 leaves out the prefix ``text_model.`` that the files have."""
    prefix = "text_model."
    if any(n.startswith(prefix) for n, _ in theirs.named_parameters()):
        return tensors
    return {n.removeprefix(prefix): x for n, x in tensors.items()}


def transformers_clip(config, state):
    theirs = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**config.to_dict(), hidden_act="quick_gelu", bos_token_id=0, pad_token_id=1)
    )
    theirs.load_state_dict(rename(state, theirs), strict=True)
    return theirs.to(next(iter(state.values())).dtype).eval()


@examples(20)
@given(clip_prompts())
def test_clip(prompt):
    config, ids, seed = prompt
    ours = randomise(CLIPTextEncoder(config), seed)
    state = ours.state_dict()
    theirs, reference = transformers_clip(config, state), transformers_clip(config, to_float64(state))

    def our_states(model):  # and the pooled vector
        return list(model(ids))

    def their_states(model):
        out = model(ids)
        return [out.last_hidden_state, out.pooler_output]

    def our_gradients(model):
        return rename(gradients_of(model, lambda: model(ids)[1], seed), theirs)

    def their_gradients(model):
        return gradients_of(model, lambda: model(ids).pooler_output, seed)

    ours64 = CLIPTextEncoder(config)
    ours64.load_state_dict(state)
    ours64.double()
    exact = Exact(lambda: their_states(reference), worst_error)
    exact.check(their_states(theirs), torch.float32)
    exact.check(our_states(ours), torch.float32)
    exact.check(our_states(ours64), torch.float64)

    if config.hidden_size <= 2:  # LayerNorm leaves only the order of two numbers: its gradient is all rounding
        return
    exact = Exact(lambda: their_gradients(reference), worst_gradient)
    exact.check(their_gradients(theirs), torch.float32)
    exact.check(our_gradients(ours), torch.float32)
    exact.check(our_gradients(ours64), torch.float64)


# --- T5 -------------------------------------------------------------------------------------------


@st.composite
def t5_prompts(draw):
    """A config, ids ``[B, L]`` (longer than the largest distance, too) and a seed."""
    config = T5Config(
        vocab_size=draw(st.integers(5, 90)),
        d_model=draw(st.integers(2, 40)),  # with 1, RMSNorm leaves only the sign: its gradient is all rounding
        d_kv=draw(st.integers(1, 12)),  # independent of d_model / num_heads in T5
        d_ff=draw(st.integers(1, 70)),
        num_layers=draw(st.integers(1, 4)),
        num_heads=draw(st.integers(1, 4)),
        relative_attention_num_buckets=draw(st.sampled_from((8, 12, 32))),
        relative_attention_max_distance=draw(st.sampled_from((20, 50, 128))),
        layer_norm_epsilon=draw(st.sampled_from((1e-6, 1e-2))),
    )
    seed = draw(st.integers(0, 2**31))
    shape = (draw(st.integers(1, 3)), draw(st.one_of(st.integers(1, 40), st.integers(120, 300))))
    return config, torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed)), seed


def transformers_t5(config, state):
    described = transformers.T5Config(**config.to_dict(), feed_forward_proj="gated-gelu", dropout_rate=0.0)
    theirs = transformers.T5EncoderModel(described)
    theirs.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]}, strict=True)
    return theirs.to(next(iter(state.values())).dtype).eval()


@examples(20)
@given(t5_prompts())
def test_t5(prompt):
    config, ids, seed = prompt
    ours = randomise(T5Encoder(config), seed)
    state = ours.state_dict()
    theirs, reference = transformers_t5(config, state), transformers_t5(config, to_float64(state))
    ours64 = T5Encoder(config)
    ours64.load_state_dict(state)
    ours64.double()

    exact = Exact(lambda: reference(ids).last_hidden_state)
    exact.check(theirs(ids).last_hidden_state, torch.float32)
    exact.check(ours(ids), torch.float32)
    exact.check(ours64(ids), torch.float64)

    def our_gradients(model, ids):
        return gradients_of(model, lambda: model(ids), seed)

    def their_gradients(model, ids):
        return gradients_of(model, lambda: model(ids).last_hidden_state, seed)

    exact = Exact(lambda: their_gradients(reference, ids), worst_gradient)
    exact.check(our_gradients(ours64, ids), torch.float64)
    # In float32 with few tokens. A gradient of the position bias is a sum over all pairs of tokens, which kernels add
    # one after the other: of tens of thousands of terms, the sum alone loses more than the margin allows.
    few = ids[:, :40]
    exact = Exact(lambda: their_gradients(reference, few), worst_gradient)
    exact.check(their_gradients(theirs, few), torch.float32)
    exact.check(our_gradients(ours, few), torch.float32)
