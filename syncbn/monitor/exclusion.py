"""Taking one rank out of a contrast of ranks, from its sums alone, so that no sample has to be kept."""

import torch
from torch import Tensor

from syncbn.drift.ranks import RankContrast


def without(contrast: RankContrast, rank: int, share: Tensor) -> RankContrast:
    """The contrast of all ranks but ``rank``, which keeps its own numbers; the others lose its part in them.

    Let ``p`` be the ``share`` of images, ``(R,)``, 0 for ranks that are out already, and ``d`` a rank's difference
    from its others, weighted by ``p (1 - p)``. Without ``q`` the rank ``r`` differs from its others by
    ``((1 - p_r) d_r + p_q d_q) (1 - p_q) / (1 - p_q - p_r)``, weighted by ``p_r (1 - p_q - p_r) / (1 - p_q)``. This is
    exact if shares are the same in all samples, save that chance is still measured on all ranks.
    """
    p, p_q = share.unsqueeze(1), share[rank]
    left = 1 - p_q - p
    growth = left / ((1 - p_q) * (1 - p))  # of the weight, (R, 1)
    sums, noise, squared_noise, scale, squares = contrast.sums.unbind()  # (2, R, C)
    total = contrast.weights[0]
    difference = sums / total
    own = difference[:, [rank]]
    new_total = total * growth
    new_sums = ((1 - p) * difference + p_q * own) * ((1 - p_q) / left) * new_total
    overall = scale[1] / total + p * difference[1]  # mean square over all ranks
    others_square = overall - (p_q * (1 - p_q) * own[1] + p * (1 - p) * difference[1]) / left
    new_scale = torch.stack([scale[0] * growth, others_square.clamp(min=0) * new_total])
    new_squares = new_sums.square() / new_total + (squares - sums.square() / total)
    changed = torch.stack([new_sums, noise * growth, squared_noise * growth.square(), new_scale, new_squares])
    stays = ((share == 0) | (torch.arange(len(share)) == rank)).unsqueeze(1)
    weights = contrast.weights * torch.stack([growth, growth, torch.ones_like(growth)])
    return RankContrast(
        contrast.num_steps,
        torch.where(stays, contrast.weights, weights),
        torch.where(stays, contrast.sums, changed),
    )
