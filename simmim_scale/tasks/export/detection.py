"""A backbone for torchvision's detectors: its tensors and a norm for every stage's map; `load_detection_backbone` reads them."""

from pathlib import Path

import torch
from torch import nn

from simmim_scale.models.weights import save_weights
from simmim_scale.tasks.export.records import Agreement, Source, Target, Written, compare

CLASSES = 5  # of the detector that is built to see that it runs
IMAGE = 96  # pixels
PROPOSALS = 10


def write(source: Source, out: Path) -> Written:
    """Portable weights of the backbone and its norms: weight 1 and bias 0, since the backbone's final norm is not used."""
    from simmim_scale.models.detection_backbone import build_pyramid

    source.swin("torchvision-detection-backbone")
    norms = {f"norms.{name}": value for name, value in build_pyramid(source.config.model).norms.state_dict().items()}
    tree = source.config.model_dump(mode="json") | {"task": "backbone"}
    save_weights(out, source.backbone_state | norms, tree, dict(source.pretrained.extra))
    return Written(
        usage=USAGE, notes=["the norm of each map starts as a plain LayerNorm, and the pyramid is new: fine-tune them"]
    )


def verify(source: Source, out: Path) -> list[Agreement]:
    from torchvision.models.detection import MaskRCNN

    from simmim_scale.models.detection_backbone import load_detection_backbone

    image = source.picture()
    theirs = load_detection_backbone(out).eval()
    agreements = []
    ours = source.module.backbone.features(image, final_norm=False)
    for stage, (own, other) in enumerate(zip(ours, theirs.body(image), strict=True)):
        normed = torch.nn.functional.layer_norm(own.permute(0, 2, 3, 1), own.shape[1:2]).permute(0, 3, 1, 2)
        agreements.append(compare(f"map of stage {stage}", normed, other))
    data = source.config.data
    detector = MaskRCNN(
        theirs,
        CLASSES,
        min_size=IMAGE,
        max_size=IMAGE,
        image_mean=list(data.mean),
        image_std=list(data.std),
        rpn_post_nms_top_n_test=PROPOSALS,
        rpn_anchor_generator=_anchors(len(theirs.body.stages) + 1),  # 5 maps, of 4 stages, are what torchvision expects by itself
    ).eval()
    found = detector([torch.zeros(source.config.model.in_chans, IMAGE, IMAGE)])
    if set(found[0]) != {"boxes", "labels", "scores", "masks"}:
        raise ValueError(f"torchvision's MaskRCNN gave {sorted(found[0])}, expected boxes, labels, scores and masks.")
    return agreements


def _anchors(maps: int) -> nn.Module:
    """torchvision's own, for another number of maps."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    return AnchorGenerator(tuple((32 * 2**level,) for level in range(maps)), ((0.5, 1.0, 2.0),) * maps)


USAGE = """```python
from simmim_scale.models.detection_backbone import load_detection_backbone
from torchvision.models.detection import MaskRCNN

detector = MaskRCNN(load_detection_backbone("DIR"), num_classes=91)  # pass image_mean and image_std if they are not ImageNet's
```"""


def target() -> Target:
    """The target, for the table."""
    return Target(libraries=("torchvision",), install="pip install torchvision", write=write, verify=verify)
