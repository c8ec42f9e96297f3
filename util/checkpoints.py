"""Published encoders: where they are, and a loader that takes all of a file or refuses it."""

import json
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch

from models_vit import ARCHITECTURES, VisionTransformer, architecture
from util.catalogue import CATALOGUE, fetch_weights, hugging_face_offline
from util.choices import instead_of
from util.datasets import IMAGENET_MEAN, IMAGENET_STD
from util.distributed import main_process_first
from util.families import FAMILIES, Family, State, drop_rule, fits, unlike_plain_vit, weights_of
from util.files import atomic_path, sha256
from util.progress import log
from util.safe_load import load_plain


class Encoder(NamedTuple):
    """A loaded backbone and where its weights come from."""

    backbone: VisionTransformer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    record: dict  # model, source, family, sha256: for args.json and results


def load_encoder(
    finetune: str,
    model: str,
    family: str | None = None,
    checkpoint_key: str | None = None,
    offline: bool = False,
    **options,
) -> Encoder:
    """The encoder `model` with the weights that `finetune` names, or random ones where it is empty.

    finetune: a file (.pth or .safetensors), a name of CATALOGUE, a URL, or the name of a timm model.
    family: a name of FAMILIES; where it is None, the file must fit exactly one. checkpoint_key: another encoder of the
    file than the family's default (see Family). options: of models_vit.VisionTransformer, such as class_token.
    offline: download nothing; ValueError says which file belongs where.
    The backbone is in evaluation mode and frozen. Every tensor of the file is used, or dropped by a rule that the
    family names; every parameter is set; ValueError names the architecture that the file is of, where it is another
    one, or lists all that is missing, left over, misshapen or not finite.
    """
    arch = architecture(model)
    if not finetune:
        if family:
            raise ValueError(f"--family {family} needs weights: name them with --finetune")
        backbone = VisionTransformer(**{**arch, **options})
        record = {"model": model, "source": None, "family": None, "sha256": None}
        return Encoder(backbone.eval().requires_grad_(False), IMAGENET_MEAN, IMAGENET_STD, record)

    family = known_family(finetune, model, family)
    with main_process_first():  # what it downloads, the others find
        path = fetch_weights(finetune, offline)
        timm_model = load_timm(finetune, offline) if path is None else None
    if timm_model is not None:
        family = family or "timm"
        content, mean, std = timm_model
    else:
        content = load_plain_or_safetensors(path)
        said = safetensors_metadata(path).get("family") if path.suffix == ".safetensors" else None
        if None not in (family, said) and family != said:
            log.warning("%s says that its family is %s; it is read as %s, as --family wants it", finetune, said, family)
        family = family or detect_family(path, content, checkpoint_key)
        mean, std = FAMILIES[family].mean, FAMILIES[family].std
    chosen = FAMILIES[family]
    state, problems = converted(content, chosen, checkpoint_key)
    check_model(finetune, state, model)
    native = {**arch, **chosen.vit, **chosen.read(state)}
    for name in sorted(native.keys() & options.keys()):
        if native[name] != options[name]:
            log.warning("%s: %s = %s, where its authors have %s", finetune, name, options[name], native[name])
    options = {**native, **options}
    options["img_size"] = native_size(state, options)
    backbone = VisionTransformer(**options)
    problems = problems or mismatches(state, backbone)
    if problems:
        raise ValueError(f"{finetune} is not a {model} of family {family}: {'; '.join(problems)}")
    backbone.load_state_dict(state, strict=True)
    digest = sha256(path) if path is not None else None
    record = {"model": model, "source": Path(finetune).name, "family": family, "sha256": digest}
    log.info("loaded %s (%s, family %s, %d tensors)", finetune, model, family, len(state))
    return Encoder(backbone.eval().requires_grad_(False), mean, std, record)


# ---------------------------------------------------------------------------------------------------------------------
# from a name to the content of a file
# ---------------------------------------------------------------------------------------------------------------------


def known_family(finetune: str, model: str, family: str | None) -> str | None:
    """The family that the arguments name, or the catalogue does. ValueError where they do not go together."""
    if finetune in CATALOGUE:
        entry = CATALOGUE[finetune]
        if entry.model != model:
            raise ValueError(f"--finetune {finetune} is no {model}: write --model {entry.model}")
        family = family or entry.family
    if family is not None and family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: {instead_of(family, FAMILIES)}")
    return family


def load_timm(name: str, offline: bool = False) -> tuple[State, tuple[float, ...], tuple[float, ...]]:
    """A pretrained timm model: state dict without its classifier, and the mean and std of its preprocessing."""
    import timm  # a second to import, and few runs need it

    try:
        with hugging_face_offline(offline):
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{'--offline: ' * offline}timm cannot provide {name!r}: {reason}") from error
    if obstacles := unlike_plain_vit(model):
        raise ValueError(f"timm's {name} is no plain ViT: {'; '.join(obstacles)}")
    return model.state_dict(), model.pretrained_cfg["mean"], model.pretrained_cfg["std"]


def load_plain_or_safetensors(path: Path) -> dict:
    if path.suffix != ".safetensors":
        content = load_plain(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name")
        return content
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error


def safetensors_metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata() or {}


# ---------------------------------------------------------------------------------------------------------------------
# from the content of a file to our state dict
# ---------------------------------------------------------------------------------------------------------------------


def converted(content: dict, family: Family, checkpoint_key: str | None) -> tuple[State, list[str]]:
    """Our state dict from the file's content, and what is wrong with the file."""
    weights = weights_of(content, family, checkpoint_key)
    if weights is None:
        key = checkpoint_key or family.key
        where = f"no weights under {key!r}" if key else "not a flat file of weights"
        return {}, [f"{where} (the file holds {', '.join(map(str, list(content)[:5]))}{', ...' * (len(content) > 5)})"]
    kept = {key: value for key, value in weights.items() if drop_rule(family, key) is None}
    if stray := sorted(key for key in kept if not key.startswith(family.prefix)):
        return {}, [f"not used, because it is not under {family.prefix}: {', '.join(stray)}"]
    return family.convert({key.removeprefix(family.prefix): value for key, value in kept.items()}), []


def sizes_of(state: State) -> tuple[int, int, int] | None:
    """Width, blocks and patch size of our state dict; heads cannot be told from tensors. None without patch_embed."""
    stem = state.get("patch_embed.proj.weight")
    if stem is None or stem.ndim != 4:
        return None
    return stem.shape[0], len({key.split(".")[1] for key in state if key.startswith("blocks.")}), stem.shape[-1]


def architectures_of(state: State) -> list[str]:
    """The names of the architectures that have the sizes of a state dict."""
    named = {name: (arch["embed_dim"], arch["depth"], arch["patch_size"]) for name, arch in ARCHITECTURES.items()}
    return [name for name, sizes in named.items() if sizes == sizes_of(state)]


def check_model(finetune: str, state: State, model: str) -> None:
    """ValueError where a file is of another architecture that has a name."""
    fitting = architectures_of(state)
    if fitting and model not in fitting:
        width, depth, patch = sizes_of(state)
        raise ValueError(
            f"{finetune} is no {model}: it has width {width}, {depth} blocks and patches of {patch} pixels: "
            f"write --model {' or '.join(fitting)}"
        )


def mismatches(state: State, backbone: VisionTransformer) -> list[str]:
    """All reasons why `state` does not cover the backbone exactly."""
    wanted = backbone.state_dict()
    problems = []
    if missing := sorted(wanted.keys() - state.keys()):
        problems.append(f"missing {', '.join(missing)}")
    if extra := sorted(state.keys() - wanted.keys()):
        problems.append(f"not used {', '.join(extra)}")
    for name in sorted(wanted.keys() & state.keys()):
        if state[name].shape != wanted[name].shape:
            problems.append(f"{name} is {tuple(state[name].shape)}, wanted {tuple(wanted[name].shape)}")
        elif not state[name].isfinite().all():
            problems.append(f"{name} holds NaN or infinity")
    return problems


def detect_family(path: Path, content: dict, checkpoint_key: str | None) -> str:
    """The one family that a file fits: as its safetensors metadata says, else by its keys."""
    if path.suffix == ".safetensors" and (said := safetensors_metadata(path).get("family")) in FAMILIES:
        return said
    flat = path.suffix == ".safetensors"  # such files have no entries
    fitting = [name for name, family in FAMILIES.items() if fits(content, family, checkpoint_key, flat)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"{path} can be of several families: say with --family which of {', '.join(fitting)} it is")
    where = f" under --checkpoint_key {checkpoint_key}" if checkpoint_key else ""
    raise ValueError(f"{path} holds no weights of a known family{where}: there are {', '.join(FAMILIES)}")


def native_size(state: State, options: dict) -> int:
    """Input size in pixels for which the file's table of positions, or of relative positions, was made."""
    table = state.get("pos_embed", state.get("blocks.0.attn.rel_pos_bias.relative_position_bias_table"))
    side = 0.0
    if table is not None and table.ndim == 3:
        prefix = int(options.get("class_token", True)) + options.get("reg_tokens", 0)
        side = max(table.shape[1] - (0 if options.get("no_embed_class") else prefix), 0) ** 0.5
    elif table is not None and table.ndim == 2:
        side = (max(len(table) - 3, 0) ** 0.5 + 1) / 2
    return int(side) * options["patch_size"] if side and side == int(side) else options.get("img_size", 224)


def save_encoder(path: Path, state: State, metadata: dict[str, str]) -> None:
    """Weights as safetensors with their family, model and making in the metadata; whole or absent."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        sort_metadata(temporary)


def sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: it is written in a random one, and equal weights are to have
    equal hashes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))
