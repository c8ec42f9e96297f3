"""The parser, one-line errors and exit codes of every program. No torch: --help and mistakes answer at once."""

import argparse
import atexit
import contextlib
import itertools
import json
import math
import os
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from util import signals
from util.choices import instead_of, nearest
from util.distributed import PeerLost, joined
from util.files import without_credentials
from util.rendezvous import NotJoined
from util.workers import DeadWorker, worker_failure


def number(kind: type, requirement: str, allowed: Callable[[float], bool]) -> Callable[[str], Any]:
    """An argparse type; NaN, infinity and integers beyond 64 bits are never allowed."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        bound = 2**63 if kind is int else math.inf
        if not (abs(value) < bound and allowed(value)):  # NaN is neither
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


def refuse(applies: object, message: str) -> None:
    """ValueError where a mistake applies."""
    if applies:
        raise ValueError(message)


def named_path(text: str) -> Path:
    """An argparse type: a path. An empty text, of an unset shell variable, would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: is a shell variable not set?")
    return Path(text)


METAVARS = {int: "N", float: "X", Path: "PATH", named_path: "PATH"}


class Help(argparse.RawDescriptionHelpFormatter):
    """Help with defaults, and with short placeholders for values."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if "default" in text or default in (None, "", [], [None], [""], False, argparse.SUPPRESS):
            return f"{text} (required)" if action.required and action.option_strings else text
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        return f"{text} (default: {str(shown).replace('%', '%%')})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return METAVARS.get(action.type) or getattr(action.type, "metavar", None) or action.dest.upper()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help shows defaults and whose errors are one line.

    description: what the program does; what follows its line "examples:" is printed after the arguments.
    """

    def __init__(self, description: str | None, **options):
        description, heading, examples = (description or "").partition("examples:\n")
        self.other_flags: list[str] = []  # of another program that reads the same command line
        self.presets: dict[str, str] = {}  # flags that --preset NAME stands for
        self.groups: dict[str, argparse._ArgumentGroup] = {}  # those of add_groups, by title
        options = {"epilog": heading + examples, "formatter_class": Help, "usage": "%(prog)s [options]", **options}
        # without abbreviations, whose meaning changes when a flag is added
        super().__init__(description=description, allow_abbrev=False, **options)

    def add_groups(self, groups: dict[str, Any], **tables: Any) -> None:
        """Add the groups of flags of a TOML file, see flags.toml.

        tables: the names that `choices` and braces in the help stand for, or one text for the help; types of flags."""
        texts = {k: v if isinstance(v, str) else ", ".join(v) for k, v in tables.items() if not callable(v)}
        for title, group in groups.items():
            shared, own = FLAGS.get(group.get("include"), {}), {k: v for k, v in group.items() if isinstance(v, dict)}
            self.groups[title] = self.add_argument_group(title)
            for name in [name for name in {**shared, **own} if name not in group.get("omit", ())]:
                options = {**shared.get(name, {}), **own.get(name, {})}
                if options.pop("each", False) and group.get("several"):
                    options |= {"nargs": "+", "default": [options.get("default")]}
                names = [f"--{name}", *filter(None, [options.pop("alias", None)])]
                self.groups[title].add_argument(*names, **argparse_options(options, tables, texts))

    def add_argument(self, *names, **options) -> argparse.Action:
        action = super().add_argument(*names, **options)
        if not action.option_strings:
            self.usage += f" {action.dest}" + (" ..." if action.nargs in ("+", "*") else "")
        return action

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"unknown {value!r}: {instead_of(str(value), action.choices)}")

    @property
    def flags(self) -> list[str]:
        return list(self._option_string_actions)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        hint = "" if "--help" in message else "; --help lists the arguments"
        self.exit(2, f"{self.prog}: {message}{hint}\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As argparse does, but an unknown flag is reported first: a missing one may be the same, misspelt."""
        args = sys.argv[1:] if args is None else args
        for argument in itertools.takewhile(lambda argument: argument != "--", args):
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in self.flags and " " not in flag:
                near = nearest(flag, [*self.flags, *self.other_flags])
                self.error(f"{flag}: unknown; {near}--help lists the arguments")
        return super().parse_args(args, namespace)

    def take_defaults(self, saved: dict[str, Any]) -> None:
        """Replace defaults by values of JSON; ValueError where an argument does not take its value."""
        known = {action.dest: action for action in self._actions}
        for name, value in saved.items():
            if name not in known:
                raise ValueError(f"this program has no argument {name!r}")
            action, values = known[name], value if isinstance(value, list) else [value]
            several, switch = action.nargs not in (None, "?", 0), isinstance(action.default, bool)
            kinds = bool if switch else str if action.type in (None, Path, named_path) else (str, int, float)
            if value != action.default or action.required:
                alike = all(isinstance(item, kinds) and isinstance(item, bool) == switch for item in values)
                short = not values or (several and isinstance(action.nargs, int) and len(values) != action.nargs)
                if not alike or short or (isinstance(value, list) and not several):
                    raise ValueError(f"--{name} does not take {json.dumps(value)}")
            try:
                for text in [str(item) for item in values if item is not None and not switch]:
                    self._check_value(action, self._get_value(action, text))
            except argparse.ArgumentError as error:
                raise ValueError(f"--{name}: {error.message}") from error
            action.required = False
            self.set_defaults(**{name: values if several and isinstance(value, str | int | float) else value})


FLAGS = tomllib.loads(Path(__file__).with_name("flags.toml").read_text("utf-8"))


def argparse_options(options: dict[str, Any], tables: dict[str, Any], texts: dict[str, str]) -> dict[str, Any]:
    """The options of add_argument that a flag of a TOML file stands for."""
    options = {**options, "help": options["help"].format_map(texts) if options.get("help") else argparse.SUPPRESS}
    if isinstance(options.get("metavar"), list):
        options["metavar"] = tuple(options["metavar"])
    if isinstance(options.get("choices"), str):
        options["choices"] = list(tables[options["choices"]])
    if "type" in options:
        options["type"] = {"int": int, "float": float, "Path": Path, **globals(), **tables}[options["type"]]
    if options.get("action") == "BooleanOptionalAction":
        options["action"] = argparse.BooleanOptionalAction
    return options


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
            parser.take_defaults(dict(json.loads(path.read_text(encoding="utf-8"))["args"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            parser.error(f"--args_from {path}: not the args.json of a run of this program ({error})")
    return parser.parse_args(argv)


def checked(args: argparse.Namespace, *checks: Callable[[argparse.Namespace], Any]) -> argparse.Namespace:
    """The arguments, after the checks; the ValueError of a check is one line and exit code 2. For the top of a main,
    before the slow imports."""
    signals.exit_on_request()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of lost connections are pages of addresses
    try:
        for check in checks:
            check(args)
    except ValueError as error:
        fail(error, 2)
    return args


def run_main(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a program. Errors that its user can mend are one line on standard error; the exit code is

    2 for a mistake in the arguments, the files or the disk (ValueError, OSError); 1 for a run that diverged or lost a
    loader worker or another process; signals.EXIT_STOPPED after a request to stop, and where other ranks do not answer:
    the same command continues the run; 130 for Ctrl-C that nothing handled.
    """
    with contextlib.suppress(AttributeError):  # not a file, in tests
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    threading.excepthook = _ignore_disk_errors
    try:
        with signals.listening():
            main(args)
            sys.stdout.flush()
    except ValueError as error:
        fail(error, 2)
    except OSError as error:  # of a file that a script reads or writes, or of its output
        if error.errno is None:
            raise
        if error.filename is None:
            with contextlib.suppress(OSError):
                sys.stdout.close()  # it would be flushed once more, and fail
        fail(ValueError(f"{error.filename or 'the output, or a connection'}: {error.strerror}"), 2)
    except PeerLost as error:
        fail(error, 1 if error.answered else signals.EXIT_STOPPED)
    except (NotJoined, signals.Stopped) as error:
        fail(error, signals.EXIT_STOPPED)
    except FloatingPointError as error:
        fail(error, 1)
    except RuntimeError as error:  # PyTorch reports a killed worker wherever the program is at that moment
        if not (failure := error if isinstance(error, DeadWorker) else worker_failure(error)):
            raise
        fail(failure, 1)
    except KeyboardInterrupt:
        fail(KeyboardInterrupt("interrupted"), signals.EXIT_INTERRUPTED)


def fail(error: BaseException, code: int) -> NoReturn:
    """Print the error as one line and exit."""
    signals.kill_children()
    if getattr(error, "reported_here", True):
        # torchrun ends all processes when one fails: only an error that the first one does not have is still reported
        time.sleep(min(int(os.environ.get("LOCAL_RANK", 0)), 1))
        line = f"{Path(sys.argv[0]).name}: {' '.join(without_credentials(str(error)).split())}"
        line = line.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        print(line, file=sys.stderr, flush=True)
    if joined():  # threads of the process group may wait for ranks that are gone
        sys.stdout.flush()
        atexit.register(os._exit, code)
    raise SystemExit(code) from error


def _ignore_disk_errors(problem: threading.ExceptHookArgs) -> None:
    """TensorBoard writes from a thread; its disk errors are raised again by the program's next write."""
    if not isinstance(problem.exc_value, OSError):
        threading.__excepthook__(problem)
