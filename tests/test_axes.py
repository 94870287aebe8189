"""Spans against their definition with loops; the axes of random anatomies."""

from __future__ import annotations

import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.anatomy import Anatomy
from prunus.axes import Axis, Span, kind_of, layer_of
from prunus.families import FAMILIES
from prunus.shape import LayerShape, Shape


def test_rows_of_plain_blocked_and_strided_spans():
    assert Span("w", 0).rows([0, 3]).tolist() == [[0], [3]]
    assert Span("w", 0, block=4).rows([2, 0]).tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]  # in the order asked for
    assert Span("w", 0, block=2, offset=100).rows([1]).tolist() == [[102, 103]]
    # query head 1 of each of 3 groups of 2 heads of size 2: heads 1, 3, 5
    assert Span("q", 0, block=2, repeat=3, stride=4).rows([1]).tolist() == [[2, 3, 6, 7, 10, 11]]
    assert Span("w", 0).rows([]).shape == (0, 1)
    assert Span("q", 0, block=2, repeat=3, stride=4).rows_per_unit == 6


def test_a_span_of_a_single_unit_owns_the_rows_of_unit_zero():
    span = Span("model.layers.3.mlp.up_proj.weight", 0, block=3, only=3)
    assert span.rows([0, 1, 3]).tolist() == [[0, 1, 2]]
    assert span.rows([0, 1, 2]).shape == (0, 3)


def test_a_shared_block_goes_with_the_last_unit_that_has_it():
    """Query heads 0 to 4 read KV heads 0 0 1 2 2, of two rows each, behind three rows of something else."""
    span = Span("k", 0, block=2, offset=3, shared=(0, 0, 1, 2, 2))
    assert span.rows([1, 2]).tolist() == [[3, 4], [5, 6]]
    going = {(): [], (0,): [], (0, 4): [], (0, 1): [3, 4], (2,): [5, 6], (4, 3, 2): [5, 6, 7, 8], (0, 1, 2, 4): [3, 4, 5, 6]}
    assert {units: span.gone(units).tolist() for units in going} == going
    assert Span("q", 0, block=2).gone([2, 0]).tolist() == [4, 5, 0, 1]


SPANS = st.builds(
    Span,
    param=st.just("w"),
    dim=st.just(0),
    block=st.integers(1, 5),
    offset=st.integers(0, 7),
    repeat=st.integers(1, 4),
    stride=st.integers(0, 30),
    only=st.none() | st.integers(0, 6),
)


@given(SPANS, st.lists(st.integers(0, 6), unique=True))
def test_rows_are_their_definition(span, units):
    assert span.rows(units).reshape(-1).tolist() == tiny.spans_rows(span, units)
    assert span.rows(units).dtype == torch.int64


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.sampled_from([torch.float16, torch.float64]))
def test_unit_sums_add_what_each_unit_owns(size, block, repeat, dtype):
    span = Span("w", 0, block=block, repeat=repeat, stride=size * block)
    values = torch.arange(size * block * repeat, dtype=dtype) / 8  # exact in half precision, and so are the sums
    sums = Axis("a", size, (span,)).unit_sums(span, values)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert sums.tolist() == [sum(float(values[r]) for r in tiny.spans_rows(span, [u])) for u in range(size)]


def test_unit_sums_of_half_precision_add_in_float32():
    span = Span("w", 0, block=4096)
    ones = torch.ones(4096, dtype=torch.bfloat16)  # bfloat16 would stop counting at 256
    assert Axis("a", 1, (span,)).unit_sums(span, ones).tolist() == [4096.0]


def test_names_of_axes():
    assert [layer_of(n) for n in ("hidden", "layers", "vocab", "layers.12.kv_heads")] == [None, None, None, 12]
    assert [kind_of(n) for n in ("hidden", "layers", "layers.12.kv_heads")] == ["hidden", "layers", "kv_heads"]
    assert Axis("layers.7.mlp", 1, ()).layer == 7


@st.composite
def anatomies(draw):
    """Any family with any of its optional parameters, and layers of any sizes, also without a sub-layer."""
    family = draw(st.sampled_from(FAMILIES))
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.integers(0, 3))
        layers.append(LayerShape(groups * draw(st.integers(1, 3)), groups, draw(st.integers(0, 4))))
    sizes = st.integers(1, 5)
    shape = Shape(draw(sizes), draw(sizes), draw(sizes), draw(st.booleans()), tuple(layers))
    flags = draw(st.sets(st.sampled_from(sorted(family.flags - {"untied"})))) if family.flags - {"untied"} else set()
    return Anatomy(family, shape, frozenset(flags))


@given(anatomies())
@settings(deadline=None)
def test_spans_are_in_range_and_claim_every_row_once(anatomy):
    inner: dict[tuple[str, int], list[int]] = {}
    for name, axis in anatomy.axes.items():
        seen: dict[tuple[str, int], list[int]] = {}
        for span in axis.spans:
            rows = [row for u in range(axis.size) for row in tiny.spans_rows(span, [u])]
            seen.setdefault((span.param, span.dim), []).extend(rows if span.shared is None else sorted(set(rows)))
        for (param, dim), rows in seen.items():
            assert len(set(rows)) == len(rows), (name, param)
            assert all(0 <= row < anatomy.tensors[param].shape[dim] for row in rows), (name, param)
            if kind_of(name) in ("kv_heads", "intermediate", "hidden", "vocab"):
                inner.setdefault((param, dim), []).extend(rows)
    for param, tensor in anatomy.tensors.items():
        for dim, size in enumerate(tensor.shape):
            (kind, *_) = tensor.param.dims[dim]
            axis = {"q": "kv_heads", "kv": "kv_heads", "qkv": "kv_heads"}.get(kind, kind)
            fixed = kind == "head_dim" or axis in anatomy.refused
            assert sorted(inner.get((param, dim), [])) == ([] if fixed else list(range(size))), (param, dim)


@given(anatomies())
@settings(deadline=None)
def test_query_heads_are_a_second_partition_of_the_same_rows(anatomy):
    for i, layer in enumerate(anatomy.shape.layers):
        if layer.num_attention_heads and "q_heads" not in anatomy.refused:
            q, kv = anatomy.axes[f"layers.{i}.q_heads"], anatomy.axes[f"layers.{i}.kv_heads"]
            assert q.size * kv.size == layer.num_attention_heads
            head = anatomy.shape.head_dim
            for span in q.spans:  # unit u owns query head u of every group: heads g * r + u
                for u in range(q.size):
                    heads = [g * q.size + u for g in range(kv.size)]
                    wanted = [span.offset + h * head + j for h in heads for j in range(head)]
                    assert span.rows([u]).reshape(-1).tolist() == wanted
        else:
            assert f"layers.{i}.q_heads" not in anatomy.axes
