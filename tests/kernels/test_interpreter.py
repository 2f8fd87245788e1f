"""Corrections of Triton's interpreter, and the access checker: planted faults are found."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

from tests.kernels import interpreter  # noqa: E402
from tests.kernels.access_checker import Race, checked_accesses  # noqa: E402

interpreter.install()

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
NUMBERS = torch.tensor([0.0, 1.0, 1.005, -1.005, 3.14159, 1e-3, -7e-6, 1e-8, 255.9, 300.0, 3e38, 65504.0, 2.0**-133])


@triton.jit
def cast_kernel(x_N, y_N, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(y_N + n, tl.load(x_N + n).to(y_N.dtype.element_ty))


@triton.jit
def arithmetic_kernel(x_N, y_N, out_4N, N: tl.constexpr):
    n = tl.arange(0, N)
    x, y = tl.load(x_N + n), tl.load(y_N + n)
    tl.store(out_4N + n, x + y)
    tl.store(out_4N + N + n, x * y)
    tl.store(out_4N + 2 * N + n, tl.where(x < y, x, -y))
    tl.store(out_4N + 3 * N + n, tl.maximum(x, y) - tl.sum(x, 0))


@triton.jit
def dot_kernel(x_NN, y_NN, out_NN, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_NN + at, tl.dot(tl.load(x_NN + at), tl.load(y_NN + at), input_precision="ieee"))


@triton.jit
def copy_kernel(x_N, y_N, count, skip, step, OTHER: tl.constexpr, N: tl.constexpr):
    """Program p copies `count` numbers from x + p * step to y + p * step + skip."""
    n = tl.arange(0, N)
    x = tl.load(x_N + tl.program_id(0) * step + n, mask=n < count, other=OTHER)
    tl.store(y_N + tl.program_id(0) * step + skip + n, x, mask=n < count)


@triton.jit
def masked_sum_kernel(x_N, y_1, count, OTHER: tl.constexpr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(y_1, tl.sum(tl.load(x_N + n, mask=n < count, other=OTHER), 0))


@triton.jit
def clamp_kernel(x_N, out_2N, N: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(x_N + n)
    tl.store(out_2N + n, tl.clamp(x, -1.0, 1.0))
    tl.store(out_2N + N + n, tl.clamp(x, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL))


def _run(kernel, *arguments, programs=1):
    kernel[(programs,)](*arguments)
    return arguments


class TestCasts:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FLOAT8], ids=str)
    def test_float32_is_rounded_as_torch_rounds(self, dtype):
        """Truncation, which the interpreter does without its correction, changes 1.005 and 255.9."""
        x = torch.cat([NUMBERS, -NUMBERS, torch.tensor([torch.nan, 0.1, 0.2, 0.3, 0.7, 9.99])])
        assert len(x) == 32
        _, y, _ = _run(cast_kernel, x, torch.empty(32, dtype=dtype), 32)
        largest = torch.finfo(dtype).max
        expected = (x.clamp(-largest, largest) if dtype in FLOAT8 else x).to(dtype)
        assert torch.equal(y.float().nan_to_num(7.5), expected.float().nan_to_num(7.5))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FLOAT8], ids=str)
    @pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=str)
    def test_every_number_of_a_narrow_format_is_widened_exactly(self, dtype, wide):
        x = torch.randint(0, 256, (1024 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
        _, y, _ = _run(cast_kernel, x, torch.empty(1024, dtype=wide), 1024)
        assert torch.equal(y.float().nan_to_num(7.5), x.float().to(wide).float().nan_to_num(7.5))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_integers_are_cast_as_numbers(self, dtype):
        x = torch.arange(-512, 512, dtype=torch.int32)
        _, y, _ = _run(cast_kernel, x, torch.empty(1024, dtype=dtype), 1024)
        assert torch.equal(y, x.to(dtype))
        _, back, _ = _run(cast_kernel, y, torch.empty(1024, dtype=torch.int32), 1024)
        assert torch.equal(back, y.int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_arithmetic_is_that_of_the_numbers(dtype):
    x, y = (torch.randn(64, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    *_, out, _ = _run(arithmetic_kernel, x, y, torch.empty(256, dtype=dtype), 64)
    got = out.view(4, 64)
    assert torch.equal(got[0], x + y)
    assert torch.equal(got[1], x * y)
    assert torch.equal(got[2], torch.where(x < y, x, -y))
    torch.testing.assert_close(got[3].double(), torch.maximum(x, y).double() - x.double().sum(), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
def test_dot_multiplies_numbers_and_sums_in_float32(dtype):
    x, y = (torch.randn(16, 16, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    *_, out, _ = _run(dot_kernel, x, y, torch.empty(16, 16), 16)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), atol=1e-5, rtol=1e-5)


def test_a_number_wins_over_nan_as_on_gpus():
    x, y = torch.full((64,), torch.nan), torch.arange(64.0)
    *_, out, _ = _run(arithmetic_kernel, x.clone().fill_(2.0), y.clone().fill_(torch.nan), torch.empty(256), 64)
    assert torch.equal(out[192:], torch.full((64,), 2.0 - 128.0))
    *_, out, _ = _run(arithmetic_kernel, x, x, torch.empty(256), 64)  # without a warning
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_clamp_keeps_nan_only_if_it_is_told_to(dtype):
    _, out, _ = _run(clamp_kernel, torch.tensor([torch.nan, 0.5, -3.0, 9.0]).to(dtype), torch.empty(8, dtype=dtype), 4)
    assert out[:4].tolist() == [-1.0, 0.5, -1.0, 1.0]
    assert out[4].isnan() and out[5:].tolist() == [0.5, -1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64], ids=str)
def test_a_masked_lane_that_is_used_shows(dtype):
    x = torch.ones(16, dtype=dtype)
    sums = {other: _run(masked_sum_kernel, x, torch.zeros(1, dtype=dtype), 10, other, 16)[1] for other in (None, 0)}
    assert sums[0].item() == 10
    assert sums[None].isnan() if dtype.is_floating_point else sums[None].item() != 10


class TestAccessChecker:
    @pytest.mark.parametrize(
        ("count", "skip", "kind"), [(8, 0, None), (9, 0, "load"), (8, 1, "store"), (8, -1, "store")]
    )
    def test_an_access_beyond_the_end_or_before_the_start_is_found(self, count, skip, kind):
        """Also where the neighbouring memory belongs to another argument: x and y lie side by side."""
        both = torch.zeros(32)
        x, y = both[:8], both[8:16]

        def launch():
            with checked_accesses():
                _run(copy_kernel, x, y, count, skip, 0, 0.0, 16)

        if kind is None:
            launch()
        else:
            with pytest.raises(InterpreterError, match=f"OutOfBounds.*copy_kernel line .*{kind} of 1 numbers out of"):
                launch()

    def test_a_masked_lane_may_point_anywhere(self):
        with checked_accesses() as launches:
            _run(copy_kernel, torch.zeros(3), torch.zeros(3), 3, 0, 0, 0.0, 1024)
        assert (launches[0].loaded_bytes, launches[0].stored_bytes) == (12, 12)

    @pytest.mark.parametrize(("step", "skip", "text"), [(8, 0, None), (7, 0, "stored by several"), (0, 0, "stored by")])
    def test_stores_of_two_programs_at_one_address_are_found(self, step, skip, text):
        x, y = torch.zeros(32), torch.zeros(32)
        if text is None:
            with checked_accesses():
                _run(copy_kernel, x, y, 8, skip, step, 0.0, 8, programs=3)
        else:
            with pytest.raises(Race, match=text), checked_accesses():
                _run(copy_kernel, x, y, 8, skip, step, 0.0, 8, programs=3)

    def test_a_load_of_what_another_program_stores_is_found(self):
        x = torch.zeros(32)
        with checked_accesses():
            _run(copy_kernel, x, x, 8, 0, 8, 0.0, 8, programs=3)
        with pytest.raises(Race, match="loads 8 bytes that others store"), checked_accesses():
            _run(copy_kernel, x, x, 8, 2, 8, 0.0, 8, programs=3)

    def test_bytes_are_counted_per_launch_and_once_per_address(self):
        x, y = torch.zeros(24, dtype=torch.float16), torch.zeros(24, dtype=torch.float16)
        with checked_accesses() as launches:
            _run(copy_kernel, x, y, 5, 0, 8, 0.0, 8, programs=3)
            _run(dot_kernel, *torch.zeros(3, 16, 16), 16)
        assert [(one.kernel, one.loaded_bytes, one.stored_bytes) for one in launches] == [
            ("copy_kernel", 3 * 5 * 2, 3 * 5 * 2),
            ("dot_kernel", 2 * 16 * 16 * 4, 16 * 16 * 4),
        ]

    def test_nothing_is_checked_after_the_block(self):
        with checked_accesses() as launches:
            pass
        _run(copy_kernel, torch.zeros(8), torch.zeros(8), 8, 0, 0, 0.0, 8)
        assert not launches
