"""LayerNorm of tokens, alone and with the residual sum beside it, as modules: calling them lets ZeRO-3 gather their parameters.

They are `nn.LayerNorm`s, so parameters keep their published names and `init_weights` its rules.
Letters: b batch, c channels, h w tokens per axis.
"""

from jaxtyping import Float
from torch import Tensor, nn

from simmim_scale.kernels.norm import layer_norm, post_norm, pre_norm


class TokenNorm(nn.LayerNorm):
    """LayerNorm of the last axis, by the implementation that `use_norm_kernels` chose.

    Attributes:
        implementation: "auto" or a name of `kernels/dispatch.py`.
    """

    implementation = "auto"

    def forward(self, x: Float[Tensor, "*tokens c"]) -> Float[Tensor, "*tokens c"]:
        """Same shape and type."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps, implementation=self.implementation)


class PostNorm(TokenNorm):
    """The end of a residual branch of Swin V2: x + scale * LN(branch)."""

    def forward(
        self, branch: Float[Tensor, "b h w c"], residual: Float[Tensor, "b h w c"], scale: Float[Tensor, "b"] | None
    ) -> Float[Tensor, "b h w c"]:
        """The sum. `scale` is drop path's, one per sample; None: 1."""
        return post_norm(branch, residual, scale, self.weight, self.bias, eps=self.eps, implementation=self.implementation)


class PreNorm(TokenNorm):
    """The end of one residual branch of Swin V1 with the beginning of the next."""

    def forward(
        self, branch: Float[Tensor, "b h w c"], residual: Float[Tensor, "b h w c"], scale: Float[Tensor, "b"] | None
    ) -> tuple[Float[Tensor, "b h w c"], Float[Tensor, "b h w c"]]:
        """residual + scale * branch, and its LayerNorm. `scale` is drop path's, one per sample; None: 1."""
        return pre_norm(branch, residual, scale, self.weight, self.bias, eps=self.eps, implementation=self.implementation)


def use_norm_kernels(module: nn.Module, implementation: str) -> int:
    """Let every norm of `module` use `implementation` of `kernels.norm`; returns how many there are."""
    norms = [norm for norm in module.modules() if isinstance(norm, TokenNorm)]
    for norm in norms:
        norm.implementation = implementation
    return len(norms)
