"""Statements of the paper, tested on records: python scripts/claims.py [--records FOLDER] [--write PAGE | --check PAGE]

FOLDER (default results/study) has encoders.toml, which names encoders, their kinds and their records
(scripts/study_measure.sh). Every claim of paper/claims.toml gets an effect, a 95 % interval and a verdict, in Markdown.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.console import Parser, run_main
from paper import claims
from paper.claims import CONFIRMED, REFUTED, UNDECIDED, UNTESTED, Effect, Encoder, Missing, Tested, unit_of
from paper.shown import ROOT
from util.files import keep_table, reading
from util.intervals import student

COMMAND = "python scripts/claims.py --write"
SHOWN = {
    "attention": ("[curves](study_attention.png)", "main_analyze_attention.py"),
    "park": ("[curves](study_park.png)", "main_analyze_attention.py"),
    "depth": ("[curves](study_depth.png)", "main_linprobe.py --return_block"),
    "cues": ("[curves](study_perturbed.png)", "evaluate_probe.py"),
    "scaling": ("[accuracies](#accuracies)", "main_linprobe.py"),
    "heads": ("[accuracies](#accuracies)", "main_linprobe.py"),
    "rules": ("[weights](#weights)", "main_analyze_aggregation.py"),
}
RULES = ("attn-mn", "attn-lcte", "ca1", "dino", "far", "norm", "lowfreq", "fiedler", "received")
DETAILS = ["claim", "measurement", "interval over", "each encoder", "attack", "shown in", "measured by"]
TITLES = {
    REFUTED: "Refuted: these contradict the paper at this scale",
    CONFIRMED: "Confirmed",
    UNDECIDED: "Undecided",
    UNTESTED: "Not testable on these encoders",
}


def number(value: float) -> str:
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4
    return "–" if math.isnan(value) else f"{value:+.{digits}f}".replace("-", "−")


def effect_text(effect: Effect) -> str:
    low, high = map(number, effect.interval)
    return f"{number(effect.value)} (no interval)" if low == "–" else f"{number(effect.value)} ({low} to {high})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(text.replace('|', '&#124;') for text in line)} |" for line in lines]


def section(verdict: str, tests: Sequence[Tested]) -> list[str]:
    lines = ["", f"## {TITLES[verdict]} ({len(tests)})", ""]
    if verdict == UNTESTED:
        rows = [[test.claim["statement"], test.claim["source"], test.reason] for test in tests]
        return lines + table(["statement", "source", "what it needs"], rows)
    rows, details = [], []
    for test in tests:
        claim, effect = test.claim, test.effect
        rows.append([claim["name"], claim["statement"], claim["source"], effect_text(effect), unit_of(claim)])
        each = ", ".join(f"{label} {number(value)}" for label, value in effect.each.items())
        attack = f"{claim['attack']['label']}: {effect_text(test.attack) if test.attack else 'not measured'}"
        figure, program = SHOWN[claim["figure"]]
        details.append([claim["name"], claim["measurement"], effect.over, each, attack, figure, f"`{program}`"])
    lines += table(["claim", "statement", "source", "effect (95 % interval)", "unit"], rows)
    return [*lines, "", *table(DETAILS, details)]


def grid(encoders: Mapping[str, Encoder], names: Sequence[str], *quantities: Callable) -> list[str]:
    """Names x encoders: means of quantities over runs; a dash where the records lack a value."""

    def text(name: str, encoder: Encoder) -> str:
        try:
            return ", ".join(f"{quantity(encoder, name).mean():.1f}" for quantity in quantities)
        except Missing:
            return "–"

    rows = [[f"`{name}`", *(text(name, encoder) for encoder in encoders.values())] for name in names]
    return table(["", *encoders], [row for row in rows if set(row[1:]) != {"–"}])


def closed(encoder: Encoder, rule: str):
    """Share of the gap between mean patch and AbMILP that a rule closes, %, in each run; Missing if it may be 0."""
    start, end = (claims.accuracy(encoder, head) for head in ("pos", "abmilp"))
    if not student(end - start).low > 0:
        raise Missing(f"{encoder.label} has no gap")
    return 100 * (claims.accuracy(encoder, rule) - start) / (end - start)


def markdown(encoders: Mapping[str, Encoder]) -> str:
    tests = [claims.judge(claim, encoders) for claim in claims.CLAIMS]
    counts = Counter(test.verdict for test in tests)
    lines = [
        f"{len(tests)} statements, {len(tests) - counts[UNTESTED]} tested: "
        + ", ".join(f"{counts[v]} {v}" for v in TITLES)
        + "."
    ]
    for verdict in TITLES:
        if counts[verdict]:
            lines += section(verdict, [test for test in tests if test.verdict == verdict])
    probed = {label: encoder for label, encoder in encoders.items() if claims.heads_of(encoder)}
    heads = list(dict.fromkeys(head for encoder in probed.values() for head in claims.heads_of(encoder)))
    lines += ["", "## Accuracies", "", "%, last block, mean over runs, each head at its own rate.", ""]
    lines += grid(probed, heads, claims.accuracy)
    lines += ["", "## Weights", "", "Entropy of the weights in nats, MaxBoxAccV2 in %; means over runs.", ""]
    lines += grid(probed, heads, claims.entropy, claims.localization)
    lines += ["", "## Gap closed by rules", "", "(rule - `pos`) / (`abmilp` - `pos`), %, mean over runs.", ""]
    return "\n".join([*lines, *grid(probed, [rule for rule in RULES if rule in heads], closed), ""])


def main(args: argparse.Namespace) -> None:
    encoders, page = claims.read_encoders(args.records), args.write or args.check
    with reading(args.records, "a folder of complete records"):
        text = markdown(encoders)
    if page is None:
        print(text, end="")
    else:
        keep_table(page, "claims", COMMAND, text, write=args.write is not None)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    parser.add_argument("--records", type=Path, default=ROOT / "results" / "study", help="folder with encoders.toml")
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--write", type=Path, metavar="PAGE", help="put the text between the page's markers")
    pages.add_argument("--check", type=Path, metavar="PAGE", help="fail where the page's text is another")
    return parser


if __name__ == "__main__":
    run_main(main, get_args_parser().parse_args())
