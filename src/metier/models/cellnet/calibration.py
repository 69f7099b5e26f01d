"""The head in closed form: slope and shift of what is known, and a kernel for what remains.

Shapes: B cells, N expressed genes of all cells of a batch, G genes of a panel, V genes of the network, D width,
C components, F features of the kernel (D + C), M landmarks, K proteins of pretraining, P proteins asked for,
O proteins of the network, R rank of a kernel, L strengths of shrinkage, X and Y some proteins, S splits of the cells,
W a search's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metier.core.rng import derive
from metier.models.cellnet.network import PRIOR_CELLS, CellNet, Head, gaussian
from metier.models.cellnet.ragged import Ragged, scaled, totals

STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Ridge added to a kernel whose diagonal is one."""
SLOPE_CELLS = (1.0, 3.0, 10.0, 30.0, 100.0)
"""How many cells the slope common to all proteins may weigh against each protein's own."""
KERNELS = ((1.0, 0.0), (0.3, 0.3), (1.0, 0.3), (0.3, 1.0), (1.0, 1.0), (0.0, 1.0))
"""Inverse squared widths of the kernel over states and over components, in units of the median squared distance."""
PROTEIN_CELLS = 100.0
"""How many cells the strength best for all proteins weighs against the strength best for one."""
FOLDS = 5
HELD_OUT, MOST_REPEATS = 500, 10
"""Cross-validation is repeated until so many cells were held out, or so many times."""
LEAST_CELLS_OF_KERNEL = 2 * FOLDS
"""Fewer cells get slopes and shifts only."""
LEAST_VARIANCE = 1e-9
"""A protein that varies less is constant."""
CHUNK = 512
"""Cells that are read at a time where no gradient is needed."""


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells of a calibration, in float64.

    Attributes:
        state_BD: Their states.
        component_BC: Their scores on their own leading components.
        prior_BP: The pretrained answer, 0 for new proteins.
        known_P: Whether there is one.
        target_BP: What was measured, 0 elsewhere.
        measured_BP: Where.
        weight_BP: Weights under which squared errors sum to the mean over cells in units of a protein's variance; 0
            where nothing was measured and for constant proteins.
        fold_SB: Fold of each cell in each repetition of the cross-validation.
        landmark_M: Cells that the kernel remembers.
    """

    state_BD: Tensor
    component_BC: Tensor
    prior_BP: Tensor
    known_P: Tensor
    target_BP: Tensor
    measured_BP: Tensor
    weight_BP: Tensor
    fold_SB: Tensor
    landmark_M: Tensor


@torch.no_grad()
def calibrate(
    network: CellNet,
    inputs: Mapping[str, Tensor],
    target_BP: Tensor,
    measured_BP: Tensor | None = None,
    *,
    seed: int = 0,
    adapt: bool = True,
) -> list[str]:
    """Fit the network's head to new cells in closed form, in place; every strength is chosen by cross-validation.

    First each known protein's slope and shift (the slope shrunk towards the slope that all share), then a kernel
    ridge regression of what remains, over the cell's state and its leading components. Both stay close to the
    pretrained answer as long as the cells do not speak against it.

    Args:
        network: Extended to the panel, on the CPU; without landmarks only slopes and shifts are fitted.
        inputs: Arguments of `forward` for the cells.
        target_BP: Measured proteins in the order of `inputs["protein_P"]`; NaN where not measured.
        measured_BP: Where the target was measured, in addition; None for all.
        seed: Decides folds and landmarks.
        adapt: Whether centre and spread of the genes, and the components, follow the new cells; False for cells that
            they follow already.

    Returns:
        What was chosen, in sentences.
    """
    was_training = network.training
    network.eval()
    _forget_kernel(network.head)
    if adapt:
        network.standardise(inputs, prior_cells=PRIOR_CELLS)
        _fit_components(network, inputs, seed)
    known = _gather(network, inputs, target_BP, measured_BP, seed)
    slope_cells = _choose_slope_cells(known)
    slope_P, shift_P = _line(known, known.measured_BP.any(1), slope_cells)
    seen_P = known.measured_BP.any(0)
    output_P = inputs["protein_P"][seen_P]
    network.head.slope_O[output_P] = slope_P[seen_P].float()
    network.head.shift_O[output_P] = shift_P[seen_P].float()
    said = [_say_slopes(known, slope_P, slope_cells)]
    if network.config.landmarks and int(known.measured_BP.sum(0).max()) >= LEAST_CELLS_OF_KERNEL:
        said.append(_fit_kernel(network, known, slope_cells, inputs["protein_P"]))
    network.train(was_training)
    return said


def _forget_kernel(head: Head) -> None:
    """Leave slopes and shifts: outputs of an earlier panel must not be read off the landmarks of this one."""
    used_M = head.weight_MO.any(1)
    if bool(used_M.any()):
        near_MF = head.landmark_MF[used_M]
        head.shift_O.add_((gaussian(near_MF, near_MF) @ head.weight_MO[used_M]).mean(0))
        head.weight_MO.zero_()


def _fit_components(network: CellNet, inputs: Mapping[str, Tensor], seed: int) -> None:
    """Set the loadings to the leading principal axes of the cells."""
    if not network.config.components:
        return
    gene_N, offset_B = inputs["gene_N"], inputs["offset_B"]
    total_B = totals(inputs["count_N"], gene_N, offset_B)
    network.depth.copy_(total_B.median().clamp_min(1.0))
    value_N = scaled(inputs["count_N"], gene_N, offset_B, network.depth)
    table = Ragged.of(value_N, gene_N, offset_B, len(network.rate_V))
    _, axes_VC = table.principal(network.config.components, derive(seed, "calibrate", "components"))
    network.loading.weight.zero_()
    network.loading.weight[:, : axes_VC.shape[1]] = axes_VC
    network.middle_C.copy_(table.mean_V @ network.loading.weight)


def _batches(inputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The same cells, a chunk at a time."""
    offset_B, total = inputs["offset_B"], len(inputs["gene_N"])
    for start in range(0, len(offset_B), CHUNK):
        stop = start + CHUNK
        first, last = int(offset_B[start]), int(offset_B[stop]) if stop < len(offset_B) else total
        tokens = {name: inputs[name][first:last] for name in ("count_N", "gene_N")}
        yield {**tokens, "offset_B": offset_B[start:stop] - first}


def _gather(
    network: CellNet, inputs: Mapping[str, Tensor], target_BP: Tensor, measured_BP: Tensor | None, seed: int
) -> Cells:
    states, components = [], []
    for batch in _batches(inputs):
        states.append(network.state(**batch, panel_G=inputs["panel_G"]))
        components.append(network.components(**batch) if network.config.components else states[-1][:, :0])
    state_BD, output_P = torch.cat(states), inputs["protein_P"]
    there_BP = ~target_BP.isnan() if measured_BP is None else measured_BP & ~target_BP.isnan()
    target_BP = torch.where(there_BP, target_BP, 0.0).double()
    number = len(state_BD)
    return Cells(
        state_BD=state_BD.double(),
        component_BC=torch.cat(components).double(),
        prior_BP=network.head.prior(network.known(state_BD))[:, output_P].double(),
        known_P=network.head.origin_O[output_P] >= 0,
        target_BP=target_BP,
        measured_BP=there_BP,
        weight_BP=_weights(target_BP, there_BP),
        fold_SB=_folds(number, seed),
        landmark_M=_drawn(number, network.config.landmarks, seed, "landmarks"),
    )


def _weights(target_BP: Tensor, measured_BP: Tensor) -> Tensor:
    there_BP = measured_BP.double()
    count_P = there_BP.sum(0).clamp_min(1.0)
    centred_BP = (target_BP - (target_BP * there_BP).sum(0) / count_P) * there_BP
    square_P = centred_BP.square().sum(0)
    return torch.where(square_P > LEAST_VARIANCE * count_P, there_BP / square_P.clamp_min(1e-12), 0.0)


def _folds(number: int, seed: int) -> Tensor:
    """Folds of each repetition: few cells are split again and again, for the choice of one split is noise."""
    repeats = max(1, min(MOST_REPEATS, HELD_OUT // number))
    fold_SB = torch.empty(repeats, number, dtype=torch.int64)
    for repeat in range(repeats):
        fold_SB[repeat, _drawn(number, number, seed, f"folds {repeat}")] = torch.arange(number) % FOLDS
    return fold_SB


def _splits(known: Cells) -> Iterator[Tensor]:
    """The cells held out, bool, in each fold of each repetition."""
    for fold_B in known.fold_SB:
        for fold in range(FOLDS):
            yield fold_B == fold


def _drawn(number: int, most: int, seed: int, word: str) -> Tensor:
    dice = torch.Generator().manual_seed(derive(seed, "calibrate", word))
    return torch.randperm(number, generator=dice)[:most]


def _line(known: Cells, rows_B: Tensor, slope_cells: float) -> tuple[Tensor, Tensor]:
    """Slope and shift of each protein by least squares, the slope drawn towards the common one; (P,) each.

    The common slope weighs as much as `slope_cells` cells: the mean of a normal prior, in the words of Bayes.
    """
    there_BP = (known.measured_BP & rows_B[:, None]).double()
    count_P = there_BP.sum(0).clamp_min(1.0)
    prior_mean_P = (known.prior_BP * there_BP).sum(0) / count_P
    target_mean_P = (known.target_BP * there_BP).sum(0) / count_P
    centred_BP = (known.prior_BP - prior_mean_P) * there_BP
    var_P = centred_BP.square().sum(0)
    cov_P = (centred_BP * (known.target_BP - target_mean_P)).sum(0)
    common = (cov_P.sum() / var_P.sum().clamp_min(1e-12)).clamp_min(0.0)
    share_P = slope_cells / count_P
    slope_P = (cov_P + common * share_P * var_P) / (var_P * (1 + share_P)).clamp_min(1e-12)
    # Where nothing varied there is nothing that a slope could follow.
    slope_P = torch.where(known.known_P & known.weight_BP.any(0), slope_P, 0.0)
    return slope_P, target_mean_P - slope_P * prior_mean_P


def _choose_slope_cells(known: Cells) -> float:
    error_LBP = torch.zeros(len(SLOPE_CELLS), *known.target_BP.shape, dtype=torch.float64)
    for number, strength in enumerate(SLOPE_CELLS):
        for held_B in _splits(known):
            slope_P, shift_P = _line(known, ~held_B, strength)
            miss_BP = slope_P * known.prior_BP[held_B] + shift_P - known.target_BP[held_B]
            error_LBP[number, held_B] += miss_BP.square() / len(known.fold_SB)
    return SLOPE_CELLS[_strongest((error_LBP * known.weight_BP).sum(2))]


def _strongest(error_LB: Tensor) -> int:
    """The number of the last strength whose error is within one standard error of the least.

    New donors differ from the cells at hand, which cross-validation cannot see: it shrinks too little.

    Source: Breiman et al. 1984, Classification and Regression Trees, the one-standard-error rule.
    """
    gap_LB = error_LB - error_LB[error_LB.sum(1).argmin()]
    noise_L = gap_LB.std(1, unbiased=False) * gap_LB.shape[1] ** 0.5
    return int((gap_LB.sum(1) <= noise_L).nonzero().max())


def _say_slopes(known: Cells, slope_P: Tensor, slope_cells: float) -> str:
    number = int(known.known_P.sum())
    if not number:
        return f"none of the {len(slope_P)} proteins is known from pretraining"
    low, middle, high = (float(x) for x in slope_P[known.known_P].quantile(slope_P.new_tensor([0.0, 0.5, 1.0])))
    return (
        f"{number} of {len(slope_P)} proteins are known from pretraining: slopes {low:.2f} to {high:.2f}, "
        f"median {middle:.2f}, the common slope weighs as {slope_cells:g} cells"
    )


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel over the cells as explicit features.

    Attributes:
        stretch: Factors on states and on components.
        feature_BF: Stretched states and components.
        basis_MR: From values at the landmarks to explicit features.
        explicit_BR: Explicit features of the cells: their products are the kernel.
    """

    stretch: tuple[float, float]
    feature_BF: Tensor
    basis_MR: Tensor
    explicit_BR: Tensor

    @classmethod
    def of(cls, known: Cells, stretch: tuple[float, float]) -> Kernel:
        """The kernel of these stretches, exact where all cells are landmarks.

        Source: Williams & Seeger 2001, Using the Nystroem method to speed up kernel machines.
        """
        feature_BF = torch.cat([known.state_BD * stretch[0], known.component_BC * stretch[1]], dim=1)
        landmark_MF = feature_BF[known.landmark_M]
        power_M, axes_MM = torch.linalg.eigh(gaussian(landmark_MF, landmark_MF))
        kept_M = power_M > power_M[-1] * 1e-8
        basis_MR = axes_MM[:, kept_M] / power_M[kept_M].sqrt()
        return cls(stretch, feature_BF, basis_MR, gaussian(feature_BF, landmark_MF) @ basis_MR)


def _fit_kernel(network: CellNet, known: Cells, slope_cells: float, output_P: Tensor) -> str:
    """Choose the kernel and its strengths, fit what slope and shift leave, and write it into the head."""
    unit = _units(known)
    best: tuple[float, Kernel, Tensor, tuple[float, float]] | None = None
    # Kernels that differ only in what is constant here are one.
    for width in dict.fromkeys((a if unit[0] else 0.0, b if unit[1] else 0.0) for a, b in KERNELS):
        kernel = Kernel.of(known, (unit[0] * width[0] ** 0.5, unit[1] * width[1] ** 0.5))
        error_LP = (_held_out_errors(known, kernel, slope_cells) * known.weight_BP).sum(1)
        score = float(error_LP.mean(1).min())
        if best is None or score < best[0]:
            best = (score, kernel, error_LP, width)
    assert best is not None  # noqa: S101 - KERNELS is not empty
    score, kernel, error_LP, width = best
    _write_kernel(network, known, kernel, slope_cells, _strengths(known, error_LP), output_P)
    common = STRENGTHS[int(error_LP.mean(1).argmin())]
    return (
        f"a kernel over states ({width[0]:g}) and components ({width[1]:g}), strength {common:g}: "
        f"the error of held-out cells is {score:.2f} of the variance"
    )


def _units(known: Cells) -> tuple[float, float]:
    """What brings the median squared distance of states, and of components, to one; 0 where all are alike."""
    found = []
    for some in (known.state_BD[known.landmark_M], known.component_BC[known.landmark_M]):
        distance = torch.pdist(some) if some.shape[1] else some.new_zeros(1)
        middle = float(distance.median())
        found.append(1.0 / middle if middle > 1e-6 else 0.0)
    return found[0], found[1]


def _held_out_errors(known: Cells, kernel: Kernel, slope_cells: float) -> Tensor:
    """Squared error of each held-out value for each strength, (L, B, P)."""
    error_LBP = torch.zeros(len(STRENGTHS), *known.target_BP.shape, dtype=torch.float64)
    patterns = _patterns(known.measured_BP)
    for held_B in _splits(known):
        slope_P, shift_P = _line(known, ~held_B, slope_cells)
        rest_BP = known.target_BP - slope_P * known.prior_BP - shift_P
        for columns_X, rows_B in patterns:
            train_B, test_B = rows_B & ~held_B, (rows_B & held_B).nonzero()
            path = _ridge(kernel.explicit_BR[train_B], rest_BP[train_B][:, columns_X])
            for number, (weight_RX, bias_X) in enumerate(path):
                answer_BX = kernel.explicit_BR[test_B[:, 0]] @ weight_RX + bias_X
                miss_BX = rest_BP[test_B, columns_X] - answer_BX
                error_LBP[number, test_B, columns_X] += miss_BX.square() / len(known.fold_SB)
    return error_LBP


def _patterns(measured_BP: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Proteins that were measured in the same cells, by number, and which cells, bool; enough for every fold."""
    pattern_XB, which_P = torch.unique(measured_BP.T, dim=0, return_inverse=True)
    return [
        ((which_P == number).nonzero()[:, 0], rows_B)
        for number, rows_B in enumerate(pattern_XB)
        if int(rows_B.sum()) >= LEAST_CELLS_OF_KERNEL
    ]


def _ridge(explicit_BR: Tensor, target_BX: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights (R, X) and shift (X,) of a ridge regression with a free shift, for each strength."""
    mean_R, mean_X = _mean(explicit_BR), _mean(target_BX)
    centred_BR = explicit_BR - mean_R
    power_R, axes_RR = torch.linalg.eigh(centred_BR.T @ centred_BR)
    turned_RX = axes_RR.T @ (centred_BR.T @ (target_BX - mean_X))
    for strength in STRENGTHS:
        weight_RX = axes_RR @ (turned_RX / (power_R.clamp_min(0.0) + strength)[:, None])
        yield weight_RX, mean_X - mean_R @ weight_RX


def _mean(x_BX: Tensor) -> Tensor:
    """Mean over cells, zero for none."""
    return x_BX.sum(0) / max(1, len(x_BX))


def _strengths(known: Cells, error_LP: Tensor) -> Tensor:
    """The strength of each protein by number: its own errors, and all proteins' as if from so many cells more."""
    count_P = known.measured_BP.sum(0).double()
    own_P = count_P / (count_P + PROTEIN_CELLS)
    return (error_LP * own_P + error_LP.mean(1, keepdim=True) * (1 - own_P)).argmin(0)


def _write_kernel(
    network: CellNet, known: Cells, kernel: Kernel, slope_cells: float, strength_P: Tensor, output_P: Tensor
) -> None:
    slope_P, shift_P = _line(known, known.measured_BP.any(1), slope_cells)
    rest_BP = known.target_BP - slope_P * known.prior_BP - shift_P
    head, used = network.head, len(known.landmark_M)
    network.stretch.copy_(torch.tensor(kernel.stretch))
    head.landmark_MF.zero_()
    head.landmark_MF[:used] = kernel.feature_BF[known.landmark_M].float()
    for columns_X, rows_B in _patterns(known.measured_BP):
        path = _ridge(kernel.explicit_BR[rows_B], rest_BP[rows_B][:, columns_X])
        for number, (weight_RX, bias_X) in enumerate(path):
            here_X = strength_P[columns_X] == number
            output_Y = output_P[columns_X[here_X]]
            head.weight_MO[:used, output_Y] = (kernel.basis_MR @ weight_RX[:, here_X]).float()
            head.shift_O[output_Y] = (shift_P[columns_X] + bias_X)[here_X].float()
