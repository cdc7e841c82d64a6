"""Singular values of a saved model's products: effective rank and norms, which a run does not log."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModel
from transformers.utils import logging

import fnl_hf


def spectra_of(folder: Path) -> dict[str, dict[str, float]]:
    """{kind: measures} of the model saved in ``folder``, each measure a mean over the products of that kind.

    ``effective_rank`` is a mean over heads, too; in the norms the heads of a layer count as one block-diagonal matrix,
    as in :func:`fnl_hf.diagnose_products`.
    """
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # that a head is left out is meant
    logging.disable_progress_bar()
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for product in fnl_hf.find_products(AutoModel.from_pretrained(folder)):
        values = singular_values(product.factors())
        measures = found[product.kind]
        measures["effective_rank"] += effective_rank(values).tolist()
        measures["frobenius"].append(values.square().sum().sqrt().item())
        measures["nuclear"].append(values.sum().item())
    return {
        kind: {name: float(f"{fmean(of):.6g}") for name, of in measures.items()} for kind, measures in found.items()
    }


def singular_values(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of H products U_h V_hᵀ or U_h M_h V_hᵀ, in float64: (H, r), from the r×r cores of QR decompositions."""
    left, *middle, right = (factor.double() for factor in factors)
    core = torch.linalg.qr(left, mode="r").R
    for matrix in middle:
        core = core @ matrix
    return torch.linalg.svdvals(core @ torch.linalg.qr(right, mode="r").R.mT)


def effective_rank(values: torch.Tensor) -> torch.Tensor:
    """exp(−Σ p log p) with p = σ/Σσ (Roy and Vetterli 2007): (H, r) -> (H,), between 1 and r.

    Equal singular values give r, a single one, or none but zeros, 1.
    """
    shares = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp()
