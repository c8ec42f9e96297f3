"""AGGREGATIONS: how the tokens of a block become one vector per image, and the options of each head.

Importing this table does not import torch: the command line lists it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

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
    flag: str = ""  # if not --<aggregation>_<name>
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
    needs_cls: bool
    options: dict[str, Option]
    description: str
    number: str = ""  # the option that a number after the name sets: ap12 is ap:heads=12


def fixed(name: str) -> Callable[..., Pooling]:
    """Build a class of probing.fixed."""

    def build(tokens: Tokens, **options: Value) -> Pooling:
        return getattr(importlib.import_module("probing.fixed"), name)(tokens, **options)

    return build


def learned(module: str, name: str) -> Callable[..., Pooling]:
    """Build a TokenPool of the patch tokens, or with content="all" of all tokens."""

    def build(tokens: Tokens, content: str = "patch", **options: Value) -> Pooling:
        pool = getattr(importlib.import_module(module), name)
        return importlib.import_module("probing.pooling").PooledTokens(pool.of(tokens, content, **options), content)

    return build


def is_linear(options: dict[str, Value]) -> bool:
    return options["depth"] == 1


CONTENT = Option("patch", ("patch", "all"), "tokens to pool")
SCALE = Option("sum", ("sum", "release"), "weights of sum 1, or the published code's scale", flag="aggregation_scale")

AGGREGATIONS = {
    "cls": Aggregation(fixed("ClsToken"), True, {}, "the [cls] token"),
    "pos": Aggregation(fixed("MeanPatch"), False, {}, "the mean of the patch tokens"),
    "both": Aggregation(fixed("ClsAndMeanPatch"), True, {}, "[cls] and mean patch, concatenated"),
    "abmilp": Aggregation(
        learned("abmilp", "AbMILP"),
        False,
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
        "attention-based multiple-instance pooling (the paper's head)",
    ),
    "ap": Aggregation(
        learned("probing.attentive", "AttentivePool"),
        False,
        {"heads": Option(12, 1, "attention heads"), "content": CONTENT},
        "attentive probing as in CAE; ap12 has 12 heads",
        number="heads",
    ),
    "ep": Aggregation(
        learned("probing.attentive", "EfficientPool"),
        False,
        {
            "queries": Option(32, 1, "learned queries"),
            "shrink": Option(1, 1, "factor by which the vector is narrower than the tokens"),
            "content": CONTENT,
        },
        "efficient probing; ep32 has 32 queries",
        number="queries",
    ),
    "attn-mn": Aggregation(fixed("MeanClsAttention"), True, {}, "patches weighted by the mean [cls] attention"),
    "attn-lcte": Aggregation(
        fixed("LowestEntropyClsAttention"), True, {}, "patches weighted by the [cls] attention of lowest entropy"
    ),
    "ca": Aggregation(
        fixed("CentralAttention"),
        False,
        {"size": Option(1, 1, "side of the square of patches whose attention is used"), "scale": SCALE},
        "patches weighted by the attention of the central ones; ca2: of the central 2 x 2",
        number="size",
    ),
    "cp": Aggregation(
        fixed("CentralPatches"),
        False,
        {"size": Option(1, 1, "side of the square of patches")},
        "the mean of the central patches; cp2: of the central 2 x 2",
        number="size",
    ),
    "dino": Aggregation(
        fixed("OracleAttention"), False, {"scale": SCALE}, "patches weighted by the [cls] attention of --oracle"
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
    }


def parse_head(head: str, flags: dict[str, Value]) -> tuple[str, Options]:
    """A head's name -> its aggregation and options, as in ProbeSpec.

    "cls", "abmilp:depth=2,act=tanh", "ap12" (short for "ap:heads=12"). flags: values for option_flags. Options at their
    default and unused ones are omitted, so each head has one name. ValueError, one line, for a head that does not exist
    or an option without effect.
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


def head_name(aggregation: str, options: Options) -> str:
    """The name that parse_head reads: abmilp, abmilp:depth=2,act=tanh, ap12."""
    entry = AGGREGATIONS.get(aggregation)
    number = entry.number if entry is not None else ""
    suffix = "".join(str(value) for key, value in options if key == number)
    rest = ",".join(f"{key}={value}" for key, value in options if key != number)
    return aggregation + suffix + ":" * bool(rest) + rest
