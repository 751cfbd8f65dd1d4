"""model.onnx: normalised pictures of the model's size, any number of them, to logits; of other models to tokens and maps."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from simmim_scale.tasks.export.records import Agreement, Source, Target, Written, compare

FILE = "model.onnx"
ATTENTION = "reference"  # plain PyTorch: every operation of it has a counterpart in ONNX


class Outputs(nn.Module):
    """The module's outputs as a tuple: what a graph can have."""

    def __init__(self, module: nn.Module, *, classifies: bool) -> None:
        super().__init__()
        self.module, self.classifies = module, classifies

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(b, c, h, w) normalised -> (logits,), or (final tokens, map of every stage)."""
        if self.classifies:
            return (self.module({"image": image})["logits"],)
        backbone = self.module.backbone
        if not hasattr(backbone, "features"):
            return (backbone.encode(backbone.embed(image)),)
        maps = backbone.features(image)
        return (maps[-1].permute(0, 2, 3, 1), *maps)

    def names(self, count: int) -> list[str]:
        """One name per output."""
        return ["logits"] if self.classifies else ["tokens", *(f"map_{stage}" for stage in range(count - 1))]


def write(source: Source, out: Path) -> Written:
    """The graph with its weights inside (beside it above 2 GB), exported by torch.export."""
    try:
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ModuleNotFoundError as error:
        raise ValueError(f"--to onnx: {error.name} is not installed. pip install 'simmim-scale[onnx]'.") from error
    outputs = _outputs(source, attention=ATTENTION)
    image = source.picture()
    with torch.no_grad():
        names = outputs.names(len(outputs(image)))  # this run also makes the tables of the windows, which must not be traced
        program = torch.onnx.export(
            outputs,
            (image,),
            dynamo=True,
            input_names=["image"],
            output_names=names,
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    program.model.metadata_props["class_names"] = json.dumps(source.pretrained.class_names)
    program.model.metadata_props["mean"] = json.dumps(source.config.data.mean)
    program.model.metadata_props["std"] = json.dumps(source.config.data.std)
    program.save(out / FILE)
    height, width = source.config.model.image_size
    notes = [f"images of {height}x{width} alone, any batch; outputs {', '.join(names)}"]
    if source.config.task == "pretrain":
        notes.append("the features of whole pictures; mask token and decoder are left out")
    return Written(usage=USAGE, notes=notes)


def _outputs(source: Source, *, attention: str) -> Outputs:
    return Outputs(source.rebuilt(attention), classifies=source.config.task == "classification").eval()


def verify(source: Source, out: Path) -> list[Agreement]:
    import onnx
    import onnxruntime

    onnx.checker.check_model(out / FILE)
    session = onnxruntime.InferenceSession(out / FILE, providers=["CPUExecutionProvider"])
    outputs = Outputs(source.module, classifies=source.config.task == "classification").eval()
    image = source.picture(batch=3)  # another batch than the one it was traced with
    ours = outputs(image)
    theirs = session.run(None, {"image": image.numpy()})
    return [
        compare(name, own, torch.from_numpy(other))
        for name, own, other in zip(outputs.names(len(ours)), ours, theirs, strict=True)
    ]


USAGE = """```python
import json
import onnxruntime

session = onnxruntime.InferenceSession("DIR/model.onnx")
names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
outputs = session.run(None, {"image": image})  # (b, c, h, w) float32, (x / 255 - mean) / std
```"""


def target() -> Target:
    """The target, for the table."""
    return Target(libraries=("onnx", "onnxruntime"), install="pip install 'simmim-scale[onnx]'", write=write, verify=verify)
