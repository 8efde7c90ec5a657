"""How every network of the miniature was trained. Not part of the installed package: it needs a checkout.

    fluxedu train --all               every stage, from scratch (stages.py)
    fluxedu train --variant kontext   one model of the family, starting from the miniature (family.py)
    fluxedu train --variant sd        a Stable Diffusion on a comparable budget (baselines.py)
    fluxedu train --variant flux2     a miniature FLUX.2; flux2-swiglu and others, one change of it (flux2.py)

``python -m training`` takes the same options.
"""

from __future__ import annotations

from pathlib import Path

from fluxedu.files import check_writable

VARIANTS = ("schnell", "fill", "canny", "depth", "kontext", "redux", "hollow", "sd", "twin")
VARIANTS += ("flux2", "flux2-twin", "flux2-modulation", "flux2-positions", "flux2-no-pooled", "flux2-swiglu")


def train(all_stages: bool, stage: str | None, variant: str | None, out: Path, resume: bool, ship_to: Path) -> None:
    """Run every stage, one stage, or one variant; exactly one of the first three arguments must be set.

    ``out`` is the folder with the state of every run; with ``resume`` a run continues from there. The finished weights
    are written to ``ship_to``. Raises ValueError for unknown names.
    """
    from training.baselines import RECIPES, train_baseline
    from training.family import train_variant
    from training.flux2 import train_flux2
    from training.stages import STAGES, run_stages

    if all_stages + (stage is not None) + (variant is not None) != 1 or (stage is not None and stage not in STAGES):
        raise ValueError(f"give --all, --variant NAME, or --stage with one of {', '.join(STAGES)}.")
    if Path(ship_to).exists():  # now, and not after days of training
        check_writable(Path(ship_to) / "README.md")
    if variant is None:
        run_stages(list(STAGES) if all_stages else [stage], out, resume, ship_to)
    elif variant in RECIPES:
        train_baseline(variant, out, resume, ship_to)
    elif variant.startswith("flux2"):
        train_flux2(variant, out, resume, ship_to)
    else:
        train_variant(variant, out, resume, ship_to)
