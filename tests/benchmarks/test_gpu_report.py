"""The tables of what a GPU did, from a file of JSON lines."""

import pytest

from benchmarks import __main__ as command
from benchmarks import records

TIME = {"samples": 16, "dim": 65536, "dtype": "float32", "loss": "kl", "eager": 150e-6, "graph": 20e-6}
TIME |= {"composite": 50e-6, "cublas": 30e-6, "moved_bytes": 16 << 20, "kernels": {"gram_tensor<float, 1>": 9e-6}}


def write(path, *more):
    records.append(path, "start", date="of an earlier run")
    records.append(path, "failure", name="an earlier failure", detail="")
    records.append(path, "start", date="2026-01-01")
    records.append(path, "machine", device="A GPU", capability="9.0")
    records.append(path, "step", name="build", status="passed", seconds=20.2, output="built")
    records.append(path, "tests", files="tests/gpu", collected=9, passed=7, skipped=1)
    records.append(path, "copy", bytes_per_second=3e12)
    records.append(path, "time", **TIME)
    records.append(path, "time", **TIME | {"samples": 64})
    records.append(path, "compiled", samples=16, dim=65536, dtype="float32", loss="kl", seconds=45e-6)
    for kind, values in more:
        records.append(path, kind, **values)


def test_times_stand_beside_the_floor_and_the_peers(tmp_path, capsys):
    write(tmp_path / "gpu.jsonl")
    assert command.main(["gpu", str(tmp_path / "gpu.jsonl")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("device A GPU, capability 9.0, copies 3,000 GB/s\n\nNothing failed.\n")
    assert "| 16 x 65,536 | float32 | kl | 150.0 | 20.0 | 3.58 | 2.50x | 2.25x | 1.50x |" in out
    assert "| 64 x 65,536 | float32 | kl | 150.0 | 20.0 | 3.58 | 2.50x |  | 1.50x |" in out
    assert "| tests/gpu | 7 passed, 1 skipped, of 9 |  |" in out
    assert "| 16 x 65,536 | float32 | kl | gram_tensor<float, 1> | 9.0 |" in out


def test_failures_come_first(tmp_path, capsys):
    failed = {"name": "memcheck", "status": "out of time", "seconds": 160.0, "output": "one line\nthe last line\n"}
    check = {"name": "cuda: sample kl 33 x 8 float32", "detail": "the loss is off by 1 | 2"}
    write(tmp_path / "gpu.jsonl", ("step", failed), ("failure", check))
    assert command.main(["gpu", str(tmp_path / "gpu.jsonl")]) == 1
    out = capsys.readouterr().out
    assert "an earlier failure" not in out
    first = out.index("| memcheck | out of time: the last line |")
    assert first < out.index("| cuda: sample kl 33 x 8 float32 | the loss is off by 1 \\| 2 |") < out.index("| build |")


@pytest.mark.parametrize("text", ["no JSON\n", '{"no": "kind"}\n', "[1]\n", None])
def test_a_bad_file_is_one_line(text, tmp_path, capsys):
    path = tmp_path / "gpu.jsonl"
    if text is not None:
        path.write_text('{"kind": "start"}\n' + text)
    assert command.main(["gpu", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "gpu.jsonl" in error
