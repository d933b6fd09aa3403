"""The Triton kernels. Importing them imports triton."""

from icsd.ops.triton.kernels.combine import combine
from icsd.ops.triton.kernels.epilogue import differentiate, measure
from icsd.ops.triton.kernels.gram import gram, gram_sums
from icsd.ops.triton.kernels.moments import moment_sums, moments, project
from icsd.ops.triton.kernels.norms import inverse_norms
from icsd.ops.triton.kernels.streamed import differentiate_streamed, measure_streamed, project_panel

__all__ = [
    "combine",
    "differentiate",
    "differentiate_streamed",
    "gram",
    "gram_sums",
    "inverse_norms",
    "measure",
    "measure_streamed",
    "moment_sums",
    "moments",
    "project",
    "project_panel",
]
