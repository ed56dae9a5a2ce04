"""No offset of a kernel overflows 32 bits: with a KV cache of 192 GB, 256 rows of 256k logits, prompts of 64k rows.

`tests/support/triton_offsets.py` bounds the integers of each kernel's intermediate form.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.support.ttir_intervals import Analysis, Interval, parse

KERNELS = {"linear", "add_splits", "attend", "reduce", "norm", "act_and_mul", "rope_and_store_kv"}
KERNELS |= {"shrink", "expand", "top", "forbid", "add_biases", "penalise", "collect", "draw"}


def run(module: str) -> dict[str, list[str]]:
    """Run a module in a process in which kernels are compiled. Returns its findings by kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_no_kernel_has_an_offset_that_overflows() -> None:
    found = run("tests.support.triton_offsets")
    assert {name for name, texts in found.items() if texts} == set(), found
    assert found.keys() >= KERNELS


def test_kernels_whose_offsets_overflow_are_found() -> None:
    found = run("tests.support.overflowing_kernels")
    assert len(found) == 14
    assert {name for name, texts in found.items() if texts} == {name for name in found if "narrow" in name}


HEAD = "tt.func public @f(%arg0: !tt.ptr<f32>, %arg1: i32) attributes {noinline = false} {"


@pytest.mark.parametrize(
    ("lines", "low", "high"),
    [
        (["%0 = arith.addi %arg1, %arg1 : i32"], -14, 10),
        (["%0 = arith.muli %arg1, %arg1 : i32"], -35, 49),
        (["%0 = arith.subi %arg1, %arg1 : i32"], -12, 12),
        (["%c2 = arith.constant 2 : i32", "%0 = arith.divsi %arg1, %c2 : i32"], -3, 2),
        (["%c3 = arith.constant 3 : i32", "%0 = arith.remsi %arg1, %c3 : i32"], -2, 2),
        (["%c4 = arith.constant 4 : i32", "%0 = arith.andi %arg1, %c4 : i32"], 0, 4),
        (["%c4 = arith.constant 4 : i32", "%0 = arith.minsi %arg1, %c4 : i32"], -7, 4),
        (["%c4 = arith.constant dense<-4> : tensor<8xi32>", "%0 = tt.trans %c4 : tensor<8xi32>"], -4, -4),
        (["%0 = tt.get_program_id y : i32"], 0, 8),
        (["%0 = tt.get_num_programs y : i32"], 9, 9),
        (["%0 = tt.make_range {end = 8 : i32, start = 2 : i32} : tensor<6xi32>"], 2, 7),
        (["%1 = tt.load %arg0 : !tt.ptr<i32>", "%0 = arith.extsi %1 : i32 to i64"], -1, 77),
        (
            [
                "%1 = tt.splat %arg1 : i32 -> tensor<8xi32>",
                '%0 = "tt.reduce"(%1) <{axis = 0 : i32}> ({',
                "^bb0(%arg2: i32, %arg3: i32):",
                "%2 = arith.addi %arg2, %arg3 : i32",
                "tt.reduce.return %2 : i32",
                "}) : (tensor<8xi32>) -> i32",
            ],
            -56,
            40,
        ),
        (
            [
                "%c0 = arith.constant 0 : i32",
                "%c2 = arith.constant 2 : i32",
                "%c9 = arith.constant 9 : i32",
                "%0 = scf.for %arg2 = %c0 to %c9 step %c2 iter_args(%arg3 = %arg1) -> (i32)  : i32 {",
                "%1 = arith.addi %arg3, %c2 : i32",
                "scf.yield %1 : i32",
                "}",
            ],
            -7,
            15,  # five trips
        ),
        (
            [
                "%c1 = arith.constant true",
                "%0 = scf.if %c1 -> (i32) {",
                "%1 = arith.addi %arg1, %arg1 : i32",
                "scf.yield %1 : i32",
                "} else {",
                "scf.yield %arg1 : i32",
                "}",
            ],
            -14,
            10,
        ),
    ],
)
def test_intervals(lines: list[str], low: int, high: int) -> None:
    """Of a kernel with a pointer and an argument of -7 .. 5, on a grid of (4, 9)."""
    analysis = Analysis(
        {"%arg0": ("ptr", Interval(0, 0)), "%arg1": ("i32", Interval(-7, 5))}, (4, 9), {"%arg0": Interval(-1, 77)}
    )
    analysis.run(parse("\n".join([HEAD, *lines, "}"])))
    assert analysis.values["%0"] == Interval(low, high)
    assert not analysis.findings
