"""FLOPs of the CPU's attention, for which PyTorch's FlopCounterMode has no formula: its `custom_mapping`."""

import torch

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def product(q, k):
    """Half the FLOPs of Q·Kᵀ, from the shapes [B, heads, S, D] of both."""
    return q[0] * q[1] * q[2] * k[2] * q[3]


FORMULAS = {
    FORWARD: lambda q, k, *rest, **options: 4 * product(q, k),  # Q·Kᵀ and the sum over V
    # Five products of that size: one is the scores', again.
    BACKWARD: lambda gradient, q, k, *rest, **options: 10 * product(q, k),
}
