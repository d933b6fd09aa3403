"""Print the instruction sets of the CPU kernels that this machine can execute, as values of ICSD_CPU_ISA."""

import os
import subprocess
import sys

from icsd import _native

QUESTION = "from icsd import _native; _native.cpu_isa()"

REFUSAL = "this processor runs"  # in the error of an instruction set that the processor does not have


def main() -> None:
    """Ask one process for each instruction set, for the choice is made once in a process."""
    for isa in _native.build["cpu"].split():
        environment = os.environ | {"ICSD_CPU_ISA": isa}
        command = [sys.executable, "-c", QUESTION]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode == 0:
            print(isa)
        elif REFUSAL not in run.stderr:
            sys.exit(f"the kernels for {isa} cannot be loaded (exit status {run.returncode}):\n{run.stderr}")


if __name__ == "__main__":
    main()
