"""Load published encoders strictly: every tensor of a file is used or dropped by a rule, every parameter is set."""

import importlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_sets.views import CROP_PCT, IMAGENET_MEAN, IMAGENET_STD
from encoders.architectures import ARCHITECTURES, FROM_FILE, architecture, default_input_size
from encoders.catalogue import fetch_weights, known_family, named_family
from encoders.contents import weights_of, without_wrappers
from encoders.detect import UNSURE, Detected, detect_family, obstacle, other_encoders, where_encoders_are
from encoders.families import FAMILIES, Grid
from encoders.libraries import LIBRARIES, Loaded, library_of, load_from_library, one_line, timm_of_file
from encoders.reading import DEFAULTS, RELATIVE, Reading, problems_of, read_as
from encoders.traced import TracedEncoder
from models_vit import NORMS, Backbone, VisionTransformer
from util.distributed import main_process_first
from util.files import digest, sha256, without_credentials
from util.progress import log
from util.tensor_files import load_plain_or_safetensors, safetensors_metadata, save_encoder  # noqa: F401


class Encoder(NamedTuple):
    """A loaded backbone and where its weights come from."""

    backbone: Backbone
    mean: tuple[float, ...]
    std: tuple[float, ...]
    record: dict  # model, source, family, sha256: for args.json and results
    options: dict | None = None  # of the backbone
    interpolation: str = "bicubic"
    crop_pct: float | None = CROP_PCT

    @property
    def pixels(self) -> dict[str, Any]:
        """Its preprocessing, as options of data_sets.views.eval_transform."""
        return {name: getattr(self, name) for name in ("mean", "std", "interpolation", "crop_pct")}

    def facts(self, size: int, name: str = "encoder") -> dict[str, Any]:
        """What its tokens of images of `size` pixels depend on, as plain data: the weights, and all that they do not
        show, so that files of the same tensors under different families differ."""
        settings = {"family": self.record["family"], "input size": size, **self.pixels, **(self.options or {})}
        weights = digest(self.backbone.state_dict())
        return {"weights" if name == "encoder" else f"{name} weights": weights} | {
            f"{name}: {setting}": list(value) if isinstance(value, tuple) else value
            for setting, value in settings.items()
        }


def load_encoder(
    finetune: str,
    model: str = FROM_FILE,
    family: str | None = None,
    checkpoint_key: str | None = None,
    offline: bool = False,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    grid: Grid | None = None,
    timm_name: str | None = None,
    size: int | None = None,
    **options,
) -> Encoder:
    """The encoder `model` with the weights that `finetune` names, or random ones where it is empty.

    finetune: a file (.pth or .safetensors), a name of CATALOGUE, a URL, or a model that its own library runs at `size`
    pixels (encoders.libraries; the name of a timm model, too): it needs no other option.
    model: a name of ARCHITECTURES, or "file" to take the sizes from the tensors.
    family: a name of FAMILIES; None or "auto": see detect_family. Where that leaves several, which differ in how they
    resample positions, the backbone takes no images of another size than its table's. checkpoint_key: another encoder
    of the file than the family's default (see Family). offline: download nothing.
    mean, std, grid (rows and columns of the file's positions), and options of models_vit.VisionTransformer, such as
    num_heads: what tensors do not show. What remains open is logged with the value assumed. timm_name: the timm model
    whose weights the file holds, which timm runs.
    The backbone is in evaluation mode and frozen. Raises ValueError where a tensor is missing, left over, misshapen or
    not finite.
    """
    if model != FROM_FILE:
        architecture(model)
    stated = {"family": named_family(family), "timm_name": timm_name, "grid": grid, "mean": mean, "std": std}
    stated = {name: value for name, value in stated.items() if value} | options
    if not finetune:
        return random_encoder(model, stated)
    if library_of(finetune) is None:
        known_family(finetune, model, family)  # before a download that could not be used
        with main_process_first():  # the other processes find its download
            path = fetch_weights(finetune, offline)
        finetune = without_credentials(finetune)  # for messages and records
        if path is not None and not timm_name:
            pixels = [tuple(own or default) for own, default in ((mean, IMAGENET_MEAN), (std, IMAGENET_STD))]
            opened = open_weights(finetune, path, model, family, checkpoint_key, grid, **options)
            return encoder_of_file(finetune, path, opened, pixels, stated)
        if path is not None:

            def load() -> Loaded:
                content = without_wrappers(load_plain_or_safetensors(path))
                weights = weights_of(content, FAMILIES["timm"], checkpoint_key or None)
                return timm_of_file(weights or {}, timm_name, size)

            del stated["timm_name"]
            return traced_encoder(finetune, "timm", Path(finetune).name, load, stated)
        finetune = f"timm:{finetune}"
    if checkpoint_key:
        stated["checkpoint_key"] = checkpoint_key
    prefix, name = finetune.split(":", 1)
    source = f"{prefix}:{Path(name).name if Path(name).exists() else name}"
    load = partial(load_from_library, finetune, size, offline)
    return traced_encoder(finetune, LIBRARIES[prefix].package, source, load, stated)


def random_encoder(model: str, stated: dict) -> Encoder:
    if needing := [name for name in ("family", "timm_name", "grid") if name in stated]:
        raise ValueError(f"--{needing[0]} {stated[needing[0]]} needs weights: name them with --finetune")
    if model == FROM_FILE:
        raise ValueError(f"--model {FROM_FILE} needs weights: name them with --finetune")
    pixels = [tuple(stated.pop(name, default)) for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))]
    options = {**architecture(model), **stated}
    backbone = VisionTransformer(**options).eval().requires_grad_(False)
    return Encoder(backbone, *pixels, {"model": model, "source": None, "family": None, "sha256": None}, options)


def traced_encoder(finetune: str, package: str, source: str, load: Callable[[], Loaded], stated: dict) -> Encoder:
    """An encoder that its own library runs. ValueError, with the reason, if it cannot be traced."""
    if other := [name for name in stated if name not in ("mean", "std")]:
        raise ValueError(f"{finetune}: {package} sets {', '.join(other)} and runs it frozen, as it is")
    with main_process_first():  # the other processes find its download
        loaded = load()
    try:
        backbone = TracedEncoder(loaded)
    except Exception as error:  # libraries raise errors of all kinds
        raise ValueError(f"{finetune} cannot be traced: {one_line(error)}") from error
    pixels = loaded.pixels._replace(**{name: tuple(value) for name, value in stated.items()})
    prefix = {"cls": int(backbone.has_cls), "registers": backbone.num_registers}
    record = {
        "model": type(loaded.model).__name__,
        "source": source,
        "family": package,
        "version": importlib.import_module(package).__version__,
        "revision": loaded.revision,
        "sha256": digest(backbone.state_dict()),
        "traced": backbone.traced,
        "tokens": {**prefix, "patches": loaded.size // backbone.patch_size},
        "preprocessing": {"size": loaded.size, **pixels._asdict()},
    }
    log.info("loaded %s", "; ".join(f"{name} {value}" for name, value in record.items() if name != "sha256"))
    if assumed := [f"{name} (--{name})" for name in loaded.assumed if name not in stated]:
        record["assumed"] = assumed
        log.warning("%s does not state its preprocessing, so these are assumed: %s", finetune, ", ".join(assumed))
    options = {"version": record["version"], "configuration": digest(loaded.configuration)}
    return Encoder(backbone.eval(), pixels.mean, pixels.std, record, options, pixels.interpolation, pixels.crop_pct)


class Opened(NamedTuple):
    """A weight file, and how it is read."""

    content: dict
    detected: Detected
    reading: Reading
    chosen: bool  # whether the caller says which encoder of the file is meant


def open_weights(
    finetune: str,
    path: Path,
    model: str = FROM_FILE,
    family: str | None = None,
    checkpoint_key: str | None = None,
    grid: Grid | None = None,
    **options,
) -> Opened:
    """A file read as its family; whether the reading covers an encoder is not checked. Arguments: see load_encoder."""
    checkpoint_key = checkpoint_key or None  # "" leaves one of several encoders without
    family = known_family(finetune, model, family)
    content = without_wrappers(load_plain_or_safetensors(path))
    if family is None:
        detected = detect_family(path, content, checkpoint_key, grid, **options)
    else:
        detected = Detected(family, reason="" if family == "timm" else "as stated")
        written = safetensors_metadata(path).get("family") if path.suffix == ".safetensors" else None
        if written not in (None, family):
            log.warning("%s states family %s; it is read as %s because of --family", path, written, family)
    reading = read_as(content, detected.family, model, checkpoint_key, grid, **options)
    return Opened(content, detected, reading, bool(family or checkpoint_key))


def encoder_of_file(finetune: str, path: Path, opened: Opened, pixels: list[tuple], stated: dict) -> Encoder:
    """ValueError, with all reasons, where the file does not cover an encoder."""
    content, detected, reading, chosen = opened
    if problems := problems_of(reading):
        if "patch_embed.proj.weight" not in reading.state:
            problems += filter(None, [obstacle(content) or where_encoders_are(content)])
        model = reading.model or "model"
        raise ValueError(f"{finetune} is not a {model} of family {detected.family}: {'; '.join(problems)}")
    for name, theirs in reading.published.items():
        if stated.get(name, theirs) != theirs:
            log.warning("%s: %s = %s, where its authors have %s", finetune, name, stated[name], theirs)
    options = {**reading.options, **({"pos_resampling": "unknown"} if detected.others else {})}
    backbone = VisionTransformer(**options)
    backbone.load_state_dict(reading.state, strict=True)
    record = {"model": reading.model, "source": Path(finetune).name, "family": detected.family, "sha256": sha256(path)}
    encoder = Encoder(backbone.eval().requires_grad_(False), *pixels, record, options)
    log_encoder(finetune, encoder, opened, set(stated))
    if others := other_encoders(content, reading):
        level = logging.INFO if chosen else logging.WARNING
        log.log(level, "%s holds other encoders, too: %s", finetune, ", ".join(others))
    return encoder


def input_size(encoder: Encoder, stated: int | None) -> int:
    """Pixels of the square images for an encoder: as stated, of its architecture, or those of its positions."""
    backbone, model = encoder.backbone, encoder.record["model"]
    if isinstance(backbone, TracedEncoder):
        return backbone.size
    rows, columns = backbone.grid_size
    size = stated or (default_input_size(model) if model in ARCHITECTURES else rows * backbone.patch_size)
    if size % backbone.patch_size or (not stated and model not in ARCHITECTURES and rows != columns):
        raise ValueError(
            f"--input_size{f' {stated}' * bool(stated)}: {model} needs a multiple of its patch size "
            f"{backbone.patch_size}"
        )
    return size


# ---------------------------------------------------------------------------------------------------------------------
# what a file does not state
# ---------------------------------------------------------------------------------------------------------------------


def log_encoder(finetune: str, encoder: Encoder, opened: Opened, stated: set[str]) -> None:
    """Log what the tokens depend on and tensors do not show; what nothing states, as a warning and in the record."""
    content, detected, reading, _ = opened
    arch = content["arch"] if isinstance(content.get("arch"), str) else None  # the file names it

    def numbers(values: Sequence[float]) -> str:
        return " ".join(f"{value:.4g}" for value in values)

    options, backbone = {**DEFAULTS, **reading.options}, encoder.backbone
    eps = NORMS[options["norm_layer"]].keywords["eps"]
    facts = {
        "num_heads": f"{backbone.num_heads} heads",
        "timm_name": f"{options['norm_order']}-norm blocks, {options['activation']}, eps {eps:g}",
        "mean": f"mean {numbers(encoder.mean)}",
        "std": f"std {numbers(encoder.std)}",
    }
    if "pos_embed" in reading.state or RELATIVE in reading.state:
        facts["grid"] = f"positions for {backbone.grid_size[0]} x {backbone.grid_size[1]} patches"
    log.info(
        "loaded %s (%s, family %s %s, %d tensors): %s, resampled by rule %s",
        finetune,
        reading.model,
        detected.family,
        detected.reason or "by assumption",
        len(reading.state),
        "; ".join(facts.values()),
        backbone.pos_resampling,
    )
    if detected.reason in UNSURE:
        if RELATIVE in reading.state:
            stated = {*stated, "timm_name"}  # not a plain ViT of timm
        assumed = [f"{fact} (--{name})" for name, fact in facts.items() if name not in stated]
        encoder.record["assumed"] = assumed
        hints = [undecided_family(detected)] * bool(detected.others)
        hints += [f"the file names the architecture {arch}, which --timm_name may know"] * bool(arch)
        log.warning("%s does not state, so these are assumed: %s", finetune, "; ".join(assumed + hints))


def undecided_family(detected: Detected) -> str:
    names = [detected.family, *detected.others]
    rules = ", ".join(f"{name}: {resampling(name)}" for name in names)
    return (
        f"can be of the families {', '.join(names)}, the same encoder at the size of its positions: other input sizes "
        f"need --family, which resample positions differently ({rules})"
    )


def resampling(family: str) -> str:
    return FAMILIES[family].vit.get("pos_resampling", "antialias")
