"""The convolution in plain torch: any device, any dtype, differentiable by autograd to any order; the oracle."""

import torch
from torch import Tensor

from equimd.kernels.plan import ConvolutionPlan


def convolve_reference(
    x: Tensor, sh: Tensor, radial: Tensor, senders: Tensor, receivers: Tensor, plan: ConvolutionPlan, n_receivers: int
) -> Tensor:
    """``out[n, path] = Σ_{e into n} radial[e, path] · CG_path(x[sender], sh[e])``, (N, D_out, C).

    x (N, D_in, C); sh (E, (l_max_sh+1)²); radial (E, P, C); senders, receivers (E,) int64. Holds all messages of a path
    at once, and keeps them for the backward pass.
    """
    n_channels = x.shape[2]
    gathered = x.index_select(0, senders)
    rows = []
    for path in plan.paths:
        cg = torch.as_tensor(path.cg.copy(), dtype=x.dtype, device=x.device)
        coupling = torch.einsum("ej,ijk->eik", sh[:, path.sh_rows], cg)  # (E, 2 l1 + 1, 2 l3 + 1)
        message = torch.einsum("eic,eik->ekc", gathered[:, path.in_rows], coupling)
        message = message * radial[:, path.weight_index].unsqueeze(1)
        rows.append(x.new_zeros(n_receivers, 2 * path.l3 + 1, n_channels).index_add(0, receivers, message))
    return torch.cat(rows, dim=1) if rows else x.new_zeros(n_receivers, 0, n_channels)
