"""Kernels with planted faults, and one without, for the test of the ahead-of-time gate."""

from __future__ import annotations

import triton
import triton.language as tl
from batchinfer_kernels.triton.targets import ATTENTION, AotCase, Launch, Target


@triton.jit
def attend(queries, keys, values, out, length, use_dot: tl.constexpr, n_size: tl.constexpr, d_size: tl.constexpr):
    rows, columns, n = tl.arange(0, 16), tl.arange(0, d_size), tl.arange(0, n_size)
    q_MD = tl.load(queries + rows[:, None] * d_size + columns[None, :])
    acc_MD = tl.zeros([16, d_size], tl.float32)
    for start in range(0, length, n_size):
        k_DN = tl.load(keys + (start + n)[None, :] * d_size + columns[:, None])
        v_ND = tl.load(values + (start + n)[:, None] * d_size + columns[None, :])
        if use_dot:
            acc_MD = tl.dot(tl.dot(q_MD, k_DN).to(v_ND.dtype), v_ND, acc_MD)
        else:
            acc_MD += tl.sum(k_DN.to(tl.float32), 1)[None, :] + tl.sum(v_ND.to(tl.float32), 0)[None, :]
    tl.store(out + rows[:, None] * d_size + columns[None, :], acc_MD)


@triton.jit
def normalize(values, out, size: tl.constexpr):
    columns = tl.arange(0, size)
    x = tl.load(values + columns)
    tl.store(out + columns, x / tl.sum(x))


@triton.jit
def typo(values):
    tl.store(values, unknown_name)  # noqa: F821


def aot_cases(target: Target) -> list[AotCase]:
    def attention(name: str, use_dot: bool, num_stages: int) -> AotCase:
        pointers = dict.fromkeys(("queries", "keys", "values"), "*bf16")
        return AotCase(
            name,
            attend,
            {**pointers, "out": "*fp32", "length": "i32"},
            {"use_dot": use_dot, "n_size": 64, "d_size": 64},
            Launch(4, num_stages),
            divisible=("queries", "keys", "values", "out"),
            needs=ATTENTION,
        )

    def norm(name: str, size: int) -> AotCase:
        return AotCase(name, normalize, {"values": "*fp32", "out": "*fp32"}, {"size": size}, Launch(1))

    return [
        attention("good", True, 3),
        attention("without MMA", False, 3),
        attention("single stage", True, 1),
        norm("spilling", 8192),
        norm("greedy", 2048),
        norm("unlisted", 128),
        AotCase("typo", typo, {"values": "*fp32"}, {}, Launch()),
    ]
