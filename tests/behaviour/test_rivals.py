"""The small Stable Diffusion: against diffusers' own pipeline, and its training and figures from end to end."""

import json
from types import SimpleNamespace

import pytest
import torch

import fluxedu as fe
from fluxedu.arena.contestants import contestant
from fluxedu.checkpoints import save_file
from fluxedu.errors import RequestError
from fluxedu.loading import WEIGHTS
from fluxedu.nano.report import drawer
from fluxedu.nano.rivals import DDIM, FILE, SD, UNET, StableDiffusion, load_sd, schedule, unet
from fluxedu.nano.training import rivals
from fluxedu.nano.training.flow import Texts
from fluxedu.nano.training.latents import Tokens, make_shard
from fluxedu.nano.training.loop import Recipe
from fluxedu.sampling.latents import draw_noise

diffusers = pytest.importorskip("diffusers")
PROMPTS = ["a red circle left of a blue square", "a green star on a white background"]


@pytest.fixture(scope="module")
def sd():
    return load_sd()


@pytest.mark.parametrize("steps", [3, 8])
def test_it_samples_as_diffusers_pipeline_does(sd, steps):
    """StableDiffusionPipeline with the same U-Net, words and noise: the same latents."""
    theirs = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=sd.unet, safety_checker=None, feature_extractor=None,
        scheduler=diffusers.DDIMScheduler(**DDIM), requires_safety_checker=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    words, empty = sd.words(PROMPTS), sd.words(["", ""])
    noise = torch.cat([draw_noise(s, 16, 12, 20) for s in (3, 4)])
    wanted = theirs(
        prompt_embeds=words, negative_prompt_embeds=empty, latents=noise, guidance_scale=4.0, height=96, width=160,
        num_inference_steps=steps, output_type="latent",
    ).images  # fmt: skip
    ours = sd(PROMPTS, seed=[3, 4], steps=steps, guidance=4.0, height=96, width=160, progress=False).latents
    assert (ours - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_the_words_are_clips_last_states(sd):
    """transformers' CLIPTextModel on the shipped folder."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTextModel.from_pretrained(WEIGHTS / "text_encoder").float()
    ids = sd.prompt_encoder.clip_tokenizer(PROMPTS)
    with torch.no_grad():
        assert (theirs(ids).last_hidden_state - sd.words(PROMPTS)).abs().max() < 2e-5


def test_noise_is_added_by_the_paper():
    """x_t = sqrt(prod(1 - beta)) x0 + sqrt(1 - prod(1 - beta)) noise; beta runs evenly in its root."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - beta, 0)[[0, 499, 999]].float()[:, None, None, None]
    x0, noise = torch.randn(2, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = kept.sqrt() * x0 + (1 - kept).sqrt() * noise
    assert torch.allclose(schedule().add_noise(x0, noise, torch.tensor([0, 499, 999])), wanted, atol=1e-5)


def test_what_ships_is_what_diffusers_opens():
    theirs = diffusers.UNet2DConditionModel.from_pretrained(WEIGHTS / FILE.parent)
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in unet().parameters())
    told = json.loads((WEIGHTS / FILE).with_name("config.json").read_text())
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in told.items() if k != "_class_name"} == UNET


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seed": [1, 2]}, "1 prompts need as many seeds, or one, not 2."),
        ({"steps": 0}, "1 to 1000 steps, not 0."),
        ({"height": 100}, "multiples of 16, not 100 x 128."),
        ({"trajectory": True}, "keeps no trajectory"),
    ],
)
def test_what_does_not_fit_is_a_sentence(sd, asked, message):
    with pytest.raises(RequestError, match=message):
        sd("a red circle", **asked)


def test_a_folder_without_it_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"unet.diffusion_pytorch_model.safetensors; `fluxedu train --variant sd`"):
        load_sd(tmp_path)


def test_it_takes_part_in_the_arena(sd):
    few = contestant("sd@3")
    drawn = few.draw("a red circle", 5, 96, 160)
    assert drawn.size == (160, 96)
    assert drawn.tobytes() == sd("a red circle", seed=5, steps=3, height=96, width=160).images[0].tobytes()


def test_who_says_the_noise_and_names_the_patches_loses_nothing():
    """The loss of a network that answers with the very noise and labels is zero; of one that says 0 it is about 1."""
    pipe = fe.load("nano-base")
    texts = Texts(pipe.prompt_encoder.t5, pipe.prompt_encoder.clip)
    shard = make_shard(0, pipe.autoencoder, Tokens(), size=32)
    batch = {"latents": shard["latents"].float(), "labels": shard["labels"].long(), "clip": shard["clip"][:, 0].long()}
    labels = batch["labels"].flatten(2)
    heard = {}

    def knowing(x_t, t, words):
        kept = schedule().alphas_cumprod[t][:, None, None, None]
        heard["words"] = words
        colour, form = (torch.nn.functional.one_hot(labels[:, i], n) * 50.0 for i, n in ((0, 9), (1, 17)))
        return (x_t - kept.sqrt() * batch["latents"]) / (1 - kept).sqrt(), torch.cat([colour, form], -1)

    of = lambda model: rivals.noise_loss(model, batch, texts, torch.Generator().manual_seed(0), rivals.ALIGN)  # noqa: E731
    loss, told = of(knowing)
    assert told["noise"] < 1e-4 and told["named"] < 1e-4
    assert heard["words"].shape == (32, 32, 96)
    loss, told = of(lambda x_t, t, words: (torch.zeros_like(x_t), torch.zeros(32, 64, 26)))
    assert told["noise"] == pytest.approx(1, abs=0.05)
    assert float(loss) == pytest.approx(told["noise"] + rivals.ALIGN / 3 * told["named"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [SD, rivals.TWIN])
def test_training_from_nothing_to_the_card(tmp_path, monkeypatch, name):
    """A few steps: the loss falls, what is written is opened, and rivals.json and the card tell of it."""
    pipe = fe.load("nano-base")
    shard = make_shard(0, pipe.autoencoder, Tokens(), size=64)
    (tmp_path / "latents").mkdir()
    save_file(shard, tmp_path / "latents" / "0000.safetensors")
    monkeypatch.setattr(rivals, "make_shards", lambda *args: None)
    monkeypatch.setitem(rivals.RECIPES, name, Recipe(steps=12, lr=2e-3, batch=8, warmup=2, ema=0.5, muon=True))
    shown = []
    train = rivals.Run.train
    watched = lambda run, loss: train(run, lambda step: shown.append(loss(step)) or shown[-1])  # noqa: E731
    monkeypatch.setattr(rivals.Run, "train", watched)
    (tmp_path / "README.md").write_text((WEIGHTS / "README.md").read_text())
    monkeypatch.setattr(rivals, "drawer", lambda pipe, steps, guidance: drawer(pipe, 1, guidance))
    path = rivals.train_rival(name, tmp_path, False, tmp_path, prompts=14, few=1)
    losses = [float(value.detach()) for value, _ in shown]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    assert path.exists()
    entry = json.loads((tmp_path / "rivals.json").read_text())[name]
    assert (entry["steps"], entry["batch"], entry["exam"]["prompts"], entry["few"]) == (12, 8, 14, 1)
    assert list(entry["by_steps"]) == ["4", "8", "20", "50"]
    card = (tmp_path / "README.md").read_text()
    assert card.count("## Beside a Stable Diffusion") == 1 and f"| {name} |" in card and "12 x 8" in card
    if name == SD:
        assert load_sd(tmp_path)("a red circle", steps=1).images[0].size == (128, 128)
    else:
        network = fe.load(WEIGHTS, transformer="transformer_base").flux
        assert entry["parameters"] == sum(p.numel() for p in network.parameters())


def test_a_rival_is_seated_with_the_miniatures_encoders():
    pipe = fe.load("nano-base")
    made = rivals.seated(unet(), pipe)
    assert isinstance(made, StableDiffusion) and made.autoencoder is pipe.autoencoder
    assert rivals.seated(pipe.flux, SimpleNamespace(flux=None)).flux is pipe.flux
