"""Singular value fine-tuning: a frozen weight whose singular values are scaled by a learned vector.

Sun, Cetin and Tang, "Transformer-Squared: Self-adaptive LLMs", arXiv 2501.06252, section 3.1, and its authors' code,
which besides keeps the sum of each matrix' singular values.

Dimensions: o rows and i columns of a weight, r = min(o, i). Weights may be stacks of such, [..., o, i], as those of
ensembles are; each is then scaled by itself, and the others' shapes have the same dimensions in front.
"""

import contextlib
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.checks import NonNegative, Number, Positive, checked
from components.files import replacing

RESCALES = ("nuclear", "none")
PARAMETRIZATIONS = ("sigmoid", "direct")


class SVD(NamedTuple):
    """A thin singular value decomposition, singular values falling."""

    u: Tensor  # [o, r]
    s: Tensor  # [r]
    vh: Tensor  # [r, i]


def checksum(weight: Tensor) -> str:
    """Of a tensor's type, shape and values."""
    weight = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{weight.dtype} {list(weight.shape)}".encode())
    digest.update(weight.view(torch.uint8).numpy())
    return digest.hexdigest()


def decompose(weight: Tensor, cache: str | Path | None = None) -> SVD:
    """The decomposition of a weight [..., o, i] in single precision, on the weight's device.

    Args:
        weight: in any precision.
        cache: folder of decompositions by the checksums of their weights; None for none.
    """
    if weight.dim() < 2:
        raise ValueError(f"weight: expected a matrix, found the shape {list(weight.shape)}.")
    if not weight.is_meta and not weight.isfinite().all():
        raise ValueError("weight: expected finite numbers, found NaN or infinity, of which there is no decomposition.")
    path = None if cache is None else Path(cache) / f"{checksum(weight)[:32]}.safetensors"
    if path is not None and path.exists():
        with contextlib.suppress(SafetensorError, KeyError):  # one that is damaged is made anew
            found = load_file(path, device=str(weight.device))
            return SVD(found["u"], found["s"], found["vh"])
    # A large model's weights are made on the CPU, where decomposing them takes hours instead of a minute.
    fastest = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    on = weight.device if weight.is_meta or fastest is None else fastest
    parts = torch.linalg.svd(weight.detach().to(on, torch.float32), full_matrices=False)
    # Contiguous, as they are read again: products would round differently.
    svd = SVD(*(part.to(weight.device).contiguous() for part in parts))
    if path is not None:
        with replacing(path, shared=True) as temporary:
            save_file(svd._asdict(), temporary)
    return svd


@checked
class SingularValueScaling(nn.Module):
    """A parametrisation of a weight W = U diag(s) V' by a vector p [r]: c U diag(s z) V'.

    z = max_scale * sigmoid(p), or p itself. c keeps the sum of singular values, so that only the profile of z matters
    and any constant z gives W (a single singular value has nothing to learn then); or it is 1. p, z and the singular
    values are in single precision whatever the weight's is: in half precision most steps of training would vanish. U
    and V may have another.

    Register it with `parametrize.register_parametrization(linear, "weight", scaling)`: the linear layer's parameter is
    then p, `linear.parametrizations.weight.original0`. This is an ordinary function of p, unless `held` is set to a
    weight, which it is then: many passes take one composition, and `pull_back` takes the gradient of it to p. Likewise
    `apply_to` takes scales z that `fixed` is set to instead of those of p. With `is_base` it is W. All but p are frozen
    parameters, so that whatever shards a model shards them with it.

    Args:
        weight: W [o, i]; kept as it is, for `base`.
        svd: of W.
        rescale: ``nuclear`` keeps the sum of singular values (the authors' code), ``none`` does not (the paper).
        parametrization: ``sigmoid`` (the authors' code) or ``direct``.
        max_scale: largest z of ``sigmoid``; of no effect with ``nuclear``.
        initial_mean, initial_std: p begins normally distributed; by default so that z begins at about 0.525 with
            ``sigmoid``, which needs ``nuclear``, and at 1 with ``direct``.

    Raises:
        ValueError: a setting is unknown, or training would begin far from W.
    """

    def __init__(
        self,
        weight: Tensor,
        svd: SVD,
        *,
        rescale: str = "nuclear",
        parametrization: str = "sigmoid",
        max_scale: Positive = 1.0,
        initial_mean: Number | None = None,
        initial_std: NonNegative | None = None,
    ) -> None:
        super().__init__()
        if rescale not in RESCALES:
            raise ValueError(f"Unknown rescale={rescale!r}: expected one of {', '.join(RESCALES)}.")
        if parametrization not in PARAMETRIZATIONS:
            raise ValueError(f"Unknown parametrization={parametrization!r}: expected one of {PARAMETRIZATIONS}.")
        if (*svd.u.shape[:-1], svd.vh.shape[-1]) != weight.shape:
            raise ValueError(f"svd: expected one of a weight {list(weight.shape)}, found one of another shape.")
        sigmoid = parametrization == "sigmoid"
        if sigmoid and rescale == "none" and initial_mean is None:
            raise ValueError(
                "rescale=none: expected parametrization=direct, or an initial_mean, for a sigmoid would begin at about "
                "half of the weight."
            )
        self.rescale = rescale
        self.parametrization = parametrization
        self.max_scale = max_scale
        self.initial_mean = (0.1 if sigmoid else 1.0) if initial_mean is None else initial_mean
        self.initial_std = (0.01 if sigmoid else 0.0) if initial_std is None else initial_std
        for name, tensor in (("weight", weight.detach().clone()), *zip(svd._fields, svd)):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.held: Tensor | None = None  # the weight to be instead of a function of p
        self.fixed: Tensor | None = None  # z to apply instead of that of p
        self.is_base = False

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        """Where p begins, [r]; not what gives `weight`. A tuple, for p may have another precision than the weight."""
        return (self.initial_mean + self.initial_std * torch.randn_like(self.s),)

    def scales(self, p: Tensor) -> Tensor:
        """z [r] of p [r]."""
        return self.max_scale * p.sigmoid() if self.parametrization == "sigmoid" else p

    def singular_values(self, z: Tensor) -> Tensor:
        """What those of W become, [r]. Where z is zero throughout there is nothing to scale: those of W."""
        scaled = self.s * z
        if self.rescale == "none":
            return scaled
        total = scaled.sum(-1, keepdim=True)
        whole = self.s.sum(-1, keepdim=True)
        return torch.where(total == 0, self.s, scaled * (whole / torch.where(total == 0, 1.0, total)))

    def compose(self, z: Tensor) -> Tensor:
        """The weight [o, i] of scales z [r]."""
        values = self.singular_values(z)
        return ((self.u * values[..., None, :]) @ self.vh.to(values.dtype)).to(self.weight.dtype)

    def forward(self, p: Tensor) -> Tensor:
        if self.is_base:
            return self.weight
        return self.compose(self.scales(p)) if self.held is None else self.held

    def apply_to(self, x: Tensor, p: Tensor, bias: Tensor | None = None) -> Tensor:
        """What a linear layer with the weight makes of x [..., i], without composing it: [..., o]."""
        values = self.singular_values(self.scales(p) if self.fixed is None else self.fixed)
        u, vh = self.u.to(x.dtype), self.vh.to(x.dtype)
        y = ((x @ vh.T) * values.to(x.dtype)) @ u.T
        return y if bias is None else y + bias

    @torch.no_grad()
    def pull_back(self, p: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to p [r] of one with respect to the composed weight [o, i], in closed form.

        With q_j = u_j' G v_j it is c s_j (q_j - <G, W'> / sum(s)) dz_j / dp_j, where <G, W'> = sum_j s'_j q_j; without
        rescaling s_j q_j dz_j / dp_j.
        """
        z = self.scales(p)
        q = (self.u * (gradient.to(self.s.dtype) @ self.vh.mT.to(self.s.dtype))).sum(-2)
        if self.rescale == "nuclear":
            total, whole = (self.s * z).sum(-1, keepdim=True), self.s.sum(-1, keepdim=True)
            factor = torch.where(total == 0, 0.0, whole / torch.where(total == 0, 1.0, total))
            values = self.singular_values(z)
            along = factor * self.s * (q - (values * q).sum(-1, keepdim=True) / whole)
        else:
            along = self.s * q
        return along * (z * (1 - z / self.max_scale)) if self.parametrization == "sigmoid" else along


def unscaled(z: Tensor, largest: float) -> Tensor:
    """p of z = largest * sigmoid(p), finite also where the sigmoid has rounded to 0 or to 1."""
    precision = torch.finfo(z.dtype)
    return (z / largest).clamp(precision.tiny, 1 - precision.eps / 2).logit()


def factorise(layer: nn.Linear) -> None:
    """Let a parametrised linear layer apply its factors one after the other instead of the composed weight.

    Costs r (o + i) for each row instead of o i, and no composition.
    """
    composed = type(layer)
    layer.__class__ = type(f"Factorised{composed.__name__}", (composed,), {"forward": _factorised_forward})


def _factorised_forward(self: nn.Linear, x: Tensor) -> Tensor:
    scaling, p = self.parametrizations.weight[0], self.parametrizations.weight.original0
    whole = scaling.is_base or scaling.held is not None
    return nn.functional.linear(x, scaling(p), self.bias) if whole else scaling.apply_to(x, p, self.bias)
