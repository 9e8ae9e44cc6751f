"""How numbers are computed: float32 in float32 on GPUs, and the same vector mathematics in every thread on CPUs."""

import torch


def exact_float32():
    """Float32 products and convolutions in float32: on GPUs PyTorch would take TF32 for convolutions, with 10 bits."""
    allow_tf32(False)


def allow_tf32(allowed):
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def settle_vector_math():
    """Call the functions that PyTorch takes from oneMKL on one number each, before two threads can meet in one of them.

    On the CPU, oneMKL chooses a kernel at a function's first call. When two threads make that call together, one of
    them may run a kernel with errors of 1.5e-4 (seen with torch 2.13 and its oneMKL 2024.2, which 2.11 and 2.15 have,
    too): two identical runs differ from the first batch on, and VideoAlign's first scores are wrong by 3e-4. A call on
    one number runs in one thread.
    """
    number = torch.ones(1)
    for function in (torch.exp, torch.expm1, torch.log, torch.sqrt, torch.sin, torch.cos, torch.tanh, torch.erf):
        function(number)
