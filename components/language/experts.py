"""Expert vectors: what a language model's singular values are scaled by for a task; kept in files, and mixed.

Sun, Cetin and Tang, "Transformer-Squared: Self-adaptive LLMs", arXiv 2501.06252, sections 3.2 and 3.3.

Dimensions: K experts, A adapted matrices, r singular values of one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from components.files import check_file, is_damage, replacing
from components.language.singular_values import unscaled
from components.structure import NUMBER, check_structure

FORMAT = "tenfold expert 1"
_ABOUT = {"base": str, "task": str, "largest": (NUMBER, None), "rescale": str}


@dataclass
class Expert:
    """Scales z [r] of the singular values of each adapted matrix, by the name of its layer.

    Attributes:
        scales: single precision, on the CPU.
        base: checksum of the model that they are of.
        task: what it was trained for.
        largest: z comes from `largest * sigmoid(p)`; None where z was trained itself.
        rescale: of `SingularValueScaling`.
    """

    scales: dict[str, Tensor]
    base: str
    task: str
    largest: float | None
    rescale: str

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically."""
        about = {"base": self.base, "task": self.task, "largest": self.largest, "rescale": self.rescale}
        # One entry alone: of several the order, and with it the file, would be another each time.
        with replacing(path) as temporary:
            save_file({name: z.contiguous() for name, z in self.scales.items()}, temporary, {FORMAT: json.dumps(about)})

    @staticmethod
    def load(path: str | Path, base: str | None = None) -> "Expert":
        """What `save` wrote.

        Args:
            base: checksum of the model that it has to be of; None for any.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no expert, or one of another model than `base`.
        """
        path = Path(path)
        check_file(path, "the file of an expert vector")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                scales = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            if not is_damage(error):
                raise
            raise ValueError(f"{path}: expected the file of an expert vector, found a damaged one ({error}).") from None
        if FORMAT not in metadata:
            raise ValueError(f"{path}: expected the file of an expert vector, found another kind of file.")
        try:
            about = json.loads(metadata[FORMAT])
        except (ValueError, RecursionError):
            about = metadata[FORMAT]
        check_structure(about, _ABOUT, f"{path}: {FORMAT}")
        for name, z in scales.items():
            if z.dtype != torch.float32 or z.dim() != 1 or not len(z) or not z.isfinite().all():
                found = f"{z.dtype} {list(z.shape)}" + ", not all finite" * z.is_floating_point()
                raise ValueError(f"{path}: expected finite numbers of single precision in {name}, found {found}.")
        if base is not None and about["base"] != base:
            raise ValueError(f"{path}: expected an expert of the model {base}, found one of the model {about['base']}.")
        return Expert(scales, **{name: about[name] for name in _ABOUT})

    def shuffled(self, seed: int) -> "Expert":
        """A control: every matrix' scales in another order, so that only their distribution is left."""
        generator = torch.Generator().manual_seed(seed)
        scales = {name: z[torch.randperm(len(z), generator=generator)] for name, z in self.scales.items()}
        return Expert(scales, self.base, self.task, self.largest, self.rescale)

    def raw(self) -> dict[str, Tensor]:
        """p of z = largest * sigmoid(p), which the authors' code mixes; z where that is what was trained."""
        if self.largest is None:
            return self.scales
        return {name: unscaled(z, self.largest) for name, z in self.scales.items()}


def mixed(experts: Sequence[Expert], weights: Tensor, space: str = "z") -> dict[str, Tensor]:
    """Scales of a mixture of experts of one model, in which each has a weight, or one for each matrix.

    A matrix in which no expert has any is the base model's.

    Args:
        experts: K.
        weights: [K], or [K, A] in the order of the experts' matrices.
        space: what is mixed: scales ``z`` (the paper), or the ``raw`` numbers before the sigmoid, used as scales (the
            authors' code, where an expert alone is not itself).
    """
    if space not in ("z", "raw"):
        raise ValueError(f"Unknown mix_space={space!r}: expected z or raw.")
    shapes = [[len(experts)], [len(experts), len(experts[0].scales)]] if experts else []
    if list(weights.shape) not in shapes:
        raise ValueError(f"weights: expected the shape {' or '.join(map(str, shapes))}, found {list(weights.shape)}.")
    vectors: list[Mapping[str, Tensor]] = [each.scales if space == "z" else each.raw() for each in experts]
    names = list(vectors[0])
    for expert, vector in zip(experts, vectors):
        if list(vector) != names:
            raise ValueError(f"The expert of {expert.task} adapts other matrices than that of {experts[0].task}.")
    weights = weights.cpu()
    columns = weights[:, None].expand(-1, len(names)) if weights.dim() == 1 else weights
    return {
        name: sum(weight * vector[name] for weight, vector in zip(column, vectors))
        if column.any()
        else torch.ones_like(vectors[0][name])
        for name, column in zip(names, columns.T)
    }
