"""PERTURBATIONS of test images: filtered noise, low or high frequencies alone, shuffled patches.

One is written name:number, such as lowpass:0.25, and is applied to the crop that the encoder sees, after resizing; the
result is rounded to 8 bits. Random ones draw from torch's global generator, which loaders seed by image. Radii are
distances from the mean in the Fourier spectrum, in units of the Nyquist frequency of half a cycle per pixel: 1 along an
axis, sqrt(2) in a corner. Images whose texture contradicts their shape come from data_sets.demo.

Sources: Park and Kim, "How Do Vision Transformers Work?", ICLR 2022 (noise of a band of frequencies, 0.1 wide);
Naseer et al., "Intriguing Properties of Vision Transformers", NeurIPS 2021 (shuffled grids).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from data_sets.images import pixels_of
from util.choices import instead_of
from util.lazy import lazy

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

torch = lazy("torch")

BAND = 0.1  # width of the ring of noise
ROUNDING = 1e-9  # of radii: one that equals the limit is inside


@functools.lru_cache(maxsize=8)
def radii(height: int, width: int) -> Tensor:
    """(h,w) radius of each coefficient of fft2."""
    rows, columns = (2 * torch.fft.fftfreq(side, dtype=torch.float64) for side in (height, width))
    return torch.hypot(rows[:, None], columns)


def keep(pixels: Tensor, kept: Tensor) -> Tensor:
    """Pixels (3,h,w) with the coefficients of a mask (h,w) alone."""
    return torch.fft.ifft2(torch.fft.fft2(pixels) * kept).real


def low_pass(pixels: Tensor, radius: float) -> Tensor:
    return keep(pixels, radii(*pixels.shape[1:]) <= radius + ROUNDING)


def high_pass(pixels: Tensor, radius: float) -> Tensor:
    """The frequencies above a radius, and each channel's mean."""
    distances = radii(*pixels.shape[1:])
    return keep(pixels, (distances > radius + ROUNDING) | (distances == 0))


def add_noise(pixels: Tensor, radius: float, std: float = 0.1) -> Tensor:
    """Add Gaussian noise of the frequencies within BAND / 2 of a radius, scaled to a root mean square of std."""
    ring = (radii(*pixels.shape[1:]) - radius).abs() <= BAND / 2 + ROUNDING
    if not ring.any():
        size = " x ".join(map(str, pixels.shape[1:]))
        raise ValueError(
            f"noise:{radius:g}: images of {size} pixels have no frequency that near; choose another radius"
        )
    noise = keep(torch.randn(pixels.shape, dtype=pixels.dtype), ring)
    return pixels + noise * (std / noise.square().mean().sqrt())


def shuffle(pixels: Tensor, cells: float) -> Tensor:
    """Cut the image into cells x cells parts and permute them at random."""
    n, (_, height, width) = int(cells), pixels.shape
    if height % n or width % n:
        raise ValueError(f"shuffle:{n}: images of {height} x {width} pixels cannot be cut into {n} x {n} cells")
    parts = pixels.unflatten(2, (n, -1)).unflatten(1, (n, -1)).transpose(2, 3).flatten(1, 2)  # (3,n n,h/n,w/n)
    parts = parts[:, torch.randperm(n * n)].unflatten(1, (n, n))
    return parts.transpose(2, 3).flatten(3).flatten(1, 2)


class Kind(NamedTuple):
    """function: of pixels (3,h,w) in float64 from 0 to 1, and of numbers within the limits."""

    function: Callable[..., Tensor]
    usage: str
    limits: tuple[tuple[float, float], ...]
    axis: str  # the first number, for figures


PERTURBATIONS = {
    "lowpass": Kind(low_pass, "lowpass:R, R from 0 to 1.5", ((0, 1.5),), "kept up to radius"),
    "highpass": Kind(high_pass, "highpass:R, R from 0 to 1.5", ((0, 1.5),), "kept above radius"),
    "noise": Kind(
        add_noise, "noise:R or noise:R,STD, R from 0 to 1.5, STD to 1", ((0, 1.5), (0, 1)), "radius of the noise"
    ),
    "shuffle": Kind(shuffle, "shuffle:N, N a whole number >= 1", ((1, 1024),), "cells per side"),
}


class Perturbation(NamedTuple):
    """A step of data_sets.views.View: an image -> pixels (3,h,w) uint8."""

    kind: str
    numbers: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.kind}:" + ",".join(f"{number:.10g}" for number in self.numbers)

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        pixels = PERTURBATIONS[self.kind].function(pixels_of(image).double() / 255, *self.numbers)
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def read_perturbation(text: str) -> Perturbation:
    """The perturbation of a text such as lowpass:0.25. ValueError says what is allowed."""
    name, _, rest = text.partition(":")
    if name not in PERTURBATIONS:
        raise ValueError(f"perturbation {text!r}: {instead_of(name, PERTURBATIONS)}, as in lowpass:0.25")
    kind = PERTURBATIONS[name]
    with contextlib.suppress(ValueError):
        numbers = tuple(map(float, rest.split(",")))
        within = [least <= number <= most for number, (least, most) in zip(numbers, kind.limits, strict=False)]
        if len(numbers) <= len(kind.limits) and all(within) and (name != "shuffle" or numbers[0].is_integer()):
            return Perturbation(name, numbers)
    raise ValueError(f"perturbation {text!r}: write {kind.usage}")
