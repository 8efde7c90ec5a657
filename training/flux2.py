"""A miniature FLUX.2, and FLUX.1 with one change of FLUX.2 at a time: which change costs or buys what, at this size?

    fluxedu train --variant flux2-twin         FLUX.1 as it is: the control, the same run as ``--variant twin``
    fluxedu train --variant flux2              FLUX.2 with all its changes
    fluxedu train --variant flux2-modulation   FLUX.1 with one modulation for all blocks
    fluxedu train --variant flux2-positions    FLUX.1 with position ids that count the text tokens
    fluxedu train --variant flux2-no-pooled    FLUX.1 without CLIP's pooled vector
    fluxedu train --variant flux2-swiglu       FLUX.1 with SwiGLU in place of GELU
    python -m training.flux2 [OUT]             the sizes, and the figures of the runs judged in OUT (flux2_exam.py)

A name with ``@SEED``, such as ``flux2-twin@89``, is another run of the same model: other first weights, other batches.

Scenes, captions, T5, CLIP, autoencoder, optimiser, loss and sampler are the twin's (baselines.py). FLUX.2 reads the
miniature's T5 in place of a language model. Parameters: the width of the MLP is what makes all models as large as the
twin, in steps of 8; without the pooled vector, FLUX.1 is 1 % smaller, and its MLP stays as it is. Time: all have the
twin's minutes on one thread, not its steps. Before the first run, a few steps of each model are timed in turn; a model
whose step takes longer is trained for fewer steps (``OUT/flux2-steps.json``).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fluxedu.arena.stable_diffusion import GUIDANCE
from fluxedu.checkpoints import save_folder
from fluxedu.files import folder_lock, read_json_file, write_text
from fluxedu.loading import load
from fluxedu.models.blocks import SingleStreamBlock
from fluxedu.models.config import Flux2Config, FluxConfig
from fluxedu.models.flux import Flux, Plan
from fluxedu.models.flux2 import Flux2, Flux2SingleStreamBlock, SwiGLU
from fluxedu.models.modulation import Modulation, SplitModulation
from fluxedu.nano import networks
from fluxedu.probe import name_sites
from fluxedu.sampling.pipeline import FluxPipeline
from training import baselines
from training.data import Tokens
from training.flow import AlignedFlow, TextEncoders, averaged_flow, flow_loss, initialise
from training.flux2_exam import examine, figures_table, pipeline_with
from training.loop import Recipe, Run

TWIN = "flux2-twin"
RECIPE = baselines.RECIPES[baselines.TWIN]
ROUNDS = 4  # steps of each model that are timed, after one that is not

# ---------------------------------------------------------------- FLUX.1 with one change


@dataclass(frozen=True)
class ChangedConfig(FluxConfig):
    """A FLUX.1 with some changes of FLUX.2."""

    shared_modulation: bool = False
    text_positions: bool = False
    no_pooled: bool = False
    swiglu: bool = False


class SwiGLUSingleBlock(SingleStreamBlock):
    """FLUX.1's single block with SwiGLU; ``forward`` is the same."""

    def __init__(self, config: FluxConfig):
        super().__init__(config)
        self.widths = [3 * config.hidden_size, 2 * config.mlp_hidden]  # of linear1's output: qkv, gate and value
        self.linear1 = nn.Linear(config.hidden_size, sum(self.widths))
        self.swiglu = SwiGLU()

    activation = Flux2SingleStreamBlock.activation


class ChangedFlux(Flux):
    """FLUX.1's transformer with the changes that its config names; all else, biases included, is FLUX.1's."""

    def __init__(self, config: ChangedConfig):
        super().__init__(config)
        dim = config.hidden_size
        if config.no_pooled:
            del self.vector_in
        if config.swiglu:
            for block in self.double_blocks:
                for mlp in (block.img_mlp, block.txt_mlp):
                    mlp[0], mlp[1] = nn.Linear(dim, 2 * config.mlp_hidden), SwiGLU()
            self.single_blocks = nn.ModuleList(SwiGLUSingleBlock(config) for _ in self.single_blocks)
        if config.shared_modulation:  # under FLUX.2's names
            self.double_stream_modulation_img = Modulation(dim, double=True)
            self.double_stream_modulation_txt = Modulation(dim, double=True)
            self.single_stream_modulation = Modulation(dim, double=False)
            for block in self.double_blocks:
                block.img_mod, block.txt_mod = SplitModulation(double=True), SplitModulation(double=True)
            for block in self.single_blocks:
                block.modulation = SplitModulation(double=False)
        name_sites(self)

    def rope(self, img_ids: Tensor, txt_ids: Tensor) -> Tensor:
        """FLUX.1's rotations. Text positions are counted on the axis of the frame, which is 0 for every image token."""
        if self.config.text_positions:
            txt_ids = txt_ids.clone()
            txt_ids[..., 0] = torch.arange(txt_ids.shape[-2])
        return super().rope(img_ids, txt_ids)

    def plan(self, timesteps: Tensor, guidance: Tensor | None = None, y: Tensor | None = None) -> Plan:
        """As in FLUX.2 without the pooled vector: of ``y [B, D]`` only the number of images is read."""
        return (Flux2 if self.config.no_pooled else Flux).plan(self, timesteps, guidance, y)

    def _modulation(self, terms: dict[str, Tensor], vec: Tensor) -> Plan:
        return (Flux2 if self.config.shared_modulation else Flux)._modulation(self, terms, vec)


def flux2_config(base: FluxConfig) -> Flux2Config:
    """FLUX.2 with the width, the heads and the depth of a FLUX.1, for the same text encoder and autoencoder."""
    same = ("in_channels", "out_channels", "context_in_dim", "hidden_size", "num_heads", "depth", "depth_single_blocks")
    kept = {name: getattr(base, name) for name in same}
    return Flux2Config(**kept, mlp_ratio=3.65, axes_dim=(base.head_dim // 4,) * 4, guidance_embed=False)


def configs(base: FluxConfig = networks.FLUX) -> dict[str, FluxConfig | Flux2Config]:
    """The config of each model; ``base`` is the twin's, for whose width the MLPs' ratios are meant."""
    changed = ChangedConfig(**vars(base))
    return {
        TWIN: base,
        "flux2": flux2_config(base),
        "flux2-modulation": changed.with_(shared_modulation=True, mlp_ratio=5.35),
        "flux2-positions": changed.with_(text_positions=True),
        "flux2-no-pooled": changed.with_(no_pooled=True),
        "flux2-swiglu": changed.with_(swiglu=True, mlp_ratio=2.65),
    }


NAMES = tuple(configs())


def build(config: FluxConfig | Flux2Config) -> Flux:
    """The transformer of a config."""
    kind = {ChangedConfig: ChangedFlux, Flux2Config: Flux2}.get(type(config), Flux)
    return kind(config)


def sizes_table(base: FluxConfig = networks.FLUX) -> str:
    """Parameters of each model, and how many more or fewer than the twin's."""
    counts, lines = {}, [f"{'':<18}{'parameters':>11}{'':>8}{'width of the MLP':>18}"]
    for name, config in configs(base).items():
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in build(config).parameters())
        share = 100 * (counts[name] / counts[TWIN] - 1)
        lines.append(f"{name:<18}{counts[name]:>11,}{share:>+7.2f}%{config.mlp_hidden:>18}")
    return "\n".join(lines)


# ---------------------------------------------------------------- training


def parse(variant: str) -> tuple[str, int]:
    """``flux2-twin@89`` -> the name and the seed; raises ValueError for a name or a seed that there is not."""
    name, _, seed = variant.partition("@")
    if name not in NAMES or not (seed.isdecimal() or variant == name):
        raise ValueError(f"there is no variant {variant!r}; choose one of {', '.join(NAMES)}, or NAME@SEED.")
    return name, int(seed or baselines.SEED)


def run_name(name: str, seed: int) -> str:
    """The folder of a run. The control is the baseline's twin: its run, if it is finished, serves here too."""
    folder = baselines.TWIN if name == TWIN else name
    return folder if seed == baselines.SEED else f"{folder}@{seed}"


def train(name: str, seed: int, folder: Path, pipe: FluxPipeline, recipe: Recipe, resume: bool = True) -> Run:
    """Train a model of the size of ``pipe``'s transformer, or load it if its run is finished."""
    torch.manual_seed(seed)
    baselines.make_shards(baselines.SHARDS, folder, pipe.autoencoder)
    model = AlignedFlow(initialise(build(configs(pipe.flux.config)[name])))
    run = run_name(name, seed)
    return baselines.train_on_latents(run, model, flow_loss, recipe, folder, pipe, resume, seed)


def seconds_per_step(pipe: FluxPipeline, batch: int = RECIPE.batch) -> dict[str, float]:
    """CPU seconds of a training step of each model: the fastest of ``ROUNDS`` steps, timed in turn."""
    texts = TextEncoders(pipe.prompt_encoder.t5, pipe.prompt_encoder.clip)
    t5, clip = Tokens()(["a red circle"] * batch)
    labels = torch.zeros(batch, 2, 8, 8, dtype=torch.long)
    data = {"latents": torch.randn(batch, 16, 16, 16), "labels": labels, "t5": t5, "clip": clip}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        models = {name: AlignedFlow(initialise(build(c))) for name, c in configs(pipe.flux.config).items()}
        runs = {name: Run(name, model, RECIPE, Path(folder)) for name, model in models.items()}
        for step in range(ROUNDS + 1):
            for name, run in runs.items():
                start = time.process_time()
                g = torch.Generator().manual_seed(step)
                run._one_step(lambda _, model=models[name], g=g: flow_loss(model, data, texts, g))
                seconds[name].append(time.process_time() - start)
    return {name: min(values[1:]) for name, values in seconds.items()}


def steps_of(name: str, folder: Path, pipe: FluxPipeline) -> int:
    """The number of steps in the twin's minutes: measured once, and the same ever after in this folder."""
    path = Path(folder) / "flux2-steps.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(path.parent):
        if not path.exists():
            print("timing a few steps of each model", flush=True)
            seconds = seconds_per_step(pipe)
            steps = {n: 10 * round(RECIPE.steps * seconds[TWIN] / s / 10) for n, s in seconds.items()}
            write_text(path, json.dumps(steps, indent=2) + "\n")
    return read_json_file(path)[name]


def train_flux2(variant: str, folder: Path, resume: bool, ship_to: Path, prompts: int = 500) -> Path:
    """Train one of the models on one thread and judge it; returns the file of its figures, ``OUT/RUN/exam.json``.

    FLUX.2's weights are written in bfloat16 to ``ship_to``; those of the others stay in the state of their run.
    """
    name, seed = parse(variant)
    print(sizes_table(), flush=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the budget is for one; another number would also round differently after a stop
    try:
        pipe = load("nano-base")
        run = train(name, seed, folder, pipe, replace(RECIPE, steps=steps_of(name, folder, pipe)), resume)
        flux = averaged_flow(run)
        if variant == "flux2":
            path = Path(ship_to) / "transformer_flux2"
            save_folder(flux.state_dict(), path, flux.config, dtype=torch.bfloat16, overwrite=True)
            print(f"wrote {path}")
        baselines.round_as_shipped(flux)
        rows = examine(pipeline_with(flux, pipe), prompts)
        figures = baselines.budget(flux, run) | {"guidance": GUIDANCE, "rows": rows}
    finally:
        torch.set_num_threads(threads)
    path = run.folder / "exam.json"
    write_text(path, json.dumps(figures) + "\n")
    print(figures_table(folder))
    return path


if __name__ == "__main__":
    print(sizes_table(), figures_table(Path(*sys.argv[1:] or ["runs"])), sep="\n\n")
