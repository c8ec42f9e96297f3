"""The family of a weight file, and the arguments that load each encoder in it."""

from pathlib import Path
from typing import NamedTuple

from encoders.architectures import FROM_FILE
from encoders.catalogue import families_called
from encoders.contents import dictionaries, encoders_in, fits, is_state, obstacles_in, part_of
from encoders.families import FAMILIES, TABLE, Family, Grid
from encoders.reading import DEFAULTS, Reading, read_as
from util.tensor_files import safetensors_metadata

FILE_NAME = "by its file name"
UNSURE = ("", TABLE, FILE_NAME)  # reasons that leave heads, activation and preprocessing open


class Detected(NamedTuple):
    """The family that a file is read as.

    others: families that make the same encoder of it at the size of its own positions; to other sizes, they resample
    the positions by different rules. reason: what shows the family; "" where nothing does.
    """

    family: str
    others: tuple[str, ...] = ()
    reason: str = ""


def detect_family(
    path: Path, content: dict, checkpoint_key: str | None = None, grid: Grid | None = None, **options
) -> Detected:
    """The family of a file: as its safetensors metadata states; else by its structure.

    The tensors of plain ViTs have the same names in many methods. Such a file is of a method where it holds evidence
    (Family.evidence), or is nothing but weights under the file name that the authors use. Otherwise it is read as
    "timm", and the other families that it can be of are returned, too.
    Only families that read the whole file are named. ValueError where several remain, or none.
    """
    flat = path.suffix == ".safetensors"  # such files have no entries
    if flat and (written := safetensors_metadata(path).get("family")) in FAMILIES:
        return Detected(written, reason="by its metadata")

    def read(name: str) -> Reading:
        return read_as(content, name, FROM_FILE, checkpoint_key, grid, **options)

    fitting = [name for name, family in FAMILIES.items() if fits(content, family, checkpoint_key, flat)]
    readings = {name: read(name) for name in fitting}
    complete = [name for name in fitting if not readings[name].problems]
    reasons = {name: FAMILIES[name].shown_by(readings[name].weights, content) for name in complete or fitting}
    shown = [name for name, reason in reasons.items() if reason not in UNSURE]
    shown = shown or [name for name, reason in reasons.items() if reason]
    if not shown and complete:
        shown = [name for name in complete if name in families_called(path) and only_weights(content, FAMILIES[name])]
        reasons |= dict.fromkeys(shown, FILE_NAME)
    if len(shown) == 1:
        return Detected(shown[0], reason=reasons[shown[0]])
    if not complete and (damaged := [name for name in ("timm", *fitting) if name in fitting]):
        return Detected(damaged[0])  # which the loader refuses with the list of problems
    if not shown and complete and (len(complete) == 1 or "timm" in complete):
        first = "timm" if "timm" in complete else complete[0]
        same = [name for name in complete if alike(readings[first], readings[name])]
        return Detected(first, tuple(name for name in same if name != first))
    names = shown or complete
    advice = "" if names else obstacle(content) or ("" if checkpoint_key else where_encoders_are(content))
    if not names and not advice:
        readings = {name: reading for name in FAMILIES if not (reading := read(name)).problems}
        names = list(readings)
    where = f" under --checkpoint_key {checkpoint_key}" if checkpoint_key else ""
    if names:
        same = len(names) > 1 and all(alike(readings[names[0]], readings[name]) for name in names)
        raise ValueError(
            f"{path} does not show its family{where}, but loads with --family {' or --family '.join(names)}"
            f"{', which make the same encoder of it' * same}: write {'one of them' if len(names) > 1 else 'that'}"
        )
    raise ValueError(f"{path} holds no weights of a known family{where}: {advice or what_it_holds(content)}")


def only_weights(content: dict, family: Family) -> bool:
    return is_state(content) or (family.key is not None and set(content) == {family.key})


def alike(one: Reading, other: Reading) -> bool:
    """Whether two families make the same encoder of a file, at the size of its table of positions."""
    options = []
    for reading in (one, other):
        options.append({**DEFAULTS, **reading.options, "pos_resampling": None})
        options[-1]["pos_embed"] = options[-1]["pos_embed"] != "none"  # a fixed table is in the file, too
    same = one.state.keys() == other.state.keys() and all(
        value is other.state[key] or value.equal(other.state[key]) for key, value in one.state.items()
    )
    return same and options[0] == options[1]


def what_it_holds(content: dict) -> str:
    if any(str(key).endswith("flat_param") for _, entries in dictionaries(content) for key in entries):
        return (
            "FSDP has flattened its tensors: name a file of whole tensors, such as the teacher_checkpoint.pth that "
            "DINOv2's trainer writes when it evaluates"
        )
    names = [key for state in (content, *content.values()) if is_state(state) for key in state]
    beginning = f"its tensors are called {', '.join(names[:3])}{', ...' * (len(names) > 3)}; " if names else ""
    return f"{beginning}there are {', '.join(FAMILIES)}"


def obstacle(content: dict) -> str:
    """Entries of an encoder that are not tensors, with what to do about them."""
    entries = obstacles_in(content)
    return f"not all entries are tensors ({', '.join(entries[:4])}): save tensors only" if entries else ""


def where_encoders_are(content: dict) -> str:
    """The arguments that load an encoder from below the top of a file; each was tried."""
    names = encoders_in(content)
    arguments = list(filter(None, (arguments_for(content, name) for name in names)))
    if arguments:
        several = "there are encoders" if len(arguments) > 1 else "there is an encoder"
        return f"{several} under {', '.join(names)}: write {' or '.join(arguments)}"
    for name in names[:1]:
        readings = [reading for family in FAMILIES if (reading := read_as(content, family, FROM_FILE, name)).shapes]
        if problems := min(("; ".join(reading.problems) for reading in readings), key=len, default=""):
            return f"there is an encoder under {name}, which no family loads: {problems[:300]}"
    return ""


def other_encoders(content: dict, reading: Reading) -> list[str]:
    """The arguments that load the encoders of a file other than the one that was read; of those that nothing loads, the
    names."""
    used = set(map(id, reading.weights.values()))
    arguments = []
    for name in encoders_in(content, tensors_only=False):
        own = set(map(id, (part_of(content, name) or {}).values()))
        if own & used:
            continue
        parts = name.split(".")
        for key in dict.fromkeys([parts[-1], parts[0], name]) if own else ():  # the family's own name, if there is one
            other = read_as(content, reading.family, FROM_FILE, key)
            if not other.problems and own & set(map(id, other.weights.values())):
                arguments.append(f"--checkpoint_key {key}")
                break
        else:
            arguments.append(arguments_for(content, name) or f"{name} (which no family loads)")
    return arguments


def arguments_for(content: dict, name: str) -> str:
    """The arguments that load the encoder of this name from a file; "" where nothing does."""
    families = [family for family in FAMILIES if not read_as(content, family, FROM_FILE, name).problems]
    if not families:
        return ""
    try:
        detect_family(Path(), content, name)
    except ValueError:
        return f"--checkpoint_key {name} --family {families[0]}"
    return f"--checkpoint_key {name}"
