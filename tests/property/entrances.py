"""Every public entrance of the package, with arguments that it accepts; a test replaces one of them at a time."""

import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from sizes import TINY_FLUX
from torch import nn

import fluxedu as fe
from fluxedu import arena, checkpoints, course, instruments, memory, plots, sampling, trace, widgets
from fluxedu.attention_map import AttentionMap
from fluxedu.instruments import Named, lenses, open_recording
from fluxedu.instruments.ablation import ablate
from fluxedu.loading import WEIGHTS
from fluxedu.models import Flux, FluxConfig
from fluxedu.sweep import from_dict, open_sweep, read_config, run_sweep

PROMPT = "a red circle"
SHORT = {"steps": 1, "height": 16, "width": 16, "progress": False}
SWEEP = {"prompts": ["a"], "seeds": [0, 1], "shard": 1, "settings": {"steps": 1, "height": 16, "width": 16}}

Entrance = tuple[Callable, dict]  # a function and arguments that it accepts
#: an argument of the table that is passed without its name
ALONE = "*"


def entrances(make_pipe, folder: Path) -> dict[str, Entrance]:
    """Every entrance by name. ``folder`` is empty, and will hold a checkpoint, a recording and a finished sweep."""
    pipe = make_pipe()
    with fe.record("double.0.attn.map", "vec", to=folder / "recording") as rec:
        out = pipe(PROMPT, **SHORT | {"steps": 2})
    with fe.gradients(), fe.record("vec", detach=False) as in_graph:
        pipe(PROMPT, **SHORT).latents.sum().backward()
    run_sweep(from_dict(SWEEP), folder / "sweep")
    (folder / "sweep.yaml").write_text("{prompts: [a], settings: {steps: 1, height: 16, width: 16}}")
    with torch.random.fork_rng(devices=[]):
        flux = Flux(TINY_FLUX.with_(depth=1, depth_single_blocks=1))
    checkpoints.save_file(flux.state_dict(), folder / "flux.safetensors", config=flux.config)
    layer = "double_blocks.0.img_attn.qkv"
    lora = {f"{layer}.lora_A.weight": torch.ones(2, 48), f"{layer}.lora_B.weight": torch.ones(144, 2)}
    weights, saved, sweep = flux.state_dict(), rec.saved(), open_sweep(folder / "sweep")
    picture = Image.new("RGB", (16, 16), "red")
    named = Named(torch.rand(2, 3, 4), ("block", "word", "row"), {"word": ["a", "b", "c"]})
    maps = Named(torch.rand(2, 1, 2, 2), ("block", "word", "row", "column"))
    q = torch.randn(1, 2, 6, 8)
    attention = AttentionMap(q, q, q, txt_len=2)
    networks = memory.Networks(pipe.flux, pipe.autoencoder, pipe.prompt_encoder.clip, pipe.prompt_encoder.t5)
    mine = widgets.trajectory(pipe, PROMPT, **SHORT)
    text = pipe.prompt_encoder([PROMPT])
    votes = arena.Votes(folder / "votes.sqlite")
    red_and_blue = [arena.Contestant(c, lambda p, s, h, w, c=c: Image.new("RGB", (w, h), c)) for c in ("red", "blue")]

    def recording(*globs, **options):
        with fe.record(*globs, **options) as recorder:
            pipe(PROMPT, **SHORT)
        return {name: recorder.entries(name) for name in recorder}

    def changing(make, *arguments, **options):
        with make(*arguments, **options):
            pipe(PROMPT, **SHORT)

    def changed(kind):
        return lambda *arguments, **options: changing(kind, *arguments, **options)

    selection = {"steps": 0, "passes": "prompted"}
    at_heads = {**selection, "heads": [0], "streams": "img"}
    found = {
        "FluxPipeline": (sampling.FluxPipeline, {"prompt_encoder": pipe.prompt_encoder, "flux": pipe.flux,
            "autoencoder": pipe.autoencoder, "defaults": pipe.defaults, "size": 32}),
        "pipe": (pipe, {"prompt": PROMPT, **SHORT, "negative_prompt": None, "seed": 0, "num_images": 1, "batch": 1,
            "latents": None, "times": None, "shift": None, "guidance": 3.5, "true_cfg_scale": 1.0, "solver": "euler",
            "guidance_interval": (0, 1), "image": None, "strength": 0.5, "mask": None, "paste": True, "control": None,
            "reference": None, "image_prompt": None, "trajectory": True, "rounding": "up", "decode": True,
            "stop_after": None}),
        "pipe with a picture": (pipe, {"prompt": PROMPT, **SHORT, "image": picture, "strength": 1.0}),
        "pipe.to": (make_pipe().to, {ALONE: "cpu"}),
        "load": (fe.load, {"name": "nano", "device": "cpu", "dtype": "float32", "transformer": "transformer",
            "memory": "full", "quantise": None, "compile": False, "variant": None, "revision": None, "like": None,
            "lora": None, "lora_scale": 1.0}),
        "sites": (fe.sites, {"pipe": pipe}),
        "record": (recording, {ALONE: "double.*.heads", **at_heads, "times": None, "tokens": 0, "queries": None,
            "reduce": "norm", "to": "memory", "budget": 10**8, "dtype": torch.float16, "detach": True}),
        "record a map": (recording, {ALONE: "double.0.attn.map", "tokens": ["red"], "queries": "img"}),
        "intervene": (changed(fe.intervene), {ALONE: ("double.*.heads", lambda x, ctx: 0 * x), **at_heads,
            "times": None, "tokens": 0, "queries": None}),
        "intervene ": (lambda change: changing(fe.intervene, "double.0.heads", change), {"change": lambda x, ctx: x}),
        "ablate": (changed(ablate), {ALONE: "double.*.heads", **at_heads, "to": 0.0}),
        "patch": (lambda glob, source, **options: changing(fe.patch, glob, source, **options),
            {"glob": "vec", "source": saved, "steps": None, "passes": "prompted"}),
        "ablate_each": (fe.ablate_each, {"pipe": pipe, "interventions": [[], fe.ablate("double.0")],
            "prompt": PROMPT, "seed": 0, **SHORT}),
        "region": (lambda **options: recording("double.0.img", tokens=fe.region(**options)), {"box": (0, 0, 1, 1)}),
        "region of a mask": (fe.region, {"mask": picture}),
        "gradients": (changed(fe.gradients), {"steps": [0], "checkpointing": False}),
        "invert": (fe.invert, {"pipe": pipe, "picture": picture, "prompt": PROMPT, "rounds": 1, "trajectory": False,
            "steps": 1, "progress": False}),
        "swap": (changed(fe.swap), {"glob": "double.0.img_mlp", "new": lambda old: old, "pipe": pipe}),
        "positions": (lambda edit, text: changing(fe.intervene, "double.0.attn.rope",
            instruments.positions(edit, text)), {"edit": lambda ids: ids, "text": lambda ids: ids}),
        # ------------------------------------------------ named values, recordings, maps, sweeps
        "Named": (Named, {"tensor": torch.zeros(2, 3), "axes": ("a", "b"), "coords": {"a": [1, 2]}}),
        "Named.axis": (named.axis, {"name": "row"}),
        "Named.at": (named.at, {"row": 1}),
        "Named.take": (named.take, {"name": "row", "index": [0, 1]}),
        "Named.mean": (named.mean, {ALONE: "row"}),
        "Named.to": (named.to, {"dtype": torch.float16}),
        "Named.dropped": (named.dropped, {"name": "row", "tensor": torch.zeros(2, 3)}),
        "Named +": (lambda other: named + other, {"other": 1.0}),
        "Named /": (lambda other: named / other, {"other": named}),
        "Recording[]": (lambda name: saved[name], {"name": "vec"}),
        "Recording in": (lambda name: name in saved, {"name": "vec"}),
        "Recording.entries": (saved.entries, {"name": "vec"}),
        "Recording.in_order": (saved.in_order, {"name": "vec"}),
        "Recording.dataset": (saved.dataset, {"name": "vec", "flatten": "channel"}),
        "record.grad": (in_graph.grad, {"name": "vec"}),
        "open_recording": (open_recording, {"folder": folder / "recording"}),
        "AttentionMap.rows": (attention.rows, {"index": [0]}),
        "AttentionMap.columns": (attention.columns, {"index": [0], "rows": slice(None)}),
        "AttentionMap.heads": (attention.heads, {"index": [0]}),
        "AttentionMap.picture": (attention.picture, {"index": 0}),
        "AttentionMap.head_mean": (attention.head_mean, {"rows": [0], "columns": [1]}),
        "AttentionMap.with_scores": (lambda scores: attention.with_scores(scores).weights(),
            {"scores": torch.zeros(1, 2, 6, 6)}),
        "AttentionMap @": (lambda v: attention @ v, {"v": q}),
        "Results[]": (lambda number: sweep[number], {"number": 0}),
        "Sweep.cell": (sweep.sweep.cell, {"number": 0}),
        "Sweep.cells": (sweep.sweep.cells, {"file": 0}),
        "from_dict": (from_dict, {"values": SWEEP}),
        "read_config": (read_config, {"path": folder / "sweep.yaml"}),
        "open_sweep": (open_sweep, {"folder": folder / "sweep"}),
        "run_sweep": (run_sweep, {"sweep": from_dict(SWEEP), "folder": folder / "sweep", "workers": 1,
            "scheduler": None, "progress": False}),
        "trace.stages": (trace.stages, {"pipe": pipe, "prompt": PROMPT, **SHORT}),
        "trace.page": (trace.page, {"title": "a", "about": "b", "stages": trace.stages(pipe, PROMPT, **SHORT)[1]}),
        # ------------------------------------------------ sampling
        "Trajectory.joined": (sampling.Trajectory.joined, {"runs": [out.trajectory]}),
        "Conditioning.joined": (text.joined, {"other": text}),
        "Conditioning.with_tokens": (text.with_tokens, {"tokens": torch.zeros(1, 2, 24)}),
        "Conditioning[]": (lambda rows: text[rows], {"rows": [0]}),
        "PromptEncoder": (pipe.prompt_encoder, {"prompts": [PROMPT], "batch": 1}),
        "Tokenizer.pieces": (pipe.prompt_encoder.t5_tokenizer.pieces, {"prompt": PROMPT}),
        "Tokenizer": (pipe.prompt_encoder.t5_tokenizer, {"prompts": [PROMPT], "length": 32}),
        "Solver": (lambda step, stages: sampling.Solver(step, stages), {"step": sampling.euler, "stages": (0,)}),
        "schedule": (sampling.schedule, {"steps": 2, "tokens": 64, "shift": True, "ends": (0.5, 1.15)}),
        "shift_amount": (sampling.shift_amount, {"tokens": 64, "base": (256, 0.5), "top": (4096, 1.15)}),
        "shift_times": (sampling.shift_times, {"times": torch.linspace(1, 0, 3), "mu": 1.0}),
        "guide": (sampling.guide, {"negative": torch.zeros(2), "prompted": torch.ones(2), "scale": 2.0}),
        "draw_noise": (sampling.draw_noise, {"seed": 0, "channels": 4, "height": 2, "width": 2,
            "dtype": torch.float32, "device": "cpu"}),
        "pack": (sampling.pack, {"latent": torch.zeros(1, 4, 4, 4)}),
        "unpack": (sampling.unpack, {"tokens": torch.zeros(1, 4, 16), "height": 4, "width": 4}),
        "image_ids": (sampling.image_ids, {"height": 4, "width": 4}),
        "text_ids": (sampling.text_ids, {"length": 4}),
        "edges": (sampling.edges, {"image": picture, "low": 50, "high": 200}),
        # ------------------------------------------------ lenses, figures, explorers
        "straightness": (lenses.straightness, {"trajectory": out.trajectory}),
        "curvature": (lenses.curvature, {"trajectory": out.trajectory}),
        "plots.contributions": (plots.contributions, {"sizes": Named(torch.rand(2, 2), ("block", "step"))}),
        "plots.elo": (plots.elo, {"rows": _ratings(), "title": "a"}),
        "plots.elo_axes": (plots.elo_axes, {"tables": {"overall": _ratings()}}),
        "plots.film_strip": (plots.film_strip, {"rows": {"a": [picture, picture]}, "times": [1.0, 0.5],
            "max_images": 2}),
        "plots.head_gallery": (plots.head_gallery, {"heads": Named(maps.tensor, ("block", "head", "row", "column")),
            "image": picture}),
        "plots.modulation": (plots.modulation, {"sizes": Named(torch.rand(2, 3, 3), ("time", "layer", "kind"))}),
        "plots.overlay": (plots.overlay, {"image": picture, "weights": torch.rand(2, 2), "title": "a"}),
        "plots.quiver": (plots.quiver, {"field": Named(torch.rand(2, 2, 4), ("up", "across", "what"))}),
        "plots.side_by_side": (plots.side_by_side, {"first": picture, "second": picture, "names": ("a", "b")}),
        "plots.spectrum": (plots.spectrum, {"values": {"a": torch.rand(4, 4, 4)}}),
        "plots.treemap": (plots.treemap, {"network": {"a": 2, "b": 1}, "depth": 2, "title": "a"}),
        "plots.word_maps": (plots.word_maps, {"maps": maps, "image": picture}),
        "Explorer.set": (mine.set, {"step": "t = 1.00"}),
        "widgets.blind": (widgets.blind, {"images": {"a": [picture], "b": [picture]}, "prompts": [PROMPT],
            "pairs": 1, "seed": 0}),
        "widgets.parameters": (widgets.parameters, {"own": {"mine": TINY_FLUX}}),
        "widgets.particles": (widgets.particles, {"fields": {"a": lambda x, t: -x}, "data": torch.zeros(1, 2),
            "count": 4, "steps": 2, "seed": 0}),
        "where": (lambda pipe, name: course.where(pipe, name), {"pipe": pipe, "name": "clip"}),
        # ------------------------------------------------ the arena
        "arena.Arena": (arena.Arena, {"models": red_and_blue, "votes": votes, "prompts": 2, "folder": None, "seed": 0}),
        "arena.Votes": (arena.Votes, {"path": folder / "votes.sqlite"}),
        "arena.Votes.export": (votes.export, {"path": folder / "votes.csv"}),
        "arena.booth": (arena.booth, {"arena": arena.Arena(red_and_blue, votes, prompts=2), "voter": "me",
            "axis": "overall"}),
        "arena.contestant": (arena.contestant, {"spec": "nano@4", "device": "cpu"}),
        "arena.rate": (arena.rate, {"names": ["a", "b"], "votes": [("a", "b", 1.0), ("b", "a", 0.5, 2)], "level": 0.9,
            "rounds": 8, "seed": 0}),
        # ------------------------------------------------ checkpoints
        "config_of": (checkpoints.config_of, {"tensors": checkpoints.read(folder / "flux.safetensors")}),
        "convert": (checkpoints.convert, {"state_dict": weights, "to": "diffusers", "config": flux.config}),
        "convert_file": (checkpoints.convert_file, {"source": folder / "flux.safetensors", "target": folder / "new",
            "to": "diffusers", "config": flux.config, "part": "transformer", "dtype": torch.float32,
            "shard_bytes": 10**9, "overwrite": True, "progress": None}),
        "convert_lazily": (checkpoints.convert_lazily, {"tensors": weights, "to": "bfl", "config": flux.config}),
        "extract": (checkpoints.extract, {"after": weights, "before": weights, "rank": 1}),
        "find": (checkpoints.find, {"name": WEIGHTS, "transformer": "transformer", "variant": None, "revision": None}),
        "from_diffusers_config": (checkpoints.from_diffusers_config,
            {"values": checkpoints.to_diffusers_config(flux.config), "kind": FluxConfig}),
        "to_diffusers_config": (checkpoints.to_diffusers_config, {"config": flux.config}),
        "infer_config": (checkpoints.infer_config, {"tensors": weights, "like": flux.config}),
        "load_into": (checkpoints.load_into, {"module": flux, "tensors": weights, "dtype": torch.float32,
            "device": "cpu"}),
        "load_model": (checkpoints.load_model, {"path": folder / "flux.safetensors", "config": flux.config,
            "dtype": torch.float32, "device": "cpu", "part": "transformer"}),
        "open_model": (checkpoints.open_model, {"path": folder / "flux.safetensors", "config": flux.config,
            "part": "transformer"}),
        "read": (checkpoints.read, {"path": folder / "flux.safetensors", "part": "transformer"}),
        "lora_in_channels": (checkpoints.lora_in_channels, {"lora": lora}),
        "merge": (lambda **options: checkpoints.merge(**options).unmerge(),
            {"networks": flux, "lora": lora, "scale": 0.5, "config": None}),
        "save_file": (checkpoints.save_file, {"tensors": weights, "path": folder / "new.safetensors",
            "config": flux.config, "dtype": torch.float32, "overwrite": True, "progress": None}),
        "save_folder": (checkpoints.save_folder, {"tensors": weights, "path": folder / "new", "config": flux.config,
            "to": "diffusers", "max_shard_bytes": 10**9, "dtype": torch.float32, "overwrite": True, "progress": None}),
        "shapes": (checkpoints.shapes, {"config": flux.config, "layout": "bfl"}),
        "widen_input": (checkpoints.widen_input, {"tensors": weights, "in_channels": 128}),
        # ------------------------------------------------ memory
        "Networks": (memory.Networks, {"flux": networks.flux, "ae": networks.ae, "clip": networks.clip,
            "t5": networks.t5, "dtype": torch.float32}),
        "Networks.need": (networks.need, {"placement": memory.Placement(), "height": 16, "width": 16, "txt_len": 4}),
        "Placement": (memory.Placement, {"mode": "full", "streamed": 0, "tiled": False, "quantised": None}),
        "WeightStreamer": (memory.WeightStreamer, {"modules": [nn.Linear(2, 2)], "device": "cpu", "others": ()}),
        "choose": (memory.choose, {"networks": networks, "mode": "auto", "free": 10**9, "size": 64, "txt_len": 4,
            "quantised": None}),
        "decode_tiled": (memory.decode_tiled, {"ae": pipe.autoencoder,
            "latent": torch.zeros(1, pipe.autoencoder.config.z_channels, 4, 4), "tile": 4, "overlap": 2}),
        "modulations": (memory.modulations, {"flux": flux}),
        "predicted": (memory.predicted, {"cards": (24,), "networks": networks, "size": 64, "quantised": None}),
        "table": (memory.table, {"size": 64}),
    }  # fmt: skip
    own = {
        "words": ["red"], "query": "red", "at_steps": [0], "at_step": 0, "size": 2, "reach": 0.5, "probes": 1,
        "times": 2, "guidance": 3.5, "seeds": [0], "decoded": False, "added": False, "edit": torch.zeros_like,
    }  # fmt: skip
    for name in sorted(set(lenses.__all__) - {"straightness", "curvature"}):
        lens = getattr(lenses, name)
        arguments = {key: value for key, value in own.items() if key in inspect.signature(lens).parameters}
        arguments |= {} if name == "modulation" else {"seed": 0, **SHORT}
        found[f"lenses.{name}"] = (lens, {"pipe": pipe, "prompt": PROMPT, **arguments})
    for name, arguments in {
        "architecture": {"at_steps": [0], **SHORT},
        "attention": {"blocks": "double.*", "at_steps": [0], **SHORT},
        "bench": {"other": PROMPT, **SHORT},
        "contributions": SHORT,
        "heads": SHORT,
        "streams": {"block": "double.0", **SHORT},
        "grid": {"guidance_scales": [1.0, 2.0], "shifts": [1.0], **SHORT, "steps": [1]},
        "tokens": {},
        "trajectory": SHORT,
        "solvers": {"evaluations": [2], "solvers": ["euler"], "shifts": [1.0], "reference": 1, "height": 16},
    }.items():
        found[f"widgets.{name}"] = (getattr(widgets, name), {"pipe": pipe, "prompt": PROMPT, **arguments})
    found |= {
        "widgets.latents": (widgets.latents, {"pipe": pipe, "image": picture, "seed": 0}),
        "widgets.modulation": (widgets.modulation, {"pipe": pipe, "prompts": [PROMPT], "times": 2}),
        "widgets.positions": (widgets.positions, {"pipe": pipe, "side": 4, "block": "single.1", "head": 0}),
        "widgets.similarity": (widgets.similarity, {"pipe": pipe, "prompts": ["a", "b"], "words": [None, "red"]}),
        "widgets.velocity": (widgets.velocity, {"pipe": pipe, "prompts": ["a"], "seeds": 3, **SHORT}),
    }
    return found


def _ratings() -> dict:
    return {"nano": {"elo": 1500.0, "low": 1490.0, "high": 1510.0, "votes": 3}}


def call(entrance: Entrance, **others) -> None:
    """Call an entrance, some of whose arguments are replaced; what it returns is used up."""
    function, arguments = entrance
    arguments = {**arguments, **others}
    alone = arguments.pop(ALONE, ())
    result = function(*(alone if isinstance(alone, tuple) else (alone,)), **arguments)
    if isinstance(result, widgets.Explorer):
        result.figure()
