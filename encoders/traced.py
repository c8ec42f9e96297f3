"""Trace any Vision Transformer while its own library runs it: nothing is converted, so the tokens are exact.

Queries, keys, scale and bias are the arguments of scaled_dot_product_attention; forward hooks see the tokens that enter
and leave a block, and the output of its attention. Letters as in models_vit.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from encoders.libraries import Loaded
from models_vit import Backbone, BlockTrace

CLS_TOKEN = re.compile(r"(.*\.)?(cls|class)_?(token|embedding|embed|emb)s?")  # names of its parameter


@dataclass(eq=False)
class Call:
    """A call of scaled_dot_product_attention, and the names of the modules that were running, outermost first."""

    modules: tuple[str, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    scale: float


class Run(greenlet):
    """One forward pass of a model, which pauses at every block while its BlockTrace is used elsewhere."""

    def __init__(self, forward: Callable):
        super().__init__(forward)
        self.x: Tensor | None = None  # entering the running block
        self.update: Tensor | None = None
        self.calls: list[Call] = []  # of the running block
        self.modules: list[str] = []  # running, outermost first; only in structure_of


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Record each Run's calls of scaled_dot_product_attention. The fused path of nn.MultiheadAttention is off."""
    original, fused = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        run = getcurrent()
        if isinstance(run, Run):
            width = query.shape[-1] ** -0.5 if scale is None else scale
            run.calls.append(Call(tuple(run.modules), query, key, value, attn_mask, is_causal, width))
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)

    F.scaled_dot_product_attention = attention
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fused)


# ---- the structure of a model


class Structure(NamedTuple):
    blocks: list[nn.Module]
    attentions: list[nn.Module]  # of each block
    names: list[str]  # of the attentions
    norm: nn.Module  # after the last block; nn.Identity if there is none
    used: set[str]  # modules that compute the tokens
    output: Any  # of the model


class Ended(NamedTuple):
    """A module's completed forward pass."""

    name: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None


def first_tensor(value: Any) -> Tensor | None:
    """A tensor, or the first one of a tuple or of keyword arguments."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else (value,)
    return next((item for item in values if isinstance(item, Tensor)), None)


def structure_of(model: nn.Module, forward: Callable[[], Any]) -> Structure:
    """Find the blocks of a model in a forward pass of one image.

    Blocks are the members of the container with the most members that compute attention. ValueError, with the reason,
    if a BlockTrace does not describe the model's attention.
    """
    names = {module: name for name, module in model.named_modules()}
    run, ended = Run(forward), []

    def enter(module: nn.Module, args: tuple) -> None:
        run.modules.append(names[module])

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        ended.append(Ended(run.modules.pop(), module, first_tensor(args), first_tensor(output)))

    with contextlib.ExitStack() as hooks, listening():
        for module in names:
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        output = run.switch()
    if not run.calls:
        raise ValueError("no attention call was seen: it does not use torch's scaled_dot_product_attention")

    members: dict[str, dict[str, list[Call]]] = {}  # container -> member -> its calls
    for call in run.calls:
        for name in call.modules[1:]:
            members.setdefault(name.rpartition(".")[0], {}).setdefault(name, []).append(call)
    lists = (nn.ModuleList, nn.Sequential)
    container = max(members, key=lambda name: (len(members[name]), isinstance(model.get_submodule(name), lists)))
    blocks = members[container]
    last = max(index for index, end in enumerate(ended) if end.name in blocks)
    final_calls = next(reversed(blocks.values()))
    for call in run.calls[: run.calls.index(final_calls[-1]) + 1]:  # those that follow pool the tokens
        where, q, k = call.modules[-1], tuple(call.q.shape), tuple(call.k.shape)
        if len(q) != 4 or q[0] != 1:
            raise ValueError(f"{where} computes attention in windows: queries of shape {q} for 1 image")
        if k != q or call.causal:
            reason = "it is causal" if call.causal else f"{q[2]} queries, {k[2]} keys"
            raise ValueError(f"{where} is not self-attention among all tokens: {reason}")
        if not blocks.keys() & set(call.modules):
            raise ValueError(f"{where} computes attention outside of the blocks {container}")
    silent = [end.name for end in ended if container and end.name.rpartition(".")[0] == container]
    for name in [*blocks, *silent]:
        if len(blocks.get(name, ())) != 1:
            raise ValueError(f"{name} makes {len(blocks.get(name, ()))} attention calls; a block of a ViT makes one")
    paths = {name: calls[0].modules for name, calls in blocks.items()}
    if name := next((name for name, path in paths.items() if path[-1] == name), None):
        raise ValueError(f"{name} computes attention in no module of its own, so that its output cannot be read")
    attentions = [path[path.index(name) + 1] for name, path in paths.items()]
    norm = norm_after(ended[last].output, ended[last + 1 :])
    used = {end.name for end in ended[: last + 1]} | {names.get(norm, "")}
    modules = [[model.get_submodule(name) for name in part] for part in (blocks, attentions)]
    return Structure(*modules, attentions, norm, used, output)


def norm_after(tokens: Tensor, ended: list[Ended]) -> nn.Module:
    """The first norm of all tokens (B,N,D), or of the first token, after the last block; nn.Identity without one."""
    norms = [end for end in ended if end.input is not None and "norm" in type(end.module).__name__.lower()]
    normed = (end.module for end in norms if any(end.input.equal(part) for part in (tokens, tokens[:, 0])))
    return next(normed, nn.Identity())


# ---- the encoder


class TracedEncoder(Backbone):
    """A model of another library; it takes images of one size.

    ValueError, with the reason, if a BlockTrace does not describe its blocks, its tokens are not a row-major grid of
    patches after some prefix tokens, or weights of the blocks are missing.
    """

    def __init__(self, loaded: Loaded):
        super().__init__()
        self.model, self.run, self.outputs_of = loaded.model.eval().requires_grad_(False), loaded.run, loaded.outputs
        self.size = loaded.size
        image = torch.randn(1, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            structure = structure_of(self.model, lambda: self.run(self.model, image))
            if lost := [key for key in loaded.missing if key.rpartition(".")[0] in structure.used]:
                raise ValueError(f"the file lacks {', '.join(lost[:4])}{', ...' * (len(lost) > 4)}")
            self._norm = (structure.norm,)  # in a tuple, so that it is not registered twice
            self.pooled = {name: output.shape[1] for name, output in self.outputs_of(structure.output).items()}
            self.depth, self.traced = len(structure.blocks), f"{structure.names[0]} ... {structure.names[-1]}"
            add_hooks(structure)
            self.find_tokens(image)

    @property
    def norm(self) -> nn.Module:
        return self._norm[0]

    def find_tokens(self, image: Tensor) -> None:
        """Find the grid by experiment: new pixels in a patch must change its token more than all others."""
        step = next(self.trace(image))
        shapes = [tuple(tokens.shape) for tokens in (step.x, step.update, step.out)]
        if len(set(shapes)) > 1 or len(shapes[0]) != 3 or shapes[0][0] != 1:
            raise ValueError(f"the tokens that enter a block, of its attention and that leave it have shapes {shapes}")
        _, tokens, self.embed_dim = shapes[0]
        self.num_heads = step.q.shape[1]
        for side in range(isqrt(tokens), 0, -1):
            prefix = tokens - side**2
            if self.size % side == 0 and prefix < side**2 and self.is_grid(image, side, prefix):
                break
        else:
            raise ValueError(f"its {tokens} tokens are not one for each patch of a row-major grid")
        self.has_cls = prefix > 0 and any(CLS_TOKEN.fullmatch(name) for name, _ in self.model.named_parameters())
        self.patch_size, self.num_prefix_tokens = self.size // side, prefix
        self.num_registers = prefix - self.has_cls

    def is_grid(self, image: Tensor, side: int, prefix: int) -> bool:
        patch, cells = self.size // side, [(0, 0), (0, side - 1), (side - 1, 0), (side // 2, side // 3)]
        images = image.repeat(len(cells) + 1, 1, 1, 1)
        for changed, (row, column) in zip(images[1:], cells, strict=True):
            changed[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].neg_()
        tokens = next(self.trace(images)).x
        most = (tokens[1:] - tokens[:1]).abs().amax(-1).argmax(1)
        return most.tolist() == [prefix + row * side + column for row, column in cells]

    def trace(self, images: Tensor) -> Iterator[BlockTrace]:
        height, width = images.shape[-2:]
        if (height, width) != (self.size, self.size):
            raise ValueError(f"images of {height} x {width} pixels: this encoder was loaded for {self.size} pixels")
        run, more = Run(lambda: self.run(self.model, images)), False
        try:
            for _ in range(self.depth):
                with listening():
                    step = run.switch()
                more = yield step
            if more:  # what the model itself returns
                with listening():
                    yield run.switch()
        finally:
            run.throw()

    def own_outputs(self, steps: Iterator[BlockTrace]) -> dict[str, Tensor]:
        return self.outputs_of(steps.send(True))


def add_hooks(structure: Structure) -> None:
    """Add hooks that pause a Run after every block, and do nothing in other forward passes."""

    def enter(block: nn.Module, args: tuple, kwargs: dict) -> None:
        if isinstance(run := getcurrent(), Run):
            run.x, run.calls = first_tensor(args) if args else first_tensor(kwargs), []

    def attended(attention: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(run := getcurrent(), Run):
            run.update = first_tensor(output)

    def leave(index: int, block: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(run := getcurrent(), Run):
            (call,) = run.calls
            q, k, v = map(in_autocast, (call.q, call.k, call.v))
            step = BlockTrace(index, run.x, q, k, call.scale, bias_of(call), run.update, first_tensor(output), v)
            run.x = run.update = None
            run.calls, consumer = [], run.parent
            del call, run  # a pass that refers to itself, or to tensors, would not be freed when it is abandoned
            consumer.switch(step)

    for index, (block, attention) in enumerate(zip(structure.blocks, structure.attentions, strict=True)):
        block.register_forward_pre_hook(enter, with_kwargs=True)
        attention.register_forward_hook(attended)
        block.register_forward_hook(partial(leave, index))


def in_autocast(tokens: Tensor) -> Tensor:
    """Queries or keys in the precision that autocast gives the call."""
    kind = tokens.device.type
    return tokens.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tokens


def bias_of(call: Call) -> Tensor | None:
    """The call's mask as an addition to the logits, (H,N,N) or None. ValueError if it differs between images."""
    mask = call.mask
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=call.q.dtype).masked_fill_(~mask, float("-inf"))
    if not mask.any():
        return None
    mask = mask.expand(1, *call.q.shape[1:3], call.k.shape[2]) if mask.ndim < 4 or len(mask) == 1 else mask
    if not mask.eq(mask[:1]).all():
        raise ValueError("its attention has another mask for each image")
    return mask[0].expand(*call.q.shape[1:3], call.k.shape[2])
