"""Randomness as a function of names: the same words give the same numbers, in any process and on any machine."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

from util.lazy import lazy

np, torch = lazy("numpy"), lazy("torch")


def stable_seed(*parts: object) -> int:
    """A 63-bit seed that depends on nothing but the text of its parts."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextlib.contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Run a block with the CPU generators of torch, numpy and random seeded by `parts`; restore them afterwards."""
    seed = stable_seed(*parts)
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
