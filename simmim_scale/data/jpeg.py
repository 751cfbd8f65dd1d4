"""What libjpeg-turbo's refusals say about a JPEG. Torch-free, for training and for the data tools."""

# The strict decoder stops at the first of libjpeg's warnings, where others go on and invent pixels. These mean that coded data
# were overwritten, cut out or cut off; other refusals are of what it cannot do (CMYK) or of what costs no pixels.
_DAMAGE = (
    "premature end of",  # data segment, JPEG file (in capitals)
    "bad huffman code",
    "bad arithmetic code",
    "found marker",  # another one than the restart marker that was due
    "inconsistent progression",
)


def is_damage(refusal: ValueError) -> bool:
    """Whether the strict decoder refused a file because pixels are lost.

    Bytes too many before the end marker do not count, since cameras and programs write such files. A flipped bit that shifts all
    that follows can leave the same and is not told apart.
    """
    return any(phrase in str(refusal).lower() for phrase in _DAMAGE)
