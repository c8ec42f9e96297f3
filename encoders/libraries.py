"""Encoders that their own library loads and runs: transformers (hf:), timm (timm:) and open_clip (open_clip:).

Weights come from safetensors files alone, and no code from a model's repository is run. Downloads are kept in Hugging
Face's cache, in a folder named after the commit. Importable without torch.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_sets.views import CROP_PCT, IMAGENET_MEAN, IMAGENET_STD
from util.choices import nearest
from util.lazy import lazy

open_clip, timm, torch = map(lazy, ("open_clip", "timm", "torch"))
if TYPE_CHECKING:
    from torch import Tensor, nn


class Pixels(NamedTuple):
    """Preprocessing, as data_sets.views.eval_transform takes it."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float | None = CROP_PCT


class Loaded(NamedTuple):
    """A model of a library, what runs it on images (B,3,size,size), and its preprocessing."""

    model: nn.Module
    configuration: str  # determines its computation, with the weights
    run: Callable[[nn.Module, Tensor], Any]
    size: int
    pixels: Pixels
    revision: str | None  # commit of the repository; None for local files
    outputs: Callable[[Any], dict[str, Tensor]] = lambda output: {}  # pooled vectors (B,E) in the model's output
    assumed: tuple[str, ...] = ()  # parts of the preprocessing that nothing states
    missing: tuple[str, ...] = ()  # tensors that the file lacks


class Library(NamedTuple):
    package: str
    names: str  # what may follow the prefix
    load: Callable[[str, int | None, bool], Loaded]  # name, input size, offline


def library_of(finetune: str) -> str | None:
    """The prefix of LIBRARIES that a name of weights begins with; None for other names."""
    prefix = finetune.partition(":")[0]
    return prefix if prefix in LIBRARIES and ":" in finetune else None


def load_from_library(finetune: str, size: int | None = None, offline: bool = False) -> Loaded:
    """The model that `finetune` names by a prefix and a name of LIBRARIES.

    ValueError, in one line, if the library is not installed, has no such model, or the weights are not safetensors.
    """
    library, name = LIBRARIES[library_of(finetune)], finetune.partition(":")[2]
    if not name:
        raise ValueError(f"{finetune} names no model: write {' or '.join(library.names.split(', '))}")
    try:
        importlib.import_module(library.package)
    except ImportError as error:
        raise ValueError(
            f"{finetune} needs {library.package}, which cannot be imported ({error}): "
            "pip install -r requirements-encoders.txt"
        ) from error
    try:
        return library.load(name, size, offline)
    except Exception as error:  # libraries raise errors of all kinds
        raise ValueError(f"{finetune}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def fetched(repository: str, offline: bool, weights: str = "model*.safetensors") -> tuple[Path, str | None]:
    """The folder with a model's configuration and weights; the commit, if they are downloaded.

    repository: ORG/NAME, ORG/NAME@REVISION, or a folder. weights: a pattern of the files to download. ValueError if
    there are no safetensors.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder, commit = Path(repository).expanduser(), None
    if not folder.is_dir():
        if folder.exists() or repository.startswith((".", "/", "~")):
            raise ValueError("this is not a folder")
        name, _, revision = repository.partition("@")
        kept = {"allow_patterns": ["*.json", weights], "local_files_only": offline}
        try:
            folder = Path(snapshot_download(name, revision=revision or None, **kept))
        except LocalEntryNotFoundError as error:
            reason = "--offline" if offline else "the hub cannot be reached"
            raise ValueError(
                f"{reason}, and {repository} is neither a folder nor in the cache: get it with: hf download {name}"
            ) from error
        commit = folder.name
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"there are no *.safetensors in {repository}; pickled weights are not loaded")
    return folder, commit


# ---- transformers


def load_hf(name: str, size: int | None, offline: bool) -> Loaded:
    """A model of transformers; of models of images and text, the part for images."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # no advice
    logging.disable_progress_bar()
    folder, commit = fetched(name, offline)
    safe = {"trust_remote_code": False, "local_files_only": True}
    config = AutoConfig.from_pretrained(folder, **safe)
    size, pixels, assumed = hf_pixels(folder, getattr(config, "vision_config", config), size)
    for option, value in {"mask_ratio": 0.0, "crop_size": size}.items():  # ViTMAE shows all patches; V-JEPA 2's grid
        if hasattr(config, option):
            setattr(config, option, value)
    safe |= {"use_safetensors": True, "dtype": torch.float32, "attn_implementation": "sdpa"}
    try:
        model, report = AutoModel.from_pretrained(folder, config=config, output_loading_info=True, **safe)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        problem = "it does not use torch's scaled_dot_product_attention, which is traced"
        raise ValueError(f"a model of type {config.model_type} cannot be traced: {problem}") from error
    missing = sorted(report["missing_keys"])
    for key in missing:  # not random: the digest of the weights covers them
        model.state_dict()[key].zero_()
    missing = tuple(key.removeprefix("vision_model.") for key in missing)
    projection, model = getattr(model, "visual_projection", None), getattr(model, "vision_model", model)

    def outputs(output: Any) -> dict[str, Tensor]:
        heads = {"map": hasattr(model, "head") and (lambda pooled: pooled), "projected": projection}
        return {name: head(output.pooler_output) for name, head in heads.items() if head and not missing}

    configuration = config.to_json_string(use_diff=False)
    return Loaded(model, configuration, run_hf, size, pixels, commit, outputs, assumed, missing)


def run_hf(model: nn.Module, images: Tensor) -> Any:
    """The output of a model of transformers for images (B,3,size,size)."""
    config, count = model.config, len(images)
    kind = config.model_type.removesuffix("_vision_model")
    if kind == "vjepa2":  # a clip of the one image, as long as one token lasts
        clip = images[:, None].expand(-1, config.tubelet_size, -1, -1, -1)
        return model(pixel_values_videos=clip, skip_predictor=True)
    if kind == "siglip2":
        from models_mae import patchify

        side = images.shape[-1] // config.patch_size
        shapes = torch.tensor([[side, side]], device=images.device).expand(count, -1)
        valid = torch.ones(count, side**2, dtype=torch.long, device=images.device)
        patches = patchify(images, config.patch_size)
        return model(pixel_values=patches, pixel_attention_mask=valid, spatial_shapes=shapes)
    accepted = inspect.signature(model.forward).parameters
    if "pixel_values" not in accepted:
        raise ValueError(f"it takes no images: a model of type {kind} takes {next(iter(accepted))}")
    options: dict[str, Any] = {}
    if "interpolate_pos_encoding" in accepted:  # by the model's own rule
        options["interpolate_pos_encoding"] = True
    if kind == "vit_mae":  # ordered noise: every patch keeps its place
        patches = (images.shape[-1] // config.patch_size) ** 2
        options["noise"] = torch.arange(patches, device=images.device).float().expand(count, -1)
    return model(pixel_values=images, **options)


def hf_pixels(folder: Path, config: Any, size: int | None) -> tuple[int, Pixels, tuple[str, ...]]:
    """Input size, preprocessing and its unstated parts, from the processor's file or its class's defaults."""
    from transformers.models.auto import image_processing_auto as auto

    files = [folder / f"{kind}_config.json" for kind in ("preprocessor", "video_preprocessor", "processor")]
    stated: dict = next((json.loads(path.read_text("utf-8")) for path in files if path.is_file()), {})
    stated = stated.get("image_processor", stated.get("video_processor", stated))
    known = auto.IMAGE_PROCESSOR_MAPPING_NAMES
    known = known.get(config.model_type) or known.get(config.model_type.removesuffix("_vision_model")) or {}
    name = stated.get("image_processor_type", known.get("torchvision"))
    processor = auto.get_image_processor_class_from_name(name) if name else None

    def value(option: str) -> Any:
        return stated.get(option, getattr(processor, option, None))

    native = getattr(config, "image_size", getattr(config, "crop_size", None))
    if native is not None:
        native = edge(native)
    elif hasattr(config, "num_patches"):
        native = isqrt(config.num_patches) * config.patch_size
    resized, crop = value("size"), value("crop_size") if value("do_center_crop") else None
    if not stated or not resized:  # the class's default size is not the model's
        resized, crop = {"shortest_edge": native or 224}, None
    side, target = edge(crop or resized), edge(resized)
    squash = not crop and not (isinstance(resized, dict) and "shortest_edge" in resized)
    white = 255 * (value("rescale_factor") or 1 / 255)  # the largest value of a pixel
    mean, std = value("image_mean") or IMAGENET_MEAN, value("image_std") or IMAGENET_STD
    if value("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    mean, std = (tuple(round(number / white, 6) for number in numbers) for numbers in (mean, std))
    codes = dict(enumerate(("nearest", "lanczos", "bilinear", "bicubic")))  # Pillow's
    interpolation = codes.get(value("resample"), "bicubic")
    pixels = Pixels(mean, std, interpolation, None if squash else side / target)
    return size or side, pixels, () if stated else ("mean", "std", "crop")


def edge(size: Any) -> int:
    """The side in pixels that a processor's size states: a number, the shorter edge, or height and width."""
    sides = {size} if isinstance(size, int) else {*(size.values() if isinstance(size, dict) else size)} - {None}
    if len(sides) != 1:
        raise ValueError(f"its images are resized to {size}; a square, or one shorter edge, is possible here")
    return sides.pop()


# ---- timm and open_clip


def run_model(model: nn.Module, images: Tensor) -> Any:
    return model(images)


def load_timm(name: str, size: int | None, offline: bool) -> Loaded:
    """A model of timm: NAME, hf-hub:ORG/NAME, or a folder that timm saved."""
    overlay = {}
    if (repository := hub_name(name)) is not None:
        folder, commit = fetched(repository, offline)
        if "architecture" not in json.loads((folder / "config.json").read_text("utf-8")):
            raise ValueError("its config.json names no architecture of timm: is it a model of transformers (hf:)?")
        name = f"local-dir:{folder}"
    else:
        check_timm_name(name)
        published = timm.get_pretrained_cfg(name)
        if not (published and published.hf_hub_id):
            raise ValueError("timm has no weights of it on the hub: name a tag of timm.list_pretrained()")
        repository, file = published.hf_hub_id, published.hf_hub_filename or "model.safetensors"
        if repository == "timm/":
            repository += name if "." in name else f"{name}.{published.tag}"
        weights = f"{Path(file).stem}.safetensors"
        folder, commit = fetched(repository, offline, weights)
        overlay = {"pretrained_cfg_overlay": {"file": str(folder / weights), "source": "file", "custom_load": False}}
    model = timm.create_model(name, pretrained=True, img_size=size, **overlay)  # with its classifier: loaded strictly
    model.reset_classifier(0)
    return loaded_by_timm(model, size, commit)


def timm_of_file(path: Path, checkpoint_key: str | None, name: str, size: int | None) -> Loaded:
    """timm's model of this name with the weights of a file, at the stated size or that of its positions.

    ValueError if timm has no such model, or tensors are missing, left over or misshapen.
    """
    from encoders.contents import read_content, weights_of
    from encoders.families import FAMILIES

    check_timm_name(name)
    weights = weights_of(read_content(path), FAMILIES["timm"], checkpoint_key) or {}
    weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
    table, kernel = weights.get("pos_embed"), weights.get("patch_embed.proj.weight")
    if size is None and table is not None and kernel is not None and table.ndim == 3:
        size = isqrt(table.shape[1]) * kernel.shape[-1]
    overlay = {"state_dict": weights, "num_classes": 0, "custom_load": False}
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, img_size=size, pretrained_cfg_overlay=overlay)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"the file is not timm's {name}: {' '.join(lines[-2:])[:300]}") from error
    return loaded_by_timm(model, size, None)


def check_timm_name(name: str) -> None:
    if not timm.is_model(name.split(".")[0]):
        near = nearest(name.split(".")[0], timm.list_models())
        raise ValueError(f"timm {timm.__version__} has no model {name!r}: {near}timm.list_models() lists them")


def loaded_by_timm(model: nn.Module, size: int | None, commit: str | None) -> Loaded:
    stated = timm.data.resolve_model_data_config(model)
    native = getattr(getattr(model, "patch_embed", None), "img_size", None) or stated["input_size"][1:]
    pixels = pixels_of(stated, stated["crop_mode"], stated["crop_pct"])
    configuration = f"{model.pretrained_cfg['architecture']} {model._model_args}"
    pools = getattr(model, "attn_pool", None) is not None
    outputs = (lambda output: {"map": output}) if pools else (lambda output: {})
    return Loaded(model, configuration, run_model, size or native[0], pixels, commit, outputs)


def load_open_clip(name: str, size: int | None, offline: bool) -> Loaded:
    """The image tower of a model of open_clip: MODEL/TAG, MODEL/FILE.safetensors, hf-hub:ORG/NAME or a folder."""
    configuration, commit, options = name, None, {"force_image_size": size}
    if (repository := hub_name(name)) is not None:
        folder, commit = fetched(repository, offline, "open_clip*.safetensors")
        configuration = (folder / "open_clip_config.json").read_text("utf-8")
        model = open_clip.create_model(f"local-dir:{folder}", **options)
    else:
        architecture, _, tag = name.partition("/")
        file, published = Path(tag), open_clip.get_pretrained_cfg(architecture, tag)
        if not file.is_file():
            if not published.get("hf_hub"):
                tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
                raise ValueError(f"write MODEL/TAG or MODEL/FILE; the tags of {architecture} are {tags}")
            folder, commit = fetched(str(Path(published["hf_hub"] + "_").parent), offline, "open_clip*.safetensors")
            file = next(folder.glob("open_clip*.safetensors"))
        if file.suffix != ".safetensors":
            raise ValueError(f"{file} is not a safetensors file; other files are not loaded")
        options["force_quick_gelu"] = published.get("quick_gelu", False)
        chosen = {key: published[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in published}
        model = open_clip.create_model(architecture, str(file), force_preprocess_cfg=chosen, **options)
    stated = open_clip.get_model_preprocess_cfg(model)
    native = stated["size"] if isinstance(stated["size"], int) else stated["size"][0]
    pixels, outputs = pixels_of(stated, stated["resize_mode"], 1.0), lambda output: {"projected": output}
    return Loaded(model.visual, configuration, run_model, size or native, pixels, commit, outputs)


def hub_name(name: str) -> str | None:
    """The repository or folder in a name of timm or open_clip; None for a name of the library's own list."""
    hub = name.removeprefix("hf-hub:").removeprefix("local-dir:")
    return hub if hub != name or Path(hub).is_dir() else None


def pixels_of(stated: dict, mode: str, share: float) -> Pixels:
    """The preprocessing that timm or open_clip states. share: kept of the shorter side by a central crop."""
    modes = {"center": share, "shortest": share, "squash": None}
    if mode not in modes:
        raise ValueError(f"images are to be cropped by rule {mode}; this project has {', '.join(modes)}")
    return Pixels(tuple(stated["mean"]), tuple(stated["std"]), stated["interpolation"], modes[mode])


LIBRARIES = {
    "hf": Library("transformers", "hf:ORG/NAME, hf:FOLDER", load_hf),
    "timm": Library("timm", "timm:NAME, timm:hf-hub:ORG/NAME, timm:FOLDER", load_timm),
    "open_clip": Library("open_clip", "open_clip:MODEL/TAG, open_clip:MODEL/FILE, open_clip:FOLDER", load_open_clip),
}
