"""What only the C++ kernels have: instruction sets, threads, the calls of _C and their errors."""

import os
import subprocess
import sys

import pytest
import torch

from fastdiff import ops
from fastdiff.ops import OPS, streams_of

_C = pytest.importorskip("fastdiff._C", reason="installed without a C++ compiler")


def child(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_each_instruction_set_gets_every_case_right(isa):
    run = child(
        "import torch; from fastdiff.verify import fault; from fastdiff.ops import OPS\n"
        "import fastdiff._C as _C; print(_C.isa())\n"
        "for op in OPS.values():\n"
        "    for case in op.cases():\n"
        "        if not case.large:\n"
        "            assert fault(op, case) is None, (op.name, fault(op, case))\n",
        FASTDIFF_ISA=isa,
        PYTHONPATH=os.pathsep.join([*sys.path, str(os.getcwd())]),
    )
    if run.returncode and "this machine runs" in run.stderr:
        assert isa not in run.stderr.partition("this machine runs")[2]
        return
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == isa


def test_an_unknown_instruction_set_is_refused():
    run = child("import torch, fastdiff._C", FASTDIFF_ISA="avx1024")
    assert run.returncode and "FASTDIFF_ISA=avx1024: this machine runs" in run.stderr


def test_one_openmp_runtime_is_in_the_process_and_ours_uses_it():
    run = child(
        "import torch, fastdiff; from fastdiff import _C\n"
        "torch.set_num_threads(2)\n"
        "torch.ops.fastdiff.randn((4, 20000), fastdiff.ops.streams_of(0, 4), 0, False)\n"
        "lines = [l.split()[-1] for l in open('/proc/self/maps')]\n"
        "maps = {l for l in lines if 'omp.so' in l or 'omp5.so' in l}\n"
        "print(_C.threaded(), len(maps))"
    )
    assert run.stdout.split() == ["True", "1"], run.stderr


def test_without_torch_the_module_loads_and_works_on_one_thread():
    run = child(
        "from importlib import util, machinery\n"
        f"loader = machinery.ExtensionFileLoader('_C', {_C.__file__!r})\n"
        "module = util.module_from_spec(util.spec_from_loader('_C', loader))\n"
        "loader.exec_module(module)\n"
        "import ctypes; out = (ctypes.c_uint32 * 4)(); streams = (ctypes.c_int64 * 2)()\n"
        "module.randn(1, 4, ctypes.addressof(streams), 0, True, ctypes.addressof(out))\n"
        "print(module.threaded(), *map(hex, out))"
    )
    words = ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    assert run.stdout.split() == ["False", *words], run.stderr


def arguments(case, size=None):
    inputs = next(c for c in OPS["step"].cases() if c.name == case).inputs("cpu")
    if size is None:
        return inputs
    x, m = torch.randn(size), torch.randn(size)
    return (x, m, *inputs[2:9], streams_of(1, size[0]), 0)


def test_results_are_the_same_bits_on_any_number_of_threads():
    inputs = arguments("ddpm", (3, 5, 101, 103))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(OPS["step"].call(*inputs)[0])
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_units_result_is_the_same_bits_on_any_threads_and_in_any_batch(dtype, samples):
    """What is cut among threads, and where, is no part of the result."""
    x = torch.randn(samples, 192, 15, 15).to(dtype).contiguous(memory_format=torch.channels_last)
    q = torch.randn(samples, 3, 300, 40).to(dtype)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for batch in (samples, 9):  # nine samples of which these are the last
            normal = OPS["group_norm_silu"].call(
                x.repeat(9, 1, 1, 1)[-batch:], 32, None, None, 1e-5, None, None, True
            )
            attended = OPS["attention"].call(*[q.repeat(9, 1, 1, 1)[-batch:]] * 3, 0.1, False)[0]
            results.append((normal[-samples:], attended[-samples:]))
    torch.set_num_threads(before)
    for normal, attended in results[1:]:
        assert torch.equal(normal, results[0][0]) and torch.equal(attended, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [True, False])
def test_gradients_are_the_same_bits_on_any_number_of_threads(dtype, last):
    """Of 3 samples, which are cut by channels, and of 6 heads, which are cut by their keys."""
    form = torch.channels_last if last else torch.contiguous_format
    x, grad = torch.randn(2, 3, 192, 15, 15).to(dtype).unbind()
    x, grad = x.contiguous(memory_format=form), grad.contiguous(memory_format=form)
    weight, scale = torch.randn(192), torch.randn(3, 192)
    q, k, v, to = torch.randn(4, 3, 2, 300, 40).to(dtype)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, lse = OPS["attention"].call(q, k, v, 0.1, True)
        normal = OPS["group_norm_silu_backward"].call(
            grad, x, 32, weight, weight, 1e-5, scale, scale, True, True
        )
        attended = OPS["attention_backward"].call(to, q, k, v, out, lse, 0.1)
        results.append((*normal, *attended, lse))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_results_are_the_same_bits_in_any_layout_and_batch():
    x, m, table, row, *rest, streams, _ = arguments("ddpm", (3, 4, 33, 7))
    step = OPS["step"].call
    dense = step(x, m, table, row, *rest, streams, 0)[0]
    last = torch.channels_last
    for a, b in [
        (x.contiguous(memory_format=last), m),
        (x, m.contiguous(memory_format=last)),
        (x.contiguous(memory_format=last), m.contiguous(memory_format=last)),
        (x.repeat_interleave(2, -1)[..., ::2], torch.cat([m, m], 1).chunk(2, 1)[1]),
    ]:
        assert torch.equal(step(a, b, table, row, *rest, streams, 0)[0], dense)
    one = step(x[1:2], m[1:2], table, row, *rest, streams[1:2], 0)[0]
    assert torch.equal(one, dense[1:2])


def test_nan_passes_the_clamp():
    x, m, *rest = arguments("ddim")
    x = x.clone()
    x[0, 0, 0, :3] = torch.nan
    out = OPS["step"].call(x, m, *rest)[0]
    assert out.isnan().sum() == 3 and out[0, 0, 0, :3].isnan().all()


def test_strides_beyond_32_bits(tmp_path):
    """Two samples 2^31 elements apart, in a file that is empty between them."""
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=(1 << 31) + 128)
    x = storage.as_strided((2, 64), ((1 << 31) + 64, 1))
    x.copy_(torch.randn(2, 64))
    _, _, table, row, *rest = arguments("ddim")
    m = torch.randn(2, 64)
    far = OPS["step"].call(x, m, table, row, *rest)[0]
    assert torch.equal(far, OPS["step"].call(x.contiguous(), m, table, row, *rest)[0])


def test_rows_and_timesteps_out_of_the_table_are_refused():
    x, m, table, _, *rest = arguments("ddim")
    for row in (-1, len(table)):
        with pytest.raises(ValueError, match=rf"row={row}: must be in \[0, 3\)"):
            OPS["step"].call(x, m, table, torch.tensor(row), *rest)
    for t in (-1, 7):
        with pytest.raises(ValueError, match=rf"t={t}: must be in \[0, 7\)"):
            OPS["noising"].call(x, torch.tensor([0, t]), torch.ones(7, 4), x, None, 0)
        with pytest.raises(ValueError, match=rf"t={t}: must be in \[0, 7\)"):
            OPS["weighted_mse"].call(x, m, torch.ones(7), torch.tensor([0, t]))
        with pytest.raises(ValueError, match=rf"t={t}: must be in \[0, 7\)"):
            OPS["weighted_mse_backward"].call(
                torch.ones(2), x, m, torch.ones(7), torch.tensor([0, t]), False
            )
        with pytest.raises(ValueError, match=rf"i={t}: must be in \[0, 7\)"):
            i = torch.tensor([0, t])
            OPS["teacher_step"].call(x, m, torch.ones(7, 5), i, None, None, None, 0.0)


def test_more_than_three_dimensions_of_unlike_strides_are_refused():
    x = torch.randn(2, 3, 4, 5, 6)
    m = x.permute(0, 4, 3, 2, 1).contiguous().permute(0, 4, 3, 2, 1)
    with pytest.raises(ValueError, match="contiguous"):
        OPS["cfg"].call(x, m, None, 1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does")
@pytest.mark.skipif(not ops.conv3x3_available(torch.float32), reason="its kernel is not here")
def test_memory_that_threads_lack_is_an_error_and_not_the_end():
    """Each thread of a convolution takes 2 MB, which the system refuses; then it does not."""
    run = child(
        "import resource, time, torch\n"
        "from fastdiff import ops\n"
        "torch.set_num_threads(2)\n"
        "x = torch.randn(4, 512, 32, 32).contiguous(memory_format=torch.channels_last)\n"
        "weight = ops.pack_conv3x3(torch.randn(64, 512, 3, 3), 4)\n"
        "out = torch.empty(4, 64, 32, 32).contiguous(memory_format=torch.channels_last)\n"
        "torch.relu(torch.randn(2, 64, 64, 64))  # threads exist\n"
        "call = ops.OPS['conv3x3'].bind(x, weight, None, None, False, out)\n"
        "limits = resource.getrlimit(resource.RLIMIT_AS)\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), limits[1]))\n"
        "try:\n"
        "    call()\n"
        "except MemoryError:\n"
        "    time.sleep(0.2)  # for a thread that is late\n"
        "    resource.setrlimit(resource.RLIMIT_AS, limits)\n"
        "    call()\n"
        "    print(torch.equal(out, ops.conv3x3(x, weight)))\n",
        MALLOC_MMAP_THRESHOLD_="65536",
        PYTHONPATH=os.pathsep.join([*sys.path, str(os.getcwd())]),
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "True"
