from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import torch.multiprocessing as multiprocessing
from tests.kernels.conftest import needs_library

from headway.kernels import library
from headway.kernels.adam import adam_
from headway.kernels.blockwise import adam8_, dequantize_blockwise, quantize_blockwise
from headway.kernels.finite import first_nonfinite
from headway.kernels.project import project_orthogonal_
from headway.kernels.select import clamp_magnitude_, kth_largest_magnitude


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def adam_tensors(count: int = 100_000) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(count, generator=generator) + 0.5 for _ in range(4)]


def adam_step(tensors: list[torch.Tensor]) -> torch.Tensor:
    adam_(*[[t] for t in tensors], step_sizes=[0.1], root_scales=[1.0], beta1=0.9, beta2=0.99, eps=1e-8)
    return tensors[0]


@pytest.mark.skipif(shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler")
def test_library_is_built_where_a_compiler_is():
    assert library._PATH.exists(), "build it: pip install --no-build-isolation --no-deps -e ."
    assert library._load("")[1] == ""


def test_reference_is_forced_by_the_environment():
    code = """
from headway.kernels import library
from headway.kernels.finite import first_nonfinite
import torch
print(library.available(), library.why_not(), first_nonfinite([torch.tensor(float("inf"))]))
"""
    assert run_python(code, HEADWAY_KERNELS="reference") == "False HEADWAY_KERNELS=reference is set 0\n"


def test_unknown_value_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("HEADWAY_KERNELS", "fast")
    with pytest.raises(ValueError, match="HEADWAY_KERNELS must be 'native' or 'reference', got 'fast'"):
        library.available()


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.delenv("HEADWAY_KERNELS", raising=False)
    library._load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library._load.cache_clear()


def test_missing_library_is_explained_and_the_reference_runs(fresh, tmp_path):
    expected = adam_step(adam_tensors())
    fresh.setattr(library, "_PATH", tmp_path / "_native.so")
    library._load.cache_clear()
    assert not library.available()
    assert "were not built" in library.why_not()
    torch.testing.assert_close(adam_step(adam_tensors()), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="were not built"):
        adam_(*[[torch.ones(2)]] * 4, step_sizes=[1], root_scales=[1], beta1=0, beta2=0, eps=1, native=True)


def test_unloadable_library_is_explained(fresh, tmp_path):
    (tmp_path / "_native.so").write_bytes(b"no library")
    fresh.setattr(library, "_PATH", tmp_path / "_native.so")
    assert "cannot be loaded" in library.why_not()


@needs_library
def test_library_of_another_version_is_refused(fresh):
    fresh.setattr(library, "_VERSION", -1)
    assert "reinstall headway" in library.why_not()


@needs_library
def test_one_thread_pool_serves_torch_and_the_kernels():
    code = """
import torch
from headway.kernels.adam import adam_
torch.set_num_threads(3)
(torch.randn(10**6) + 1).sum()
tensors = [[torch.rand(10**6)] for _ in range(4)]
count = lambda: len(__import__("os").listdir("/proc/self/task"))
before = count()
adam_(*tensors, step_sizes=[1.0], root_scales=[1.0], beta1=0.9, beta2=0.9, eps=1.0, native=True)
print(before, count())
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("counts threads in /proc")
    before, after = run_python(code).split()
    assert before == after


def _child(queue, tensors: list[torch.Tensor], expected: bytes) -> None:
    # No torch operation that runs in parallel: those hang in a forked child.
    same = adam_step(tensors).numpy().tobytes() == expected
    queue.put((same, first_nonfinite([tensors[1], torch.tensor([float("nan")])])))


@needs_library
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_kernels_run_in_child_processes(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tensors = adam_tensors()
        expected = adam_step(adam_tensors()).numpy().tobytes()  # the pool is running when the process forks
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        child = context.Process(target=_child, args=(queue, tensors, expected), daemon=True)
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get() == (True, 1)
    finally:
        torch.set_num_threads(threads)


@needs_library
def test_kernels_run_in_several_threads_at_once():
    expected, results = adam_step(adam_tensors()), []
    threads = [threading.Thread(target=lambda: results.append(adam_step(adam_tensors()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


def test_takes_only_plain_dense_cpu_tensors_of_the_dtype():
    x = torch.zeros(4, 6, 3, 5)
    assert library.takes(x)
    assert library.takes(torch.nn.Parameter(x))
    assert library.takes(torch.tensor(1.0))
    assert library.takes(torch.zeros(0, 3))
    assert library.takes(x.to(memory_format=torch.channels_last))
    assert library.takes(x.permute(2, 0, 3, 1))
    assert not library.takes(x[:, ::2])
    assert not library.takes(torch.zeros(1).expand(3))
    assert not library.takes(x.double())
    assert not library.takes(x.to("meta"))
    assert not library.takes(x.to_sparse())
    assert not library.takes(torch._neg_view(x))


def test_dense_alike_means_elements_in_the_same_order():
    x = torch.zeros(4, 6, 3, 5)
    last = x.to(memory_format=torch.channels_last)
    assert library.dense_alike(x, x.clone(), x.clone())
    assert library.dense_alike(last, last.clone())
    assert not library.dense_alike(x, last)
    assert not library.dense_alike(last, x)
    assert not library.dense_alike(x, x.reshape(-1))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_leave_the_floating_point_unit_as_it_was(instruction_set, dtype):
    """Compilers may use MMX registers, which makes torch.remainder return NaN unless they are given back."""
    scales = {"step_sizes": [0.1], "root_scales": [1.0], "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
    for count in (*range(1, 40), 1000):  # each way to end a loop
        p, g = (torch.rand(count).add(0.5).to(dtype) for _ in range(2))
        m, v, h = (torch.rand(count) for _ in range(3))
        codes, absmax = quantize_blockwise(m)
        adam_([p], [g], [m], [v], **scales)
        adam_([p], [g], [m], [v], previous_grads=[h], spike=2.0, clip=1.0, l2=0.1, **scales)
        for decay_after in (1.0, 0.9):
            moments = [codes], [absmax], [codes.clone()], [absmax.clone()]
            adam8_([p], [g], *moments, decay_after=decay_after, **scales)
        first_nonfinite([p, m])
        dequantize_blockwise(*quantize_blockwise(v, signed=False), signed=False)
        kth_largest_magnitude([m, torch.rand(100_000)], 5)
        clamp_magnitude_([m], 0.5)
        project_orthogonal_([m, 3 * v + 1e-3 * m], [v, v], renormalize=True)
        assert torch.remainder(torch.tensor(5.25, dtype=torch.float64), 2).item() == 1.25
