"""The text of compiled programs is read as it runs: loops by their length, exchanges once, slices as slices."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import pytest

from retool_jax.core import sharding
from retool_jax.plan import hlo

# A loop of 5 whose body gathers over 4 chips in three fused steps of one channel and adds up over pairs.
TEXT = """HloModule jit_f, is_scheduled=true

%start (p: bf16[1,256]) -> (bf16[1,256], bf16[4,256]) {
  %p = bf16[1,256]{1,0:T(8,128)(2,1)} parameter(0)
  %g1 = bf16[4,256]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=2] {'a','b'}, dimensions={0}
  ROOT %c1 = (bf16[1,256]{1,0}, bf16[4,256]{1,0}) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}

%done (q: bf16[1,256]) -> bf16[4,256] {
  %q = bf16[1,256]{1,0} parameter(0)
  %g2 = bf16[4,256]{1,0} all-gather(%q), channel_id=7, replica_groups=mesh['a'=2,'b'=2] {'a','b'}, dimensions={0}
  ROOT %c2 = bf16[4,256]{1,0} custom-call(%q, %g2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (r: f32[8,128]) -> f32[4,128] {
  %r = f32[8,128]{1,0} parameter(0)
  %ar = f32[8,128]{1,0} all-reduce(%r), channel_id=8, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %ds = f32[4,128]{1,0} dynamic-slice(%ar, %r), dynamic_slice_sizes={4,128}
}

%layer (w: f32[5,1024], i: s32[]) -> f32[1,1024] {
  %w = f32[5,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %one = f32[1,1024]{1,0} dynamic-slice(%w, %i), dynamic_slice_sizes={1,1024}
}

%body (s: (s32[], bf16[1,256], f32[8,128], f32[5,1024])) -> (s32[], bf16[1,256], f32[8,128], f32[5,1024]) {
  %s = (s32[], bf16[1,256]{1,0}, f32[8,128]{1,0}, f32[5,1024]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %x = bf16[1,256]{1,0} get-tuple-element(%s), index=1
  %y = f32[8,128]{1,0} get-tuple-element(%s), index=2
  %ws = f32[5,1024]{1,0} get-tuple-element(%s), index=3
  %f1 = (bf16[1,256]{1,0:S(1)}, bf16[4,256]{1,0:S(1)}) fusion(%x), kind=kCustom, calls=%start
  %f2 = bf16[4,256]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%done
  %f3 = f32[4,128]{1,0:S(1)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %f4 = f32[1,1024]{1,0:S(1)} fusion(%ws, %n), kind=kLoop, calls=%layer
  ROOT %out = (s32[], bf16[1,256]{1,0}, f32[8,128]{1,0}, f32[5,1024]{1,0}) tuple(%n, %x, %y, %ws)
}

%condition (t: (s32[], bf16[1,256], f32[8,128], f32[5,1024])) -> pred[] {
  %limit = s32[] constant(5)
  %t = (s32[], bf16[1,256]{1,0}, f32[8,128]{1,0}, f32[5,1024]{1,0}) parameter(0)
  %now = s32[] get-tuple-element(%t), index=0
  ROOT %less = pred[] compare(%now, %limit), direction=LT
}

ENTRY %main (a: s32[], b: bf16[1,256], c: f32[8,128], d: f32[5,1024]) -> f32[8,128] {
  %a = s32[] parameter(0)
  %b = bf16[1,256]{1,0} parameter(1)
  %c = f32[8,128]{1,0} parameter(2)
  %d = f32[5,1024]{1,0} parameter(3)
  %in = (s32[], bf16[1,256]{1,0}, f32[8,128]{1,0}, f32[5,1024]{1,0}) tuple(%a, %b, %c, %d)
  %loop = (s32[], bf16[1,256], f32[8,128], /*index=3*/f32[5,1024]) while(%in), condition=%condition, body=%body
  ROOT %end = f32[8,128]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_an_exchange_in_fused_steps_counts_once_and_its_loop_by_its_length():
    found = hlo.Module(TEXT).collectives()
    assert [(c.kind, c.bytes, c.group, c.times) for c in found] == [
        ('all-gather', 4 * 256 * 2, 4, 5),
        ('reduce-scatter', 8 * 128 * 4, 2, 5),
    ]
    assert [c.sent for c in found] == [5 * 2048 * 3 / 4, 5 * 4096 / 2]


def test_memory_is_counted_by_what_is_sliced_and_not_where_a_layout_stays_on_chip():
    read = 512 + 512 + 4096 + 4096  # x twice, y, one layer of five; results are in S(1)
    assert hlo.Module(TEXT).bytes_moved() == 5 * (read + 4)  # and the counter


@pytest.mark.parametrize(
    'line, moved',
    [
        ('(f32[4,256]{1,0}, f32[4,256]{1,0}, u32[]) copy-start(%c)', 2 * 4096 + 4),
        ('(f32[4,256]{1,0:S(1)}, f32[4,256]{1,0}, u32[]{:S(2)}) copy-start(%c)', 4096),
        ('((f32[4,256]{1,0}), f32[2,256]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%c), slice={[0:2], [0:256]}', 2048 + 4),
        ('f32[4,256]{1,0} all-reduce-start(%c), channel_id=1', 2 * 4096),
        ('((f32[4,256]{1,0}), f32[4,256]{1,0}, s32[]) call-start(%c), calls=%other', 4096 + 4096 // 2),
    ],
)
def test_what_begins_ahead_of_its_use_moves_what_it_brings(line, moved):
    text = f"""
%other (p: f32[4,256]) -> f32[4,256] {{
  %p = f32[4,256]{{1,0}} parameter(0)
  ROOT %half = bf16[4,256]{{1,0}} convert(%p)
}}

ENTRY %main (c: f32[4,256]) -> f32[4,256] {{
  %c = f32[4,256]{{1,0}} parameter(0)
  ROOT %start = {line}
}}
"""
    assert hlo.Module(text).bytes_moved() == moved


def test_fusions_move_what_they_slice_and_update_however_deep():
    """Per layer of five: one row of `kept` read by a fusion inside, one of each of two results written, `x` whole."""
    text = """
%inner (w: f32[5,1024], i: s32[]) -> f32[1,1024] {
  %w = f32[5,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %one = f32[1,1024]{1,0} dynamic-slice(%w, %i), dynamic_slice_sizes={1,1024}
}

%outer (kept: f32[5,1024], x: f32[1,1024], i: s32[], a: f32[5,1024], b: bf16[5,1024]) -> (f32[5,1024], bf16[5,1024]) {
  %kept = f32[5,1024]{1,0} parameter(0)
  %x = f32[1,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %a = f32[5,1024]{1,0} parameter(3)
  %b = bf16[5,1024]{1,0} parameter(4)
  %row = f32[1,1024]{1,0} fusion(%kept, %i), kind=kLoop, calls=%inner
  %sum = f32[1,1024]{1,0} add(%row, %x)
  %half = bf16[1,1024]{1,0} convert(%sum)
  %first = f32[5,1024]{1,0} dynamic-update-slice(%a, %sum, %i)
  %second = bf16[5,1024]{1,0} dynamic-update-slice(%b, %half, %i)
  ROOT %both = (f32[5,1024]{1,0}, bf16[5,1024]{1,0}) tuple(%first, %second)
}

ENTRY %main (kept: f32[5,1024], x: f32[1,1024], i: s32[], a: f32[5,1024], b: bf16[5,1024]) -> f32[5,1024] {
  %kept = f32[5,1024]{1,0} parameter(0)
  %x = f32[1,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %a = f32[5,1024]{1,0} parameter(3)
  %b = bf16[5,1024]{1,0} parameter(4)
  %f = (f32[5,1024]{1,0}, bf16[5,1024]{1,0}) fusion(%kept, %x, %i, %a, %b), kind=kOutput, calls=%outer
  ROOT %end = f32[5,1024]{1,0} get-tuple-element(%f), index=0
}
"""
    assert hlo.Module(text).bytes_moved() == 4096 + 4096 + 4 + 4096 + 2048  # and the index
    whole = text.replace('add(%row, %x)', 'subtract(%row, %kept)')
    assert (
        hlo.Module(whole).bytes_moved() == 5 * 4096 + 4096 + 4 + 4096 + 2048 - 4096
    )  # `kept` is read whole, `x` is not


def test_a_weight_that_is_only_renamed_inside_a_fusion_is_read_whole():
    """As the TPU compiler writes a matmul; what is sliced behind such a renaming counts as a slice."""
    text = """
%renamed (w: bf16[2,64,32]) -> bf16[128,32] {
  %w = bf16[2,64,32]{2,1,0} parameter(0)
  ROOT %flat = bf16[128,32]{1,0} bitcast(%w)
}

%matmul (w: bf16[2,64,32], x: bf16[8,128]) -> bf16[8,32] {
  %w = bf16[2,64,32]{2,1,0} parameter(0)
  %x = bf16[8,128]{1,0} parameter(1)
  %flat = bf16[128,32]{1,0} fusion(%w), kind=kLoop, calls=%renamed
  ROOT %y = bf16[8,32]{1,0} convolution(%x, %flat), dim_labels=bf_io->bf
}

ENTRY %main (w: bf16[2,64,32], x: bf16[8,128]) -> bf16[8,32] {
  %w = bf16[2,64,32]{2,1,0} parameter(0)
  %x = bf16[8,128]{1,0} parameter(1)
  ROOT %f = bf16[8,32]{1,0} fusion(%w, %x), kind=kOutput, calls=%matmul
}
"""
    assert hlo.Module(text).bytes_moved() == 2 * (128 * 32 + 8 * 128 + 8 * 32)
    slice_of = 'dynamic-slice(%flat, %x), dynamic_slice_sizes={8,32}'
    sliced = text.replace('convolution(%x, %flat), dim_labels=bf_io->bf', slice_of)
    assert hlo.Module(sliced).bytes_moved() == 2 * (8 * 32 + 8 * 128 + 8 * 32)


def test_a_loop_without_a_constant_limit_takes_the_callers():
    text = TEXT.replace('%limit = s32[] constant(5)', '%limit = s32[] get-tuple-element(%t), index=0')
    assert {c.times for c in hlo.Module(text, trips=3).collectives()} == {3}
    known = TEXT.replace('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
    assert {c.times for c in hlo.Module(known).collectives()} == {9}


@pytest.mark.parametrize(
    'written, size',
    [
        ("replica_groups=mesh['data'=1,'fsdp'=16,'tensor'=4] {'fsdp'}", 16),
        ('replica_groups=[4,2]<=[2,4]T(1,0)', 2),
        ('replica_groups={{0,1,2},{3,4,5}}', 3),
        ('source_target_pairs={{0,1},{1,0}}', 2),
        ('', 1),
    ],
)
def test_groups_are_read_however_they_are_written(written, size):
    assert hlo.group_size(f'channel_id=1, {written}, dimensions=0') == size


def test_shapes_of_every_kind_have_their_bytes():
    assert hlo.array_bytes('bf16[2,3]{1,0:T(8,128)(2,1)S(1)}') == 12
    assert hlo.array_bytes('(f32[4]{0}, pred[], s4[8]{0})') == 16 + 1 + 4
    assert hlo.memory_bytes('(f32[4]{0:S(1)}, u8[8]{0})') == 8
    assert hlo.array_bytes('token[]') == 0


def test_a_program_compiled_here_is_read_as_written():
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 2, 'tensor': 4})
    put = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))
    place = lambda shape, *axes: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=put(*axes))

    def f(x, w):
        def layer(x, w):
            hidden = jnp.tanh(x @ w)  # [8, 64] split over tensor
            return jax.lax.with_sharding_constraint(hidden @ w.T, put('fsdp')), None

        return jax.lax.scan(layer, x, w)[0]

    compiled = jax.jit(f).lower(place((8, 32), 'fsdp'), place((6, 32, 64), None, None, 'tensor')).compile()
    module = hlo.Module(compiled.as_text())
    sums = collections.Counter()
    for c in module.collectives():
        sums[c.kind, c.group, c.times] += c.bytes
    assert sums == {('all-reduce', 4, 6): 4 * 32 * 4}  # the product, of 4 of 8 rows, in each of 6 layers
    weights = 6 * 32 * 16 * 4
    assert weights < module.bytes_moved() < 30 * weights
