"""Work counted from HLO: against numbers known by hand, and against XLA's own count where no loop hides work."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from capvl.planning.work import Program


def compiled(function, *shapes):
    """The optimised program of a function of float32 arrays."""
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()


@pytest.mark.parametrize("unroll", [1, 5])
def test_a_loop_counts_as_often_as_it_runs(unroll):
    def loop(x, kernels):
        return jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, kernels, unroll=unroll)[0]

    cost = Program(compiled(loop, (64, 128), (5, 128, 128)).as_text()).cost
    assert cost.flops == 5 * 2 * 64 * 128 * 128


def test_bytes_are_those_of_xla_where_nothing_loops():
    program = compiled(lambda x, a, b: jnp.tanh(x @ a) @ b, (64, 128), (128, 256), (256, 32))
    assert Program(program.as_text()).cost.bytes == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.05)


def test_collectives_are_found_with_bytes_and_groups():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("a", "b")))
    k = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("b", None)))
    text = jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, P("a", None))).lower(x, k).compile().as_text()
    found = Program(text, chips_a_slice=2).cost.collectives
    # Each chip adds up an (8, 32) partial product with the three others of its row; rows span two slices of two chips.
    assert dict(found) == {("all-reduce", 8 * 32 * 4, 4, True): 1}


LOOP = """HloModule loop
%cond (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%body (q: (s32[], s32[])) -> (s32[], s32[]) {
  %q = (s32[], s32[]) parameter(0)
  %a = f32[8,4]{1,0} constant({...})
  %b = f32[4,2]{1,0:T(8,128)S(1)} constant({...})
  %d = f32[8,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %r = (s32[], s32[]) copy(%q)
}
ENTRY %main (z: (s32[], s32[])) -> (s32[], s32[]) {
  %z = (s32[], s32[]) parameter(0)
  ROOT %w = (s32[], s32[]) while(%z), condition=%cond, body=%body, metadata={op_name="jit(f)/at_most_7_times/while"}
}
"""


def test_a_loop_of_unknown_length_runs_as_often_as_its_scope_promises():
    program = Program(LOOP)
    assert program.loops == [("body", 7)]
    assert program.cost.flops == 7 * 2 * 8 * 4 * 2


COUNTED = """HloModule counted
%cond (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(9)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%body (q: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %q = (s32[], f32[8,4]) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %a = f32[8,4]{1,0} get-tuple-element(%q), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %d = f32[4,4]{1,0} dot(%a, %a), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  ROOT %r = (s32[], f32[8,4]) tuple(%next, %a)
}
ENTRY %main (z: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %z = (s32[], f32[8,4]) parameter(0)
  ROOT %w = (s32[], f32[8,4]) while(%z), condition=%cond, body=%body
}
"""


def test_a_counter_that_goes_up_by_two_runs_half_as_often():
    # Matmuls that gather their weights on a ring are loops over shards, unrolled in this way.
    program = Program(COUNTED)
    assert program.loops == [("body", 5)]
    assert program.cost.flops == 5 * 2 * 8 * 4 * 4


def test_memory_on_the_chip_is_not_hbm():
    cost = Program(LOOP).cost
    dot, copy = (8 * 4 + 4 * 2 + 8 * 2) * 4, 2 * 2 * 4
    assert cost.bytes == 7 * (dot + copy)
    assert cost.hbm_bytes == 7 * (dot - 4 * 2 * 4 + copy)


SLICED = """HloModule sliced
%inner (s: f32[12,64], at: s32[]) -> f32[64] {
  %s = f32[12,64]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,64]{1,0} dynamic-slice(%s, %at, %zero), dynamic_slice_sizes={1,64}
  ROOT %flat = f32[64]{0} bitcast(%cut)
}
%outer (stack: f32[12,64], i: s32[], x: f32[64]) -> f32[64] {
  %stack = f32[12,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[64]{0} parameter(2)
  %layer = f32[64]{0} fusion(%stack, %i), kind=kLoop, calls=%inner
  ROOT %sum = f32[64]{0} add(%layer, %x)
}
ENTRY %main (a: f32[12,64], i: s32[], x: f32[64]) -> f32[64] {
  %a = f32[12,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[64]{0} parameter(2)
  ROOT %r = f32[64]{0} fusion(%a, %i, %x), kind=kLoop, calls=%outer
}
"""


def test_a_fused_slice_of_stacked_layers_reads_one_layer():
    layer, index = 64 * 4, 4
    assert Program(SLICED).cost.bytes == 3 * layer + index


CONVOLUTION = """HloModule convolution
ENTRY %main (a: bf16[32,12,196,64], b: bf16[32,12,196,64]) -> f32[32,12,196,196] {
  %a = bf16[32,12,196,64]{3,2,1,0} parameter(0)
  %b = bf16[32,12,196,64]{3,2,1,0} parameter(1)
  ROOT %c = f32[32,12,196,196]{3,2,1,0} convolution(%a, %b), window={size=32x12 stride=31x11 lhs_dilate=32x12}, \
dim_labels=01bf_01oi->01bf
}
"""


def test_a_batched_matmul_in_a_convolutions_clothes_counts_once():
    # How the TPU compiler writes attention scores: batch and heads are spatial, each position meeting one kernel tap.
    assert Program(CONVOLUTION).cost.flops == 2 * 32 * 12 * 196 * 196 * 64


TRANSFER = """HloModule transfer
ENTRY %main (a: bf16[37,8,128]) -> token[] {
  %a = bf16[37,8,128]{2,1,0} parameter(0)
  %t = token[] after-all()
  %s = (bf16[37,8,128]{2,1,0}, u32[], token[]) send(%a, %t), channel_id=4, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %d = token[] send-done(%s), channel_id=4, is_host_transfer=true
}
"""


def test_a_transfer_through_the_hosts_is_a_collective_between_slices():
    program = Program(TRANSFER, chips_a_slice=16, slices=4)
    assert dict(program.cost.collectives) == {("all-reduce", 37 * 8 * 128 * 2, 4, True): 1}


@pytest.mark.parametrize(
    ("groups", "size", "crosses"),
    [
        ("replica_groups={{0,1},{2,3}}", 2, False),
        ("replica_groups={{0,2},{1,3}}", 2, True),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", 2, True),
        ("replica_groups=[1,4]<=[4]", 4, True),
        ("replica_groups=mesh['x'=2,'y'=2] {'y'}", 2, False),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}", 2, True),
    ],
)
def test_groups_in_all_spellings(groups, size, crosses):
    text = (
        "HloModule m\nENTRY %main (a: f32[8]) -> f32[8] {\n  %a = f32[8]{0} parameter(0)\n"
        f"  ROOT %r = f32[8]{{0}} all-reduce(%a), {groups}, to_apply=%add\n}}\n"
    )
    assert list(Program(text, chips_a_slice=2).cost.collectives) == [("all-reduce", 32, size, crosses)]
