"""Load published encoders strictly: every tensor of a file is used or dropped by a rule, every parameter is set."""

import importlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_sets.views import CROP_PCT, IMAGENET_MEAN, IMAGENET_STD
from encoders.architectures import ARCHITECTURES, FROM_FILE, architecture, default_input_size
from encoders.catalogue import CATALOGUE, fetch_weights, known_family
from encoders.families import Grid
from encoders.libraries import LIBRARIES, Loaded, library_of, load_from_library, one_line, timm_of_file
from encoders.reading import DEFAULTS, RELATIVE, UNSURE, Reading, open_weights, other_encoders, problems_of, undecided
from encoders.traced import TracedEncoder
from models_mae import DECODERS, with_decoder
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
        """All that its tokens of images of `size` pixels depend on, as plain data: the digest of the weights, and the
        settings, so that files of the same tensors under different families differ."""
        settings = {"family": self.record["family"], "input size": size, **self.pixels, **(self.options or {})}
        weights = digest(self.backbone.state_dict())
        return {"weights" if name == "encoder" else f"{name} weights": weights} | {
            f"{name}: {setting}": list(value) if isinstance(value, tuple) else value
            for setting, value in settings.items()
        }


class Oracle:
    """Attention of another frozen encoder, with which a probe weights its own encoder's patches (the paper's Table 6).

    Images, normalised for the probed encoder, -> [cls] attention (B,M) of the oracle's last block, mean over heads.

    The M values sum to less than 1, because [cls] also attends to itself. Images are normalised again if the two
    encoders differ in mean or std. ValueError if the oracle has no [cls] token or another patch size.
    """

    def __init__(self, oracle: Encoder, probed: Encoder, size: int, amp: torch.dtype = torch.float32):
        self.backbone, self.amp, self.record = oracle.backbone.eval().requires_grad_(False), amp, oracle.record
        self.facts = oracle.facts(size, "oracle")
        if not self.backbone.has_cls:
            raise ValueError("this encoder has no [cls] token, hence no [cls] attention")
        own, other = self.backbone.patch_size, probed.backbone.patch_size
        if own != other:
            raise ValueError(
                f"its patches have {own} pixels, the probed encoder's {other}: name an oracle with equal ones"
            )
        (mean, probed_mean), (std, probed_std) = (
            [torch.tensor(values)[:, None, None] for values in pair]
            for pair in ((oracle.mean, probed.mean), (oracle.std, probed.std))
        )
        self.factor, self.offset = probed_std / std, (probed_mean - mean) / std
        self.same = (oracle.mean, oracle.std) == (probed.mean, probed.std)

    def to(self, device: torch.device) -> "Oracle":
        self.backbone.to(device)
        self.factor, self.offset = self.factor.to(device), self.offset.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp != torch.float32):
            normalised = images if self.same else images * self.factor + self.offset
            (features,) = self.backbone(normalised, cls_attention=True).values()
        return features.cls_attention.mean(1)


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
    decoder: bool = False,
    **options,
) -> Encoder:
    """The encoder `model` with the weights that `finetune` names, or random ones if it is empty; frozen, in eval mode.

    finetune: a file, a name of CATALOGUE, a URL, or a model that its own library runs at `size` pixels.
    model: a name of ARCHITECTURES; "file": by the sizes of the tensors.
    family: a name of FAMILIES; None or "auto": see detect_family. If several families remain, which resample positions
    differently, the backbone takes only images of its positions' size.
    checkpoint_key: another encoder of the file than the family's default. offline: download nothing.
    timm_name: the timm model whose weights the file holds, and which timm runs.
    decoder: append the file's MAE decoder, as further blocks.
    mean, std, grid (rows and columns of the file's positions) and options of models_vit.VisionTransformer, such as
    num_heads: facts that tensors do not show; what nothing states is assumed and logged.
    ValueError if a tensor is missing, left over, misshapen or not finite.
    """
    if model != FROM_FILE:
        architecture(model)
    family = known_family(finetune, model, family)
    stated = {"family": family, "checkpoint_key": checkpoint_key, "timm_name": timm_name}
    stated |= {"grid": grid, "mean": mean, "std": std, "decoder": decoder}
    stated = {name: value for name, value in stated.items() if value} | options
    if not finetune:
        return random_encoder(model, stated)
    if library_of(finetune) is None:
        with main_process_first():  # the other processes use its download
            path = fetch_weights(finetune, offline)
        finetune = without_credentials(finetune)  # for messages and records
        if path is not None and not timm_name:
            reading = open_weights(path, model, family, checkpoint_key, grid=grid, **options)
            return encoder_of_file(finetune, path, reading, stated)
        if path is not None:
            load = partial(timm_of_file, path, stated.pop("checkpoint_key", None), stated.pop("timm_name"), size)
            return traced_encoder(finetune, "timm", Path(finetune).name, load, stated)
        finetune = f"timm:{finetune}"
    prefix, name = finetune.split(":", 1)
    source = f"{prefix}:{Path(name).name if Path(name).exists() else name}"
    load = partial(load_from_library, finetune, size, offline)
    return traced_encoder(finetune, LIBRARIES[prefix].package, source, load, stated)


def pixels_of(stated: dict) -> list[tuple[float, ...]]:
    return [tuple(stated.get(name, default)) for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))]


def random_encoder(model: str, stated: dict) -> Encoder:
    if needing := [n for n in ("family", "checkpoint_key", "timm_name", "grid", "decoder") if n in stated]:
        value = "" if stated[needing[0]] is True else f" {stated[needing[0]]}"
        raise ValueError(f"--{needing[0]}{value} needs weights: name them with --finetune")
    if model == FROM_FILE:
        raise ValueError(f"--model {FROM_FILE} needs weights: name them with --finetune")
    options = {name: value for name, value in stated.items() if name not in ("mean", "std")}
    options = {**architecture(model), **options}
    backbone = VisionTransformer(**options).eval().requires_grad_(False)
    record = {"model": model, "source": None, "family": None, "sha256": None}
    return Encoder(backbone, *pixels_of(stated), record, options)


def traced_encoder(finetune: str, package: str, source: str, load: Callable[[], Loaded], stated: dict) -> Encoder:
    """An encoder that its own library runs. ValueError, with the reason, if it cannot be traced."""
    if other := [name for name in stated if name not in ("mean", "std")]:
        raise ValueError(f"{finetune}: {package} sets {', '.join(other)} and runs it frozen, as it is")
    with main_process_first():  # the other processes use its download
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
        log.warning("%s does not state its preprocessing; assumed: %s", finetune, ", ".join(assumed))
    options = {"version": record["version"], "configuration": digest(loaded.configuration)}
    return Encoder(backbone.eval(), pixels.mean, pixels.std, record, options, pixels.interpolation, pixels.crop_pct)


def encoder_of_file(finetune: str, path: Path, reading: Reading, stated: dict) -> Encoder:
    """ValueError, with all reasons, if the file does not cover an encoder."""
    if problems := problems_of(reading):
        model = reading.model or "model"
        raise ValueError(f"{finetune} is not a {model} of family {reading.family}: {'; '.join(problems)}")
    for name, theirs in reading.published.items():
        if stated.get(name, theirs) != theirs:
            log.warning("%s: %s is %s, but its authors use %s", finetune, name, stated[name], theirs)
    options = {**reading.options, **({"pos_resampling": "unknown"} if reading.others else {})}
    backbone = VisionTransformer(**options)
    backbone.load_state_dict(reading.state, strict=True)
    record = {"model": reading.model, "source": Path(finetune).name, "family": reading.family, "sha256": sha256(path)}
    encoder = Encoder(backbone.eval().requires_grad_(False), *pixels_of(stated), record, options)
    log_encoder(finetune, encoder, reading, set(stated))
    if stated.get("decoder"):
        encoder = decoded(finetune, encoder, reading)
    if others := other_encoders(reading):
        chosen = finetune in CATALOGUE or {"family", "checkpoint_key"} & stated.keys()
        level = logging.INFO if chosen else logging.WARNING
        log.log(level, "%s holds other encoders, too: %s", finetune, ", ".join(others))
    return encoder


def decoded(finetune: str, encoder: Encoder, reading: Reading) -> Encoder:
    """The encoder, followed by the decoder of its file."""
    heads = DECODERS.get(reading.model, DECODERS["vit_base_patch16"])["decoder_num_heads"]
    try:
        backbone = with_decoder(encoder.backbone, reading.weights, heads)
    except ValueError as error:
        raise ValueError(f"--decoder: {finetune}: {error}") from error
    first, width = backbone.encoder_depth, backbone.widths[-1]
    decoder = {"first_block": first, "depth": backbone.depth - first, "width": width, "heads": heads}
    return encoder._replace(backbone=backbone, record={**encoder.record, "decoder": decoder})


def input_size(encoder: Encoder, stated: int | None) -> int:
    """Pixels of the square images for an encoder: as stated, of its architecture, or those of its positions."""
    backbone, model = encoder.backbone, encoder.record["model"]
    if isinstance(backbone, TracedEncoder):
        return backbone.size
    rows, columns = backbone.grid_size
    size = stated or (default_input_size(model) if model in ARCHITECTURES else rows * backbone.patch_size)
    if size % backbone.patch_size or (not stated and model not in ARCHITECTURES and rows != columns):
        given = f"--input_size {stated}" if stated else "--input_size"
        raise ValueError(f"{given}: {model} needs a multiple of its patch size {backbone.patch_size}")
    return size


def log_encoder(finetune: str, encoder: Encoder, reading: Reading, stated: set[str]) -> None:
    """Log the facts that tensors do not show; those that nothing states, as a warning and in the record."""
    options, backbone = {**DEFAULTS, **reading.options}, encoder.backbone
    eps = NORMS[options["norm_layer"]].keywords["eps"]
    facts = {"num_heads": f"{backbone.num_heads} heads"}
    facts["timm_name"] = f"{options['norm_order']}-norm blocks, gelu, eps {eps:g}"
    for name in ("mean", "std"):
        facts[name] = f"{name} {' '.join(f'{value:.4g}' for value in getattr(encoder, name))}"
    if "pos_embed" in reading.state or RELATIVE in reading.state:
        facts["grid"] = f"positions for {backbone.grid_size[0]} x {backbone.grid_size[1]} patches"
    described = f"{reading.model}, family {reading.family} {reading.reason or 'by assumption'}"
    described += f", {len(reading.state)} tensors): {'; '.join(facts.values())}"
    log.info("loaded %s (%s, resampled by rule %s", finetune, described, backbone.pos_resampling)
    if reading.reason in UNSURE:
        if RELATIVE in reading.state:
            stated = {*stated, "timm_name"}  # not a plain ViT of timm
        assumed = [f"{fact} (--{name})" for name, fact in facts.items() if name not in stated]
        encoder.record["assumed"] = assumed
        hints = [undecided(reading)] * bool(reading.others)
        if isinstance(arch := reading.content.leaves.get("arch"), str):
            hints.append(f"the file names the architecture {arch}, which --timm_name may know")
        log.warning("%s does not show these facts, so they are assumed: %s", finetune, "; ".join(assumed + hints))
