"""Lenses: questions one asks of a run, answered as tensors with named axes.

Each runs a pipeline, records what it needs and reduces it on the way; each names the paper whose question
it is. ``lenses.word_maps(pipe, "a red circle left of a blue square", ["circle", "square"])``.
"""

from fluxedu.instruments.lenses.attention import attention_balance, head_gallery, padding_mass
from fluxedu.instruments.lenses.flow import curvature, divergence, straightness, velocity_field
from fluxedu.instruments.lenses.layers import contributions, position_dependence, vital_layers, x0_by_block
from fluxedu.instruments.lenses.modulation import modulation
from fluxedu.instruments.lenses.tokens import massive_activations
from fluxedu.instruments.lenses.words import concept_maps, word_maps

__all__ = [
    "attention_balance",
    "concept_maps",
    "contributions",
    "curvature",
    "divergence",
    "head_gallery",
    "massive_activations",
    "modulation",
    "padding_mass",
    "position_dependence",
    "straightness",
    "velocity_field",
    "vital_layers",
    "word_maps",
    "x0_by_block",
]
