"""A linear layer by the library that is fastest on this machine."""

from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._cpu_products import cpu_product
from comemo_kernels.reference.fused_linear_checks import check_linear


@public
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, for inference on a CPU by the fastest way that this machine has.

    On a GPU, with gradients, under autocast and for small weights it is PyTorch's `F.linear`. On a
    CPU a large weight is multiplied by MKL, by oneDNN, by oneDNN with both operands exchanged, or
    in half precision in float32 by pieces, depending on its dtype and the number of rows: by a
    table for CPUs that were measured, otherwise by a measurement once per process (some 0.1 s). A
    way has to win by 20 % to replace that of the table, so that results have the same bits from run
    to run. COMEMO_LINEAR=defaults in the environment measures nothing, COMEMO_LINEAR=torch always
    takes `F.linear`. Also under `torch.compile`.

    Args:
        x: [..., d].
        weight: [O, d] in the dtype of x, except under autocast.
        bias: [O] in the dtype of x, or None.

    Returns:
        [..., O] in the dtype of x. A row's bits depend on how many rows there are, not on the
        other rows.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_linear(x, weight, bias)
    return cpu_product(x, weight, bias)
