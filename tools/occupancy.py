"""The part of an NVIDIA multiprocessor that the blocks of a kernel can fill.

Sources: CUDA C++ Programming Guide, "Compute capabilities", and the occupancy calculator of Nsight Compute.
"""

from __future__ import annotations

# The limits of a multiprocessor by compute capability: warps, blocks, KiB of shared memory.
MULTIPROCESSORS = {
    75: (32, 16, 64),
    80: (64, 32, 164),
    86: (48, 16, 100),
    89: (48, 24, 100),
    90: (64, 32, 228),
    100: (64, 32, 228),
    120: (48, 24, 100),
}
REGISTERS = 65536


def reserved(capability: int) -> int:
    """Return the bytes of shared memory that the system reserves in every block."""
    return 1024 if capability >= 80 else 0


def occupancy(capability: int, registers: int, shared: int, warps: int) -> float:
    """Return the part of a multiprocessor's warps that are resident at once; 0 if a block does not fit.

    Args:
        capability: The compute capability, 80 for 8.0.
        registers: The registers of a thread.
        shared: The bytes of shared memory of a block, static and dynamic.
        warps: The warps of a block.
    """
    most_warps, most_blocks, shared_kib = MULTIPROCESSORS[capability]
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // warp_registers // 4 * 4 // warps
    by_shared = (shared_kib << 10) // max(1, shared + reserved(capability))
    return min(most_warps // warps, most_blocks, by_registers, by_shared) * warps / most_warps
