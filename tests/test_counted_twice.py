"""Every count by a second way that shares no code with the first: bytes of files, tokens that were read, products that ran."""

import json
import math
import struct
from unittest import mock

import numpy as np
import pipeline
import pytest
import training

from prunus import record
from prunus.anatomy import Anatomy
from prunus.ledger import Ledger
from prunus.source import Source
from prunus.spent import Flops
from prunus.train import export, loop

BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def on_disk(folder):
    """Shapes of all tensors, from the headers' own bytes; every file is exactly as long as its header says."""
    shapes, sizes = {}, 0
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = {k: v for k, v in json.loads(content[8 : 8 + length]).items() if k != "__metadata__"}
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items()}
        weighs = sum(math.prod(entry["shape"]) * BYTES[entry["dtype"]] for entry in header.values())
        assert len(content) == 8 + length + weighs
        sizes += weighs
    return shapes, sizes


def of_blocks(shapes):
    return sum(math.prod(shape) for name, shape in shapes.items() if ".layers." in name)


@pytest.mark.parametrize("name", ["per-layer", "uniform"])
def test_a_cut_is_as_large_as_it_says(name):
    """Formula = built module = tensors on disk = what prunus.json and --json tell; the ratio is of these tensors, too."""
    folder, said, _ = pipeline.saved(name)
    (after, weighs), (before, _) = on_disk(folder), on_disk(pipeline.folder(pipeline.SAVED[name][0]))
    params = sum(map(math.prod, after.values()))
    told = json.loads((folder / "prunus.json").read_text())
    source = Source.open(str(folder))
    assert params == source.anatomy.num_params == told["after"]["params"] == said["after"]["params"]
    assert params == sum(p.numel() for p in source.load("float32").parameters())
    assert weighs == 4 * params == source.anatomy.weight_bytes(4)
    assert told["before"]["params"] == sum(map(math.prod, before.values()))
    assert told["ratios"]["removed_of_all"] == pytest.approx(1 - params / told["before"]["params"], rel=1e-12)
    assert told["ratios"]["removed_of_block"] == pytest.approx(1 - of_blocks(after) / of_blocks(before), rel=1e-12)


def test_sparse_weights_are_as_sparse_as_they_say():
    folder, said, _ = pipeline.saved("sparse")
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    cut = [t for name, t in tensors.items() if ".layers." in name and t.dim() == 2]
    zeros = sum(int((t == 0).sum()) for t in cut)
    assert said["ratios"]["sparsity"] == pytest.approx(zeros / sum(t.numel() for t in cut), rel=1e-12)
    assert all(((t.view(-1, 4) == 0).sum(1) >= 2).all() for t in cut)


class Watch:
    """Takes note of what a run really reads."""

    def __init__(self, feed):
        self.feed, self.rows = feed, []

    def __getattr__(self, name):
        return getattr(self.feed, name)

    def take(self, position, count):
        batch = self.feed.take(position, count)
        self.rows += batch.ids.tolist()
        return batch


@pytest.fixture
def watched(tmp_path):
    """(rows of ids, run's folder, products that ran) of a run over two epochs of two domains."""
    fields = {
        "data__domains": [{"folder": str(training.data()), "weight": 0.6}, {"folder": str(training.other_data()), "weight": 0.4}],
        "data__epochs": 2, "tokens": 100 * 4 * training.SEQ, "validate__every": 0, "save__every": 0,
    }  # fmt: skip
    seen, train = [], loop.train_

    def watching(run, *arguments):
        run.feed = Watch(run.feed)
        with Flops() as spent:
            train(run, *arguments)
        seen.append((run.feed.rows, spent.total))

    with (
        mock.patch("prunus.train.run.train_", watching),
        mock.patch.object(export, "check_saved", return_value={}),
    ):
        training.run(tmp_path / "run", training.asked(**fields))
    ((rows, ran),) = seen
    return rows, tmp_path / "run", ran


def test_the_ledger_tells_the_tokens_that_were_read(watched):
    """Its ranges, read from the shards' bytes, are the very sequences that the model was given."""
    rows, run, _ = watched
    (stage,) = Ledger.read(run / "ledger.json").stages
    assert stage.tokens == len(rows) * training.SEQ == record.read(run / "record.jsonl")[-1]["figures"]["tokens"]
    known = {}
    for name, folder in (("tokens", training.data()), ("backwards", training.other_data())):
        (shard,) = json.loads((folder / "manifest.json").read_text())["ranges"]["retrain"]
        ids = np.fromfile(folder / shard["file"], "<u2").tolist()
        for first in range(0, len(ids) - training.SEQ, training.SEQ):
            known.setdefault(tuple(ids[first : first + training.SEQ + 1]), []).append((name, first))
    read = {place for row in rows for place in known[tuple(row)]}
    told = {
        (name, at)
        for name, ranges in stage.consumed.items()
        for first, end in ranges.spans
        for at in range(first, end, training.SEQ)
    }
    assert told <= read and {name for name, _ in told} == {"tokens", "backwards"}
    assert all(told.intersection(known[tuple(row)]) for row in rows)  # some lie at several places


def test_flops_are_of_products_that_ran(watched):
    """Three times a forward pass, but for what the formula leaves out: attention's scores, which the way back makes again (half of
    its two products), and the products of rotary positions."""
    rows, run, ran = watched
    shape, length = pipeline.config("llama"), training.SEQ
    scores = 2 * shape.num_attention_heads * length**2 * shape.head_dim * shape.num_hidden_layers * len(rows)
    told = record.read(run / "record.jsonl")[-1]["figures"]["flops"]["train"]
    assert told == 3 * Anatomy.of(shape).flops(length) * len(rows)
    assert told + scores <= ran <= 1.001 * (told + scores)
