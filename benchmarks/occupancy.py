"""How much of one of NVIDIA's multiprocessors the blocks of a kernel can fill.

Source: CUDA C++ Programming Guide, "Compute capabilities", and the occupancy calculator of Nsight Compute.
"""

from __future__ import annotations

# Of a multiprocessor: warps, blocks, KiB of shared memory.
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
    """Bytes of shared memory that the system takes of every block."""
    return 1024 if capability >= 80 else 0


def occupancy(capability: int, registers: int, shared: int, warps: int) -> float:
    """Part of a multiprocessor's warps that are there at once, 0 if a block does not fit.

    Args:
        capability: E.g. 80.
        registers: Of a thread.
        shared: Bytes of a block, static and dynamic.
        warps: Of a block.
    """
    most_warps, most_blocks, shared_kib = MULTIPROCESSORS[capability]
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // of_warp // 4 * 4 // warps
    by_shared = (shared_kib << 10) // max(1, shared + reserved(capability))
    return min(most_warps // warps, most_blocks, by_registers, by_shared) * warps / most_warps
