"""The Stable Diffusion baseline: against diffusers' own pipeline, and its training and figures from end to end."""

import json
from types import SimpleNamespace

import pytest
import torch

import fluxedu as fe
from fluxedu.arena.match import contestant
from fluxedu.arena.stable_diffusion import DDIM, FILE, SD, UNET, StableDiffusion, build_unet, load_sd, noise_schedule
from fluxedu.checkpoints import save_file
from fluxedu.errors import RequestError
from fluxedu.loading import WEIGHTS
from fluxedu.nano.exam import batch_sampler
from fluxedu.sampling.latents import draw_noise
from training import baselines
from training.data import Tokens, make_shard
from training.flow import TextEncoders
from training.loop import Recipe

diffusers = pytest.importorskip("diffusers")
PROMPTS = ["a red circle left of a blue square", "a green star on a white background"]


@pytest.fixture(scope="module")
def sd():
    return load_sd()


@pytest.mark.parametrize("steps", [3, 8])
def test_it_samples_as_diffusers_pipeline_does(sd, steps):
    """StableDiffusionPipeline with the same U-Net, text states and noise: the same latents."""
    theirs = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=sd.unet, safety_checker=None, feature_extractor=None,
        scheduler=diffusers.DDIMScheduler(**DDIM), requires_safety_checker=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    txt, empty_txt = sd.encode(PROMPTS), sd.encode(["", ""])
    noise = torch.cat([draw_noise(s, 16, 12, 20) for s in (3, 4)])
    expected = theirs(
        prompt_embeds=txt, negative_prompt_embeds=empty_txt, latents=noise, guidance_scale=4.0, height=96, width=160,
        num_inference_steps=steps, output_type="latent",
    ).images  # fmt: skip
    ours = sd(PROMPTS, seed=[3, 4], steps=steps, guidance=4.0, height=96, width=160, progress=False).latents
    assert (ours - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_the_text_states_are_clips_last_hidden_states(sd):
    """transformers' CLIPTextModel on the shipped folder."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTextModel.from_pretrained(WEIGHTS / "text_encoder").float()
    ids = sd.prompt_encoder.clip_tokenizer(PROMPTS)
    with torch.no_grad():
        assert (theirs(ids).last_hidden_state - sd.encode(PROMPTS)).abs().max() < 2e-5


def test_noise_is_added_as_in_the_paper():
    """x_t = sqrt(prod(1 - beta)) x0 + sqrt(1 - prod(1 - beta)) noise; beta runs evenly in its root."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - beta, 0)[[0, 499, 999]].float()[:, None, None, None]
    x0, noise = torch.randn(2, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = kept.sqrt() * x0 + (1 - kept).sqrt() * noise
    assert torch.allclose(noise_schedule().add_noise(x0, noise, torch.tensor([0, 499, 999])), expected, atol=1e-5)


def test_diffusers_opens_what_ships():
    theirs = diffusers.UNet2DConditionModel.from_pretrained(WEIGHTS / FILE.parent)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in build_unet().parameters())
    config = json.loads((WEIGHTS / FILE).with_name("config.json").read_text())
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k != "_class_name"} == UNET


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": [1, 2]}, "1 prompts need as many seeds, or one, not 2."),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, not 0"),
        ({"height": 100}, "multiples of 16, not 100 x 128."),
        ({"trajectory": True}, "keeps no trajectory"),
    ],
)
def test_invalid_arguments_are_refused(sd, arguments, message):
    with pytest.raises(RequestError, match=message):
        sd("a red circle", **arguments)


def test_a_folder_without_the_unet_is_named_in_the_error(tmp_path):
    with pytest.raises(RequestError, match=r"unet.diffusion_pytorch_model.safetensors; `fluxedu train --variant sd`"):
        load_sd(tmp_path)


def test_it_takes_part_in_the_arena(sd):
    few = contestant("sd@3")
    drawn = few.draw("a red circle", 5, 96, 160)
    assert drawn.size == (160, 96)
    assert drawn.tobytes() == sd("a red circle", seed=5, steps=3, height=96, width=160).images[0].tobytes()


def test_exact_noise_and_labels_have_no_loss():
    """The loss is zero for a network that returns the true noise and labels, about 1 for one that returns zeros."""
    pipe = fe.load("nano-base")
    texts = TextEncoders(pipe.prompt_encoder.t5, pipe.prompt_encoder.clip)
    shard = make_shard(0, pipe.autoencoder, Tokens(), size=32)
    batch = {"latents": shard["latents"].float(), "labels": shard["labels"].long(), "clip": shard["clip"][:, 0].long()}
    labels = batch["labels"].flatten(2)
    received = {}

    def exact(x_t, t, txt):
        kept = noise_schedule().alphas_cumprod[t][:, None, None, None]
        received["txt"] = txt
        colour, form = (torch.nn.functional.one_hot(labels[:, i], n) * 50.0 for i, n in ((0, 9), (1, 17)))
        return (x_t - kept.sqrt() * batch["latents"]) / (1 - kept).sqrt(), torch.cat([colour, form], -1)

    def loss_of(model):
        return baselines.noise_loss(model, batch, texts, torch.Generator().manual_seed(0), baselines.ALIGN_WEIGHT)

    _, values = loss_of(exact)
    assert values["noise"] < 1e-4 and values["labels"] < 1e-4
    assert received["txt"].shape == (32, 32, 96)
    loss, values = loss_of(lambda x_t, t, txt: (torch.zeros_like(x_t), torch.zeros(32, 64, 26)))
    assert values["noise"] == pytest.approx(1, abs=0.05)
    assert float(loss) == pytest.approx(values["noise"] + baselines.ALIGN_WEIGHT / 3 * values["labels"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [SD, baselines.TWIN])
def test_training_from_nothing_to_the_card(tmp_path, monkeypatch, name):
    """A few steps: the loss falls, what is written opens again, and baselines.json and the card have the figures."""
    pipe = fe.load("nano-base")
    shard = make_shard(0, pipe.autoencoder, Tokens(), size=32)
    (tmp_path / "latents").mkdir()
    save_file(shard, tmp_path / "latents" / "0000.safetensors")
    monkeypatch.setattr(baselines, "make_shards", lambda *args: None)
    monkeypatch.setitem(baselines.RECIPES, name, Recipe(steps=12, lr=2e-3, batch=4, warmup=2, ema=0.5, muon=True))
    shown = []
    train = baselines.Run.train
    watched = lambda run, loss: train(run, lambda step: shown.append(loss(step)) or shown[-1])  # noqa: E731
    monkeypatch.setattr(baselines.Run, "train", watched)
    (tmp_path / "README.md").write_text((WEIGHTS / "README.md").read_text())
    monkeypatch.setattr(baselines.exam, "batch_sampler", lambda pipe, steps, guidance: batch_sampler(pipe, 1, guidance))
    path = baselines.train_baseline(name, tmp_path, False, tmp_path, prompts=7, few=1)
    losses = [float(value.detach()) for value, _ in shown]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    assert path.exists()
    entry = json.loads((tmp_path / "baselines.json").read_text())[name]
    assert (entry["steps"], entry["batch"], entry["exam"]["prompts"], entry["few"]) == (12, 4, 7, 1)
    assert list(entry["by_steps"]) == ["4", "8", "20", "50"]
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Compared with a Stable Diffusion") == 1 and f"| {name} |" in card and "12 x 4" in card
    if name == SD:
        assert load_sd(tmp_path)("a red circle", steps=1).images[0].size == (128, 128)
    else:
        network = fe.load(WEIGHTS, transformer="transformer_base").flux
        assert entry["parameters"] == sum(p.numel() for p in network.parameters())


def test_a_baseline_uses_the_miniatures_text_encoders_and_autoencoder():
    pipe = fe.load("nano-base")
    made = baselines.pipeline_with(build_unet(), pipe)
    assert isinstance(made, StableDiffusion) and made.autoencoder is pipe.autoencoder
    assert baselines.pipeline_with(pipe.flux, SimpleNamespace(flux=None)).flux is pipe.flux
