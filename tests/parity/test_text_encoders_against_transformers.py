"""CLIP's and T5's text encoders compute what transformers' do."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from oracle import drawn, gradients, randomise, relative, worst_gradient
from transformers.models.t5 import modeling_t5

from fluxedu.models import CLIPTextConfig, CLIPTextEncoder, T5Config, T5Encoder

F32, F64 = 2e-5, 1e-12
GRAD_F32, GRAD_F64 = 1e-4, 1e-11
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "bar", "grad"), [(torch.float32, F32, GRAD_F32), (torch.float64, F64, GRAD_F64)], ids=["f32", "f64"]
)


def backward(output, seed):
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    (output * noise.to(output.dtype)).sum().backward()


# --- CLIP -----------------------------------------------------------------------------------------


@st.composite
def clip_prompts(draw):
    """A config, ids ``[B, L]`` with one or more end-of-text tokens in every row, and a seed."""
    heads = draw(st.integers(1, 4))
    places = draw(st.integers(3, 77))
    config = CLIPTextConfig(
        vocab_size=draw(st.integers(5, 90)),
        hidden_size=heads * draw(st.integers(1, 12)),
        intermediate_size=draw(st.integers(1, 70)),
        num_hidden_layers=draw(st.integers(1, 4)),
        num_attention_heads=heads,
        max_position_embeddings=places,
        layer_norm_eps=draw(st.sampled_from((1e-5, 1e-2))),
        eos_token_id=draw(st.sampled_from((0, 1, 3, 4))),  # not 2: there transformers pools at the largest id
    )
    length, batch = draw(st.integers(1, places)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    for row in ids:
        row[torch.randint(length, (2,), generator=generator)] = config.eos_token_id
    return config, ids, seed


def flat(tensors, theirs):
    """Ours under their names: from version 5 on transformers leaves out the files' ``text_model.``."""
    prefix = "text_model."
    if any(n.startswith(prefix) for n, _ in theirs.named_parameters()):
        return tensors
    return {n.removeprefix(prefix): x for n, x in tensors.items()}


def transformers_clip(config, state):
    theirs = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**config.to_dict(), hidden_act="quick_gelu", bos_token_id=0, pad_token_id=1)
    )
    theirs.load_state_dict(flat(state, theirs), strict=True)
    return theirs.to(next(iter(state.values())).dtype).eval()


@PRECISIONS
def test_clip(dtype, bar, grad):
    @drawn(20)
    @given(clip_prompts())
    def check(prompt):
        config, ids, seed = prompt
        ours = randomise(CLIPTextEncoder(config), seed).to(dtype)
        theirs = transformers_clip(config, ours.state_dict())
        states, pooled = ours(ids)
        expected = theirs(ids)
        assert relative(states, expected.last_hidden_state) <= bar
        assert relative(pooled, expected.pooler_output) <= bar

        backward(pooled, seed)
        backward(expected.pooler_output, seed)
        mine = flat(gradients(ours.named_parameters()), theirs)
        assert worst_gradient(mine, gradients(theirs.named_parameters())) <= grad

    check()


# --- T5 -------------------------------------------------------------------------------------------


def exact_t5_norm(self, x):
    """transformers' T5LayerNorm with its variance in the input's precision instead of float32."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


@st.composite
def t5_prompts(draw):
    """A config, ids ``[B, L]`` (longer than the largest distance, too) and a seed."""
    config = T5Config(
        vocab_size=draw(st.integers(5, 90)),
        d_model=draw(st.integers(2, 40)),  # of one number, RMSNorm keeps the sign only: its gradient is all rounding
        d_kv=draw(st.integers(1, 12)),  # not d_model / num_heads: T5's heads have their own width
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


@PRECISIONS
def test_t5(dtype, bar, grad, monkeypatch):
    if dtype == torch.float64:  # else the comparison stops at float32's 1e-8
        monkeypatch.setattr(modeling_t5.T5LayerNorm, "forward", exact_t5_norm)

    @drawn(20)
    @given(t5_prompts())
    def check(prompt):
        config, ids, seed = prompt
        ours = randomise(T5Encoder(config), seed).to(dtype)
        theirs = transformers_t5(config, ours.state_dict())
        states, expected = ours(ids), theirs(ids).last_hidden_state
        assert relative(states, expected) <= bar

        backward(states, seed)
        backward(expected, seed)
        assert worst_gradient(gradients(ours.named_parameters()), gradients(theirs.named_parameters())) <= grad

    check()
