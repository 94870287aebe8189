"""Sizes of a decoder: read off a config, told as plain data, refused where they are none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prunus.errors import UserError
from prunus.shape import LayerShape, Shape


def config(**more):
    """What a config of three layers says, with 6 query heads and 2 KV heads of 4."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 24, "vocab_size": 50, "intermediate_size": 10, "tie_word_embeddings": 1}
    return SimpleNamespace(**(sizes | {"num_attention_heads": 6, "num_key_value_heads": 2} | more))


def layered(*layers, **more):
    """One whose layers differ: each says only what it has another of."""
    return config(is_heterogeneous=True, per_layer_config=[config(**layer) for layer in layers], **more)


def test_a_config_s_sizes():
    shape = Shape.of(config())
    assert shape == Shape(24, 4, 50, True, (LayerShape(6, 2, 10),) * 3)
    assert shape.tie_word_embeddings is True and shape.num_hidden_layers == 3 and shape.stream_size is None
    assert Shape.of(config(head_dim=5, stream_size=7, tie_word_embeddings=None)) == Shape(
        24, 5, 50, False, (LayerShape(6, 2, 10),) * 3, 7
    )


@pytest.mark.parametrize("more", [{"num_key_value_heads": None}, {"num_key_value_heads": 6}])
def test_without_kv_heads_of_their_own_query_heads_have_one_each(more):
    assert Shape.of(config(**more)).layers[0] == LayerShape(6, 6, 10)


def test_layers_that_differ():
    """The width of a head comes from a layer, as the model's own number of heads may be none that any layer has."""
    found = Shape.of(
        layered(
            {"num_attention_heads": 3, "num_key_value_heads": 1},
            {"skip": ["attention"], "kv_index": [0]},
            {"skip": ["mlp"], "intermediate_size": 9},
            num_attention_heads=7,
        )
    )
    assert found.head_dim == 8 and found.layers == (LayerShape(3, 1, 10), LayerShape(0, 0, 10), LayerShape(6, 2, 0))
    assert [layer.skipped for layer in found.layers] == [(), ("attention",), ("mlp",)]
    assert LayerShape(0, 0, 0).skipped == ("attention", "mlp")


def test_what_a_stock_config_can_say():
    alike = Shape.of(config())
    assert alike.is_uniform and not alike.is_ragged
    assert not Shape.of(layered({}, {"intermediate_size": 9}, {})).is_uniform
    assert not alike.with_layers((LayerShape(6, 2, 0),) * 2).is_uniform  # alike, but without a sub-layer
    ragged = alike.with_layers((LayerShape(3, 2, 10, (0, 1, 1)),) * 2)
    assert ragged.is_ragged and not ragged.is_uniform and ragged.num_hidden_layers == 2
    assert (ragged.hidden_size, ragged.head_dim, ragged.vocab_size) == (24, 4, 50)


def test_query_heads_read_in_order():
    assert LayerShape(6, 2, 1).kv_heads_read == (0, 0, 0, 1, 1, 1)
    assert LayerShape(3, 3, 1).kv_heads_read == (0, 1, 2)
    assert LayerShape(3, 2, 1, (0, 1, 1)).kv_heads_read == (0, 1, 1)
    assert LayerShape(0, 0, 1).kv_heads_read == ()


@pytest.mark.parametrize(
    ("index", "layer"),
    [
        ((0, 0, 1, 1), LayerShape(4, 2, 7)),  # shared evenly and in order: no map is needed
        ((3, 3, 8, 8), LayerShape(4, 2, 7)),  # the same, once what nothing reads is gone
        ((8, 3), LayerShape(2, 2, 7, (1, 0))),
        ((0, 1, 1), LayerShape(3, 2, 7, (0, 1, 1))),
        ((0, 0, 1), LayerShape(3, 2, 7, (0, 0, 1))),  # as whole numbers would divide, but not evenly
        ((5,), LayerShape(1, 1, 7)),
    ],
)
def test_a_map_is_numbered_anew(index, layer):
    assert LayerShape.mapped(index, 7) == layer


def test_a_config_s_own_map():
    shape = Shape.of(
        layered({"num_attention_heads": 3, "kv_index": [0, 1, 1]}, {"skip": ["mlp"], "kv_index": [0, 1] * 3}, {})
    )
    assert shape.layers == (LayerShape(3, 2, 10, (0, 1, 1)), LayerShape(6, 2, 0, (0, 1) * 3), LayerShape(6, 2, 10))


@pytest.mark.parametrize("index", [(0, 0, 0, 1, 1, 1), [0, 1, 1], [0] * 6, [0, 0, 0, 1, 1, 2], [0, 0, 0, 2, 2, 2], "000111"])
def test_maps_that_do_not_fit_are_refused(index):
    with pytest.raises(UserError, match=r"kv_index is .* it must name for each of 6 query heads one of 2 KV heads"):
        Shape.of(config(kv_index=index))


@pytest.mark.parametrize("value", [None, "3", 2.0, True, -1])
@pytest.mark.parametrize(
    "name",
    ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads"],
)
def test_sizes_that_are_none_are_refused(name, value):
    with pytest.raises(UserError, match=rf"config.json: {name} is {value!r}, but a whole number is needed"):
        Shape.of(config(**{name: value}))


def test_a_stream_s_size_is_a_number_too():
    with pytest.raises(UserError, match=r"config.json: stream_size is '7'"):
        Shape.of(config(stream_size="7"))
    assert Shape.of(config(intermediate_size=0)).layers[0].skipped == ("mlp",)  # none is a number


def test_sizes_as_plain_data():
    alike = Shape.of(config())
    assert alike.describe() == {
        "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2,
        "intermediate_size": 10, "head_dim": 4, "vocab_size": 50, "tied": True,
    }  # fmt: skip
    told = Shape.of(layered({}, {"intermediate_size": 9}, {}, stream_size=20)).describe()
    assert told["stream_size"] == 20 and told["intermediate_size"] == [10, 9, 10] and told["num_attention_heads"] == 6


def test_uniform_shapes():
    sizes = {"num_hidden_layers": 3, "hidden_size": 24, "intermediate_size": 10, "head_dim": 4, "vocab_size": 50}
    made = Shape.uniform(**sizes, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True)
    assert made == Shape.of(config())


def test_a_model_of_one_layer_is_uniform():
    one = Shape.of(config()).with_layers((LayerShape(6, 2, 10),))
    assert one.is_uniform and one.num_hidden_layers == 1


def test_a_config_that_lacks_a_size_is_refused():
    bare = config()
    del bare.num_hidden_layers
    with pytest.raises(UserError, match=r"config.json: num_hidden_layers is None, but a whole number is needed"):
        Shape.of(bare)
