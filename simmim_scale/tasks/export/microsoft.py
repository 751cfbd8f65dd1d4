"""checkpoint.pth in the layout of microsoft/SimMIM and microsoft/Swin-Transformer: classification, or pre-training with encoder,
mask token and decoder.

Their code is no package, so it cannot be run here. What can be: our importer reads the file back bit for bit, and timm, which
knows the published names, computes the same from it.
"""

from pathlib import Path
from typing import Any

import torch

from simmim_scale.config.schema import Config, SwinBaseConfig, SwinV2Config
from simmim_scale.models.layouts.checkpoint_file import read_checkpoint
from simmim_scale.models.layouts.microsoft import convert, to_microsoft
from simmim_scale.models.layouts.records import Hints
from simmim_scale.tasks.export.records import Agreement, Source, Target, Written
from simmim_scale.tasks.export.timm import check_timm_has, compare_with, model_arguments

FILE = "checkpoint.pth"


def write(source: Source, out: Path) -> Written:
    """{"model": tensors by published names, "config": the settings that their code stores beside them}."""
    model = source.swin("microsoft")
    if source.config.task == "backbone":
        raise ValueError("--to microsoft: a backbone alone is no checkpoint of theirs. Try --to timm.")
    state = source.known_state()
    notes = ["microsoft's own code is no package and was not run; read back by our importer, and by timm where it has the model"]
    if source.config.task == "pretrain" and not source.has_published_decoder:
        state["mask_token.token"] = source.state["mask_token.token"]
        notes.append(f"the {source.config.objective.head} head has no place there and is left out")
    if getattr(model, "extra_norm_period", 0):
        notes.append("the norms on the main branch are called norm3; the public code has no such model")
    tensors = {name: value.contiguous() for name, value in to_microsoft(state).items()}
    torch.save({"model": tensors, "config": _settings(source.config, model)}, out / FILE)
    return Written(usage=USAGE, notes=notes)


def _settings(config: Config, model: SwinBaseConfig) -> dict[str, Any]:
    height, width = model.image_size
    section: dict[str, Any] = {
        "PATCH_SIZE": model.patch_size,
        "IN_CHANS": model.in_chans,
        "EMBED_DIM": model.embed_dim,
        "DEPTHS": list(model.depths),
        "NUM_HEADS": list(model.num_heads),
        "WINDOW_SIZE": model.window_size,
        "MLP_RATIO": model.mlp_ratio,
        "QKV_BIAS": model.qkv_bias,
    }
    if isinstance(model, SwinV2Config):
        section["PRETRAINED_WINDOW_SIZES"] = list(model.pretrained_window_sizes)
    target = config.objective.norm_target_window
    return {
        "DATA": {
            "IMG_SIZE": height if height == width else [height, width],
            "MASK_PATCH_SIZE": config.mask.cell,
            "MASK_RATIO": config.mask.ratio,
        },
        "MODEL": {
            "TYPE": "swin" if model.name == "swin" else "swinv2",
            "DROP_PATH_RATE": model.drop_path,
            "SWIN" if model.name == "swin" else "SWINV2": section,
            "SIMMIM": {"NORM_TARGET": {"ENABLE": target is not None, "PATCH_SIZE": target or 0}},
        },
    }


def verify(source: Source, out: Path) -> list[Agreement]:
    """The file read back, and what timm computes from it."""
    import timm

    model = source.swin("microsoft")
    back = convert(read_checkpoint(out / FILE), Hints()).state
    differing = [name for name, value in back.items() if not torch.equal(value, source.state[name].float())]
    agreements = [Agreement("tensors read back", float(len(differing)))]
    try:
        check_timm_has(model)
    except ValueError:
        return agreements
    published = torch.load(out / FILE, weights_only=True)["model"]
    encoder = {name.removeprefix("encoder."): value for name, value in published.items()}
    encoder = {name: value for name, value in encoder.items() if not name.startswith(("mask_token", "decoder."))}
    classes = encoder["head.weight"].shape[0] if "head.weight" in encoder else 0
    arguments = model_arguments(model, classes)
    kind, reader = (
        (timm.models.swin_transformer.SwinTransformer, timm.models.swin_transformer.checkpoint_filter_fn)
        if model.name == "swin"
        else (timm.models.swin_transformer_v2.SwinTransformerV2, timm.models.swin_transformer_v2.checkpoint_filter_fn)
    )
    theirs = kind(**arguments).eval()
    theirs.load_state_dict(reader({"model": encoder}, theirs))
    return agreements + compare_with(source, theirs)


USAGE = """In a checkout of microsoft/SimMIM or microsoft/Swin-Transformer `--pretrained DIR/checkpoint.pth` after pre-training,
`--resume DIR/checkpoint.pth` for a classifier, with the sizes that `torch.load("DIR/checkpoint.pth")["config"]` lists."""


def target() -> Target:
    """The target, for the table."""
    return Target(libraries=("timm",), install="pip install timm", write=write, verify=verify)
