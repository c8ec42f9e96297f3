"""Names of heads, and AGGREGATIONS (heads.toml): how the tokens of a block become one vector per image.

A head is one pooling or several, whose vectors are concatenated: "abmilp:depth=2", "cls@8-11+pos@11". Importing this
table does not import torch: the command line lists it.
"""

from __future__ import annotations

import functools
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from encoders.architectures import check_blocks
from util.choices import instead_of, nearest

if TYPE_CHECKING:
    from probing.pooling import Pooling, Tokens

Value = int | str
Options = tuple[tuple[str, Value], ...]  # those that differ from their default


class Option(NamedTuple):
    """An option of a head, written `head:name=value`; its flag sets the default for heads that do not specify it."""

    default: Value
    allowed: list[str] | int  # values, or the smallest number
    help: str
    flag: str  # without dashes; "": none
    unused_if: dict[str, Value]  # values of other options that make it irrelevant

    def read(self, text: str) -> Value:
        """The value of a text. ValueError says what is allowed."""
        if isinstance(self.allowed, list):
            if text not in self.allowed:
                raise ValueError(instead_of(text, self.allowed))
            return text
        if not re.fullmatch(r"\d+", text) or int(text) < self.allowed:
            raise ValueError(f"must be a whole number >= {self.allowed}")
        return int(text)

    def unused(self, values: dict[str, Value]) -> bool:
        return bool(self.unused_if) and all(values[key] == value for key, value in self.unused_if.items())


class Aggregation(NamedTuple):
    """An entry of heads.toml, which explains the fields."""

    pool: str
    description: str
    options: dict[str, Option]
    settings: dict[str, Value]
    number: str = ""
    needs_cls: bool = False
    blocks: str = ""

    def build(self, tokens: Tokens, **options: Value) -> Pooling:
        """The pooling for tokens of this shape."""
        from abmilp import AbMILP
        from probing import across, attentive, fixed, unlabelled
        from probing.pooling import PooledTokens

        options = {**self.settings, **options}
        if "by" in options:  # a head whose weights are used
            options["by"] = check_aggregation(options["by"], tokens.has_cls).build
        for module in (fixed, unlabelled, across):
            if hasattr(module, self.pool):
                return getattr(module, self.pool)(tokens, **options)
        pool, content = getattr(attentive, self.pool, AbMILP), options.pop("content", "patch")
        return PooledTokens(pool.of(tokens, content, **options), content)


def entry_of(name: str, options: dict[str, Any], **facts: Any) -> Aggregation:
    options = {key: Option(**{"flag": f"{name}_{key}", "unused_if": {}, **option}) for key, option in options.items()}
    return Aggregation(options=options, **facts)


AGGREGATIONS = {
    name: entry_of(name, **{"settings": {}, "options": {}, **entry})
    for name, entry in tomllib.loads(Path(__file__).with_name("heads.toml").read_text()).items()
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
    options = [option for entry in AGGREGATIONS.values() for option in entry.options.values()]
    return {option.flag: option for option in options if option.flag}


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
        value = given.get(key, str(flags.get(option.flag, option.default)))
        try:
            values[key] = option.read(value)
        except ValueError as error:
            source = f"head {head}: {key}={value}" if key in given else f"--{option.flag} {value}"
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
    number = AGGREGATIONS[aggregation].number
    suffix = "".join(str(value) for key, value in options if key == number)
    rest = ",".join(f"{key}={value}" for key, value in options if key != number)
    return aggregation + suffix + "@" * bool(blocks) + blocks + ":" * bool(rest) + rest


# ---- heads of several poolings and blocks


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
        poolings.append(entry.build(tokens.joined(blocks[-1]), **dict(part.options)))
    return poolings[0] if len(poolings) == 1 else Parts(poolings, blocks)
