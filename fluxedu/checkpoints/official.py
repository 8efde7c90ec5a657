"""The official weights: where they are on this machine, and how to get what is missing.

    find("dev")                                   in the Hugging Face cache
    find("black-forest-labs/FLUX.1-dev")          the same
    find("path/to/a/folder")                      as on the hub, or with flux1-dev.safetensors and ae.safetensors
    find("path/to/flux1-dev.safetensors").parts   {"transformer": path, "vae": path, ...}

Nothing is downloaded here. The encoders, the tokenizers and the autoencoder are the same files in every repository of
the family, so they are taken from whichever is in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fluxedu.errors import CheckpointError, describe
from fluxedu.files import read_json


@dataclass(frozen=True)
class Repository:
    """A repository on the hub: its id, the file name of its transformer, and its licence."""

    id: str
    single: str
    licence: str = "FLUX.1 [dev] Non-Commercial License"


#: every variant that can be loaded by name
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
    """The files of a pipeline: the path of each part, and the variant if the name reveals it."""

    parts: dict[str, Path]
    variant: str | None


def find(name: str | Path, transformer: str = "transformer") -> Official:
    """The files of ``name``: a variant, a repository's id, a folder, or the transformer's file.

    ``transformer`` is the name of the transformer's folder. Raises CheckpointError, one sentence with the missing files
    and the command that downloads them.
    """
    if not isinstance(name, (str, Path)) or not isinstance(transformer, str) or "\0" in f"{name}{transformer}":
        raise CheckpointError(
            f"a model must be a name or a path, not {describe(name)} (transformer folder {describe(transformer)})."
        )
    variant, path = _variant_of(str(name)), Path(name)
    parts, folders = {}, []
    if path.is_file():
        parts["transformer"], folders = path, [path.parent]
    elif path.is_dir():
        folders = [path]
    else:
        cached = snapshot(OFFICIAL[variant].id if variant else str(name))
        if cached is None and variant is None:
            raise CheckpointError(
                f"there is no model {describe(str(name))} on this machine, neither file nor folder nor in the Hugging "
                f"Face cache; use nano, {', '.join(OFFICIAL)} or a path."
            )
        folders = [cached] if cached else []
    missing = []
    for part in PARTS:
        if part in parts:
            continue
        shared = []  # the other repositories of the family
        if variant and part != "transformer":
            shared = [found for repository in OFFICIAL.values() if (found := snapshot(repository.id))]
        folder_name = transformer if part == "transformer" else part
        found, absent = _first_complete(part, folder_name, variant, [*folders, *shared])
        if found:
            parts[part] = found
        missing += absent
    if missing:
        repository = OFFICIAL[variant or "dev"]
        options = " ".join(f'--include "{file}"' for file in missing)
        raise CheckpointError(
            f"{str(name)!r} lacks {', '.join(missing)}; get {'it' if len(missing) == 1 else 'them'} with "
            f"`hf download {repository.id} {options}` (its licence is the {repository.licence}; the hub allows the "
            f"download after `hf auth login` and accepting the terms at https://huggingface.co/{repository.id})."
        )
    return Official(parts, variant)


def snapshot(repository: str) -> Path | None:
    """The folder of a repository in the Hugging Face cache; None if nothing of it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _variant_of(name: str) -> str | None:
    """``dev`` for ``dev``, its repository's id, its file, or a folder called ``FLUX.1-dev`` or holding that file."""
    if name in OFFICIAL:
        return name
    path = Path(name)
    for variant, repository in OFFICIAL.items():
        in_cache = f"models--{repository.id.replace('/', '--')}" in path.parts
        has_its_name = name == repository.id or path.name in (repository.single, repository.id.split("/")[1])
        if in_cache or has_its_name or (path / repository.single).is_file():
            return variant
    return None


def _first_complete(
    part: str, folder_name: str, variant: str | None, folders: list[Path]
) -> tuple[Path | None, list[str]]:
    """The first complete copy of a part in ``folders``; or None, and the names of the missing files."""
    single = "ae.safetensors" if part == "vae" else None
    if folder_name == "transformer" and variant:
        single = OFFICIAL[variant].single
    missing = [single or f"{folder_name}/*"]
    for folder in folders:
        if single and (folder / single).is_file():
            return folder / single, []
        absent = _absent_files(folder / folder_name, part in TOKENIZERS)
        if absent == []:
            return folder / folder_name, []
        if absent:
            missing = [f"{folder_name}/{file}" for file in absent]
    return None, missing


def _absent_files(folder: Path, is_tokenizer: bool) -> list[str] | None:
    """The files that a part's folder lacks; None if it has none of them."""
    if is_tokenizer:
        return [] if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file() else None
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = sorted(set(read_json(index.read_bytes())["weight_map"].values()))
            return [name for name in shards if not (folder / name).is_file()]
        except (ValueError, LookupError, TypeError, AttributeError):
            return []  # read() says what is wrong with the index
    return [] if any(file.is_file() for file in folder.glob("*.safetensors")) else None
