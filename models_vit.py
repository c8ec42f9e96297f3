"""The Vision Transformer, yielding what it computes: one BlockTrace per block, and the tokens of any block.

It knows nothing of data, arguments, statistics or probes. Parameter names are timm's.
Letters: B images, N tokens (prefix first), P prefix tokens ([cls], then registers), R registers, M patches, H heads,
D width, d = D / H head width, L blocks. Blocks are counted from 0.
"""

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
    "layernorm_eps1e-5": partial(nn.LayerNorm, eps=1e-5),  # CLIP's
    "rmsnorm": partial(nn.RMSNorm, eps=1e-5),  # CAPI's
}


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU."""
    return x * (1.702 * x).sigmoid()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}
NORM_ORDERS = ("pre", "post", "residual")
Grid = tuple[int, int]  # rows and columns of patches
EVERY = slice(None)


class BlockTrace(NamedTuple):
    """What one block computed. Attention logits are `q @ k.transpose(-2, -1) * scale + logit_bias`."""

    index: int  # 0-based block
    x: Tensor  # (B,N,D) residual stream entering the block
    q: Tensor  # (B,H,N,d) after any q/k norm and rotary embedding
    k: Tensor  # (B,H,N,d)
    scale: float
    logit_bias: Tensor | None  # (H,N,N) relative position, where the family has one
    update: Tensor  # (B,N,D) attention branch after its projection, before LayerScale and residual
    out: Tensor  # (B,N,D) residual stream leaving the block
    v: Tensor | None = None  # (B,H,N,d)


class BlockOutput(NamedTuple):
    """What a block returns; BlockTrace says what each is."""

    q: Tensor
    k: Tensor
    v: Tensor
    logit_bias: Tensor | None
    update: Tensor
    out: Tensor


class Features(NamedTuple):
    """The tokens of one block, before the final norm (the paper's protocol)."""

    cls: Tensor | None  # (B,D)
    registers: Tensor  # (B,R,D)
    patches: Tensor  # (B,M,D), row-major grid
    cls_attention: Tensor | None  # (B,H,M) [cls] row of the attention, softmax over all N keys; only when asked for
    patch_attention: dict[int, Tensor] | None = None  # {patch: (B,H,M) its row}; only when asked for
    oracle: Tensor | None = None  # (B,M) attention from elsewhere; no model makes it
    pooled: dict[str, Tensor] | None = None  # {name: (B,E)} the model's own pooled outputs, with its last block


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
                f"images of {height} x {width} pixels cannot be cut into patches of {self.patch_size}: "
                f"choose an --input_size that {self.patch_size} divides"
            )
        return self.proj(images)


class RelativePositionBias(nn.Module):
    """What the offset between two tokens adds to each head's logit: grid -> (H,N,N), [cls] first (BEiT, SimMIM)."""

    def __init__(self, grid_size: Grid, num_heads: int):
        super().__init__()
        self.grid_size = grid_size
        offsets = (2 * grid_size[0] - 1) * (2 * grid_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, num_heads))

    def forward(self, grid: Grid) -> Tensor:
        table = resample_relative_table(self.relative_position_bias_table, self.grid_size, grid)
        return table[relative_index(grid).to(table.device)].permute(2, 0, 1)


class RotaryEmbedding(nn.Module):
    """Rotates the tokens' queries or keys (B,H,N,d) by angles that grow with row and column (CAPI)."""

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
    """Multi-head self-attention that also returns its queries, keys, values and logit bias."""

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
        """(B,N,D) -> update (B,n,D) of the kept tokens, q, k and v (B,H,N,d), logit bias (H,N,N) if there is one."""
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2))
        if self.rope is not None:
            q, k = self.rope(q, grid), self.rope(k, grid)
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias(grid)
        values = attend(q, k, v, bias, self.scale).transpose(1, 2).flatten(2)
        return self.proj(values[:, kept]), q, k, v, bias


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Values (B,H,N,d), averaged by the softmax of q k^T scale + bias (H,N,N).

    Training in half precision on a CPU takes plain products: the gradient of the fused kernel takes twice as long
    there, and four times on the few tokens that MAE's encoder sees.
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
    """Stochastic depth: in training, a branch (B,N,D) is left out of a random share of the images and scaled for it."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.drop_prob).div_(1 - self.drop_prob)


class Block(nn.Module):
    """Transformer block. norm_order: "pre" normalises the input of each branch, "post" the sum with the residual
    stream, "residual" the output of each branch (timm's ResPostBlock)."""

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
        activation: str = "gelu",
        rel_pos_bias: nn.Module | None = None,
        rope: nn.Module | None = None,
    ):
        super().__init__()
        if norm_order not in NORM_ORDERS:
            raise ValueError(f"unknown norm_order {norm_order!r}: choose one of {', '.join(NORM_ORDERS)}")
        self.norm_order = norm_order
        self.norm1 = NORMS[norm_layer](dim)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias, rel_pos_bias, rope)
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = NORMS[norm_layer](dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), proj_bias, activation)
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid | None = None, kept: slice = EVERY) -> BlockOutput:
        """grid: of the patches among the tokens x; needed where attention knows of relative or rotary positions.

        kept: the tokens that are wanted afterwards; all are attended to.
        """
        update, q, k, v, bias = self.attn(self.norm1(x) if self.norm_order == "pre" else x, grid, kept)
        branch = self.norm1(update) if self.norm_order == "residual" else update
        middle = x[:, kept] + self.drop_path1(self.ls1(branch))
        if self.norm_order == "post":
            middle = self.norm1(middle)
            out = self.norm2(middle + self.drop_path2(self.ls2(self.mlp(middle))))
        elif self.norm_order == "residual":
            out = middle + self.drop_path2(self.ls2(self.norm2(self.mlp(middle))))
        else:
            out = middle + self.drop_path2(self.ls2(self.mlp(self.norm2(middle))))
        return BlockOutput(q, k, v, bias, update, out)


class Backbone(nn.Module):
    """What every encoder offers: `trace` yields its blocks, `forward` returns the tokens of chosen ones."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    num_registers: int
    num_prefix_tokens: int
    has_cls: bool
    norm: nn.Module  # the last one, which `forward` does not apply; nn.Identity where there is none
    widths: tuple[int, ...] = ()  # of the blocks' tokens, where they are not all embed_dim
    pooled: Mapping[str, int] = MappingProxyType({})  # widths of the model's own outputs (Features.pooled)

    def trace(self, images: Tensor) -> Iterator[BlockTrace]:
        """Images (B,3,h,w) -> one BlockTrace per block, in order; stop iterating to skip the blocks that follow."""
        raise NotImplementedError

    def norm_after(self, block: int) -> nn.Module:
        """The norm behind the last block, for tokens of this block."""
        return self.norm

    def own_outputs(self, steps: Iterator[BlockTrace]) -> dict[str, Tensor]:
        """The outputs named in `pooled`, from a trace that has come to the last block."""
        raise ValueError("this encoder has no pooled outputs of its own")

    def grid_of(self, height: int, width: int) -> Grid:
        """Rows and columns of patches of an image of height x width pixels."""
        return height // self.patch_size, width // self.patch_size

    def forward(
        self,
        images: Tensor,
        blocks: Sequence[int] | None = None,
        cls_attention: bool = False,
        patch_attention: Collection[int] = (),
        pooled: bool = False,
    ) -> dict[int, Features]:
        """Images (B,3,h,w) -> {block: Features} for the chosen blocks (default: the last), before the final norm.

        Blocks after the last chosen one are not computed, unless pooled outputs are asked for, which are those of the
        last block. Raises ValueError for a block that does not exist.
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
        """The tokens that leave a block, by kind; with the rows of its attention that are asked for."""
        prefix = self.num_prefix_tokens
        if cls_attention and not self.has_cls:
            raise ValueError("this encoder has no [cls] token, hence no [cls] attention")
        return Features(
            cls=step.out[:, 0] if self.has_cls else None,
            registers=step.out[:, prefix - self.num_registers : prefix],
            patches=step.out[:, prefix:],
            cls_attention=attention_from_cls(step, prefix) if cls_attention else None,
            patch_attention={i: attention_row(step, prefix + i, prefix) for i in patch_attention} or None,
        )


class VisionTransformer(Backbone):
    """ViT whose `trace` yields every block and whose `forward` returns the tokens of chosen blocks.

    pos_embed: "learned" (trainable), "sincos" (MAE's fixed table, not trained), or "none".
    pos_resampling: how the table is resampled to another grid; see resample_pos_embed.
    no_embed_class: the position table covers the patches only (timm's name).
    rel_pos_bias: every block adds a bias for relative positions to its logits (BEiT). rope: it rotates queries and keys
    by the tokens' coordinates (CAPI). proj_bias: of attention's projection and of the MLP.
    img_size: pixels of a square image, or (height, width). pre_norm: a norm on the embedded tokens (timm's name).
    norm_layer, norm_order, activation: of the blocks; names of NORMS, NORM_ORDERS, ACTIVATIONS.
    final_norm: "affine", "plain" (without weight and bias) or "none"; `forward` does not apply it.
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
        activation: str = "gelu",
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
        rates = [drop_path * index / max(depth - 1, 1) for index in range(depth)]  # stochastic depth grows linearly
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                proj_bias,
                init_values,
                rates[index],
                norm_layer,
                norm_order,
                activation,
                rel_pos_bias=RelativePositionBias(self.grid_size, num_heads) if rel_pos_bias else None,
                rope=RotaryEmbedding(embed_dim // num_heads, reg_tokens) if rope else None,
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

    def compile_blocks(self, backend: str | Callable = "inductor") -> None:
        """Compile each block where it stands; all share the code, which takes some twenty seconds to make."""
        for block in self.blocks:
            block.compile(backend=backend)

    def set_input_size(self, img_size: int) -> None:
        """Resample the table of positions once, to train it at that size; without this, every forward does."""
        grid = self.grid_of(img_size, img_size)
        if self.pos_embed is not None:
            table = self.pos_embed.detach()
            table = resample_pos_embed(table, self.grid_size, grid, self.num_embedded_prefix, self.pos_resampling)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        self.grid_size = grid

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,3,h,w) -> prefix tokens (B,P,D) and patch tokens (B,M,D), positions added.

        Positions are resampled when the grid differs from the one the encoder was built for.
        """
        patches = self.patch_embed(images)
        prefix, positions = self.prefix_and_positions(tuple(patches.shape[-2:]))
        patches = patches.flatten(2).transpose(1, 2)
        patches = patches if positions is None else patches + positions
        return self.norm_pre(prefix.expand(len(images), -1, -1)), self.norm_pre(patches)

    def prefix_and_positions(self, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Prefix tokens (1,P,D) with their positions, and what is added to the patches of a grid (1,M,D), if anything.

        Both before the norm that some encoders have there.
        """
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = torch.cat(tokens, dim=1) if tokens else self.patch_embed.proj.weight.new_zeros(1, 0, self.embed_dim)
        if self.pos_embed is None:
            return prefix, None
        embedded = self.num_embedded_prefix
        positions = resample_pos_embed(self.pos_embed, self.grid_size, grid, embedded, self.pos_resampling)
        return (prefix + positions[:, :embedded] if embedded else prefix), positions[:, embedded:]

    def trace_tokens(self, tokens: Tensor, grid: Grid | None = None) -> Iterator[BlockTrace]:
        """Run the blocks on embedded tokens (B,N,D), yielding each as it is computed; grid as in Block.forward."""
        for index, block in enumerate(self.blocks):
            q, k, v, bias, update, out = block(tokens, grid)
            yield BlockTrace(index, tokens, q, k, block.attn.scale, bias, update, out, v)
            tokens = out

    def trace(self, images: Tensor) -> Iterator[BlockTrace]:
        return self.trace_tokens(torch.cat(self.embed(images), dim=1), self.grid_of(*images.shape[-2:]))


def attention_row(step: BlockTrace, query: int, num_prefix: int) -> Tensor:
    """(B,H,M) the attention of token `query` over the patches, softmax over all N keys.

    In float32 or better, whatever the caller's autocast.
    """
    dtype = torch.promote_types(step.q.dtype, torch.float32)
    with torch.autocast(step.q.device.type, enabled=False):
        row = step.q[:, :, query : query + 1].to(dtype) @ step.k.to(dtype).transpose(-2, -1)
        logits = row.squeeze(2) * step.scale
        if step.logit_bias is not None:
            logits = logits + step.logit_bias[:, query]
        return logits.softmax(-1)[..., num_prefix:]


def attention_from_cls(step: BlockTrace, num_prefix: int) -> Tensor:
    """(B,H,M) the [cls] row of a block's attention over the patches."""
    return attention_row(step, 0, num_prefix)


def init_weights(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform matrices (the patch projection too), zero biases of linear layers."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def build_vit(name: str, **options) -> VisionTransformer:
    """A randomly initialised encoder, e.g. build_vit("vit_base_patch16", img_size=224, class_token=False)."""
    return VisionTransformer(**{**architecture(name), **options})
