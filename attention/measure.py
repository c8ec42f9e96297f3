"""One pass of a frozen encoder over images: every metric in every block, as moments over the images.

A pass can be interrupted between two batches and resumed bit for bit.
"""

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attention.metrics import LEGEND, METRICS, REFERENCES, Metric, Sizes, reduce_attention
from attention.tokens import log_spectrum
from data_sets.loader import Watched
from encoders.load import Encoder
from models_vit import BlockTrace, VisionTransformer
from runtime.analysis import Progress
from util.distributed import gather_objects
from util.finite import all_finite, overflow_cause
from util.moments import Covariance, Moments
from util.progress import log

Key = tuple[str, int]  # metric and block; for metrics of tokens, the number of blocks before them


def applicable(names: Collection[str], backbone: VisionTransformer) -> dict[str, Metric]:
    """The metrics among the names whose tokens the encoder has. ValueError if there is none."""
    absent = {"cls"} if not backbone.has_cls else set()
    absent |= {"registers"} if not backbone.num_registers else set()
    metrics = {name: METRICS[name] for name in METRICS if name in names and not absent & set(METRICS[name].needs)}
    if not metrics:
        missing = " and ".join(f"no {'[cls]' if token == 'cls' else 'register'} token" for token in sorted(absent))
        raise ValueError(f"metrics {' '.join(names)}: this encoder has {missing}")
    return metrics


def observe(
    step: BlockTrace, metrics: dict[str, Metric], num_prefix: int, has_cls: bool, sizes: Sizes, reduction: str
) -> Iterator[tuple[Key, Tensor]]:
    """Metrics of one block, (B,..) each; metrics of tokens are also taken before the first block."""
    of_attention = {name: metric for name, metric in metrics.items() if not metric.of_tokens}
    if of_attention:
        wanted = {need for metric in of_attention.values() for need in metric.needs}
        reduced = reduce_attention(step, num_prefix, has_cls, reduction, wanted, sizes)
        for name, metric in of_attention.items():
            yield (name, step.index), metric.record(reduced)
    states = {step.index + 1: step.out} if step.index else {0: step.x, 1: step.out}
    for depth, tokens in states.items():
        patches = tokens[:, num_prefix:].unflatten(1, sizes.grid)
        for name, metric in metrics.items():
            if metric.of_tokens:
                yield (name, depth), metric.compute(patches) if metric.over_images else metric.record(patches)


class Recorder:
    """Running moments of all observations, by key."""

    def __init__(self):
        self.moments = Moments()  # of all records of an image as one vector: one update per batch
        self.widths: dict[Key, int] = {}
        self.covariances: dict[Key, Covariance] = {}

    @classmethod
    def of(cls, states: Sequence[dict[str, Any]]) -> "Recorder":
        """Merge the states of several recorders, in the given order so that all ranks compute the same bits.
        ValueError or KeyError for an invalid state."""
        total = cls()
        for state in states:
            moments = Moments(**state["moments"])
            widths = {(name, block): width for name, block, width in state["widths"]}
            numbers = (sum(widths.values()),)
            if widths and not moments.mean.shape == moments.squares.shape == numbers:
                raise ValueError(f"its moments are not of {numbers[0]} numbers")
            total.widths = total.widths or widths
            total.moments.merge(moments)
            for name, block, kept in state["covariances"]:
                total.covariances.setdefault((name, block), Covariance()).merge(Covariance(**kept))
        return total

    def state(self) -> dict[str, Any]:
        return {
            "moments": vars(self.moments),
            "widths": [[*key, width] for key, width in self.widths.items()],
            "covariances": [[*key, vars(covariance)] for key, covariance in self.covariances.items()],
        }

    def add(self, observed: dict[Key, Tensor]) -> None:
        """Add a batch of at least one image. FloatingPointError for a number that is not finite, ValueError for a
        set of metrics that differs from the batches before."""
        records = {key: record for key, record in observed.items() if not METRICS[key[0]].over_images}
        widths = {key: record.shape[1] for key, record in records.items()}
        if records and self.widths not in ({}, widths):
            raise ValueError("the checkpoint holds other metrics than this run measures: start a new run")
        numbers = torch.cat(list(records.values()), dim=1).cpu() if records else torch.empty(0)
        vectors = {key: record.cpu() for key, record in observed.items() if key not in records}
        if not all(values.isfinite().all() for values in (numbers, *vectors.values())):
            name, block = next(key for key, record in observed.items() if not record.isfinite().all())
            raise FloatingPointError(f"{name} is not finite in block {block}: leave this metric out")
        for key, means in vectors.items():
            self.covariances.setdefault(key, Covariance()).update(means)
        if records:
            self.widths = widths
            self.moments.update(numbers)

    def results(self) -> dict[Key, dict]:
        """count, mean and std over the images of the summary, and of each number per axis, as JSON has them."""
        results, widths = {}, list(self.widths.values())
        parts = (self.moments.mean.split(widths), self.moments.std().split(widths)) if widths else ([], [])
        for key, mean, std in zip(self.widths, *parts, strict=True):
            axis = METRICS[key[0]].axis
            results[key] = {"count": self.moments.count, "mean": float(mean[0]), "std": float(std[0])}
            if axis is not None:
                results[key] |= {f"mean_per_{axis}": mean[1:].tolist(), f"std_per_{axis}": std[1:].tolist()}
        for key, covariance in self.covariances.items():
            rank = min(covariance.count - 1, len(covariance.mean))  # more cannot differ from zero
            spectrum = log_spectrum(covariance.matrix(), rank)
            mean, axis = float(spectrum.mean()) if rank else None, METRICS[key[0]].axis
            results[key] = {"count": covariance.count, "mean": mean, "std": None, f"mean_per_{axis}": spectrum.tolist()}
        return results


@torch.no_grad()
def measure(
    backbone: VisionTransformer,
    loader: Iterable,
    metrics: dict[str, Metric],
    sizes: Sizes,
    amp: torch.dtype,
    reduction: str,
    device: torch.device,
    description: str = "attention",
    progress: Progress | None = None,
) -> dict[Key, dict]:
    """{(metric, block): count, mean, std, ...} over the images of all processes, each counted once.

    Metrics of tokens have a block more: 0 is what enters the first block. progress: the images measured before; the
    loader yields the others. FloatingPointError at the first batch with activations or metrics that are not finite:
    in JSON they would be null, and one image would hide the mean of all others.
    """
    recorder, between = (progress.record, progress.reach) if progress else (Recorder(), lambda done: None)
    seen, start = 0, time.perf_counter()
    for sample in (watched := Watched(loader, description, agree=True, between=between)):
        images = sample.image.to(device, non_blocking=True)
        observed, finite = {}, []
        with torch.autocast(device.type, dtype=amp, enabled=amp != torch.float32):
            for step in backbone.trace(images):
                if step.index == 0 and "cls_update_ratio" in metrics and len(metrics) > 1 and not step.x[:, 0].any():
                    log.info("%s: cls_update_ratio is left out, as [cls] enters the first block as zeros", description)
                    metrics = {name: metric for name, metric in metrics.items() if name != "cls_update_ratio"}
                observed |= observe(step, metrics, backbone.num_prefix_tokens, backbone.has_cls, sizes, reduction)
                # not the output alone: a key of -inf gets the attention 0, and leaves no trace there
                finite.append(all_finite([step.q, step.k, step.out]))
        if not torch.stack(finite).all():
            cause = overflow_cause({"the encoder's": backbone}, amp)
            raise FloatingPointError(f"{description}: activations are not finite: {cause}")
        recorder.add(observed)
        seen += len(images)
        watched.bar.set_postfix_str(f"{seen / (time.perf_counter() - start):.0f} images/s")
    if not (results := Recorder.of(gather_objects(recorder.state())).results()):
        raise ValueError(f"{description}: none of the images can be read")
    return results


def summary(label: str, encoder: Encoder, input_size: int, numbers: dict[Key, dict]) -> dict:
    """attention.json: what was measured, on what, and what each number means; enough to draw every figure.

    numbers: of `measure`. Blocks are counted from 0; metrics of tokens also have an entry `embedding`.
    """
    backbone, measured = encoder.backbone, {}
    sizes = Sizes.of(backbone, input_size)
    for name in dict.fromkeys(name for name, _ in numbers):
        metric = METRICS[name]
        entry = {key: getattr(metric, key) for key in ("unit", "definition", "source", "axis")}
        for bound in ("lower", "upper", "uniform"):
            reference = getattr(metric, bound)
            entry[bound] = reference and {"name": reference, "value": REFERENCES[reference](sizes)}
        if metric.of_tokens:
            entry["embedding"] = numbers[name, 0]
        entry["blocks"] = [{"block": b, **numbers[name, b + metric.of_tokens]} for b in range(backbone.depth)]
        measured[name] = entry
    return {
        "label": label,
        "encoder": encoder.record,
        "random_weights": encoder.record["source"] is None,
        "images": next(iter(numbers.values()))["count"],
        "input_size": input_size,
        "patch_size": sizes.patch_size,
        "patches": sizes.patches,
        "tokens": sizes.tokens,
        "registers": sizes.registers,
        "heads": backbone.num_heads,
        "legend": LEGEND,
        "metrics": measured,
    }


def table(result: dict) -> str:
    """A line per metric of attention.json: the first, middle and last block, and the mean over all blocks."""
    depth = len(next(iter(result["metrics"].values()))["blocks"])
    shown = dict.fromkeys((0, depth // 2, depth - 1))
    lines = [f"{'':34}" + "".join(f"{f'block {block}':>11}" for block in shown) + f"{'all blocks':>12}  unit"]
    for name, metric in result["metrics"].items():
        means = [block["mean"] for block in metric["blocks"]]
        if None not in means:
            columns = "".join(f"{means[block]:>11.4g}" for block in shown)
            lines.append(f"  {name:32}{columns}{sum(means) / depth:>12.4g}  {metric['unit']}")
    return "\n".join(lines)
