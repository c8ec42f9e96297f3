"""The Vision Transformer, yielding what it computes: one BlockTrace per block, and the tokens of any block.

It knows nothing of data, arguments, statistics or probes. Parameter names are timm's.
Letters: B images, N tokens (prefix first), P prefix tokens ([cls], then registers), R registers, M patches, H heads,
D width, d = D / H head width, L blocks. Blocks are counted from 0.
"""

import abc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from encoders.architectures import ARCHITECTURES, architecture, check_blocks, default_input_size, sizes  # noqa: F401
from util.pos_embed import (
    relative_index,
    resample_pos_embed,
    resample_relative_table,
    rotary_coordinates,
    rotary_frequencies,
    sincos_pos_embed,
)

NORMS = {
    "layernorm": partial(nn.LayerNorm, eps=1e-6),  # ViT's
    "layernorm_eps1e-5": partial(nn.LayerNorm, eps=1e-5),  # PyTorch's
    "rmsnorm": partial(nn.RMSNorm, eps=1e-5),  # CAPI's
}
ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
Grid = tuple[int, int]  # rows and columns of patches
EVERY = slice(None)


class BlockTrace(NamedTuple):
    """What one block computed. Attention logits are `q @ k.transpose(-2, -1) * scale + logit_bias`."""

    index: int  # 0-based block
    x: Tensor  # (B,N,D) residual stream entering the block
    q: Tensor  # (B,H,N,d) after any q/k norm and rotary embedding
    k: Tensor  # (B,H,N,d)
    scale: float
    logit_bias: Tensor | None  # (H,N,N) of relative positions
    update: Tensor  # (B,N,D) attention branch after its projection, before LayerScale and residual
    out: Tensor  # (B,N,D) residual stream leaving the block
    v: Tensor  # (B,H,N,d)


class Features(NamedTuple):
    """The tokens of one block, before the final norm (the paper's protocol)."""

    cls: Tensor | None  # (B,D)
    registers: Tensor  # (B,R,D)
    patches: Tensor  # (B,M,D), row-major grid
    cls_attention: Tensor | None  # (B,H,M) attention of [cls], softmax over all N keys; on request
    patch_attention: dict[int, Tensor] | None = None  # {patch: (B,H,M) its attention}; on request
    oracle: Tensor | None = None  # (B,M) attention of another encoder (encoders.load.Oracle)
    pooled: dict[str, Tensor] | None = None  # {name: (B,E)} the model's own pooled outputs; last block, on request


class PatchEmbed(nn.Module):
    """Non-overlapping patches, linearly embedded: images (B,3,h,w) -> (B,D,h/p,w/p)."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images of {height} x {width} pixels cannot be cut into patches of {self.patch_size} pixels"
            )
        return self.proj(images)


class RelativePositionBias(nn.Module):
    """A bias of each head's logits for every offset between two tokens: grid -> (H,N,N), [cls] first (BEiT, SimMIM)."""

    def __init__(self, grid_size: Grid, num_heads: int):
        super().__init__()
        self.grid_size = grid_size
        offsets = (2 * grid_size[0] - 1) * (2 * grid_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, num_heads))

    def forward(self, grid: Grid) -> Tensor:
        table = resample_relative_table(self.relative_position_bias_table, self.grid_size, grid)
        return table[relative_index(grid).to(table.device)].permute(2, 0, 1)


class RotaryEmbedding(nn.Module):
    """Rotates queries or keys (B,H,N,d) by angles that grow with the token's row and column (CAPI)."""

    def __init__(self, head_width: int, num_registers: int):
        super().__init__()
        self.num_registers = num_registers
        self.freqs = nn.Parameter(rotary_frequencies(head_width))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        row, column = rotary_coordinates(grid, self.num_registers).to(x.device).split(1, dim=1)
        angle = row * self.freqs[0] + column * self.freqs[1]  # (N,d), in float32 whatever the autocast
        first, second = x.chunk(2, dim=-1)
        return (x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()).to(x.dtype)


class Attention(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        rel_pos_bias: nn.Module | None = None,
        rope: nn.Module | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {dim}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rel_pos_bias = rel_pos_bias
        self.rope = rope
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(
        self, x: Tensor, grid: Grid | None = None, kept: slice = EVERY
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """(B,N,D) -> update (B,n,D) of the n kept tokens; q, k, v (B,H,N,d); logit bias (H,N,N) or None."""
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2))
        if self.rope is not None:
            q, k = self.rope(q, grid), self.rope(k, grid)
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias(grid)
        values = attend(q, k, v, bias, self.scale).transpose(1, 2).flatten(2)
        return self.proj(values[:, kept]), q, k, v, bias


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T scale + bias) v, (B,H,N,d); bias (H,N,N).

    Training in half precision on a CPU uses plain products: the fused kernel's gradient takes twice as long there, four
    times as long on the few tokens that MAE's encoder sees.
    """
    bias = None if bias is None else bias.to(q.dtype)
    if q.device.type == "cpu" and q.requires_grad and q.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", enabled=False):
            logits = (q * scale) @ k.transpose(-2, -1)
            return (logits if bias is None else logits + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, bias: bool = True, activation: str = "gelu"):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_values: float):
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a branch (B,N,D) for a random share of the images and rescales the rest."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_prob).div_(1 - self.drop_prob)


class Block(nn.Module):
    """norm_order: "pre" normalises the input of each branch, "post" the sum of branch and residual stream."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        init_values: float | None = None,
        drop_path: float = 0.0,
        norm_layer: str = "layernorm",
        norm_order: str = "pre",
        rel_pos_bias: nn.Module | None = None,
        rope: nn.Module | None = None,
    ):
        super().__init__()
        self.norm_order = norm_order
        self.norm1 = NORMS[norm_layer](dim)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias, rel_pos_bias, rope)
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = NORMS[norm_layer](dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_bias)
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid | None = None, kept: slice = EVERY) -> BlockTrace:
        """Tokens (B,N,D) -> trace of this block, with index 0.

        grid: of the patches among the tokens, for relative and rotary positions. kept: the tokens to compute `update`
        and `out` for; they attend to all.
        """
        pre = self.norm_order == "pre"
        update, q, k, v, bias = self.attn(self.norm1(x) if pre else x, grid, kept)
        middle = x[:, kept] + self.drop_path1(self.ls1(update))
        if pre:
            out = middle + self.drop_path2(self.ls2(self.mlp(self.norm2(middle))))
        else:
            middle = self.norm1(middle)
            out = self.norm2(middle + self.drop_path2(self.ls2(self.mlp(middle))))
        return BlockTrace(0, x, q, k, self.attn.scale, bias, update, out, v)


class Backbone(nn.Module, abc.ABC):
    """An encoder: `trace` yields its blocks, `forward` returns the tokens of chosen blocks."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    num_registers: int
    num_prefix_tokens: int
    has_cls: bool
    norm: nn.Module  # after the last block, not applied by `forward`; nn.Identity if there is none
    widths: tuple[int, ...] = ()  # of the blocks' tokens, if not all are embed_dim
    pooled: Mapping[str, int] = MappingProxyType({})  # widths of the model's own outputs (Features.pooled)

    @abc.abstractmethod
    def trace(self, images: Tensor) -> Iterator[BlockTrace]:
        """Images (B,3,h,w) -> one BlockTrace per block, in order; stop iterating to skip the remaining blocks."""

    def norm_after(self, block: int) -> nn.Module:
        """The norm that follows the last block, for the tokens of this block."""
        return self.norm

    def own_outputs(self, steps: Iterator[BlockTrace]) -> dict[str, Tensor]:
        """The outputs named in `pooled`, from a trace that has reached the last block."""
        raise ValueError("this encoder has no pooled outputs of its own")

    def grid_of(self, height: int, width: int) -> Grid:
        """Rows and columns of patches in an image of height x width pixels."""
        return height // self.patch_size, width // self.patch_size

    def forward(
        self,
        images: Tensor,
        blocks: Sequence[int] | None = None,
        cls_attention: bool = False,
        patch_attention: Collection[int] = (),
        pooled: bool = False,
    ) -> dict[int, Features]:
        """Images (B,3,h,w) -> {block: Features} of the chosen blocks (default: the last), before the final norm.

        Later blocks are not computed, unless `pooled` outputs are requested. ValueError for an unknown block.
        """
        last = self.depth - 1
        wanted = {last} if blocks is None else set(blocks)
        check_blocks(sorted(wanted), self.depth)
        features = {}
        for step in (steps := self.trace(images)):
            if step.index in wanted:
                features[step.index] = self.split(step, cls_attention, patch_attention)
            if step.index == (last if pooled else max(wanted)):
                break
        if pooled and last in wanted:
            features[last] = features[last]._replace(pooled=self.own_outputs(steps))
        return features

    def split(self, step: BlockTrace, cls_attention: bool = False, patch_attention: Collection[int] = ()) -> Features:
        """The tokens leaving a block, with the requested rows of its attention."""
        prefix = self.num_prefix_tokens
        if cls_attention and not self.has_cls:
            raise ValueError("this encoder has no [cls] token, hence no [cls] attention")
        return Features(
            cls=step.out[:, 0] if self.has_cls else None,
            registers=step.out[:, prefix - self.num_registers : prefix],
            patches=step.out[:, prefix:],
            cls_attention=attention_row(step, 0, prefix) if cls_attention else None,
            patch_attention={i: attention_row(step, prefix + i, prefix) for i in patch_attention} or None,
        )


class VisionTransformer(Backbone):
    """Options have timm's names, except:

    img_size: pixels of a square image, or (height, width). proj_bias: of attention's projection and of the MLP.
    pos_embed: "learned", "sincos" (MAE's table, not trained) or "none". pos_resampling: see resample_pos_embed.
    rel_pos_bias: every block has a RelativePositionBias (BEiT). rope: every block has a RotaryEmbedding (CAPI).
    norm_layer: a name of NORMS. norm_order: see Block. final_norm: "affine", "plain" (no weight and bias) or "none".
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        class_token: bool = True,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
        init_values: float | None = None,
        pos_embed: str = "sincos",
        pos_resampling: str = "antialias",
        rel_pos_bias: bool = False,
        rope: bool = False,
        norm_layer: str = "layernorm",
        pre_norm: bool = False,
        norm_order: str = "pre",
        final_norm: str = "affine",
        drop_path: float = 0.0,
    ):
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if min(height, width) < patch_size or height % patch_size or width % patch_size:
            raise ValueError(f"an input size of {img_size} is not a multiple of the patch size {patch_size}")
        if rel_pos_bias and (not class_token or reg_tokens):
            raise ValueError("a relative-position table has rows for one [cls] token, and none for registers")
        if rope and class_token:
            raise ValueError("rotary positions are defined for registers and patches, not for a [cls] token")
        self.embed_dim, self.depth, self.num_heads, self.patch_size = embed_dim, depth, num_heads, patch_size
        self.grid_size = self.grid_of(height, width)
        self.num_registers = reg_tokens
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.num_embedded_prefix = 0 if no_embed_class else self.num_prefix_tokens
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.has_cls = class_token
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.pos_resampling = pos_resampling
        self.pos_embed = None
        if pos_embed != "none":
            table = sincos_pos_embed(embed_dim, self.grid_size, self.num_embedded_prefix)
            if pos_embed == "learned":
                table = nn.init.trunc_normal_(torch.empty_like(table), std=0.02)
            self.pos_embed = nn.Parameter(table, requires_grad=pos_embed == "learned")
        self.norm_pre = NORMS[norm_layer](embed_dim) if pre_norm else nn.Identity()
        block = partial(Block, embed_dim, num_heads, mlp_ratio, qkv_bias, proj_bias, init_values)
        self.blocks = nn.ModuleList(
            block(
                drop_path * index / max(depth - 1, 1),  # stochastic depth grows linearly
                norm_layer,
                norm_order,
                RelativePositionBias(self.grid_size, num_heads) if rel_pos_bias else None,
                RotaryEmbedding(embed_dim // num_heads, reg_tokens) if rope else None,
            )
            for index in range(depth)
        )
        self.norm = nn.Identity()
        if final_norm != "none":
            self.norm = NORMS[norm_layer](embed_dim, elementwise_affine=final_norm == "affine")
        self.apply(init_weights)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def set_input_size(self, img_size: int) -> None:
        """Resample the table of positions once, to train it at this size; otherwise, every forward resamples it."""
        grid = self.grid_of(img_size, img_size)
        if self.pos_embed is not None:
            table = self.pos_embed.detach()
            table = resample_pos_embed(table, self.grid_size, grid, self.num_embedded_prefix, self.pos_resampling)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.grid_size = grid

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,h,w) -> prefix tokens (B,P,D) and patch tokens (B,M,D), with (resampled) positions."""
        patches = self.patch_embed(images)
        prefix, positions = self.prefix_and_positions(tuple(patches.shape[-2:]))
        patches = patches.flatten(2).transpose(1, 2)
        patches = patches if positions is None else patches + positions
        return self.norm_pre(prefix.expand(len(images), -1, -1)), self.norm_pre(patches)

    def prefix_and_positions(self, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Prefix tokens (1,P,D) with their positions, and positions (1,M,D) of a grid's patches, before norm_pre."""
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = torch.cat(tokens, dim=1) if tokens else self.patch_embed.proj.weight.new_zeros(1, 0, self.embed_dim)
        if self.pos_embed is None:
            return prefix, None
        embedded = self.num_embedded_prefix
        positions = resample_pos_embed(self.pos_embed, self.grid_size, grid, embedded, self.pos_resampling)
        return (prefix + positions[:, :embedded] if embedded else prefix), positions[:, embedded:]

    def trace_tokens(self, tokens: Tensor, grid: Grid | None = None) -> Iterator[BlockTrace]:
        """Run the blocks on embedded tokens (B,N,D); grid as in Block.forward."""
        for index, block in enumerate(self.blocks):
            step = block(tokens, grid)._replace(index=index)
            yield step
            tokens = step.out

    def trace(self, images: Tensor) -> Iterator[BlockTrace]:
        return self.trace_tokens(torch.cat(self.embed(images), dim=1), self.grid_of(*images.shape[-2:]))


def attention_row(step: BlockTrace, query: int, num_prefix: int) -> Tensor:
    """(B,H,M) attention of token `query` to the patches, softmax over all N keys; float32 or better under autocast."""
    dtype = torch.promote_types(step.q.dtype, torch.float32)
    with torch.autocast(step.q.device.type, enabled=False):
        row = step.q[:, :, query : query + 1].to(dtype) @ step.k.to(dtype).transpose(-2, -1)
        logits = row.squeeze(2) * step.scale
        if step.logit_bias is not None:
            logits = logits + step.logit_bias[:, query]
        return logits.softmax(-1)[..., num_prefix:]


def init_weights(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform matrices (the patch projection too), zero biases of linear layers."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def compile_blocks(network: nn.Module, backend: str | Callable = "inductor") -> None:
    """Compile each Block of a network in place; all share the code, which takes some twenty seconds to generate.

    ValueError without one: an encoder that its own library runs is traced, which compiled code is not.
    """
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError("an encoder that its own library runs cannot be compiled: compiled code is not traced")
    for block in blocks:
        block.compile(backend=backend)


def build_vit(name: str, **options) -> VisionTransformer:
    """A randomly initialised encoder, e.g. build_vit("vit_base_patch16", img_size=224, class_token=False)."""
    return VisionTransformer(**{**architecture(name), **options})
