"""A FLUX.2 pipeline of networks that run in milliseconds, with random weights and transformers' own language models."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fluxedu.models import Flux2, Flux2AutoEncoder, Flux2AutoEncoderConfig, Flux2Config, Sampling
from fluxedu.sampling.flux2 import SYSTEM_MESSAGE, ChatTokenizer, Flux2Pipeline, Flux2PromptEncoder

TEXT_LENGTH = 64
#: as the published models write a chat, as far as diffusers uses it
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_CHAT = (
    "<s>{% for message in messages %}{% set name = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}"
    "[{{ name }}]{% for part in message.content %}{{ part.text }}{% endfor %}[/{{ name }}]{% endfor %}"
)
SPECIAL = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
WORDS = "user assistant <think> </think> a red circle left of a blue square and one green triangle under it"
TINY_FLUX2 = Flux2Config(
    in_channels=16,
    out_channels=16,
    context_in_dim=36,  # three hidden states of a language model 12 wide
    hidden_size=48,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(4, 6, 8, 6),
)
TINY_AE2 = Flux2AutoEncoderConfig(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4, norm_groups=4)
TEXT = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "vocab_size": 500,
}


def tiny_tokenizer(kind):
    """Byte-level BPE; Mistral's pads on the left."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([WORDS, SYSTEM_MESSAGE] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        padding_side="right" if kind == "qwen3" else "left",
        chat_template=QWEN_CHAT if kind == "qwen3" else MISTRAL_CHAT,
    )


def tiny_language_model(kind):
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**TEXT))
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "pixtral"}
    config = Mistral3Config(text_config=TEXT | {"model_type": "mistral"}, vision_config=vision)
    return Mistral3ForConditionalGeneration(config)


def make_flux2_pipe(kind="qwen3", guidance_embed=False, guidance=0.0):
    """Always the same weights; random statistics in the autoencoder too."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        flux = Flux2(TINY_FLUX2.with_(guidance_embed=guidance_embed))
        ae, language_model = Flux2AutoEncoder(TINY_AE2), tiny_language_model(kind)
        for p in (p for network in (flux, ae) for p in network.parameters() if p.ndim > 1):
            p *= 3**0.5  # as in conftest.py
        ae.bn.running_mean.normal_()
        ae.bn.running_var.uniform_(0.5, 2)
        for p in language_model.parameters():  # the library's scale, 0.02, would make all tokens alike
            p.normal_(1 if p.ndim == 1 else 0, 0.3)
    tokenizer = ChatTokenizer(tiny_tokenizer(kind), kind, TEXT_LENGTH)
    prompts = Flux2PromptEncoder(tokenizer, language_model.eval(), hidden_states=(1, 2, 3))
    defaults = Sampling(4, guidance, TEXT_LENGTH, shift=True)
    pipe = Flux2Pipeline(prompts, flux.eval(), ae.eval(), defaults, size=64)
    pipe.whole_language_model = language_model  # as diffusers needs it, for the same weights
    return pipe
