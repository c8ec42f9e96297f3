"""AGGREGATIONS: how the tokens of a block become one vector per image, and the names of heads.

A head is one pooling or several, whose vectors are concatenated: "abmilp:depth=2", "cls@8-11+pos@11". Importing this
table does not import torch: the command line lists it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from encoders.architectures import check_blocks
from util.choices import instead_of, nearest

if TYPE_CHECKING:
    from probing.pooling import Pooling, Tokens

Value = int | str
Options = tuple[tuple[str, Value], ...]  # those that differ from their default


class Option(NamedTuple):
    """An option of a head, written `head:name=value`; its flag sets the default for heads that do not specify it."""

    default: Value
    allowed: tuple[str, ...] | int  # values, or the smallest number
    help: str
    flag: str | None = ""  # if not --<aggregation>_<name>; None: no flag, only head:name=value
    unused: Callable[[dict[str, Value]], bool] = lambda options: False  # whether the other values make it irrelevant

    def read(self, text: str) -> Value:
        """The value of a text. ValueError says what is allowed."""
        if not isinstance(self.allowed, int):
            if text not in self.allowed:
                raise ValueError(instead_of(text, self.allowed))
            return text
        if not re.fullmatch(r"\d+", text) or int(text) < self.allowed:
            raise ValueError(f"must be a whole number >= {self.allowed}")
        return int(text)


class Aggregation(NamedTuple):
    build: Callable[..., Pooling]  # (tokens, **options)
    description: str
    options: Mapping[str, Option] = MappingProxyType({})
    number: str = ""  # the option that a number after the name sets: ap12 is ap:heads=12
    needs_cls: bool = False
    blocks: str = ""  # the blocks it reads if the head names none; "": that of the probe


def fixed(name: str, **settings: str) -> Callable[..., Pooling]:
    """Build a class of probing.fixed."""

    def build(tokens: Tokens, **options: Value) -> Pooling:
        from probing import fixed

        return getattr(fixed, name)(tokens, **settings, **options)

    return build


def learned(name: str, content: str = "patch", **settings: Value) -> Callable[..., Pooling]:
    """Build a TokenPool of probing.attentive, or AbMILP; content: the tokens it pools (see select)."""

    def build(tokens: Tokens, content: str = content, **options: Value) -> Pooling:
        from abmilp import AbMILP
        from probing import attentive
        from probing.pooling import PooledTokens

        pool = AbMILP if name == "AbMILP" else getattr(attentive, name)
        return PooledTokens(pool.of(tokens, content, **{**settings, **options}), content)

    return build


def is_linear(options: dict[str, Value]) -> bool:
    return options["depth"] == 1


CONTENT = Option("patch", ("patch", "all"), "tokens to pool")
SCALE = Option("sum", ("sum", "release"), "weights of sum 1, or the published code's scale", "aggregation_scale")
HEADS = Option(12, 1, "attention heads")
ATTENTIVE = {"heads": HEADS._replace(flag=None), "content": CONTENT._replace(flag=None)}

AGGREGATIONS = {
    "cls": Aggregation(fixed("ClsToken"), "the [cls] token", needs_cls=True),
    "pos": Aggregation(fixed("MeanPatch"), "the mean of the patch tokens"),
    "both": Aggregation(fixed("ClsAndMeanPatch"), "[cls] and mean patch, concatenated", needs_cls=True),
    "abmilp": Aggregation(
        learned("AbMILP"),
        "attention-based multiple-instance pooling (the paper's head)",
        {
            "depth": Option(1, 1, "layers of the score"),
            "act": Option("relu", ("relu", "gelu", "tanh", "gated"), "activation of the score", unused=is_linear),
            "hidden": Option(0, 0, "width of the score's hidden layers; 0: the tokens' width", unused=is_linear),
            "sa": Option(
                "none",
                ("none", "map", "both", "residual"),
                "self-attention before pooling, for the scores (map) or for scores and values (both, residual)",
            ),
            "cond": Option("none", ("none", "pe"), "pe: add position embeddings to the score's input"),
            "content": CONTENT,
            "branches": Option(1, 1, "number of scores on the same hidden layers; vectors are concatenated"),
        },
    ),
    "ap": Aggregation(
        learned("AttentivePool", design="cae"),
        "attentive probing as in CAE; ap12 has 12 heads",
        {
            "heads": HEADS,
            "content": CONTENT,
            "eps": Option("1e-6", ("1e-6", "1e-5"), "epsilon of the batch norm that follows; CAE's is 1e-5", None),
        },
        "heads",
    ),
    "ep": Aggregation(
        learned("EfficientPool"),
        "efficient probing; ep32 has 32 queries",
        {
            "queries": Option(32, 1, "learned queries"),
            "shrink": Option(1, 1, "factor by which the vector is narrower than the tokens"),
            "content": CONTENT,
        },
        "queries",
    ),
    "aim": Aggregation(
        learned("AttentivePool", design="aim"),
        "AIM's attentive probe: attention over batch-normalised tokens; aim12 has 12 heads",
        {**ATTENTIVE, "queries": Option(1, 1, "learned queries, whose vectors are averaged", None)},
        "heads",
    ),
    "vjepa": Aggregation(
        learned("AttentivePool", design="vjepa"),
        "V-JEPA's attentive probe: cross-attention and an MLP, each with a residual; vjepa12 has 12 heads",
        {**ATTENTIVE, "depth": Option(1, 1, "blocks, all but the last of self-attention: 4 in V-JEPA 2", None)},
        "heads",
    ),
    "siglip": Aggregation(
        learned("AttentivePool", design="siglip"),
        "SigLIP's attention pooling (MAP) with new weights; siglip12 has 12 heads",
        ATTENTIVE,
        "heads",
    ),
    "capi": Aggregation(
        learned("AttentivePool", design="capi", width=64),
        "CAPI's attentive probe",
        {"width": Option(64, 1, "width of an attention head", None), "content": ATTENTIVE["content"]},
    ),
    "simpool": Aggregation(
        learned("AttentivePool", design="simpool", heads=1),
        "SimPool: the mean token attends to the normalised tokens",
        {"content": ATTENTIVE["content"]},
    ),
    "alf": Aggregation(
        learned("AttentivePool", content="blocks", design="alf"),
        "attentive layer fusion: attention over [cls] and mean patch of all blocks, or of those after @",
        {"heads": Option(0, 0, "attention heads; 0: as many as summary tokens", None)},
        blocks="all",
    ),
    "attn-mn": Aggregation(fixed("MeanClsAttention"), "patches weighted by the mean [cls] attention", needs_cls=True),
    "attn-lcte": Aggregation(
        fixed("LowestEntropyClsAttention"), "patches weighted by the [cls] attention of lowest entropy", needs_cls=True
    ),
    "ca": Aggregation(
        fixed("CentralAttention"),
        "patches weighted by the attention of the central ones; ca2: of the central 2 x 2",
        {"size": Option(1, 1, "side of the square of patches whose attention is used"), "scale": SCALE},
        "size",
    ),
    "cp": Aggregation(
        fixed("CentralPatches"),
        "the mean of the central patches; cp2: of the central 2 x 2",
        {"size": Option(1, 1, "side of the square of patches")},
        "size",
    ),
    "dino": Aggregation(
        fixed("OracleAttention"), "patches weighted by the [cls] attention of --oracle", {"scale": SCALE}
    ),
    "map": Aggregation(
        fixed("OwnPooling", output="map"), "the model's own attention pooling (SigLIP, AIMv2, PE)", blocks="last1"
    ),
    "projected": Aggregation(
        fixed("OwnPooling", output="projected"), "the model's own projected output (CLIP)", blocks="last1"
    ),
}


def check_aggregation(name: str, has_cls: bool) -> Aggregation:
    """The entry of AGGREGATIONS. ValueError if there is none, or if the encoder lacks the [cls] token it needs."""
    if name not in AGGREGATIONS:
        raise ValueError(f"unknown head {name!r}: {instead_of(name, AGGREGATIONS)}")
    if AGGREGATIONS[name].needs_cls and not has_cls:
        possible = [other for other, entry in AGGREGATIONS.items() if not entry.needs_cls]
        raise ValueError(f"head {name}: this encoder has no [cls] token; use {', '.join(possible)} instead")
    return AGGREGATIONS[name]


def option_flags() -> dict[str, Option]:
    """{flag without dashes: option} of the flags that set an option's default."""
    return {
        option.flag or f"{aggregation}_{name}": option
        for aggregation, entry in AGGREGATIONS.items()
        for name, option in entry.options.items()
        if option.flag is not None
    }


def parse_head(head: str, flags: dict[str, Value]) -> tuple[str, Options]:
    """The name of one pooling -> its aggregation and options.

    "cls", "abmilp:depth=2,act=tanh", "ap12" (short for "ap:heads=12"). flags: values for option_flags. Options at their
    default and unused ones are omitted, so each head has one name. ValueError for a head that does not exist or an
    option without effect.
    """
    name, _, text = head.partition(":")
    number = re.fullmatch(r"([a-z-]+)(\d+)", name)
    if number and number[1] in AGGREGATIONS and AGGREGATIONS[number[1]].number:
        name = number[1]
        text = f"{AGGREGATIONS[name].number}={number[2]}" + ("," + text if text else "")
    entry = check_aggregation(name, True)
    given: dict[str, str] = {}
    for setting in text.split(",") if text else []:
        key, equals, value = setting.partition("=")
        if not equals or key not in entry.options:
            takes = (
                f"takes {', '.join(entry.options)}, as in {name}:option=value" if entry.options else "has no options"
            )
            raise ValueError(f"head {head}: {nearest(key, entry.options)}{name} {takes}; not {setting!r}")
        if key in given:
            raise ValueError(f"head {head}: {key} is set twice")
        given[key] = value
    values = {}
    for key, option in entry.options.items():
        flag = option.flag or f"{name}_{key}"
        value = given.get(key, str(flags.get(flag, option.default)))
        try:
            values[key] = option.read(value)
        except ValueError as error:
            source = f"head {head}: {key}={value}" if key in given else f"--{flag} {value}"
            raise ValueError(f"{source}: {error}") from None
    for key in given:
        if entry.options[key].unused(values):
            others = ", ".join(f"{other}={values[other]}" for other in values if other != key)
            raise ValueError(f"head {head}: {key} has no effect with {others}")
    return name, tuple(
        (key, value)
        for key, value in values.items()
        if key == entry.number or (value != entry.options[key].default and not entry.options[key].unused(values))
    )


def head_name(aggregation: str, options: Options, blocks: str = "") -> str:
    """The name that parse_head reads: abmilp, abmilp:depth=2,act=tanh, ap12; with blocks: abmilp@8-11:depth=2."""
    entry = AGGREGATIONS.get(aggregation)
    number = entry.number if entry is not None else ""
    suffix = "".join(str(value) for key, value in options if key == number)
    rest = ",".join(f"{key}={value}" for key, value in options if key != number)
    return aggregation + suffix + "@" * bool(blocks) + blocks + ":" * bool(rest) + rest


# ---------------------------------------------------------------------------------------------------------------------
# heads of several poolings and blocks
# ---------------------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """One pooling of a head, and the blocks whose tokens it reads, side by side in channels."""

    aggregation: str
    options: Options
    blocks: str  # "8-11", "11", "last4", "all"; "": the block of the probe

    def indices(self, block: int) -> tuple[int, ...]:
        """The blocks of a part of canonical_head; block: of the probe."""
        first, _, last = (self.blocks or str(block)).partition("-")
        return tuple(range(int(first), int(last or first) + 1))


def parts_of(head: str, flags: dict[str, Value]) -> list[Part]:
    """The poolings of a head such as "cls@8-11+abmilp:depth=2". ValueError as in parse_head."""
    parts = []
    for text in head.split("+"):
        name, _, options = text.partition(":")
        name, at, blocks = name.partition("@")
        if at and not re.fullmatch(r"\d+(-\d+)?|last[1-9]\d*|all", blocks):
            raise ValueError(f"head {head}: @{blocks} names no blocks; write @11, @8-11, @last4 or @all")
        aggregation, settings = parse_head(name + ":" * bool(options) + options, flags)
        parts.append(Part(aggregation, settings, blocks or AGGREGATIONS[aggregation].blocks))
    return parts


def canonical_head(head: str, flags: dict[str, Value], depth: int | None) -> str:
    """The one name of a head, with blocks counted from 0; depth: of the encoder, None: not known yet.

    ValueError as in parse_head, and for blocks that do not exist.
    """
    names = []
    for part in parts_of(head, flags):
        blocks = part.blocks
        if depth is not None and blocks and not blocks[0].isdigit():
            count = depth if blocks == "all" else int(blocks.removeprefix("last"))
            if count > depth:
                raise ValueError(f"head {head}: @{blocks}: this encoder has {depth} blocks")
            blocks = f"{depth - count}-{depth - 1}"
        first, _, last = blocks.partition("-")
        if first.isdigit():
            check_blocks([int(first), int(last or first)], depth)
            if int(last or first) < int(first):
                raise ValueError(f"head {head}: @{blocks} ends before it begins")
            blocks = first if first == last else blocks
        names.append(head_name(part.aggregation, part.options, blocks))
    return "+".join(names)


@functools.cache
def blocks_of(head: str, block: int) -> tuple[int, ...]:
    """The blocks that a canonical head reads; block: of the probe, for parts that name none."""
    return tuple(sorted({index for part in parts_of(head, {}) for index in part.indices(block)}))


def own_block(head: str) -> int | None:
    """The last block that a canonical head names; None if a part takes the block of the probe."""
    parts = parts_of(head, {})
    return max(part.indices(0)[-1] for part in parts) if all(part.blocks for part in parts) else None


def build_head(head: str, block: int, tokens: Tokens) -> Pooling:
    """The pooling of a canonical head; tokens: of one block. It takes the tokens that read_blocks joins."""
    from probing.pooling import Parts

    poolings, blocks = [], []
    for part in parts_of(head, {}):
        entry = check_aggregation(part.aggregation, tokens.has_cls)
        blocks.append(part.indices(block))
        poolings.append(entry.build(tokens.joined(len(blocks[-1])), **dict(part.options)))
    return poolings[0] if len(poolings) == 1 else Parts(poolings, blocks)
