"""SimMIM at scale: masked image modeling with Swin transformers, from a folder of images to SwinV2-H.

`simmim_scale.load(directory)` gives back a trained module, `load_classifier(directory)` one that takes pictures.
Everything else starts at `simmim_scale.cli`.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from simmim_scale.tasks.predict import load_classifier as load_classifier
    from simmim_scale.tasks.pretrained import load as load

__all__ = ["__version__", "load", "load_classifier"]


def __getattr__(name: str):
    # Lazy, so that `import simmim_scale.config` and the command line's help do not pay for torch.
    if name == "load":
        from simmim_scale.tasks.pretrained import load

        return load
    if name == "load_classifier":
        from simmim_scale.tasks.predict import load_classifier

        return load_classifier
    raise AttributeError(f"module 'simmim_scale' has no attribute {name!r}")
