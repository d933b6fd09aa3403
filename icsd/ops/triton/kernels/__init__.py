"""The Triton kernels, each in one file with its launcher. Importing this package imports triton."""

from icsd.ops.triton.kernels.banks import bank_gradients_kernel, bank_summaries_kernel, merge_splits_kernel
from icsd.ops.triton.kernels.combine import combine_kernel
from icsd.ops.triton.kernels.covariance import covariance_kernel, sum_covariances_kernel
from icsd.ops.triton.kernels.gram import gram_kernel, sum_grams_kernel
from icsd.ops.triton.kernels.norms import inverse_norms_kernel, normalize_backward_kernel
from icsd.ops.triton.kernels.rows import rows_backward_kernel, rows_forward_kernel
from icsd.ops.triton.kernels.streamed import (
    finish_row_block_kernel,
    merge_triangle_kernel,
    streamed_backward_kernel,
    streamed_forward_kernel,
)

__all__ = [
    "bank_gradients_kernel",
    "bank_summaries_kernel",
    "combine_kernel",
    "covariance_kernel",
    "finish_row_block_kernel",
    "gram_kernel",
    "inverse_norms_kernel",
    "merge_splits_kernel",
    "merge_triangle_kernel",
    "normalize_backward_kernel",
    "rows_backward_kernel",
    "rows_forward_kernel",
    "streamed_backward_kernel",
    "streamed_forward_kernel",
    "sum_covariances_kernel",
    "sum_grams_kernel",
]
