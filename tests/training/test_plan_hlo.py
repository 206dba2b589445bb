"""Costs read off compiled programs: against the compiler's own where there are no loops, and by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from rlstab_jax.models import Precision
from rlstab_jax.models.experts import KERNELS, ExpertWeights
from rlstab_jax.models.precision import Stored
from rlstab_jax.training.plan_hlo import Array, arrays, parse, program_cost, round_cost
from rlstab_jax.training.plan_sent import groups_of, sent


def compiled(f: Any, *shapes: tuple[int, ...]) -> Any:
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def test_without_loops() -> None:
    """Elementwise work is fused into one pass, so that the compiler's count is the same."""
    program = compiled(lambda x, w: jnp.tanh(x @ w) + 1, (128, 256), (256, 512))
    cost, stated = program_cost(program.as_text()), program.cost_analysis()
    assert cost.products == 2 * 128 * 256 * 512
    assert cost.bytes == pytest.approx(stated["bytes accessed"], rel=0.01)
    assert not cost.sent


def test_loops() -> None:
    """A scan counts as often as it runs, and a row of what it is over is read once a round, not the whole."""

    def scanned(x: jax.Array, ws: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    program = compiled(scanned, (64, 128), (12, 128, 128))
    cost = program_cost(program.as_text())
    assert cost.products == 12 * 2 * 64 * 128 * 128
    assert program.cost_analysis()["flops"] < cost.products / 6
    weights, state = 12 * 128 * 128 * 4, 12 * 64 * 128 * 4
    assert weights + 2 * state <= cost.bytes <= 3 * weights + 6 * state


def test_loops_of_unknown_length() -> None:
    def until(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x @ w)

    text = compiled(until, (64, 64), (64, 64)).as_text()
    one = 2 * 64**3
    assert program_cost(text).products == 2 * one
    assert program_cost(text, rounds=10).products == 11 * one
    assert round_cost(text).products == one


def test_loops_of_known_average() -> None:
    """Eight tokens choose 4 of 64 experts, about 25.8 different ones; a tile of 8 rows moves one expert's matrices, and
    on a CPU copies them first. Of the sizes of `grouped` the first is the one that equal shares need."""
    d, f, tokens, k, experts = 128, 64, 8, 4, 64
    rounds = experts * (1 - (1 - k / experts) ** tokens)

    def moe(kernel: str, tokens: int) -> Any:
        def run(x: Any, gates: Any, gate: Any, up: Any, down: Any) -> Any:
            weights = ExpertWeights(*(Stored(values, None) for values in (gate, up, down)))
            return KERNELS[kernel](x, gates.astype(int) % experts, gates, weights, Precision())

        weights = [(experts, d, f), (experts, d, f), (experts, f, d)]
        return program_cost(compiled(run, (tokens, d), (tokens, k), *weights).as_text())

    cost, combined = moe("tiles", tokens), 2 * tokens * k * d
    assert cost.products == pytest.approx(rounds * 8 * 6 * d * f + combined)
    matrices = rounds * 3 * d * f * 4
    assert matrices < cost.bytes < 3.5 * matrices
    assert moe("grouped", tokens) == cost
    assert moe("grouped", 8 * tokens).products == pytest.approx(8 * experts * 6 * d * f + 8 * combined)


MODULE = """\
HloModule by_hand, is_scheduled=true

%fused (p0: f32[8,100], p1: s32[], p2: f32[1,100]) -> f32[8,100] {
  %p0 = f32[8,100]{1,0} parameter(0)
  %p2 = f32[1,100]{1,0} parameter(2)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %update = f32[8,100]{1,0} dynamic-update-slice(%p0, %p2, %p1, %zero)
}

%body (state: (s32[], f32[8,100])) -> (s32[], f32[8,100]) {
  %state = (s32[], f32[8,100]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,100]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %sum = f32[8,100]{1,0:T(8,128)} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[8,100]{1,0:T(8,128)}) tuple(%next, %sum)
}

%condition (state: (s32[], f32[8,100])) -> pred[] {
  %state = (s32[], f32[8,100]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %end = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (a: f32[8,100], row: f32[1,100]) -> f32[8,100] {
  %a = f32[8,100]{1,0:T(8,128)} parameter(0)
  %row = f32[1,100]{1,0:T(8,128)} parameter(1)
  %near = f32[1,100]{1,0:T(1,128)S(1)} copy(%row)
  %two = s32[] constant(2)
  %written = f32[8,100]{1,0:T(8,128)} fusion(%a, %two, %near), kind=kLoop, calls=%fused
  %begin = (s32[], f32[8,100]{1,0:T(8,128)}) tuple(%two, %written)
  %loop = (s32[], f32[8,100]{1,0:T(8,128)}) while(%begin), condition=%condition, body=%body
  ROOT %result = f32[8,100]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_by_hand() -> None:
    """A copy to the chip reads 400 bytes; a row is written in place, 400; then 5 - 2 rounds of an all-reduce among 4
    devices, of which each reads and writes 3,200 bytes and sends 2 x 3/4 of that, and counters of 4 + 4 + 4, and
    4 + 4 + 1 in the condition."""
    cost = program_cost(MODULE)
    assert cost.sent == {"all-reduce": 3 * 3200 * 1.5}
    assert cost.bytes == 400 + (4 + 400) + 3 * (6400 + 12 + 9)


GPU_MODULE = """\
%fused (p0: f32[7,8,8], p1: s32[]) -> f32[1,8,8] {
  %p0 = f32[7,8,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,8}
}

%body (state: (s32[], f32[8,8], f32[7,8,8])) -> (s32[], f32[8,8], f32[7,8,8]) {
  %state = (s32[], f32[8,8]{1,0}, f32[7,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%state), index=1
  %w = f32[7,8,8]{2,1,0} get-tuple-element(%state), index=2
  %begin = ((f32[7,8,8]{2,1,0}, s32[]), f32[1,8,8]{2,1,0}, u32[]) fusion-start(%w, %i), kind=kLoop, calls=%fused
  %end = f32[1,8,8]{2,1,0} fusion-done(%begin)
  %one = f32[8,8]{1,0} bitcast(%end)
  %y = f32[8,8]{1,0} dot(%x, %one), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[8,8]{1,0}, f32[7,8,8]{2,1,0}) tuple(%i, %y, %w)
}

%condition (state: (s32[], f32[8,8], f32[7,8,8])) -> pred[] {
  %state = (s32[], f32[8,8]{1,0}, f32[7,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] fusion(%i), kind=kLoop, calls=%fused_compare
}

%fused_compare (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
  %seven = s32[] constant(7)
  ROOT %lt = pred[] compare(%p, %seven), direction=LT
}

ENTRY %main (a: (s32[], f32[8,8], f32[7,8,8])) -> (s32[], f32[8,8], f32[7,8,8]) {
  %a = (s32[], f32[8,8]{1,0}, f32[7,8,8]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], f32[8,8]{1,0}, f32[7,8,8]{2,1,0}) while(%a), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"7"},"known_induction_variable":{"tuple_index":"0"}}
}
"""


def test_loops_of_gpus() -> None:
    """Their conditions have the constant inside a fusion, and the compiler states the number of rounds; what has a
    stream of its own is a pair of instructions. A round slices 256 bytes, by an index of 4, and multiplies."""
    cost = program_cost(GPU_MODULE)
    assert cost.products == 7 * 2 * 8**3
    assert cost.bytes == 7 * (256 + 256 + 4 + 3 * 256 + 4 + 1)


def test_shapes_and_groups() -> None:
    assert arrays("f8e4m3fn[16,8]{1,0:T(8,128)(4,1)S(1)}") == (Array("f8e4m3fn", (16, 8), True),)
    found = arrays("(bf16[2,3]{1,0:T(8,128)}, pred[], u4[6]{0})")
    assert [array.bytes for array in found] == [12, 1, 3]
    assert groups_of("replica_groups={{0,2},{1,3}}, x") == [[0, 2], [1, 3]]
    assert groups_of("replica_groups=[2,3]<=[6], x") == [[0, 1, 2], [3, 4, 5]]
    assert groups_of("replica_groups=[3,2]<=[2,3]T(1,0), x") == [[0, 3], [1, 4], [2, 5]]
    assert groups_of("replica_groups=mesh['a'=2,'b'=3] {'a'}, x") == [[0, 3], [1, 4], [2, 5]]
    assert len(groups_of("replica_groups=mesh['a'=2,'b'=4,'c'=8] {'b', 'c'}, x")[0]) == 32
    assert groups_of("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x") == [[0, 2], [1, 3]]


def test_islands() -> None:
    """64 devices, of which 8 neighbours have a fast network: what stays there, what leaves it, what all of a group's
    members on it send once together."""
    neighbours, strided, all_of_them = "[8,8]<=[64]", "[8,8]<=[8,8]T(1,0)", "[1,64]<=[64]"

    def gather(groups: str, kind: str = "all-gather") -> tuple[float, float]:
        return sent(kind, 1.0, f"replica_groups={groups}, x", island=8)

    assert gather(neighbours) == (7, 0)
    assert gather(strided) == (7, 7)
    assert gather(all_of_them) == (63, pytest.approx(56 / 8))
    assert gather("[16,4]<=[2,4,8]T(0,2,1)") == (3, 3)
    assert gather(all_of_them, "all-reduce") == (pytest.approx(2 * 63 / 64), pytest.approx(2 * 56 / 64 / 8))
    assert gather(all_of_them, "all-to-all") == (pytest.approx(63 / 64), pytest.approx(56 / 64))
    assert sent("all-gather", 1.0, f"replica_groups={all_of_them}, x", island=0) == (63, 0)
    assert sent("collective-permute", 1.0, "source_target_pairs={{0,1},{1,0}}", island=8) == (1, 0)
    assert sent("collective-permute", 1.0, "source_target_pairs={{7,8},{8,7}}", island=8) == (1, 1)
    assert program_cost(MODULE, island=2).across == {"all-reduce": 3 * 3200 * 1.5 * (2 / 3) / 2}


def test_convolutions() -> None:
    """TPUs have products as convolutions; a batch of them is one with holes, which are not counted."""
    head = "ENTRY %main () -> f32[] {\n  %a = f32[16,5,8]{2,1,0} parameter(0)\n  %b = f32[16,8,7]{2,1,0} parameter(1)\n"
    line = (
        "  ROOT %c = f32[16,5,7]{2,1,0} convolution(%a, %b), window={size=16 stride=15 lhs_dilate=16}, "
        "dim_labels=0bf_0io->0bf\n}\n"
    )
    computations, _ = parse(head + line)
    assert computations["main"]["c"].opcode == "convolution"
    assert program_cost(head + line).products == 16 * 2 * 5 * 7 * 8
