"""The kernel of the masked loss: one patch a program, pixels read in place, error and gradient in one pass."""

import triton
import triton.language as tl

# Never compiled in. Triton makes variants of a kernel for sizes of 1 and for multiples of 16: pictures of another size would be
# compiled for again. Of the width it may know that 16 divides it: that saves up to 8 registers, the others saved none.
SIZE_ARGUMENTS = (
    *("count", "grid_columns", "height", "mask_rows", "mask_columns", "cell"),
    *("stride_image", "stride_channel", "stride_row", "stride_column"),
)


@triton.jit(do_not_specialize=SIZE_ARGUMENTS)
def masked_loss_kernel(
    PREDICTION, IMAGE, MASK, TOKENS, FLIP, MEAN, STD, LOCAL_MEAN, LOCAL_STD, SUMS, GRADIENT,
    count, grid_columns, height, width, mask_rows, mask_columns, cell,
    stride_image, stride_channel, stride_row, stride_column,
    beta,
    C: tl.constexpr, S: tl.constexpr, LOSS: tl.constexpr, STORED: tl.constexpr, LOCAL: tl.constexpr,
    TOKENS_GIVEN: tl.constexpr, FLIPPED: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the error over the hidden pixels of one patch, and its derivative (0 where visible or beyond the picture).

    LOSS: 0 l1, 1 smooth l1, 2 l2. STORED: pixels are bytes to be normalised by MEAN and STD.
    """
    patch = tl.program_id(0).to(tl.int64)
    image = patch // count
    token = patch % count
    if TOKENS_GIVEN:
        token = tl.load(TOKENS + patch)
    top = (token // grid_columns).to(tl.int32) * S
    left = (token % grid_columns).to(tl.int32) * S
    mirrored = False
    if FLIPPED:
        mirrored = tl.load(FLIP + image) != 0
    # Offsets within one picture or patch fit 32 bits, and need half the registers.
    PREDICTION += patch * (C * S * S)
    GRADIENT += patch * (C * S * S)
    MASK += image * mask_rows * mask_columns
    IMAGE += image * stride_image
    LOCAL_MEAN += image * C * height * width
    LOCAL_STD += image * C * height * width
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C * S * S, BLOCK):
        number = start + tl.arange(0, BLOCK)
        channel = number // (S * S)
        y = top + number // S % S
        x = left + number % S
        inside = (number < C * S * S) & (y < height) & (x < width)
        unit = y // cell * mask_columns + x // cell
        hidden = inside & (tl.load(MASK + unit, mask=inside, other=0) != 0)
        predicted = tl.load(PREDICTION + number, mask=hidden, other=0.0).to(tl.float32)
        column = tl.where(mirrored, width - 1 - x, x)
        place = channel * stride_channel + y * stride_row + column * stride_column
        target = tl.load(IMAGE + place, mask=hidden, other=0).to(tl.float32)
        if STORED:
            mean = tl.load(MEAN + channel, mask=hidden, other=0.0)
            target = (target / 255 - mean) / tl.load(STD + channel, mask=hidden, other=1.0)
        if LOCAL:
            # In the type of the statistics: where a picture is flat, fp32 would lose the difference.
            place = (channel * height + y) * width + x
            mean = tl.load(LOCAL_MEAN + place, mask=hidden, other=0.0)
            target = ((target - mean) / tl.load(LOCAL_STD + place, mask=hidden, other=1.0)).to(tl.float32)
        difference = tl.where(hidden, predicted - target, 0.0)
        size = tl.abs(difference)
        if LOSS == 0:
            total += size
            slope = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
        elif LOSS == 1:
            total += tl.where(size < beta, size * size / (2 * beta), size - beta / 2)
            slope = tl.where(size < beta, difference / beta, tl.where(difference > 0, 1.0, -1.0))
        else:
            total += size * size
            slope = 2 * difference
        if KEEP:
            tl.store(GRADIENT + number, slope.to(GRADIENT.dtype.element_ty), mask=number < C * S * S)
    tl.store(SUMS + patch, tl.sum(total, 0))
