"""The parser, one-line errors and exit codes of every program. No torch: --help and mistakes answer at once."""

import argparse
import itertools
import json
import math
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from util import signals
from util.choices import instead_of, nearest
from util.distributed import PeerLost, said_first

# ---------------------------------------------------------------------------------------------------------------------
# types of arguments: text -> value, or ArgumentTypeError with what is allowed and what was given
# ---------------------------------------------------------------------------------------------------------------------


def number(kind: type, requirement: str, allowed: Callable[[float], bool]) -> Callable[[str], Any]:
    """An argparse type; NaN and infinity are never allowed."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and allowed(value)):
            raise argparse.ArgumentTypeError(f"must be {requirement}, got {text!r}")
        return value

    convert.metavar = "N" if kind is int else "X"
    return convert


any_int = number(int, "an integer", lambda value: True)
positive_int = number(int, "an integer >= 1", lambda value: value >= 1)
non_negative_int = number(int, "an integer >= 0", lambda value: value >= 0)
positive = number(float, "a number > 0", lambda value: value > 0)
non_negative = number(float, "a number >= 0", lambda value: value >= 0)
share = number(float, "in [0, 1]", lambda value: 0 <= value <= 1)
share_below_one = number(float, "in [0, 1)", lambda value: 0 <= value < 1)
positive_share = number(float, "in (0, 1]", lambda value: 0 < value <= 1)
inner_share = number(float, "in (0, 1)", lambda value: 0 < value < 1)


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """An argparse type: one of the names; its error suggests the nearest."""
    names = list(names)

    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {text!r}: {instead_of(text, names)}")
        return text

    convert.metavar = "{" + ",".join(names) + "}"
    return convert


def named_path(text: str) -> Path:
    """An argparse type: a path. An empty text, of an unset shell variable, would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: is a shell variable not set?")
    return Path(text)


# ---------------------------------------------------------------------------------------------------------------------
# parser
# ---------------------------------------------------------------------------------------------------------------------

METAVARS = {int: "N", float: "X", Path: "PATH", named_path: "PATH"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help shows defaults and whose errors are one line.

    description: the program's docstring; what follows its line "examples:" is printed after the arguments.
    """

    def __init__(self, description: str | None, **options):
        description, heading, examples = (description or "").partition("examples:\n")
        self.actions: dict[str, argparse.Action] = {}  # by flag, or name of a positional argument
        self.other_flags: list[str] = []  # of another program that reads the same command line
        self.presets: dict[str, str] = {}  # flags that --preset NAME stands for
        super().__init__(
            description=description,
            epilog=heading + examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # an abbreviation would change its meaning when a flag is added
            usage="%(prog)s [options]",
            **options,
        )

    def add_argument(self, *names, **options) -> argparse.Action:
        return self._documented(super().add_argument, names, options)

    def add_argument_group(self, *words, **options):
        return self._documenting(super().add_argument_group(*words, **options))

    def add_mutually_exclusive_group(self, **options):
        return self._documenting(super().add_mutually_exclusive_group(**options))

    def _documenting(self, group):
        add = group.add_argument
        group.add_argument = lambda *names, **options: self._documented(add, names, options)
        return group

    def _documented(self, add: Callable, names: Sequence[str], options: dict) -> argparse.Action:
        """Add an argument with its default in the help, a short metavar, and a check of its choices that suggests."""
        text, default = options.get("help"), options.get("default")
        if "action" not in options:
            if choices := options.pop("choices", None):
                options["type"] = one_of(choices)
            kind = options.get("type")
            metavar = METAVARS.get(kind) or getattr(kind, "metavar", None)
            if metavar and options.get("metavar") is None and names[0].startswith("-"):
                options["metavar"] = metavar
        own_default = text in (None, argparse.SUPPRESS) or "default" in text or default is argparse.SUPPRESS
        if not own_default and options.get("action") is not argparse.BooleanOptionalAction:  # which adds it
            if default not in (None, "", []) and default is not False:
                shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
                options["help"] = f"{text} (default: {str(shown).replace('%', '%%')})"
            elif options.get("required"):
                options["help"] = f"{text} (required)"
        action = add(*names, **options)
        for name in names:
            self.actions[name] = action
        if not names[0].startswith("-"):
            self.usage += f" {names[0]}" + (" ..." if options.get("nargs") in ("+", "*") else "")
        return action

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        hint = "" if "--help" in message else "; --help lists the arguments"
        self.exit(2, f"{self.prog}: {message}{hint}\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As argparse does, but an unknown flag is reported first: a missing one may be the same, misspelt."""
        args = sys.argv[1:] if args is None else args
        for argument in itertools.takewhile(lambda argument: argument != "--", args):
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in self.actions and " " not in flag:
                near = nearest(flag, [*self.actions, *self.other_flags])
                self.error(f"{flag}: unknown; {near}--help lists the arguments")
        return super().parse_args(args, namespace)


def parse(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse; a run's args.json, named by --args_from, replaces the defaults, and other flags replace a preset's."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--args_from", type=Path)
    first.add_argument("--preset")
    given = first.parse_known_args(argv)[0]
    argv = [*parser.presets.get(given.preset, "").split(), *(sys.argv[1:] if argv is None else argv)]
    path = given.args_from
    if path is not None:
        try:
            saved = dict(json.loads(path.read_text())["args"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--args_from {path}: not the args.json of a run ({error})")
        known = {action.dest: action for action in parser.actions.values()}
        for name in saved:
            if name not in known:
                parser.error(f"--args_from {path}: this program has no argument {name!r}")
            known[name].required = False
        parser.set_defaults(**saved)
    return parser.parse_args(argv)


def checked(args: argparse.Namespace, *checks: Callable[[argparse.Namespace], Any]) -> argparse.Namespace:
    """The arguments, after the checks; the ValueError of a check is one line and exit code 2. For the top of a main,
    before the slow imports."""
    try:
        for check in checks:
            check(args)
    except ValueError as error:
        fail(error, 2)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# running a program
# ---------------------------------------------------------------------------------------------------------------------


def run_main(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a program. Errors that its user can mend are one line on standard error; the exit code is

    2 for a mistake in the arguments, the files or the disk (ValueError); 1 for a run that diverged or lost a loader
    worker or another process; signals.EXIT_STOPPED after a request to stop; 130 for Ctrl-C that nothing handled.
    """
    threading.excepthook = _ignore_disk_errors
    try:
        with signals.listening():
            main(args)
    except ValueError as error:
        fail(error, 2)
    except (FloatingPointError, signals.DeadWorker, PeerLost) as error:
        fail(error, 1)
    except signals.Stopped as stop:
        fail(stop, signals.EXIT_STOPPED)
    except KeyboardInterrupt:
        fail(KeyboardInterrupt("interrupted"), signals.EXIT_INTERRUPTED)
    except RuntimeError as error:  # PyTorch reports a killed worker wherever the program is at that moment
        if "DataLoader worker" not in str(error):
            raise
        fail(error, 1)


def fail(error: BaseException, code: int) -> NoReturn:
    """Print the error as one line, on the first process that has it, and exit."""
    signals.kill_children()
    line = f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}"
    if said_first(line):
        print(line, file=sys.stderr, flush=True)
    raise SystemExit(code) from error


def _ignore_disk_errors(problem: threading.ExceptHookArgs) -> None:
    """TensorBoard writes from a thread; its disk errors are raised again by the program's next write."""
    if not isinstance(problem.exc_value, OSError):
        threading.__excepthook__(problem)
