"""What every section of the configuration is made of: frozen models whose fields carry their unit and source."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

# Sources, as the recipes name them: S = the SimMIM supplement; R = the released configs of microsoft/SimMIM and
# microsoft/Swin-Transformer; V2 = the SwinV2 paper (arXiv 2111.09883); "choice" = published nowhere, ours.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def setting(default: Any = ..., doc: str = "", *, unit: str = "", source: str = "", **constraints: Any) -> Any:
    """A documented field: `doc` says what it does, `unit` what it is counted in, `source` where the default comes from."""
    return Field(default, description=doc, json_schema_extra={"unit": unit, "source": source}, **constraints)


class Section(BaseModel):
    """A part of the configuration: frozen, and unknown keys are errors (with a suggestion, see `config/load.py`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
