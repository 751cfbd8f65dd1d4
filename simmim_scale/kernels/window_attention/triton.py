"""Window attention on a GPU by Triton kernels: never partitions in memory; saves the projection, the output and one number a row.

The gradient of the bias is summed per group of windows and the groups' sums are added in a fixed order: the same input always
gives the same gradients, digit for digit. `TRITON_INTERPRET=1` runs the same kernels on a CPU, slowly, for tests.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from triton import knobs

from simmim_scale.kernels.window_attention.reference import MAX_LOGIT_SCALE
from simmim_scale.kernels.window_attention.triton_kernels import (
    LOG2E,
    forward_kernel,
    key_value_gradient_kernel,
    query_gradient_kernel,
)
from simmim_scale.kernels.window_attention.triton_split import bias_gradient_kernel, query_only_kernel
from simmim_scale.kernels.window_attention.triton_tiles import PairTiles, Tiles, choose_tiles, key_starts, padded_head_dim, refuse
from simmim_scale.kernels.window_attention.triton_wide import (
    bias_gradient_wide_kernel,
    forward_wide_kernel,
    query_only_wide_kernel,
)

APART = (query_only_kernel, bias_gradient_kernel)
APART_WIDE = (query_only_wide_kernel, bias_gradient_wide_kernel)
PROGRAMS_PER_PROCESSOR = 8  # programs of the gradient of q for each multiprocessor: enough to level out what is left at the end
PARTIAL_BYTES = 256 << 20  # most memory for the groups' sums of the bias gradient
# Full precision for fp32, from three products of TensorFloat-32 each; half precisions ignore it.
PRECISION = "tf32x3"


def unavailable(device: torch.device, dtype: torch.dtype, **facts: Any) -> str | None:
    """NVIDIA GPUs for which tiles are known, windows of up to 576 tokens, head dims 16 to 128; fp16, bf16 and fp32."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 and float32, got {dtype}"
    if device.type == "cuda":
        if torch.version.hip:
            return "its tiles were made for NVIDIA GPUs"
    elif not (device.type == "cpu" and knobs.runtime.interpret):
        return f"it runs on an NVIDIA GPU, got {device.type}"
    elif dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly"
    return refuse(facts.get("tokens", 1), facts.get("head_dim", 32), _capability(device))


def window_attention(
    qkv: Float[Tensor, "b h w c3"],
    bias: Float[Tensor, "heads n n"],
    *,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    logit_scale: Float[Tensor, "heads"] | None,
) -> Float[Tensor, "b h w c"]:
    """See the contract in `kernels/window_attention/__init__.py`."""
    out, _ = torch.ops.simmim_scale.triton_attention(qkv, bias, logit_scale, num_heads, window, shift)
    return out


@dataclass(frozen=True)
class Launch:
    """What the kernels of one call have in common, and how they are started."""

    heads: int
    window: tuple[int, int]
    shift: tuple[int, int]

    @classmethod
    def of(cls, heads: int, window: Sequence[int], shift: Sequence[int]) -> "Launch":
        """From an operator's arguments, in which pairs are lists."""
        return cls(heads, (window[0], window[1]), (shift[0], shift[1]))

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1]

    def tiles(self, qkv: Tensor) -> Tiles:
        return choose_tiles(self.tokens, self.head_dim(qkv), qkv.element_size(), _capability(qkv.device))

    def check(self, qkv: Tensor) -> None:
        """Raises ValueError where 32 bits do not count the elements of one image."""
        if qkv[:1].numel() >= 1 << 31:
            raise ValueError(
                f"window_attention: triton takes fewer than 2^31 elements of qkv per image, got {tuple(qkv.shape[1:])}."
                " Use smaller images, or another implementation."
            )

    def head_dim(self, qkv: Tensor) -> int:
        return qkv.shape[3] // 3 // self.heads

    def windows(self, qkv: Tensor) -> int:
        return qkv.shape[0] * (qkv.shape[1] // self.window[0]) * (qkv.shape[2] // self.window[1])

    def groups(self, qkv: Tensor, programs: int) -> int:
        """How many share the windows of the same `programs`, each group with its own sum of the bias gradient."""
        processors = torch.cuda.get_device_properties(qkv.device).multi_processor_count if qkv.is_cuda else 1
        wanted = PROGRAMS_PER_PROCESSOR * processors // programs
        affordable = PARTIAL_BYTES // (4 * self.heads * self.tokens**2)
        return max(1, min(wanted, affordable, self.windows(qkv)))

    def sizes(self, qkv: Tensor) -> dict[str, int]:
        """Arguments of the image at hand."""
        return {
            "height": qkv.shape[1],
            "width": qkv.shape[2],
            "grid_rows": qkv.shape[1] // self.window[0],
            "grid_columns": qkv.shape[2] // self.window[1],
            "shift_row": self.shift[0],
            "shift_column": self.shift[1],
            "heads": self.heads,
        }

    def constants(self, qkv: Tensor, cosine: bool) -> dict[str, Any]:
        return kernel_constants(self.window, self.head_dim(qkv), cosine=cosine, shifted=any(self.shift))


def kernel_constants(window: tuple[int, int], head_dim: int, *, cosine: bool, shifted: bool) -> dict[str, Any]:
    """Compile-time arguments that all kernels take."""
    return {
        "N": window[0] * window[1],
        "WH": window[0],
        "WW": window[1],
        "D": head_dim,
        "DP": padded_head_dim(head_dim),
        "COSINE": cosine,
        "SHIFTED": shifted,
        "PRECISION": PRECISION,
    }


def tile_constants(tiles: Tiles) -> dict[str, dict[str, Any]]:
    """Compile-time arguments and the compiler's options for each kernel that these tiles use, by its name."""
    options = {"num_stages": 1} if tiles.registers is None else {"num_stages": 1, "maxnreg": tiles.registers}
    return {kernel: constants | options for kernel, constants in _tile_constants(tiles).items()}


def _tile_constants(tiles: Tiles) -> dict[str, dict[str, Any]]:
    forward, query, pair, key_value = tiles.forward, tiles.query, tiles.pair, tiles.key_value
    shared = _pair_constants(pair)
    wide = "" if pair.part is None else "wide_"
    constants = {"key_value_gradient_kernel": _pair_constants(key_value)}
    if isinstance(forward, PairTiles):
        constants["forward_wide_kernel"] = _pair_constants(forward)
    else:
        constants["forward_kernel"] = {
            "BLOCK": forward.block,
            "TILES": forward.tiles,
            "HOLD": forward.hold,
            "STARTS": key_starts(forward.keys),
            "SIZES": forward.keys,
            "num_warps": forward.warps,
        }
    if query is None:
        return constants | {f"query_only_{wide}kernel": shared, f"bias_gradient_{wide}kernel": shared}
    own = {"BLOCK": query.block, "STARTS": key_starts(query.keys), "SIZES": query.keys, "num_warps": query.warps}
    return constants | {"query_gradient_kernel": own}


def _pair_constants(tiles: PairTiles) -> dict[str, Any]:
    constants = {"BLOCK": tiles.block, "KEYS": tiles.keys, "num_warps": tiles.warps}
    return constants if tiles.part is None else constants | {"PART": tiles.part}


def _forward(
    qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, heads: int, window: Sequence[int], shift: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The attended values, and the log2-sum-exp of each query, (images * windows, heads, n) fp32."""
    launch = Launch.of(heads, window, shift)
    qkv = _ready(qkv)
    launch.check(qkv)
    out, lse = _results(qkv, bias, logit_scale, heads, window, shift)
    tiles = launch.tiles(qkv)
    if isinstance(tiles.forward, PairTiles):
        kernel, programs = forward_wide_kernel, (lse.shape[0] * heads * -(-launch.tokens // tiles.forward.block),)
    else:
        per_program = tiles.forward.block * tiles.forward.tiles
        kernel, programs = forward_kernel, (lse.shape[0] * heads, -(-launch.tokens // per_program))
    with _on(qkv.device):
        kernel[programs](
            *(qkv, *_parameters(bias, logit_scale), out, lse),
            **launch.sizes(qkv),
            **launch.constants(qkv, logit_scale is not None),
            **tile_constants(tiles)[kernel.__name__],
        )
    return out, lse


def _backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    out: Tensor,
    lse: Tensor,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the projection, the bias and the logit scale (empty where there is none)."""
    call = _BackwardCall(Launch.of(heads, window, shift), _ready(qkv), bias, logit_scale, out, lse, _ready(grad))
    with _on(qkv.device):
        grad_bias, grad_scale = call.query_and_bias()
        call.key_and_value()
    if logit_scale is None:
        return call.grad_qkv, grad_bias.to(bias.dtype), bias.new_empty(0)
    # The clamp cuts the gradient of the raw logit scale off above ln 100.
    return call.grad_qkv, grad_bias.to(bias.dtype), (grad_scale * (logit_scale <= MAX_LOGIT_SCALE)).to(logit_scale.dtype)


def _results(
    qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, heads: int, window: Sequence[int], shift: Sequence[int]
) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = qkv.shape
    tokens = window[0] * window[1]
    lse = qkv.new_empty(batch * (height // window[0]) * (width // window[1]), heads, tokens, dtype=torch.float32)
    return qkv.new_empty(batch, height, width, channels // 3), lse


def _gradients(
    grad: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, *kept_and_sizes: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_scale = bias.new_empty(0) if logit_scale is None else logit_scale.new_empty(logit_scale.shape)
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape), grad_scale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, logit_scale, *ctx.sizes = inputs
    ctx.save_for_backward(qkv, bias, logit_scale, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _lse: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    logit_scale = ctx.saved_tensors[2]
    grads = torch.ops.simmim_scale.triton_attention_backward(grad, *ctx.saved_tensors, *ctx.sizes)
    return *grads[:2], None if logit_scale is None else grads[2], None, None, None


# Operators: torch.compile does not look into them, so that what runs is what was compiled and checked ahead of time.
_SIZES = "int heads, int[] window, int[] shift"
_FORWARD = torch.library.custom_op(
    "simmim_scale::triton_attention",
    _forward,
    mutates_args=(),
    schema=f"(Tensor qkv, Tensor bias, Tensor? logit_scale, {_SIZES}) -> (Tensor, Tensor)",
)
_FORWARD.register_fake(_results)
_FORWARD.register_autograd(_differentiate, setup_context=_keep)
_BACKWARD = torch.library.custom_op(
    "simmim_scale::triton_attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor qkv, Tensor bias, Tensor? logit_scale, Tensor out, Tensor lse, {_SIZES})"
    " -> (Tensor, Tensor, Tensor)",
)
_BACKWARD.register_fake(_gradients)


class _BackwardCall:
    """The tensors of one backward pass and the kernels that fill them."""

    def __init__(
        self, launch: Launch, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, out: Tensor, lse: Tensor, grad_out: Tensor
    ) -> None:
        self.launch, self.qkv, self.lse, self.out, self.grad_out = launch, qkv, lse, out, grad_out
        self.read = (qkv, *_parameters(bias, logit_scale))
        self.grad_qkv, self.delta = torch.empty_like(qkv), torch.empty_like(lse)
        self.tiles = launch.tiles(qkv)
        self.constants = tile_constants(self.tiles)
        self.common = launch.sizes(qkv) | launch.constants(qkv, logit_scale is not None)

    def query_and_bias(self) -> tuple[Tensor, Tensor]:
        """Fills q's part of `grad_qkv`, and `delta`; returns the gradients of the bias and of the clamped logit scale, fp32."""
        if self.tiles.query is None:
            return self._apart()
        launch, block = self.launch, self.tiles.query.block
        tiles = -(-launch.tokens // block)
        groups = launch.groups(self.qkv, launch.heads * tiles)
        grad_bias = self.lse.new_empty(groups, launch.heads, launch.tokens, launch.tokens)
        grad_scale = self.lse.new_empty(groups, launch.heads, tiles)
        query_gradient_kernel[(tiles * launch.heads * groups,)](
            *(*self.read, self.out, self.lse, self.grad_out, self.delta, self.grad_qkv, grad_bias, grad_scale),
            **self.common,
            **self.constants["query_gradient_kernel"],
            total_windows=self.lse.shape[0],
            groups=groups,
        )
        return grad_bias.sum(0), grad_scale.sum((0, 2))

    def _apart(self) -> tuple[Tensor, Tensor]:
        launch, pair = self.launch, self.tiles.pair
        tiles, key_tiles = -(-launch.tokens // pair.block), -(-launch.tokens // pair.keys)
        grad_scale = self.lse.new_empty(*self.lse.shape[:2], tiles)
        query_only, bias_gradient = APART if pair.part is None else APART_WIDE
        query_only[(tiles * launch.heads * self.lse.shape[0],)](
            *(*self.read, self.out, self.lse, self.grad_out, self.delta, self.grad_qkv, grad_scale),
            **self.common,
            **self.constants[query_only.__name__],
        )
        groups = launch.groups(self.qkv, launch.heads * tiles * key_tiles)
        grad_bias = self.lse.new_empty(groups, launch.heads, launch.tokens, launch.tokens)
        bias_gradient[(tiles * key_tiles * launch.heads * groups,)](
            *(*self.read, self.lse, self.grad_out, self.delta, grad_bias),
            **self.common,
            **self.constants[bias_gradient.__name__],
            total_windows=self.lse.shape[0],
            groups=groups,
        )
        return grad_bias.sum(0), grad_scale.sum((0, 2))

    def key_and_value(self) -> None:
        """Fills the parts of k and v of `grad_qkv`; needs `delta`."""
        tiles = -(-self.launch.tokens // self.tiles.key_value.keys)
        key_value_gradient_kernel[(tiles * self.launch.heads * self.lse.shape[0],)](
            *(*self.read, self.lse, self.grad_out, self.delta, self.grad_qkv),
            **self.common,
            **self.constants["key_value_gradient_kernel"],
        )


def _parameters(bias: Tensor, logit_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bias and logit scale as the kernels read them, fp32; without a scale the bias, which is not read then."""
    # In units of log2: one product here instead of one per logit.
    scaled_bias = (bias.float() * LOG2E.value).contiguous()
    return scaled_bias, scaled_bias if logit_scale is None else _ready(logit_scale.float())


def _ready(tensor: Tensor) -> Tensor:
    """Contiguous and aligned to 16 bytes, for which the kernels were compiled ahead of time; a view may begin anywhere."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; in the interpreter, which has no limits, that of an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton starts kernels on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
