"""Weights of smaller rank that change a model's outputs least, from the moments of :mod:`fnl_hf.bert.moments`.

Shapes: K groups of matrices W (K, m, n), m outputs and n inputs; C (K, n, n) second moment of the inputs, G (K, m, m)
of the derivatives by the outputs, k = min(m, n).
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fnl_hf.bert.moments import LayerMoments
from fnl_hf.surgery.calibration import collect_moments
from fnl_hf.surgery.ranks import FACTORIZED

# Relative to the mean eigenvalue, added to all: no text covers every direction, and each needs a gradient.
SHRINKAGE = 1e-3


@dataclass
class Truncations:
    """The best approximations of a layer's weight of each rank.

    Attributes:
        losses: (k,), what leaving out each direction adds to the squared change of the outputs, descending.
        left, right: (K, m, k), (K, n, k): W of rank r is left[..., :r] right[..., :r]ᵀ.
    """

    losses: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor


def find_truncations(weight: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> Truncations:
    """Minimizes ⟨G, (W − W') C (W − W')ᵀ⟩: W' = A⁻¹ P_r P_rᵀ A W with A² = G and the SVD A W C^½ = P Σ Qᵀ.

    Only one root is taken, of G or C, whichever is smaller; C is not inverted.

    Args:
        weight: W (K, m, n).
        inputs: C (K, n, n), or the diagonal of one, (n,).
        outputs: G (K, m, m); all zeros count as the identity.
    """
    weight = weight.double()
    outputs = _regularize(outputs.double())
    if inputs.dim() == 1:
        weighted = weight * inputs.double()  # W C
    else:
        inputs = _regularize(inputs.double())
        weighted = weight @ inputs
    if weight.shape[1] <= weight.shape[2] or inputs.dim() == 1:
        root, inverse = _roots(outputs)
        losses, p = _eigh(root @ weighted @ weight.mT @ root)  # (K, m), (K, m, m)
        return Truncations(losses.sum(dim=0), inverse @ p, weight.mT @ (root @ p))
    root, _ = _roots(inputs)
    mapped = weight @ root  # W L (K, m, n), L² = C
    losses, q = _eigh(mapped.mT @ outputs @ mapped)  # (K, n), (K, n, n)
    smallest = torch.finfo(losses.dtype).eps * losses.shape[1] * losses[:, :1]
    inverse = torch.where(losses > smallest, 1 / losses, 0.0)[:, None]  # (K, 1, n)
    left = mapped @ q  # W L Q = A⁻¹ P Σ
    return Truncations(losses.sum(dim=0), left, weight.mT @ (outputs @ left) * inverse)


def _regularize(moment: torch.Tensor) -> torch.Tensor:
    mean = moment.diagonal(dim1=1, dim2=2).mean(dim=1)  # (K,)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    eye = torch.eye(moment.shape[1], dtype=moment.dtype, device=moment.device)
    share = torch.where(moment.flatten(1).any(dim=1), SHRINKAGE, 1.0)  # (K,)
    return moment + (share * mean)[:, None, None] * eye


def _eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, descending and at least 0, and eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1).clamp(min=0), vectors.flip(-1)


def _roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric root of a positive matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()[:, None]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


class CalibratedLayer:
    """A dense layer with its best approximations, for the moments of its inputs and of the derivatives by its outputs.

    Args:
        layer: of one of the types that can be factorized.
        moments: its own, whose second moments are used up: they are large.
    """

    def __init__(self, layer: Any, moments: LayerMoments):
        self.layer, self.moments = layer, moments
        self._shapes: Any = FACTORIZED[type(layer)].like(layer, 1, False, device="meta")
        weight = self._shapes.to_matrices(layer.weight.detach())
        found = self._find(weight, moments.covariance(getattr(layer, "bias", None) is not None), moments.outputs)
        # All layers keep theirs until the ranks are chosen: about three times the model's own size.
        self._dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        self._found = Truncations(found.losses, found.left.to(self._dtype), found.right.to(self._dtype))
        self._counts = bool(moments.outputs.any())
        moments.inputs = moments.outputs = 0.0

    def _find(self, weight: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> Truncations:
        if isinstance(self.layer, nn.Embedding):  # its entries are rows: the transposed weight maps them to the outputs
            found = find_truncations(weight.mT, inputs, outputs)
            return Truncations(found.losses, found.right, found.left)
        if isinstance(self.layer, nn.Conv2d):  # a row for each (output channel, k_h)
            outputs = torch.kron(outputs, torch.eye(self.layer.kernel_size[0]).to(outputs))
        return find_truncations(weight, inputs, outputs)

    @property
    def losses(self) -> torch.Tensor:
        """The loss for leaving out each direction, (min(m, n),), descending; 0 if no output depends on the layer."""
        return self._found.losses if self._counts else torch.zeros_like(self._found.losses)

    def error(self, rank: int) -> float:
        """‖G^½ (W − W') C^½‖_F / ‖G^½ W C^½‖_F."""
        losses = self._found.losses
        return (losses[rank:].sum() / losses.sum()).sqrt().item() if losses.any() else 0.0

    @torch.no_grad()
    def truncated(self, rank: int) -> Any:
        """A dense layer whose weight has this rank, in float32 (float64: in float64); its bias absorbs the mean loss of
        its output."""
        layer, dtype = self.layer, self._dtype
        weight = self._shapes.to_weight(self._found.left[..., :rank] @ self._found.right[..., :rank].mT)
        truncated = self._shapes.new_dense(device="meta")
        truncated.weight = nn.Parameter(weight.to(dtype), requires_grad=layer.weight.requires_grad)
        if getattr(layer, "bias", None) is not None:
            bias = layer.bias.double() + self.moments.mean_output(layer.weight.double() - weight)
            truncated.bias = nn.Parameter(bias.to(dtype), requires_grad=layer.bias.requires_grad)
        return truncated.train(layer.training)


def calibrate(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]) -> dict[str, CalibratedLayer]:
    """Name -> calibrated layer, without layers that the data do not reach.

    Raises:
        ValueError: see :func:`fnl_hf.surgery.calibration.collect_moments`; weights on the meta device or not finite;
            inputs or derivatives that are not finite; data that reach no layer.
    """
    for name, layer in layers.items():
        weight: Any = layer.weight
        if not weight.is_meta and weight.isfinite().all():
            continue
        what = "on the meta device" if weight.is_meta else "not finite"
        raise ValueError(f"{name}: calibration needs the layer's weight, but it is {what}")
    found, few = {}, {}
    for name, moments in collect_moments(model, layers, batches):
        inputs = moments.inputs.shape[-1] if moments.rows else 0
        if moments.rows < inputs:
            few[name] = (inputs, moments.rows)
        if moments.rows:
            if not (moments.inputs.isfinite().all() and moments.outputs.isfinite().all()):
                raise ValueError(f"calibration: inputs of {name}, or derivatives by its outputs, are not finite")
            found[name] = CalibratedLayer(layers[name], moments)
    if not found:
        raise ValueError("the calibration data reach none of the layers: is everything padding (attention_mask)?")
    if few:
        name = max(few, key=lambda name: few[name])
        inputs, rows = few[name]
        warnings.warn(
            f"the calibration data give {rows} rows for {name}, which has {inputs} inputs. {len(few)} of "
            f"{len(layers)} layers get fewer rows than they have inputs: use more data to calibrate them reliably",
            stacklevel=4,
        )
    return found
