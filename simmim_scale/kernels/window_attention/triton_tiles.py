"""How the Triton kernels cut a window into tiles, per architecture: pure arithmetic, no Triton and no GPU needed.

The numbers were found by compiling ahead of time (`simmim bench compile`): registers that do not spill, shared memory that fits.
"""

from dataclasses import dataclass

MAX_TOKENS = 24 * 24
HEAD_DIMS = (16, 128)  # smallest and largest
SMALLEST_PADDED = 32  # the head dim of all published models
# Shared memory of one thread block, bytes (CUDA programming guide, table of compute capabilities).
SHARED_MEMORY = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448, (12, 0): 101376}
# Those that `simmim bench compile` goes through; with what result: benchmarks/, kernels-compiled.
COMPILED = tuple(SHARED_MEMORY)
MAX_REGISTERS = 255  # of a thread, on all of these
SMALL_SHARED_MEMORY = 101376  # consumer GPUs: the compiler allots registers otherwise there


@dataclass(frozen=True)
class ForwardTiles:
    """One program of the forward kernel: `tiles` tiles of `block` queries against tiles of keys.

    Attributes:
        hold: keys and values stay with the program; else each tile of queries reads them again.
        keys: sizes of the tiles of keys, powers of two.
        warps: of one program.
    """

    block: int
    tiles: int
    hold: bool
    keys: tuple[int, ...]
    warps: int


@dataclass(frozen=True)
class QueryTiles:
    """One program of the kernel for the gradients of q and bias: one tile of queries, all keys, a group of windows."""

    block: int
    keys: tuple[int, ...]
    warps: int


@dataclass(frozen=True)
class PairTiles:
    """One program of a kernel that works on tiles of `block` queries and `keys` keys; `part`: channels of a head at a time."""

    block: int
    keys: int
    warps: int
    part: int | None = None


@dataclass(frozen=True)
class Tiles:
    """The cut of all kernels.

    Attributes:
        forward: pairs where the channels of a head are taken in parts.
        query: None where the gradients of q and bias need a kernel each, cut as `pair`.
        registers: the most that the compiler may give a thread; None: as many as it thinks best.
    """

    forward: ForwardTiles | PairTiles
    query: QueryTiles | None
    pair: PairTiles
    key_value: PairTiles
    registers: int | None


def key_sizes(tokens: int, largest: int) -> tuple[int, ...]:
    """Powers of two from `largest` down to 16 that hold `tokens` with the least padding: 144 -> (128, 16)."""
    rest = -(-tokens // 16) * 16
    sizes = []
    size = largest
    while rest:
        while rest >= size:
            sizes.append(size)
            rest -= size
        size //= 2
    return tuple(sizes)


def key_starts(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """First key of each tile."""
    return tuple(sum(sizes[:number]) for number in range(len(sizes)))


def padded_head_dim(head_dim: int) -> int:
    """The power of two that holds the head dim, at least 32.

    Products take 16 channels too, but through no shared memory: the compiler then loads all keys of a window at once, and spills.
    """
    return max(SMALLEST_PADDED, 1 << (head_dim - 1).bit_length())


def refuse(tokens: int, head_dim: int, capability: tuple[int, int]) -> str | None:
    """Why there are no tiles for this window, head dim and compute capability; None: there are."""
    if capability not in COMPILED:
        known = ", ".join(f"{major}.{minor}" for major, minor in COMPILED)
        return f"no tiles are known for compute capability {capability[0]}.{capability[1]}, only for {known}"
    if tokens > MAX_TOKENS:
        return f"a window may hold {MAX_TOKENS} tokens at most, got {tokens}"
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1] or head_dim % 4:
        return f"head dims from {HEAD_DIMS[0]} to {HEAD_DIMS[1]} in steps of 4 are supported, got {head_dim}"
    return None


def choose_tiles(tokens: int, head_dim: int, itemsize: int, capability: tuple[int, int]) -> Tiles:
    """The cut for a window of `tokens`, heads of `head_dim`, elements of `itemsize` bytes and a compute capability."""
    padded = padded_head_dim(head_dim)
    row_bytes = padded * itemsize
    # The compiler unrolls a loop over exactly three parts, whatever it is told, and spills: 96 channels are six.
    parts = PairTiles(16, 32, 8 if capability >= (10, 0) else 4, part=16 if head_dim == 96 else 32)
    pair_parts = PairTiles(16, 16, 4, part=16) if head_dim == 96 and capability >= (10, 0) else parts
    half_empty = 2 * head_dim <= padded
    # One kernel for q and bias: with large windows, the cut is known for the usual head dim only; half-empty fp32 heads spill.
    together = (tokens <= 144 or head_dim == SMALLEST_PADDED) and not (itemsize == 4 and half_empty)
    forward_in_parts = itemsize == 4 and (row_bytes > 256 or tokens > 256)
    return Tiles(
        forward=parts if forward_in_parts else _forward(tokens, row_bytes, itemsize, capability),
        query=_query(tokens, row_bytes, itemsize, capability) if together else None,
        pair=pair_parts if row_bytes > 256 else _pair(tokens, row_bytes, itemsize, capability),
        key_value=_key_value(tokens, row_bytes, itemsize, capability, half_empty=half_empty),
        registers=MAX_REGISTERS if _would_spill(tokens, head_dim, itemsize, capability) else None,
    )


def _would_spill(tokens: int, head_dim: int, itemsize: int, capability: tuple[int, int]) -> bool:
    """Whether the compiler, left alone, spills a few registers to have more programs at once: of wide or padded heads mostly."""
    if head_dim != SMALLEST_PADDED:
        return True
    limit = {(8, 0): 48, (8, 6): 64, (8, 9): 64}.get(capability, 0)
    return itemsize == 2 and tokens <= limit


def _forward(tokens: int, row_bytes: int, itemsize: int, capability: tuple[int, int]) -> ForwardTiles:
    narrow = row_bytes <= 64 and itemsize == 2
    block = 64 if narrow and 48 < tokens <= (208 if capability < (9, 0) else 144) else 16
    largest = 128 if narrow else 64
    hold = tokens <= 256 and 2 * tokens * row_bytes <= 40_000 and (narrow or row_bytes > 64)
    warps = 1 if tokens <= 48 and itemsize == 2 else 4 if row_bytes <= 128 else 8
    if tokens > (144 if capability < (9, 0) and block == 64 else 400 if row_bytes == 128 else MAX_TOKENS):
        warps = 8
    if capability == (10, 0) and block == 64 and tokens <= 64:
        warps = 8
    return ForwardTiles(block, -(-tokens // block) if hold else 1, hold, key_sizes(tokens, largest), warps)


def _query(tokens: int, row_bytes: int, itemsize: int, capability: tuple[int, int]) -> QueryTiles | None:
    # The most tokens whose bias gradient fits the registers of a program, by bytes of one row of q.
    most = {(64, 2): 256, (128, 2): 144, (128, 4): 64}.get((row_bytes, itemsize), 0)
    if tokens > most or (itemsize == 4 and capability == (12, 0)):
        return None
    small = SHARED_MEMORY[capability] <= SMALL_SHARED_MEMORY
    largest = 64 if row_bytes > 64 or (capability >= (9, 0) and 176 < tokens <= 208) else 128
    if row_bytes <= 64 and tokens <= 64 and (small or capability == (9, 0)):
        largest = 32
    few_warps = tokens <= (64 if small else 160) and row_bytes <= 64
    if capability == (10, 0) and 48 < tokens < 64:
        few_warps = False
    if itemsize == 4:
        few_warps = tokens <= 48
    return QueryTiles(16, key_sizes(tokens, largest), 4 if few_warps else 8)


def _pair(tokens: int, row_bytes: int, itemsize: int, capability: tuple[int, int]) -> PairTiles:
    if row_bytes <= 64:
        return PairTiles(16, 64 if itemsize == 2 else 32, 4)
    if row_bytes == 256 and itemsize == 4 and tokens <= 64 and capability == (12, 0):
        return PairTiles(16, 32, 8)
    return PairTiles(32, 32, 4) if row_bytes <= 128 and itemsize == 2 else PairTiles(16, 32, 4)


def _key_value(tokens: int, row_bytes: int, itemsize: int, capability: tuple[int, int], *, half_empty: bool) -> PairTiles:
    if row_bytes <= 64 and itemsize == 2:
        return PairTiles(16 if tokens <= 48 else 32, 64, 4)
    if row_bytes > 256:
        return PairTiles(16, 16, 8)
    if itemsize == 4 and half_empty:
        return PairTiles(16, 16, 4)
    if itemsize == 4 and row_bytes == 128 and 144 < tokens <= 208:
        return PairTiles(16, 16 if capability == (12, 0) else 64, 4)
    return PairTiles(32, 32, 8) if itemsize == 4 and row_bytes == 256 and tokens % 16 else PairTiles(16, 32, 4)


def tile_summary(tiles: Tiles, kernel: str) -> str:
    """The cut of one kernel in a few characters, for reports: queries x keys, warps, limit of registers."""
    limit = "" if tiles.registers is None else f", {tiles.registers} registers"
    forward = tiles.forward
    if kernel == "forward_kernel" and isinstance(forward, ForwardTiles):
        held = " held" if forward.hold else ""
        return f"{forward.tiles}*{forward.block}x{'+'.join(map(str, forward.keys))}{held}, {forward.warps} warps{limit}"
    if kernel == "query_gradient_kernel" and tiles.query is not None:
        return f"{tiles.query.block}x{'+'.join(map(str, tiles.query.keys))}, {tiles.query.warps} warps{limit}"
    pair = tiles.key_value if kernel == "key_value_gradient_kernel" else tiles.pair
    if isinstance(forward, PairTiles) and kernel == "forward_wide_kernel":
        pair = forward
    part = "" if pair.part is None else f" by {pair.part} channels"
    return f"{pair.block}x{pair.keys}{part}, {pair.warps} warps{limit}"
