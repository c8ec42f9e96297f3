"""What a run will take: python scripts/expected_hours.py NAME --images 350415090 [--images_per_second 2000] [--gpus 4]

GPU-hours = images / (images/s of one GPU) / 3600. The speed is given, or was measured by scripts/benchmark.py on a GPU
like this machine's with the same architecture (results/benchmark.csv); otherwise no hours are printed. Loading images,
and heads that transform every token, come on top. Other flags are ignored, so that a program's own can follow.
"""

import argparse
import csv
import subprocess
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parent.parent / "results" / "benchmark.csv"


def this_device() -> str | None:
    """The name of this machine's first GPU."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def measured(path: Path, model: str, device: str | None) -> float | None:
    """The newest images/s of the encoder's forward on that device; None where no readable file has one."""
    wanted = {"device": device, "model": model, "contestant": "plain forward"}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if all(row.get(key) == wanted[key] for key in wanted)]
        speed = float(rows[-1]["images_per_second"])
    except (OSError, ValueError, TypeError, LookupError, csv.Error):
        return None
    return speed if 0 < speed < float("inf") else None


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("name")
    parser.add_argument("--images", type=int, required=True, help="through the encoder, over all epochs")
    parser.add_argument("--images_per_second", type=float, default=None, help="of one GPU")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--model", default="vit_base_patch16", help="architecture, by name")
    parser.add_argument("--benchmark", type=Path, default=BENCHMARK, metavar="CSV", help="measured speeds")
    args, _ = parser.parse_known_args()
    if args.gpus < 1 or args.images < 0 or (args.images_per_second is not None and args.images_per_second <= 0):
        parser.exit(2, f"{parser.prog}: --images, --images_per_second and --gpus must be positive\n")
    rate, source = args.images_per_second, "given"
    if rate is None:
        rate, source = measured(args.benchmark, args.model, this_device()), "measured on such a device"
    if rate is None:
        text = "images through the encoder; its speed on this device was not measured, so hours are unknown"
    else:
        hours = args.images / rate / 3600
        cost = f"{hours:.1f} GPU-hours, {hours / args.gpus:.1f} h on {args.gpus} GPU{'s' * (args.gpus > 1)}"
        text = f"images at {rate:,.0f} images/s ({source}): {cost if hours >= 0.5 else f'{60 * hours:.1f} GPU-minutes'}"
    print(f"# {args.name}: {args.images:,} {text}")


if __name__ == "__main__":
    main()
