"""What the mains share: checked arguments, the processes of a run and its folder, and the recipe of a training.

It imports torch, so mains import it once their arguments are checked.
"""

import argparse
import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

from cli.arguments import NODE_FLAGS, check_files, plain, timeouts
from cli.encoder_arguments import choose_precision
from runtime.folder import RunFolder
from runtime.provenance import code_digest, hardware, utc_now, versions
from runtime.training import Plan, Training
from util.distributed import World, barrier, distributed, gather_objects, require_equal
from util.lr_sched import fitting_warmup, lr_at, scaled_lr
from util.progress import log, setup_logging


@contextlib.contextmanager
def session(
    args: argparse.Namespace, check: Callable[[argparse.Namespace], None], results: str = ""
) -> Iterator[tuple[World, RunFolder]]:
    """Check the arguments, join the processes of the run, and refuse a folder of another run; ValueError. At the end,
    wait for all processes and close the folder. results: pattern of an analysis's result files."""
    check(args)
    check_files(args)
    keep_freed_memory()
    with distributed(args.device, args.dist_url, timeouts(args)) as world:
        setup_logging()
        if world.size > 1:
            compare_processes(args, world)
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


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors for the next step: returning it to the system costs a page fault for each 4 KiB.

    Banks of [cls] probes train 1.7 times as fast on a CPU, a ViT-B 13 %. Of glibc; other C libraries have no mallopt.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large tensors, too, come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def compare_processes(args: argparse.Namespace, world: World) -> None:
    """ValueError on all processes if arguments, code or versions of libraries are not the same everywhere."""
    arguments = {f"--{name}": value for name, value in plain(args).items() if name not in NODE_FLAGS}
    remedy = "start every process with the same command and the same installation"
    require_equal({"code": code_digest(), **versions(), **arguments}, remedy)
    machines = {str(machine) for machine in gather_objects(hardware(world.device))}
    if len(machines) > 1 and world.rank == 0:
        log.warning("results may differ in the last digits, because the processes run on %s", machines)


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
