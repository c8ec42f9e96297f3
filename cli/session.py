"""What the mains share: checked arguments, the processes of a run and its folder, and the recipe of a training.

It imports torch, so mains import it once their arguments are checked.
"""

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from cli.arguments import NODE_FLAGS, check_files, plain, timeouts
from cli.encoder_arguments import choose_precision
from runtime.folder import RunFolder
from runtime.processes import process_group
from runtime.provenance import utc_now
from runtime.training import Plan, Training
from util.distributed import World, barrier
from util.lr_sched import fitting_warmup, lr_at, scaled_lr


@contextlib.contextmanager
def session(
    args: argparse.Namespace, check: Callable[[argparse.Namespace], None], results: str = ""
) -> Iterator[tuple[World, RunFolder]]:
    """Check the arguments, join the processes of the run, and refuse a folder of another run; ValueError. At the end,
    wait for all processes and close the folder. results: pattern of an analysis's result files."""
    check(args)
    check_files(args)
    shared = {f"--{name}": value for name, value in plain(args).items() if name not in NODE_FLAGS}
    with process_group(args.device, args.dist_url, timeouts(args), shared) as world:
        choose_precision(args, world.device)
        path = args.output_dir and args.output_dir + getattr(args, "suffix", "")
        folder = RunFolder(path, args.log_dir, args.track)
        if results and not args.resume:
            folder.refuse_results(results)
        elif not results and not getattr(args, "eval", False):
            folder.refuse_overwriting(args.resume)
        yield world, folder
        barrier()
        folder.close()


def plan(args: argparse.Namespace) -> Plan:
    return Plan(args.epochs, args.seed, args.save_every_minutes, args.save_every_steps)


def schedule(args: argparse.Namespace) -> Callable[[float, float], float]:
    """(epoch, peak rate) -> rate: linear warm-up and half a cosine."""
    warmup = fitting_warmup(args.warmup_epochs, args.epochs)
    return functools.partial(lr_at, epochs=args.epochs, warmup_epochs=warmup, min_lr=args.min_lr)


def peak_rate(args: argparse.Namespace, blr: float, effective_batch: int) -> float:
    """--lr, or the base rate scaled with the effective batch."""
    return args.lr if args.lr is not None else scaled_lr(blr, effective_batch)


def write_results(folder: RunFolder, training: Training, results: dict[str, Any], run: dict[str, Any]) -> None:
    """Write results.json: the results, what the run is, and how long it took."""
    folder.write("results.json", {**results, **run, "seconds": training.elapsed, "finished": utc_now()})
