"""Published encoders: where they are, and a loader that takes all of a file or refuses it."""

import inspect
import json
import re
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch

from data_sets.loader import IMAGENET_MEAN, IMAGENET_STD
from encoders.catalogue import CATALOGUE, families_called, fetch_weights, hugging_face_offline
from encoders.families import (
    FAMILIES,
    Family,
    State,
    drop_rule,
    encoders_in,
    fits,
    is_state,
    unlike_plain_vit,
    weights_of,
)
from models_vit import ARCHITECTURES, VisionTransformer, architecture
from util.choices import instead_of
from util.distributed import main_process_first
from util.files import atomic_path, sha256
from util.progress import log
from util.safe_load import load_plain


class Encoder(NamedTuple):
    """A loaded backbone and where its weights come from."""

    backbone: VisionTransformer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    record: dict  # model, source, family, sha256: for args.json and results


class Detected(NamedTuple):
    """The family that a file is read as, and others that it can be of.

    All of them make the same encoder of it at the size of its own table of positions, with the same preprocessing; to
    other sizes, they resample the table by different rules.
    """

    family: str
    others: tuple[str, ...] = ()


class Reading(NamedTuple):
    """A file read as one of a family: what became of its tensors."""

    family: str
    models: list[str]  # the architectures whose sizes it has
    weights: State  # as in the file
    state: State  # as in the model
    options: dict  # of the model, but for those of its architecture
    backbone: VisionTransformer | None  # on the meta device: names and shapes only
    problems: list[str]


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
    family: a name of FAMILIES; None or "auto": see detect_family. Where that leaves several, which differ in how they
    resample positions, the backbone takes no images of another size than its table's. checkpoint_key: another encoder
    of the file than the family's default (see Family). options: of models_vit.VisionTransformer, such as class_token.
    offline: download nothing; ValueError says which file belongs where.
    The backbone is in evaluation mode and frozen. Every tensor of the file is used, or dropped by a rule that the
    family names; every parameter is set; ValueError names the architecture that the file is of, where it is another
    one, or lists all that is missing, left over, misshapen or not finite.
    """
    arch = architecture(model)
    checkpoint_key = checkpoint_key or None  # "" leaves one of several encoders without
    if not finetune:
        if family not in (None, "auto"):
            raise ValueError(f"--family {family} needs weights: name them with --finetune")
        backbone = VisionTransformer(**{**arch, **options})
        record = {"model": model, "source": None, "family": None, "sha256": None}
        return Encoder(backbone.eval().requires_grad_(False), IMAGENET_MEAN, IMAGENET_STD, record)

    family = known_family(finetune, model, family)
    detected = None
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
        detected = Detected(family) if family else detect_family(path, content, checkpoint_key)
        family = detected.family
        mean, std = FAMILIES[family].mean, FAMILIES[family].std
    chosen = FAMILIES[family]
    state, problems = converted(content, chosen, checkpoint_key)
    check_model(finetune, state, model)
    native = {**arch, **chosen.vit, **chosen.read(state)}
    if detected is not None and detected.others:
        native["pos_resampling"] = "unknown"
    for name in sorted(native.keys() & options.keys()):
        if native[name] != options[name]:
            log.warning("%s: %s = %s, where its authors have %s", finetune, name, options[name], native[name])
    options = {**native, **options}
    options["img_size"] = native_size(state, options)
    backbone = VisionTransformer(**options)
    problems = problems or mismatches(state, backbone)
    if problems:
        if elsewhere := misplaced(content, state, checkpoint_key):
            problems = [elsewhere]
        raise ValueError(f"{finetune} is not a {model} of family {family}: {'; '.join(problems)}")
    backbone.load_state_dict(state, strict=True)
    if detected is not None and detected.others:
        log.warning("%s %s", finetune, undecided(detected, options["img_size"]))
    digest = sha256(path) if path is not None else None
    record = {"model": model, "source": Path(finetune).name, "family": family, "sha256": digest}
    log.info("loaded %s (%s, family %s, %d tensors)", finetune, model, family, len(state))
    return Encoder(backbone.eval().requires_grad_(False), mean, std, record)


# ---------------------------------------------------------------------------------------------------------------------
# from a name to the content of a file
# ---------------------------------------------------------------------------------------------------------------------


def known_family(finetune: str, model: str, family: str | None) -> str | None:
    """The family that the arguments name, or the catalogue does; None where it is to be detected ("auto").

    ValueError where they do not go together.
    """
    family = named_family(family)
    if finetune in CATALOGUE:
        entry = CATALOGUE[finetune]
        if entry.model != model:
            raise ValueError(f"--finetune {finetune} is no {model}: write --model {entry.model}")
        family = family or entry.family
    return family


def named_family(family: str | None) -> str | None:
    """What --family says, where it is not "auto"; ValueError for a name that does not exist."""
    if family not in (None, "auto", *FAMILIES):
        raise ValueError(f"unknown family {family!r}: {instead_of(family, ['auto', *FAMILIES])}")
    return None if family == "auto" else family


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
        held = f"the file holds {', '.join(map(str, list(content)[:5]))}{', ...' * (len(content) > 5)}"
        elsewhere = "" if family.prefix else where_encoders_are(content, checkpoint_key)
        return {}, [f"{where} ({'; '.join(filter(None, [held, elsewhere]))})"]
    kept = {key: value for key, value in weights.items() if drop_rule(family, key) is None}
    if stray := sorted(key for key in kept if not key.startswith(family.prefix)):
        return {}, [f"not used, because it is not under {family.prefix}: {', '.join(stray)}"]
    return family.convert({key.removeprefix(family.prefix): value for key, value in kept.items()}), []


def sizes_of(state: State) -> tuple[int, int, int] | None:
    """Width, blocks and patch size of our state dict; heads cannot be told from tensors. None without patch_embed."""
    stem = state.get("patch_embed.proj.weight")
    if stem is None or stem.ndim != 4:
        return None
    depth = 1 + max((int(block[1]) for key in state if (block := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    return stem.shape[0], depth, stem.shape[-1]  # a block that is missing is not of another architecture


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
        problems.append(f"missing {', '.join(by_block(missing, wanted))}")
    if extra := sorted(state.keys() - wanted.keys()):
        problems.append(f"not used {', '.join(by_block(extra, state))}")
    shared = sorted(wanted.keys() & state.keys())
    for name in shared:
        if state[name].shape != wanted[name].shape:
            problems.append(f"{name} is {tuple(state[name].shape)}, wanted {tuple(wanted[name].shape)}")
    if broken := [name for name in shared if not state[name].isfinite().all()]:
        problems.append(f"{', '.join(by_block(broken, wanted))} hold{'s' * (len(broken) == 1)} NaN or infinity")
    return problems


def by_block(names: list[str], among: dict) -> list[str]:
    """Names of tensors; "blocks.7.*" stands for all that a block has."""
    whole = {key.split(".")[1] for key in names if key.startswith("blocks.")}
    whole -= {key.split(".")[1] for key in among.keys() - set(names) if key.startswith("blocks.")}
    parts = [key.split(".") for key in names]
    blocks = [part[1] for part in parts if part[0] == "blocks" and part[1] in whole]
    blocks.sort(key=lambda block: (len(block), block))  # 10 after 9
    rest = [".".join(part) for part in parts if not (part[0] == "blocks" and part[1] in whole)]
    return [f"blocks.{block}.*" for block in dict.fromkeys(blocks)] + rest


def read_as(content: dict, name: str, model: str | None, checkpoint_key: str | None) -> Reading:
    """A file's content as one of a family, of the architecture `model` or of that which its sizes tell."""
    family = FAMILIES[name]
    weights = weights_of(content, family, checkpoint_key) or {}
    state, problems = converted(content, family, checkpoint_key)
    options = {**family.vit, **family.read(state)}
    models = [model] if model else architectures_of(state)
    if not problems and not models:
        problems = [misplaced(content, state, checkpoint_key) or no_architecture(state)]
    if problems:
        return Reading(name, models, weights, state, options, None, problems)
    size = native_size(state, {**architecture(models[0]), **options})
    try:
        with torch.device("meta"):
            backbone = VisionTransformer(**{**architecture(models[0]), **options, "img_size": size})
    except ValueError as error:  # such as heads of this family that do not divide the width
        return Reading(name, models, weights, state, options, None, [str(error)])
    return Reading(name, models, weights, state, options, backbone, mismatches(state, backbone))


def no_architecture(state: State) -> str:
    if sizes_of(state) is None:
        return "it has no patch_embed.proj.weight, as every encoder has"
    width, depth, patch = sizes_of(state)
    near = [name for name, arch in ARCHITECTURES.items() if (arch["embed_dim"], arch["patch_size"]) == (width, patch)]
    advice = f"there are {', '.join(ARCHITECTURES)}"
    if near:
        advice = f"write --model {' or '.join(near)} to see what is missing"
    return (
        f"no architecture has its sizes (width {width}, {depth} blocks, patches of {patch} pixels): {advice}; "
        "a new one is a line of ARCHITECTURES in models_vit.py"
    )


def detect_family(path: Path, content: dict, checkpoint_key: str | None) -> Detected:
    """The family of a file: as its safetensors metadata says; else by its structure.

    What fits only because everybody calls the tensors of a plain ViT alike needs more: the mark of a method in the file
    (see Family), or, for a file with nothing but weights, the name under which its authors publish it. Without either,
    such a file is "timm", which is nobody's method, and the others that it can be of are returned, too.
    ValueError where several fit otherwise, or none does; it says what would.
    """
    flat = path.suffix == ".safetensors"  # such files have no entries
    if flat and (said := safetensors_metadata(path).get("family")) in FAMILIES:
        return Detected(said)
    fitting = [name for name, family in FAMILIES.items() if fits(content, family, checkpoint_key, flat)]
    marked = [
        name for name in fitting
        if FAMILIES[name].marked(weights_of(content, FAMILIES[name], checkpoint_key, flat), content)
    ]  # fmt: skip
    called = [name for name in fitting if name in families_called(path) and only_weights(content, FAMILIES[name])]
    found = marked or called
    if not found and "timm" in fitting and all(alike(content, "timm", name, checkpoint_key) for name in fitting):
        return Detected("timm", tuple(name for name in fitting if name != "timm"))
    if len(found) == 1:
        if not marked:
            log.info("%s: family %s, because its authors' file is called so", path, found[0])
        return Detected(found[0])
    where = f" under --checkpoint_key {checkpoint_key}" if checkpoint_key else ""
    loading = found or [name for name in FAMILIES if not read_as(content, name, None, checkpoint_key).problems]
    if loading:
        same = len(loading) > 1 and all(alike(content, loading[0], name, checkpoint_key) for name in loading)
        raise ValueError(
            f"{path} does not tell its family{where}, but loads with --family {' or --family '.join(loading)}"
            f"{', which make the same encoder of it' * same}: write {'one of them' if len(loading) > 1 else 'that'}"
        )
    told = where_encoders_are(content, checkpoint_key) or what_it_holds(content)
    raise ValueError(f"{path} holds no weights of a known family{where}: {told}")


def only_weights(content: dict, family: Family) -> bool:
    return is_state(content) or (family.key is not None and set(content) == {family.key})


def alike(content: dict, one: str, other: str, checkpoint_key: str | None) -> bool:
    """Whether two families make the same encoder of a file, at the size of its table of positions."""
    defaults = {name: option.default for name, option in inspect.signature(VisionTransformer).parameters.items()}
    states, options = [], []
    for name in (one, other):
        family, (state, _) = FAMILIES[name], converted(content, FAMILIES[name], checkpoint_key)
        states.append(state)
        options.append({**defaults, **family.vit, **family.read(state), "mean": family.mean, "std": family.std})
        del options[-1]["pos_resampling"]
        options[-1]["pos_embed"] = options[-1]["pos_embed"] != "none"  # what is not learned is in the file all the same
    tensors, others = states
    same = tensors.keys() == others.keys() and all(
        value is others[key] or value.equal(others[key]) for key, value in tensors.items()
    )
    return same and options[0] == options[1]


def undecided(detected: Detected, size: int) -> str:
    """What is left open where several families fit, and what to do about it."""
    names = [detected.family, *detected.others]
    rules = ", ".join(f"{name}: {resampling(name)}" for name in names)
    return (
        f"can be of the families {', '.join(names)}, which make the same encoder of it at its {size} pixels: read as "
        f"{detected.family}; other input sizes need --family, for positions are resampled differently ({rules})"
    )


def resampling(family: str) -> str:
    return FAMILIES[family].vit.get("pos_resampling", "antialias")


def what_it_holds(content: dict) -> str:
    names = [key for state in (content, *content.values()) if is_state(state) for key in state]
    beginning = f"its tensors are called {', '.join(names[:3])}{', ...' * (len(names) > 3)}; " if names else ""
    return f"{beginning}there are {', '.join(FAMILIES)}"


def misplaced(content: dict, state: State, checkpoint_key: str | None) -> str:
    """Where a file has encoders, if a state dict that was made of it is none."""
    return where_encoders_are(content, checkpoint_key) if state and "patch_embed.proj.weight" not in state else ""


def where_encoders_are(content: dict, checkpoint_key: str | None) -> str:
    names = [] if checkpoint_key else encoders_in(content)
    several = "there are encoders" if len(names) > 1 else "there is an encoder"
    return f"{several} under {', '.join(names)}: write --checkpoint_key {' or '.join(names)}" if names else ""


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
