"""Many variants of one image in a few passes: each differs by its own interventions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from fluxedu.errors import InstrumentError, checked, describe
from fluxedu.instruments.interventions import intervene
from fluxedu.instruments.watching import known_sites
from fluxedu.sampling.pipeline import FluxPipeline, Output
from fluxedu.sampling.prompts import Conditioning
from fluxedu.sampling.request import as_prompts

Variant = intervene | Sequence[intervene]


@checked(InstrumentError, "pipe")
def ablate_each(
    pipe: FluxPipeline, interventions: Sequence[Variant], prompt: str | Conditioning, *, seed: int = 0, **options
) -> Output:
    """One image per entry, an intervention or a list of them, which applies to this image only::

        heads = [fe.ablate("double.1.heads", heads=[h]) for h in range(5)]
        out = fe.ablate_each(pipe, [[], *heads], "a red circle", seed=4)  # out.images[0] is unchanged

    All variants share the prompt and the seed. Several are computed at once, with the same numbers, up to rounding, as
    one by one. A recorder receives variant i as image i. options: arguments of the pipeline, such as ``steps`` and
    ``batch``. Raises InstrumentError for entries that are no interventions, that are listed twice, or that would change
    a text encoder, whose result all variants share.
    """
    if isinstance(interventions, intervene) or not isinstance(interventions, Sequence) or not interventions:
        raise InstrumentError(f"interventions must be a list with at least one entry, not {describe(interventions)}.")
    variants = [[entry] if isinstance(entry, intervene) else entry for entry in interventions]
    _check(variants)
    encoded = isinstance(prompt, Conditioning)
    if len(prompt.txt if encoded else as_prompts(prompt)) != 1 or isinstance(seed, (list, tuple)):
        raise InstrumentError("ablate_each makes variants of one image; give one prompt and one seed.")
    if "num_images" in options:
        raise InstrumentError("num_images= cannot be used here; the number of images is that of the interventions.")
    prompts = prompt[[0] * len(variants)] if encoded else as_prompts(prompt) * len(variants)
    with ExitStack() as stack:
        for i, variant in enumerate(variants):
            for intervention in variant:
                intervention.picture = i
                stack.callback(setattr, intervention, "picture", None)
                stack.enter_context(intervention)
        return pipe(prompts, seed=seed, **options)


def _check(variants: list[Sequence[intervene]]) -> None:
    """Raises InstrumentError unless every entry is a list of interventions, each listed once, on what is not shared."""
    seen: list[intervene] = []
    shared = [name for name in known_sites() if name.startswith(("clip.", "t5.", "redux."))]
    for variant in variants:
        if not isinstance(variant, Sequence) or not all(isinstance(one, intervene) for one in variant):
            raise InstrumentError(f"an entry must be an intervention or a list of them, not {describe(variant)}.")
        for intervention in variant:
            if any(intervention is one for one in seen):
                raise InstrumentError("each intervention can be listed only once; create another one.")
            seen.append(intervention)
            for name in shared:
                if intervention.matches(name):
                    raise InstrumentError(
                        f"all variants share the text encoders, so {name!r} cannot be changed for one of them; "
                        f"run it by itself, in a with block."
                    )
