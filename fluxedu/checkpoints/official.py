"""The official weights: where they are on this machine, and how to get what is missing.

    find("dev")                                   in the Hugging Face cache
    find("black-forest-labs/FLUX.1-dev")          the same
    find("path/to/a/folder")                      as on the hub, or with flux1-dev.safetensors and ae.safetensors
    find("path/to/flux1-dev.safetensors").parts   {"transformer": path, "vae": path, ...}

Nothing is downloaded here. The encoders, the tokenizers and the autoencoder are the same files in every repository of
the family, so they are taken from whichever is in the cache.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from fluxedu.checkpoints.configs import fields_from_shapes, kind_name, recognise
from fluxedu.checkpoints.contents import PARTS, stored_networks
from fluxedu.checkpoints.headers import gguf_error, read_entries, variant_of_file, weights_in
from fluxedu.checkpoints.reading import config_of, open_model, read
from fluxedu.errors import CheckpointError, check_keys, describe
from fluxedu.files import check_path, read_json_file
from fluxedu.models import FLUX2_MODELS, Flux2Config, FluxConfig


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
_BFL2 = "black-forest-labs/FLUX.2"
#: every variant of FLUX.2 that can be loaded by name; klein is distilled to four steps, klein-base is not
OFFICIAL_FLUX2 = {
    "flux2-dev": Repository(f"{_BFL2}-dev", "flux2-dev.safetensors", "FLUX [dev] Non-Commercial License"),
    "klein": Repository(f"{_BFL2}-klein-4B", "flux-2-klein-4b.safetensors", "Apache License 2.0"),
    "klein-9b": Repository(f"{_BFL2}-klein-9B", "flux-2-klein-9b.safetensors", "FLUX Non-Commercial License"),
    "klein-base": Repository(f"{_BFL2}-klein-base-4B", "flux-2-klein-base-4b.safetensors", "Apache License 2.0"),
    "klein-base-9b": Repository(
        f"{_BFL2}-klein-base-9B", "flux-2-klein-base-9b.safetensors", "FLUX Non-Commercial License"
    ),
}
FLUX2_PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
TOKENIZERS = ("tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class Official:
    """The files of a pipeline: the path of each part, the variant if the name reveals it, the scheduler's file, and for
    FLUX.2 ``model_index.json``.

    A path is a folder, a file or an index of shards; a file with several networks is the path of several parts.
    """

    parts: dict[str, Path]
    variant: str | None
    scheduler: Path | None = None
    index: Path | None = None


def find(
    name: str | Path, transformer: str = "transformer", variant: str | None = None, revision: str | None = None
) -> Official:
    """The files of ``name``: a variant of FLUX.1, a repository's id, a folder, or the transformer's file.

    ``transformer`` is the name of the transformer's folder; ``variant`` is diffusers' name for a set of files, such as
    fp16; ``revision`` is a branch, tag or commit of a repository. Files directly in a folder, or beside the
    transformer's file, are recognised by the names of their tensors. Encoders, autoencoder and tokenizers that are not
    there are taken from another repository of the family in the cache.

    Raises CheckpointError: one sentence with the missing files and the command that downloads them, or with the files
    between which it cannot choose.
    """
    if not isinstance(name, (str, Path)) or not isinstance(transformer, str) or "\0" in f"{name}{transformer}":
        raise CheckpointError(
            f"a model must be a name or a path, not {describe(name)} (transformer folder {describe(transformer)})."
        )
    for option, value in (("variant", variant), ("revision", revision)):
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{option} must be a text, such as 'fp16' or 'main', not {describe(value)}.")
    path = check_path(name)
    known = _variant_of(str(name))
    if revision is not None and path.exists():
        raise CheckpointError(f"revision= is for repositories in the Hugging Face cache, and {str(name)!r} is a path.")
    parts: dict[str, Path] = {}
    if path.is_file():
        folders, parts = [path.parent], dict.fromkeys(_parts_of(path), path)
        if "transformer" in parts and _is_flux2(path):
            raise flux2_error(path)
        if "transformer" not in parts:
            raise CheckpointError(
                f"{path.name} holds no transformer of FLUX.1; pass a folder, or a transformer's file."
            )
    elif path.is_dir():
        folders = [path]
    else:
        cached = snapshot(OFFICIAL[known].id if known else str(name), revision)
        if cached is None and known is None:
            at = f" at revision {revision!r}" if revision else ""
            raise CheckpointError(
                f"there is no model {describe(str(name))} on this machine, neither file nor folder nor in the Hugging "
                f"Face cache{at}; use nano, {', '.join(OFFICIAL)} or a path."
            )
        folders = [cached] if cached else []
    missing, faults = [], []  # files that are not there, and why others cannot be used
    for part in (*PARTS, *TOKENIZERS):
        if part in parts:
            continue
        search = _Search(part, transformer if part == "transformer" else part, known, variant, parts)
        found = next((file for folder in folders if (file := search.look_in(folder))), None)
        if found is None and part != "transformer":
            found = next((file for folder in _family() if (file := search.look_in(folder, own=False))), None)
        if found is None:
            missing += search.missing
            faults += search.faults
        else:
            if part == transformer == "transformer" and _is_flux2(found):  # not in a folder that was named
                raise flux2_error(found)
            parts[part] = found
            if part == "transformer" and found.is_file():  # which may hold the other parts too
                parts |= dict.fromkeys(_parts_of(found), found)
    if faults:
        raise faults[0]
    if missing:
        official = OFFICIAL[known or "dev"]
        repository = official.id if known or path.exists() else str(name)
        terms = (
            f" (its licence is the {official.licence}; the hub allows the download after `hf auth login` and accepting "
            f"the terms at https://huggingface.co/{official.id})"
        )
        options = " ".join(f'--include "{file}"' for file in missing) + (f" --revision {revision}" if revision else "")
        raise CheckpointError(
            f"{str(name)!r} lacks {', '.join(missing)}; get {'it' if len(missing) == 1 else 'them'} with "
            f"`hf download {repository} {options}`{terms if repository == official.id else ''}."
        )
    if variant is not None and all(variant_of_file(path) != variant for path in parts.values()):
        raise CheckpointError(
            f"{str(name)!r} has no files of the variant {describe(variant)}, as in model.fp16.safetensors."
        )
    schedulers = [] if path.is_file() else [folder / "scheduler" / "scheduler_config.json" for folder in folders]
    return Official(parts, known, next((file for file in schedulers if file.is_file()), None))


def find_flux2(name: str | Path, revision: str | None = None) -> Official | None:
    """The files of a FLUX.2 pipeline: one of ``OFFICIAL_FLUX2``, a repository's id, a folder as on the hub, or the
    transformer's file; what is not beside that file is taken from a repository in the cache.

    None if it is something else than FLUX.2. Raises CheckpointError, with the command that downloads what is missing.
    """
    if not isinstance(name, (str, Path)) or not isinstance(revision, (str, type(None))) or "\0" in str(name):
        return None  # find() says what is wrong
    name = "klein" if name == "klein-4b" else name
    known = next((v for v, repository in OFFICIAL_FLUX2.items() if str(name) in (v, repository.id)), None)
    path = check_path(name)
    if path.is_file():
        is_flux2 = revision is None and "transformer" in _parts_of(path) and _is_flux2(path)
        return _find_beside(path) if is_flux2 else None
    repository = OFFICIAL_FLUX2[known].id if known else str(name)
    folder = path if known is None and path.is_dir() else None
    if folder is None and not path.exists():
        folder = snapshot(repository, revision)
    if known is None and (folder is None or not _is_flux2_folder(folder)):
        return None
    if revision is not None and folder is path:
        raise CheckpointError(f"revision= is for repositories in the Hugging Face cache, and {str(name)!r} is a path.")
    parts = {} if folder is None else {part: folder / part for part in FLUX2_PARTS}
    missing = [part for part in FLUX2_PARTS if part not in parts or not _has_files(parts[part])]
    if missing:
        raise _missing_of_flux2(name, missing, known, revision)
    return Official(parts, known, index=folder / "model_index.json")


def _find_beside(file: Path) -> Official:
    """The pipeline of a transformer's file of FLUX.2, with the other parts from its folder or from the cache."""
    config = config_of(read(file, "transformer"))
    known = next((variant for variant, official in OFFICIAL_FLUX2.items() if file.name == official.single), None)
    parts = {"transformer": file}
    for folder in (file.parent, *filter(None, (snapshot(official.id) for official in OFFICIAL_FLUX2.values()))):
        if _has_files(folder / "vae"):
            parts.setdefault("vae", folder / "vae")
        texts = {part: folder / part for part in ("text_encoder", "tokenizer")}
        if all(map(_has_files, texts.values())) and _text_width(folder) == config.context_in_dim:
            parts = texts | parts  # of several that fit, the first
    missing = [part for part in FLUX2_PARTS if part not in parts]
    if missing:
        fitting = (name for name in OFFICIAL_FLUX2 if FLUX2_MODELS[name].flux.context_in_dim == config.context_in_dim)
        raise _missing_of_flux2(file, missing, known or next(fitting, None), None)
    return Official(parts, known)


def _text_width(folder: Path) -> int | None:
    """The width of the text tokens that a repository's language model gives: three hidden states side by side."""
    file = folder / "text_encoder" / "config.json"
    values = check_keys(f"{file}", read_json_file(file) if file.is_file() else {}, error=CheckpointError)
    width = check_keys("text_config", values.get("text_config", values), error=CheckpointError).get("hidden_size")
    return 3 * width if isinstance(width, int) else None


def _missing_of_flux2(name: str | Path, missing: list[str], known: str | None, revision: str | None) -> CheckpointError:
    """Which folders are missing, and the command that downloads them."""
    source, files = OFFICIAL_FLUX2[known or "klein"], [f"{part}/*" for part in missing]
    terms = f" (its licence is the {source.licence}; see https://huggingface.co/{source.id})"
    options = " ".join(f'--include "{file}"' for file in (*files, "model_index.json"))
    options += f" --revision {revision}" if revision else ""
    return CheckpointError(
        f"{str(name)!r} lacks {', '.join(files)}; get them with `hf download {source.id} {options}`{terms}."
    )


def _is_flux2_folder(folder: Path) -> bool:
    """Whether a folder's index, or its transformer's configuration, is that of FLUX.2."""
    for file in (folder / "model_index.json", folder / "transformer" / "config.json"):
        try:
            if str(read_json_file(file)["_class_name"]).startswith("Flux2"):
                return True
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return False


def _has_files(folder: Path) -> bool:
    """Whether a part's folder holds a tokenizer, or weights of which no shard is absent."""
    if folder.name == "tokenizer":
        return any(folder.glob("tokenizer*.json"))
    return any(folder.glob("*.safetensors*")) and not _absent_shards(folder, None)[0]


def snapshot(repository: str, revision: str | None = None) -> Path | None:
    """The folder of a repository in the Hugging Face cache; None if nothing of it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _family() -> Iterator[Path]:
    """The repositories of FLUX.1 in the cache: the official ones first, then others that hold its pipeline."""
    from huggingface_hub import constants

    official = [repository.id for repository in OFFICIAL.values()]
    cached = [path.name for path in sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))]
    others = [name.removeprefix("models--").replace("--", "/") for name in cached]
    yield from (folder for name in official if (folder := snapshot(name)))
    for name in others:
        if name not in official and (folder := snapshot(name)) and _is_of_the_family(folder):
            yield folder


def _is_of_the_family(folder: Path) -> bool:
    """Whether a repository names a pipeline of FLUX.1, or holds a transformer of it."""
    index = folder / "model_index.json"
    if index.is_file():
        try:
            return re.match(r"Flux(?!2)", read_json_file(index)["_class_name"]) is not None
        except (ValueError, LookupError, TypeError):
            return False
    found = _Search("transformer", "transformer", None, None, {}).look_in(folder, own=False)
    return found is not None and not _is_flux2(found)


def _is_flux2(transformer: Path) -> bool:
    """Whether this file or folder holds a transformer of FLUX.2."""
    recognised = recognise(read(transformer, "transformer").shapes)
    return recognised is not None and recognised[0] is Flux2Config


def flux2_error(transformer: Path) -> CheckpointError:
    """How a FLUX.2 is loaded, for one that is opened as if it were FLUX.1."""
    return CheckpointError(
        f"{transformer.name} is FLUX.2, which is loaded by the path of this file, or from a folder as on the hub, with "
        f"{', '.join(FLUX2_PARTS)}."
    )


def _variant_of(name: str) -> str | None:
    """``dev`` for ``dev``, its repository's id, its file, or a folder called ``FLUX.1-dev`` or holding that file."""
    if name in OFFICIAL:
        return name
    path = Path(name)
    for variant, repository in OFFICIAL.items():
        in_cache = f"models--{repository.id.replace('/', '--')}" in path.parts
        has_its_name = name == repository.id or path.name in (repository.single, repository.id.split("/")[1])
        if in_cache or has_its_name:
            return variant
    held = [variant for variant, repository in OFFICIAL.items() if (path / repository.single).is_file()]
    return held[0] if len(held) == 1 else None


def _parts_of(path: Path) -> Collection[str]:
    """The networks that a file or an index of shards holds."""
    return stored_networks(read_entries(path)[0], path.name)


@dataclass
class _Search:
    """The search for one part in a folder; ``missing`` has the names of the files that are not there."""

    part: str
    folder_name: str
    known: str | None  # the variant of FLUX.1
    variant: str | None  # of the files
    parts: dict[str, Path]  # what has been found already, the transformer first

    def __post_init__(self):
        self.faults: list[CheckpointError] = []  # why files that hold this part cannot be used
        self.single = "ae.safetensors" if self.part == "vae" else None
        if self.folder_name == "transformer" and self.known:
            self.single = OFFICIAL[self.known].single
        self.missing = [self.single or f"{self.folder_name}/*"]

    def look_in(self, folder: Path, own: bool = True) -> Path | None:
        """The part's path in ``folder``: a file as in the official repository, a subfolder, or a file at its top.

        Raises CheckpointError for a damaged file, or several to choose from; unless the folder is not the user's
        ``own``.
        """
        try:
            return self._look_in(folder)
        except CheckpointError:
            if own:
                raise
            return None

    def _look_in(self, folder: Path) -> Path | None:
        if self.single and (folder / self.single).is_file() and self.part in _parts_of(folder / self.single):
            return folder / self.single
        subfolder = folder / self.folder_name
        if self.part in TOKENIZERS:
            return subfolder if any((subfolder / name).is_file() for name in ("tokenizer.json", "vocab.json")) else None
        if any(subfolder.glob("*.safetensors*")):
            absent, path = _absent_shards(subfolder, self.variant)
            if not absent:
                return path
            self.missing = [f"{self.folder_name}/{file}" for file in absent]
        return self._at_the_top(folder)

    def _at_the_top(self, folder: Path) -> Path | None:
        """A file or an index directly in ``folder`` that holds this part and fits the transformer.

        Of several, the files of the variant come first, then the largest encoder (fp16 before fp8). Raises
        CheckpointError if that leaves several.
        """
        files = [file for end in ("safetensors", "sft", "safetensors.index*.json") for file in folder.glob(f"*.{end}")]
        files = [f for f in sorted(files) if f.is_file() and not re.search(r"-\d{5}-of-\d{5}", f.name)]
        fitting = {path: size for path in files if (size := self._size_if_fitting(path))}
        found = [path for path in fitting if variant_of_file(path) == self.variant] or list(fitting)
        if self.part != "transformer":
            found = [path for path in found if fitting[path] == max(fitting[path] for path in found)]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(
                f"{folder} holds {kind_name(PARTS[self.part][0])} in several files, {names}; "
                f"{'pass the path of one' if self.part == 'transformer' else 'leave one of them there'}."
            )
        if not found:
            gguf = [*sorted((folder / self.folder_name).glob("*.gguf")), *sorted(folder.glob("*.gguf"))]
            self.faults += [gguf_error(path) for path in gguf]
        return found[0] if found else None

    def _size_if_fitting(self, path: Path) -> int:
        """The bytes of this part in a file; 0 if it is not there, cannot be opened, or does not fit the transformer."""
        try:
            if self.part not in _parts_of(path):
                return 0
            module, tensors = open_model(path, part=self.part)
            if self.part != "transformer" and "transformer" in self.parts:
                flux = fields_from_shapes(FluxConfig, read(self.parts["transformer"], "transformer").shapes)
                field, expected = _WIDTHS[self.part]
                if getattr(module.config, field) != expected(flux):
                    return 0
        except CheckpointError as error:
            self.faults.append(error)
            return 0
        return sum(entry.nbytes for entry in tensors.source.entries.values())


#: the field of a network's configuration that must fit the transformer, and the value that it must have
_WIDTHS = {
    "vae": ("z_channels", lambda flux: flux["out_channels"] // 4),
    "text_encoder": ("hidden_size", lambda flux: flux["vec_in_dim"]),
    "text_encoder_2": ("d_model", lambda flux: flux["context_in_dim"]),
}


def _absent_shards(folder: Path, variant: str | None) -> tuple[list[str], Path]:
    """The shards that a folder lacks, and its path: of the variant's files where it has them."""
    try:
        source = weights_in(folder, variant)
    except CheckpointError:
        variant = None
    try:
        source = weights_in(folder, variant)
        shards = set(read_json_file(source)["weight_map"].values()) if source.suffix == ".json" else {source.name}
        absent = sorted(name for name in shards if not (folder / name).is_file())
    except (ValueError, LookupError, TypeError, AttributeError):
        return [], folder  # read() says what is wrong
    return absent, source if variant else folder
