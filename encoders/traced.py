"""Any Vision Transformer, traced while its own library runs it: the tokens are exact because nothing is converted.

Queries, keys, scale and bias are the arguments of the calls of scaled_dot_product_attention; what enters and leaves a
block, and the output of its attention, come from forward hooks. Letters as in models_vit.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from models_vit import Backbone, BlockTrace

CLS_TOKEN = re.compile(r"(.*\.)?(cls|class)_?(token|embedding|embed|emb)s?")  # names of its parameter


class Call(NamedTuple):
    """One call of scaled_dot_product_attention, and the modules that were running, outermost first."""

    modules: tuple[nn.Module, ...]
    q: Tensor
    k: Tensor
    mask: Tensor | None
    causal: bool
    scale: float


class Run(greenlet):
    """One forward pass of a model, which pauses at every block while its BlockTrace is used elsewhere."""

    def __init__(self, forward: Callable):
        super().__init__(forward)
        self.x: Tensor | None = None  # entering the block that runs
        self.update: Tensor | None = None
        self.calls: list[Call] = []  # of the block that runs
        self.modules: list[nn.Module] = []  # that are running; kept while the structure is sought


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within the block, each Run notes the calls of scaled_dot_product_attention that its model makes.

    PyTorch's fused path of nn.MultiheadAttention, which makes no such call, is off.
    """
    original, fused = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        run = getcurrent()
        if isinstance(run, Run):
            width = query.shape[-1] ** -0.5 if scale is None else scale
            run.calls.append(Call(tuple(run.modules), query, key, attn_mask, is_causal, width))
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)

    F.scaled_dot_product_attention = attention
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fused)


# ---------------------------------------------------------------------------------------------------------------------
# the structure of a model
# ---------------------------------------------------------------------------------------------------------------------


class Structure(NamedTuple):
    blocks: list[nn.Module]
    attentions: list[nn.Module]  # of each block
    norm: nn.Module  # after the last block; nn.Identity where there is none


def first_tensor(value: Any) -> Tensor | None:
    """A tensor, or the first one of a tuple or of keyword arguments."""
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else (value,)
    return next((item for item in values if isinstance(item, Tensor)), None)


class Ended(NamedTuple):
    """A module's forward pass that has ended."""

    module: nn.Module
    input: Tensor | None
    output: Tensor | None


def run_noting_modules(model: nn.Module, forward: Callable[[], Any]) -> tuple[list[Call], list[Ended]]:
    """The attention calls of a forward pass, and its modules in the order of their ends."""
    run, ended = Run(forward), []

    def enter(module: nn.Module, args: tuple) -> None:
        if getcurrent() is run:
            run.modules.append(module)

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        if getcurrent() is run:
            run.modules.pop()
            ended.append(Ended(module, first_tensor(args), first_tensor(output)))

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        with listening():
            run.switch()
    finally:
        for handle in handles:
            handle.remove()
    return run.calls, ended


def structure_of(model: nn.Module, forward: Callable[[], Any], images: int) -> Structure:
    """The blocks of a model, found in a forward pass of so many images.

    Blocks are the members of the container with the most members that compute attention. ValueError, with the reason,
    for a model whose attention a BlockTrace does not describe.
    """
    calls, ended = run_noting_modules(model, forward)
    if not calls:
        raise ValueError("no attention call was seen: it does not use torch's scaled_dot_product_attention")
    names = {id(module): name for name, module in model.named_modules()}
    members: dict[str, dict[str, list[int]]] = {}  # container -> member -> its calls
    for index, call in enumerate(calls):
        for name in [names[id(module)] for module in call.modules[1:]]:
            members.setdefault(name.rpartition(".")[0], {}).setdefault(name, []).append(index)

    def rank(name: str) -> tuple[int, bool]:
        return len(members[name]), isinstance(model.get_submodule(name), nn.ModuleList | nn.Sequential)

    container = max(members, key=rank)
    blocks = members[container]
    inside = [index for own in blocks.values() for index in own]
    for index, call in enumerate(calls[: max(inside) + 1]):  # later ones pool the tokens
        where, q, k = names[id(call.modules[-1])], tuple(call.q.shape), tuple(call.k.shape)
        if len(q) != 4 or q[0] != images:
            raise ValueError(f"{where} computes attention in windows: its queries are {q} for {images} images")
        if k != q or call.causal:
            raise ValueError(
                f"{where} is not self-attention of all tokens: queries {q}, keys {k}, causal: {call.causal}"
            )
        if index not in inside:
            raise ValueError(f"{where} computes attention outside of the blocks {container}")
    several = [name for name, own in blocks.items() if len(own) > 1]
    silent = sorted(
        {names[id(end.module)] for end in ended if names[id(end.module)].rpartition(".")[0] == container} - set(blocks)
    )
    if several or (silent and container):
        name = (several + silent)[0]
        raise ValueError(f"{name} makes {len(blocks.get(name, []))} attention calls, not one as the blocks of a ViT")
    attentions = []
    for name, (index,) in blocks.items():
        path = [names[id(module)] for module in calls[index].modules]
        if path[-1] == name:
            raise ValueError(f"{name} computes attention in no module of its own, so its output cannot be read")
        attentions.append(model.get_submodule(path[path.index(name) + 1]))
    found = [model.get_submodule(name) for name in blocks]
    last = next(index for index, end in enumerate(ended) if end.module is found[-1])
    return Structure(found, attentions, norm_after(ended[last].output, ended[last + 1 :]))


def norm_after(tokens: Tensor, ended: list[Ended]) -> nn.Module:
    """The first norm of all tokens (B,N,D), or of the first token, after the last block; nn.Identity without one."""
    for end in ended:
        if "norm" in type(end.module).__name__.lower() and end.input is not None:
            if any(end.input.shape == own.shape and end.input.equal(own) for own in (tokens, tokens[:, 0])):
                return end.module
    return nn.Identity()


# ---------------------------------------------------------------------------------------------------------------------
# the encoder
# ---------------------------------------------------------------------------------------------------------------------


class TracedEncoder(Backbone):
    """A model of another library, with the interface of models_vit.VisionTransformer. It takes images of one size.

    call: runs the model on images (B,3,size,size). ValueError, with the reason, where its blocks compute something else
    than a BlockTrace describes, or its tokens are not a row-major grid of patches behind some prefix tokens.
    """

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor], Any], size: int):
        super().__init__()
        self.model, self.call, self.size = model.eval().requires_grad_(False), call, size
        with torch.no_grad():
            structure = structure_of(model, lambda: call(model, torch.zeros(1, 3, size, size)), 1)
            self._norm = (structure.norm,)  # in a tuple, so that it is not registered twice
            self.depth = len(structure.blocks)
            self.blocks_at, self.attention_at = (
                {id(m): n for n, m in model.named_modules()}[id(part[0])] for part in structure[:2]
            )
            add_hooks(structure)
            self.find_tokens()

    @property
    def norm(self) -> nn.Module:
        return self._norm[0]

    def find_tokens(self) -> None:
        """Find the grid by experiment: new pixels in a patch must change its token more than all others."""
        size = self.size
        image = torch.randn(3, size, size, generator=torch.Generator().manual_seed(0))
        step = next(self.trace(image[None]))
        if not (step.x.shape == step.update.shape == step.out.shape and step.x.ndim == 3 and len(step.x) == 1):
            shapes = f"{tuple(step.x.shape)}, {tuple(step.update.shape)} and {tuple(step.out.shape)}"
            raise ValueError(f"the tokens that its first block takes, attends to and returns have shapes {shapes}")
        _, tokens, self.embed_dim = step.x.shape
        self.num_heads = step.q.shape[1]
        for side in range(isqrt(tokens), 0, -1):
            prefix, patch = tokens - side**2, size // side
            if size % side == 0 and prefix < side**2 and self.is_grid(image, side, prefix):
                break
        else:
            raise ValueError(f"its {tokens} tokens are not a row-major grid of patches of the {size} x {size} pixels")
        named = any(CLS_TOKEN.fullmatch(name) for name, _ in self.model.named_parameters())
        self.has_cls = bool(prefix) and named
        self.patch_size, self.num_prefix_tokens, self.num_registers = patch, prefix, prefix - self.has_cls

    def is_grid(self, image: Tensor, side: int, prefix: int) -> bool:
        patch, cells = self.size // side, [(0, 0), (0, side - 1), (side - 1, 0), (side // 2, side // 3)]
        images = image.repeat(len(cells) + 1, 1, 1, 1)
        for changed, (row, column) in zip(images[1:], cells, strict=True):
            changed[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].neg_()
        tokens = next(self.trace(images)).x
        most = (tokens[1:] - tokens[:1]).abs().amax(-1).argmax(1)
        return most.tolist() == [prefix + row * side + column for row, column in cells]

    def trace(self, images: Tensor) -> Iterator[BlockTrace]:
        if images.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"images of {' x '.join(map(str, images.shape[-2:]))} pixels: the encoder was loaded for {self.size} x {self.size}"
            )
        run = Run(lambda: self.call(self.model, images))
        for _ in range(self.depth):
            with listening():
                step = run.switch()
            yield step

    def compile_blocks(self, backend: str | Callable = "inductor") -> None:
        raise ValueError(
            "an encoder that its own library runs cannot be compiled: tracing ends where compiled code begins"
        )


def add_hooks(structure: Structure) -> None:
    """Hooks that pause a Run after every block, and do nothing in any other forward pass."""

    def enter(block: nn.Module, args: tuple, kwargs: dict) -> None:
        if isinstance(run := getcurrent(), Run):
            run.x, run.calls = first_tensor(args) if args else first_tensor(kwargs), []

    def attended(attention: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(run := getcurrent(), Run):
            run.update = first_tensor(output)

    def leave(index: int, block: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(run := getcurrent(), Run):
            (call,) = run.calls
            q, k = in_autocast(call.q), in_autocast(call.k)
            step = BlockTrace(index, run.x, q, k, call.scale, bias_of(call), run.update, first_tensor(output))
            run.x = run.update = None
            run.calls = []
            run.parent.switch(step)

    for index, (block, attention) in enumerate(zip(structure.blocks, structure.attentions, strict=True)):
        block.register_forward_pre_hook(enter, with_kwargs=True)
        attention.register_forward_hook(attended)
        block.register_forward_hook(partial(leave, index))


def in_autocast(tokens: Tensor) -> Tensor:
    """Queries or keys in the precision that autocast gives the call."""
    kind = tokens.device.type
    return tokens.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tokens


def bias_of(call: Call) -> Tensor | None:
    """What the call's mask adds to the logits, (H,N,N); None for nothing. ValueError where it differs by image."""
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
