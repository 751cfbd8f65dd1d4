"""Shifted-window attention of Swin V1 and V2: the contract; `reference.py` and the faster forms beside it implement it.

Letters: b batch, h w tokens per axis (multiples of the window), c channels = heads * head dim, n tokens of one window.
"""

from functools import partial
from types import ModuleType

from jaxtyping import Float
from torch import Tensor

from simmim_scale.kernels.dispatch import choose_name
from simmim_scale.kernels.window_attention.sequential import attend_in_turn

WITHOUT_MATRICES = ("triton",)  # work on tiles of a window's logits, which never reach memory


def window_attention(
    qkv: Float[Tensor, "b h w c3"],
    bias: Float[Tensor, "heads n n"],
    *,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    logit_scale: Float[Tensor, "heads"] | None = None,
    implementation: str = "auto",
    rows_at_once: int = 0,
) -> Float[Tensor, "b h w c"]:
    """Self-attention inside windows of an image of tokens.

    The image is rolled by `-shift`, cut into windows, attended, put together and rolled back. After the roll the last window of
    an axis holds tokens from both ends of the image; logits between tokens of different regions get exactly -100 added, as
    published (cosine logits span +-100, so this is not the same as excluding them). Padding is the caller's: it comes before
    the projection and the shift, and padded tokens take part like any other (Swin detection code).

    Args:
        qkv: the un-partitioned projection; the channels are q, k, v, each head-major.
        bias: added to the logits; row = query token, column = key token, row-major inside the window.
        window: (height, width) in tokens; divides (h, w).
        shift: (down, right) in tokens; 0 on an axis that has only one window.
        logit_scale: V2: logits are cos(q, k) * exp(min(logit_scale, ln 100)), the raw parameter is passed. None: V1, logits
            are q . k / sqrt(head dim).
        implementation: "auto" or a name of `kernels/dispatch.py`.
        rows_at_once: most rows of windows of one image to work on at once, in forward and again in backward; 0: all of the batch.
            Of no effect where the implementation holds no n x n matrix anyway.

    Returns:
        The attended values, heads concatenated, in the dtype of `qkv`. Softmax and norms are in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: the window does not divide the tokens, the shapes disagree, or the implementation cannot run here.
    """
    _check(qkv, bias, num_heads, window, shift)
    head_dim = qkv.shape[-1] // 3 // num_heads
    chosen = choose_name(
        "window_attention",
        implementation,
        device=qkv.device,
        dtype=qkv.dtype,
        head_dim=head_dim,
        tokens=window[0] * window[1],
    )
    attend = partial(load(chosen).window_attention, num_heads=num_heads, window=window)
    if rows_at_once == 0 or chosen in WITHOUT_MATRICES:
        return attend(qkv, bias, shift=shift, logit_scale=logit_scale)

    def part(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, shift: tuple[int, int]) -> Tensor:
        return attend(qkv, bias, shift=shift, logit_scale=logit_scale)

    return attend_in_turn(part, qkv, bias, logit_scale, window=window, shift=shift, rows=rows_at_once)


def load(name: str) -> ModuleType:
    """The module of an implementation, imported by statements, which torch.compile can follow."""
    if name == "cpu":
        from simmim_scale.kernels.window_attention import cpu as found
    elif name == "sdpa":
        from simmim_scale.kernels.window_attention import sdpa as found
    elif name == "triton":
        from simmim_scale.kernels.window_attention import triton as found
    else:
        assert name == "reference", f"no statement imports {name}"
        from simmim_scale.kernels.window_attention import reference as found
    return found


def _check(qkv: Tensor, bias: Tensor, num_heads: int, window: tuple[int, int], shift: tuple[int, int]) -> None:
    height, width, channels = qkv.shape[1:]
    if height % window[0] or width % window[1]:
        raise ValueError(
            f"window_attention: the window must divide the tokens, got {height}x{width} tokens and a window of"
            f" {window[0]}x{window[1]}. Pad the tokens before the projection."
        )
    if channels % (3 * num_heads):
        raise ValueError(f"window_attention: qkv needs 3 * heads * head dim channels, got {channels} for {num_heads} heads.")
    if tuple(bias.shape) != (num_heads, window[0] * window[1], window[0] * window[1]):
        raise ValueError(
            f"window_attention: bias must be (heads, n, n) = {(num_heads, window[0] * window[1], window[0] * window[1])},"
            f" got {tuple(bias.shape)}."
        )
    if not (0 <= shift[0] < window[0] and 0 <= shift[1] < window[1]):
        raise ValueError(f"window_attention: shift must lie in [0, window), got {shift} for the window {window}.")
