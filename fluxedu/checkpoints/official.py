"""The official weights: where they are on this machine, and how to get what is not there.

    find("dev")                                   in the Hugging Face cache
    find("black-forest-labs/FLUX.1-dev")          the same
    find("path/to/a/folder")                      as on the hub, or flux1-dev.safetensors and ae.safetensors
    find("path/to/flux1-dev.safetensors").parts   {"transformer": path, "vae": path, ...}

Nothing is downloaded here. The encoders, the tokenizers and the autoencoder are the same files in every
repository of the family, so those of any one will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fluxedu.checkpoints.header import read_json
from fluxedu.errors import CheckpointError, describe

NON_COMMERCIAL = "FLUX.1 [dev] Non-Commercial License"


@dataclass(frozen=True)
class Repository:
    """A repository on the hub: its id, its transformer as one file, and its licence."""

    id: str
    single: str
    licence: str = NON_COMMERCIAL

    @property
    def terms(self) -> str:
        """What has to be agreed to before the hub hands out the files."""
        return (
            f"its licence is the {self.licence}, and the hub gives the files only after `hf auth login` "
            f"and a yes to the terms at https://huggingface.co/{self.id}"
        )


#: every variant whose weights load by name
OFFICIAL = {
    "dev": Repository("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors"),
    "schnell": Repository("black-forest-labs/FLUX.1-schnell", "flux1-schnell.safetensors", "Apache License 2.0"),
    "krea": Repository("black-forest-labs/FLUX.1-Krea-dev", "flux1-krea-dev.safetensors"),
    "fill": Repository("black-forest-labs/FLUX.1-Fill-dev", "flux1-fill-dev.safetensors"),
    "canny": Repository("black-forest-labs/FLUX.1-Canny-dev", "flux1-canny-dev.safetensors"),
    "depth": Repository("black-forest-labs/FLUX.1-Depth-dev", "flux1-depth-dev.safetensors"),
    "kontext": Repository("black-forest-labs/FLUX.1-Kontext-dev", "flux1-kontext-dev.safetensors"),
}
TOKENIZERS = ("tokenizer", "tokenizer_2")
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", *TOKENIZERS)


@dataclass(frozen=True)
class Official:
    """The files of a pipeline: the path of each part, and the variant if the name tells it."""

    parts: dict[str, Path]
    variant: str | None


def find(where: str | Path, transformer: str = "transformer") -> Official:
    """The files that ``where`` names: a variant, a repository's id, a folder or the transformer's file.

    ``transformer`` is what the transformer's folder is called.
    Raises CheckpointError, one sentence with the missing files and the command that gets them.
    """
    if not isinstance(where, (str, Path)) or not isinstance(transformer, str) or "\0" in f"{where}{transformer}":
        raise CheckpointError(f"a model is a name or a path, not {describe(where)} (or {describe(transformer)} in it).")
    variant = _variant(str(where))
    path, repository = Path(where), OFFICIAL.get(variant)
    if path.is_file():
        parts, folders = {"transformer": path}, [path.parent]
    elif path.is_dir():
        parts, folders = {}, [path]
    else:
        cached = snapshot(repository.id if repository else str(where))
        if cached is None and repository is None:
            raise CheckpointError(
                f"there is no model {describe(str(where))} on this machine, neither file nor folder nor in the Hugging "
                f"Face cache; say nano, {', '.join(OFFICIAL)} or a path."
            )
        parts, folders = {}, [cached] if cached else []
    missing = []
    for part in (p for p in PARTS if p not in parts):
        shared = _snapshots() if variant and part != "transformer" else ()
        found, lacking = _first_whole(
            part, transformer if part == "transformer" else part, variant, [*folders, *shared]
        )
        parts |= {part: found} if found else {}
        missing += lacking
    if missing:
        raise CheckpointError(_advice(str(where), variant, missing))
    return Official(parts, variant)


def snapshot(repository: str) -> Path | None:
    """The folder of a repository in the Hugging Face cache; None if nothing of it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _snapshots() -> Iterator[Path]:
    """Every repository of the family that is in the cache."""
    return (folder for known in OFFICIAL.values() if (folder := snapshot(known.id)))


def _variant(where: str) -> str | None:
    """``dev`` for ``dev``, its repository's id, its file, or a folder called ``FLUX.1-dev`` or holding that file."""
    if where in OFFICIAL:
        return where
    path = Path(where)
    for name, known in OFFICIAL.items():
        repository = known.id.split("/")[1]
        named = path.name in (known.single, repository) or f"models--{known.id.replace('/', '--')}" in path.parts
        if named or where == known.id or (path / known.single).is_file():
            return name
    return None


def _first_whole(part: str, name: str, variant: str | None, folders: list[Path]) -> tuple[Path | None, list[str]]:
    """The first folder's copy of a part, called ``name``, that is whole; or None and the names of what is missing."""
    single = {"vae": "ae.safetensors"}.get(part)
    if name == "transformer" and variant:
        single = OFFICIAL[variant].single
    lacking = [single or f"{name}/*"]
    for folder in folders:
        if single and (folder / single).is_file():
            return folder / single, []
        absent = _absent(folder / name, part in TOKENIZERS)
        if absent == []:
            return folder / name, []
        if absent:
            lacking = [f"{name}/{file}" for file in absent]
    return None, lacking


def _absent(folder: Path, tokenizer: bool) -> list[str] | None:
    """The files that a part's folder lacks; None if it has none at all."""
    if tokenizer:
        whole = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
        return [] if whole else None
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = sorted(set(read_json(index.read_bytes())["weight_map"].values()))
            return [name for name in shards if not (folder / name).is_file()]
        except (ValueError, LookupError, TypeError, AttributeError):
            return []  # the reader says what is wrong with it
    return [] if any(file.is_file() for file in folder.glob("*.safetensors")) else None


def _advice(where: str, variant: str | None, missing: list[str]) -> str:
    repository = OFFICIAL[variant or "dev"]
    wanted = " ".join(f'--include "{name}"' for name in missing)
    return (
        f"{where!r} lacks {', '.join(missing)}; get {'it' if len(missing) == 1 else 'them'} with "
        f"`hf download {repository.id} {wanted}` ({repository.terms})."
    )
