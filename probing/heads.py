"""AGGREGATIONS: ways from the tokens of a block to one vector per image, with the weights used; and their options.

Letters: D width.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from abmilp import ACTIVATIONS, AbMILP
from probing import fixed
from probing.attentive import AttentivePool, EfficientPool
from probing.pooling import PooledTokens, Pooling, Tokens
from util.choices import instead_of, nearest

Value = int | str


class Option(NamedTuple):
    """A setting of a head: `head:name=value`, or for all heads that do not say it, a flag."""

    default: Value
    allowed: tuple[str, ...] | int  # the words there are, or the smallest number
    help: str
    flag: str = ""  # where it is not --<aggregation>_<name>
    idle: Callable[[dict[str, Value]], bool] = lambda options: False  # it has no effect beside these other values

    def read(self, text: str) -> Value:
        """The value of a text; ValueError says what is allowed."""
        if not isinstance(self.allowed, int):
            if text not in self.allowed:
                raise ValueError(instead_of(text, self.allowed))
            return text
        if not re.fullmatch(r"\d+", text) or int(text) < self.allowed:
            raise ValueError(f"write a number from {self.allowed} on")
        return int(text)


class Aggregation(NamedTuple):
    build: Callable[..., Pooling]  # (tokens, **options)
    needs_cls: bool
    options: dict[str, Option]
    description: str
    number: str = ""  # the option that a number after the name sets: ap12 is ap:heads=12


def abmilp(tokens: Tokens, content: str = "patch", **options) -> Pooling:
    num_prefix = tokens.num_prefix if content == "all" else 0
    return PooledTokens(AbMILP(tokens.width, grid=tokens.grid, num_prefix=num_prefix, **options), content)


def ap(tokens: Tokens, content: str = "patch", **options) -> Pooling:
    return PooledTokens(AttentivePool(tokens.width, **options), content)


def ep(tokens: Tokens, content: str = "patch", **options) -> Pooling:
    return PooledTokens(EfficientPool(tokens.width, **options), content)


def is_linear(options: dict[str, Value]) -> bool:
    return options["depth"] == 1


CONTENT = Option("patch", ("patch", "all"), "tokens to pool")
SCALE = Option("sum", ("sum", "release"), "weighted sum by weights of sum 1, or the published code's scale",
               flag="aggregation_scale")  # fmt: skip

AGGREGATIONS = {
    "cls": Aggregation(fixed.ClsToken, True, {}, "the [cls] token"),
    "pos": Aggregation(fixed.MeanPatch, False, {}, "the mean of the patch tokens"),
    "both": Aggregation(fixed.ClsAndMeanPatch, True, {}, "[cls] and mean patch, concatenated"),
    "abmilp": Aggregation(
        abmilp, False, {
            "depth": Option(1, 1, "layers of the score"),
            "act": Option("relu", (*ACTIVATIONS, "gated"), "hidden layers of the score", idle=is_linear),
            "hidden": Option(0, 0, "width of the score's hidden layers; 0: the tokens'", idle=is_linear),
            "sa": Option("none", ("none", "map", "both", "residual"),
                         "self-attention first: scores, or scores and values, come from it"),
            "cond": Option("none", ("none", "pe"), "add positions to the score's input"),
            "content": CONTENT,
            "branches": Option(1, 1, "AbMILPs on the same hidden layers, concatenated"),
        },
        "attention-based multiple-instance pooling (the paper's head)",
    ),
    "ap": Aggregation(
        ap, False, {"heads": Option(12, 1, "attention heads"), "content": CONTENT},
        "attentive probing as in CAE; ap12 has 12 heads", number="heads",
    ),
    "ep": Aggregation(
        ep, False, {
            "queries": Option(32, 1, "learned queries"),
            "shrink": Option(1, 1, "the vector is narrower than the tokens by this factor"),
            "content": CONTENT,
        },
        "efficient probing; ep32 has 32 queries", number="queries",
    ),
    "attn-mn": Aggregation(fixed.MeanClsAttention, True, {}, "patches weighted by the mean [cls] attention"),
    "attn-lcte": Aggregation(
        fixed.LowestEntropyClsAttention, True, {}, "patches weighted by the [cls] attention of lowest entropy"
    ),
    "ca": Aggregation(
        fixed.CentralAttention, False,
        {"size": Option(1, 1, "side of the square of patches that attend"), "scale": SCALE},
        "patches weighted by the attention of the central ones; ca2: of the central 2 x 2", number="size",
    ),
    "cp": Aggregation(
        fixed.CentralPatches, False, {"size": Option(1, 1, "side of the square of patches")},
        "the mean of the central patches; cp2: of the central 2 x 2", number="size",
    ),
    "dino": Aggregation(
        fixed.OracleAttention, False, {"scale": SCALE}, "patches weighted by the [cls] attention of --oracle"
    ),
}  # fmt: skip


def check_aggregation(name: str, has_cls: bool, asked_by: str = "--cls_features") -> Aggregation:
    """The entry of AGGREGATIONS; ValueError where there is none or the encoder lacks the [cls] token it needs."""
    if name not in AGGREGATIONS:
        raise ValueError(f"unknown {asked_by} {name!r}: {instead_of(name, AGGREGATIONS)}")
    if AGGREGATIONS[name].needs_cls and not has_cls:
        possible = [other for other, entry in AGGREGATIONS.items() if not entry.needs_cls]
        raise ValueError(f"{asked_by} {name}: this encoder has no [cls] token; write {' or '.join(possible)} instead")
    return AGGREGATIONS[name]


def option_flags() -> dict[str, Option]:
    """{flag without dashes: option}: what is set for every head that does not set it itself."""
    return {
        option.flag or f"{aggregation}_{name}": option
        for aggregation, entry in AGGREGATIONS.items()
        for name, option in entry.options.items()
    }


def parse_head(
    word: str, flags: dict[str, Value], asked_by: str = "--cls_features"
) -> tuple[str, tuple[tuple[str, Value], ...]]:
    """A word of --cls_features -> its aggregation and its options, as ProbeSpec holds them: (name, options).

    "abmilp:depth=2,act=tanh", "ap12" (that is "ap:heads=12"), "cls". flags: {flag: value} of those of option_flags that
    are given. Options at their default are left out, and so are flags that have no effect beside the other options: a
    head has one name. asked_by: whose word it is. ValueError, one line, for what does not exist or has no effect.
    """
    name, _, text = word.partition(":")
    number = re.fullmatch(r"([a-z-]+)(\d+)", name)
    if number and number[1] in AGGREGATIONS and AGGREGATIONS[number[1]].number:
        name = number[1]
        text = f"{AGGREGATIONS[name].number}={number[2]}" + ("," + text if text else "")
    entry = check_aggregation(name, True, asked_by)
    given: dict[str, Value] = {}
    for setting in text.split(",") if text else []:
        key, equals, value = setting.partition("=")
        if not equals or key not in entry.options:
            takes = (
                f"takes {', '.join(entry.options)}, as in {name}:option=value" if entry.options else "has no options"
            )
            raise ValueError(f"{asked_by} {word}: {nearest(key, entry.options)}{name} {takes}; not {setting!r}")
        if key in given:
            raise ValueError(f"{asked_by} {word}: {key} is set twice")
        try:
            given[key] = entry.options[key].read(value)
        except ValueError as error:
            raise ValueError(f"{asked_by} {word}: {key}={value}: {error}") from None
    values = {}
    for key, option in entry.options.items():
        flag = option.flag or f"{name}_{key}"
        try:
            values[key] = given[key] if key in given else option.read(str(flags.get(flag, option.default)))
        except ValueError as error:
            raise ValueError(f"--{flag} {flags[flag]}: {error}") from None
    for key in given:
        if entry.options[key].idle(values):
            others = ", ".join(f"{other}={values[other]}" for other in values if other != key)
            raise ValueError(f"{asked_by} {word}: {key} has no effect with {others}")
    return name, tuple(
        (key, value) for key, value in values.items()
        if key == entry.number or (value != entry.options[key].default and not entry.options[key].idle(values))
    )  # fmt: skip


def head_name(aggregation: str, options: tuple[tuple[str, Value], ...]) -> str:
    """The word that parse_head reads: abmilp, abmilp:depth=2,act=tanh, ap12."""
    entry = AGGREGATIONS.get(aggregation)
    number = entry.number if entry is not None else ""
    suffix = "".join(str(value) for key, value in options if key == number)
    rest = ",".join(f"{key}={value}" for key, value in options if key != number)
    return aggregation + suffix + ":" * bool(rest) + rest
