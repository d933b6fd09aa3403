"""Print the instruction sets of the CPU kernels that this machine can execute, as values of ICSD_CPU_ISA."""

import os
import subprocess
import sys

from icsd import _native

QUESTION = "from icsd import _native; _native.cpu_isa()"


def main() -> None:
    """Ask one process for each instruction set, for the choice is made once in a process."""
    for isa in _native.build["cpu"].split():
        environment = os.environ | {"ICSD_CPU_ISA": isa}
        run = subprocess.run([sys.executable, "-c", QUESTION], env=environment, capture_output=True, check=False)
        if run.returncode == 0:
            print(isa)


if __name__ == "__main__":
    main()
