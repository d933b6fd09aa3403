"""Device tests under compute-sanitizer: a program in its place shows how it is called."""

import compute_sanitizer


def test_every_tensor_has_an_allocation_of_its_own(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\necho "caching: $PYTORCH_NO_CUDA_MEMORY_CACHING"\necho "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    output = compute_sanitizer.run("memcheck", "tests/gpu").stdout.splitlines()
    assert output[0] == "caching: 1"
    assert output[1].startswith("--tool memcheck --error-exitcode 1 --target-processes all ")
    assert output[1].endswith(" -m pytest -p no:cacheprovider tests/gpu")
