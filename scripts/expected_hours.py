"""What a run will take: python scripts/expected_hours.py NAME --images 119805030 [--images_per_second 2000] [--gpus 4]

GPU-hours are images / (images/s of one GPU) / 3600, where images/s are given, or were measured on a device like this
machine's by scripts/benchmark.py for the same architecture (results/benchmark.csv). Otherwise it says that nobody has
measured it. Loading images and heads that transform every token come on top. Other flags are ignored, so that a
program's own can follow.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parent.parent / "results" / "benchmark.csv"
ENCODER = "plain forward"  # what scripts/benchmark.py calls the frozen encoder alone


def this_device() -> str | None:
    """The name of this machine's first GPU."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return names[0].strip() if names else None


def measured(path: Path, model: str, device: str | None) -> float | None:
    """images/s of the encoder's forward on that device, as it was measured last."""
    if device is None or not path.is_file():
        return None
    with open(path, newline="") as file:
        found = [
            float(row["images_per_second"])
            for row in csv.DictReader(file)
            if row.get("device") == device and row.get("model") == model and row.get("contestant") == ENCODER
        ]
    return found[-1] if found else None


def estimate(name: str, images: int, rate: float | None, gpus: int, source: str) -> str:
    if rate is None:
        return f"# {name}: {images:,} images through the encoder; not measured on this device, so no hours are told"
    hours = images / rate / 3600
    spread = f"{hours:.1f} GPU-hours, {hours / gpus:.1f} h on {gpus} GPU{'s' * (gpus > 1)}"
    if hours < 0.5:
        spread = f"{60 * hours:.1f} GPU-minutes"
    return f"# {name}: {images:,} images at {rate:,.0f} images/s ({source}): {spread}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name")
    parser.add_argument("--images", type=int, required=True, help="that go through the encoder, over all epochs")
    parser.add_argument("--images_per_second", type=float, default=None, help="of one GPU")
    parser.add_argument("--gpus", type=int, default=1, help="of the run")
    parser.add_argument("--model", default="vit_base_patch16", help="architecture, by name")
    parser.add_argument("--benchmark", type=Path, default=BENCHMARK, metavar="CSV", help="measured speeds")
    args, _ = parser.parse_known_args()
    if args.gpus < 1 or args.images < 0 or (args.images_per_second is not None and args.images_per_second <= 0):
        parser.exit(2, f"{parser.prog}: --images, --images_per_second and --gpus are positive numbers\n")
    rate, source = args.images_per_second, "given"
    if rate is None:
        rate, source = measured(args.benchmark, args.model, this_device()), "measured on such a device"
    print(estimate(args.name, args.images, rate, args.gpus, source))


if __name__ == "__main__":
    sys.exit(main())
