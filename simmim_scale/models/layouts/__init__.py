"""Checkpoints of other programs: `read_checkpoint` opens the file, a layout turns its names and shapes into ours.

A layout is a function (CheckpointFile, Hints) -> Imported. Start reading at `microsoft.py`.
"""

# name -> "module:function"; resolved when asked for.
LAYOUTS = {
    "microsoft": "simmim_scale.models.layouts.microsoft:convert",
    "timm": "simmim_scale.models.layouts.timm:convert",
    "huggingface": "simmim_scale.models.layouts.huggingface:convert",
}
