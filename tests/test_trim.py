"""A smaller vocabulary: text of kept tokens is read as before, any text can be written, the model says the same."""

import json

import checkpoints
import pipeline
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import cli
from transformers import AutoTokenizer

from prunus import trim
from prunus.errors import UserError, VerificationError
from prunus.source import Source

COVERAGE = 0.3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    docs = [*pipeline.corpus()[:40], "the", "a"]
    path.write_text("".join(json.dumps({"text": doc}) + "\n" for doc in docs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trimmed(corpus, tmp_path_factory):
    """`trimmed("llama")`: (source, folder, what was told), made once."""
    made = {}

    def make(case):
        if case not in made:
            source = Source.open(str(pipeline.folder(case)))
            out = tmp_path_factory.mktemp("trimmed") / case
            made[case] = source, out, trim.trim(source, [str(corpus)], COVERAGE, out)
        return made[case]

    return make


@pytest.mark.parametrize("case", ["llama", "llama_tied", "gemma", "phi"])
def test_the_model_says_the_same_of_what_stays(case, trimmed):
    source, out, told = trimmed(case)
    assert told["vocab"] < told["vocab_before"] and told["verified"]["clean_process"] and told["covered"] >= COVERAGE
    assert told["same_lines"] > 0  # else nothing was compared
    opened = Source.open(str(out))
    assert opened.anatomy.shape.vocab_size == told["vocab"] and opened.anatomy.num_params == told["params"]
    kept = [i for part in told["keep"].split(",") for i in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)]
    ids = torch.randint(0, len(kept), (2, 12), generator=torch.Generator().manual_seed(0))
    before, after = source.load(), opened.load()
    wanted = tiny.logits_of(before, torch.tensor(kept)[ids])[..., kept]
    assert torch.allclose(tiny.logits_of(after, ids), wanted, atol=1e-5 * float(wanted.abs().max()))
    old, new = source.tokenizer(), opened.tokenizer()
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(old, name) == getattr(new, name)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (at := getattr(before.config, name, None)) is not None:
            assert kept[getattr(after.config, name)] == at


def reference(parts, counts, coverage):
    """By the rule, a token at a time, until nothing more is needed."""
    total, seen, kept = sum(counts.values()), 0, set()
    for token in sorted(counts, key=lambda t: (-counts[t], t)):
        if seen < coverage * total:
            kept.add(token)
            seen += counts[token]
    vocab = parts["model"]["vocab"]
    kept |= {added["id"] for added in parts["added_tokens"]}
    kept |= {i for token, i in vocab.items() if len(token) == 1 and token in trim_alphabet()}
    grew = True
    while grew:
        grew = False
        for merge in parts["model"]["merges"]:
            one, other = merge if isinstance(merge, list) else merge.split(" ")
            if vocab[one + other] in kept and not {vocab[one], vocab[other]} <= kept:
                kept |= {vocab[one], vocab[other]}
                grew = True
    return tuple(sorted(kept))


def trim_alphabet():
    from tokenizers import pre_tokenizers

    return set(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize("coverage", [0.1, 0.5, 0.9, 1.0])
def test_what_is_chosen_is_the_rule(coverage, corpus):
    tokenizer = pipeline.tokenizer()
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    docs = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    counts = trim.counts_of(tokenizer, docs, lambda done: None)
    picked = trim.chosen(parts, counts, coverage, ())
    assert picked.kept == reference(parts, counts, coverage)
    assert picked.tokens == sum(len(tokenizer(doc, add_special_tokens=False)["input_ids"]) for doc in docs)
    assert picked.covered >= coverage


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="thecatsonmdg 12.\n\u00e9\U0001f600", max_size=60))
def test_any_text_is_read_and_kept_tokens_as_before(text):
    old, new, place = _pair()
    ids = old(text, add_special_tokens=False)["input_ids"]
    found = new(text, add_special_tokens=False)["input_ids"]
    if all(i in place for i in ids):
        assert found == [place[i] for i in ids]
    assert new.decode(found, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


_PAIR = []


def _pair():
    if not _PAIR:
        old = pipeline.tokenizer()
        parts = json.loads(old.backend_tokenizer.to_str())
        counts = trim.counts_of(old, pipeline.corpus(), lambda done: None)
        place = {token: i for i, token in enumerate(trim.chosen(parts, counts, 0.6, ()).kept)}
        assert len(place) < len(old)
        _PAIR.append((old, trim.rewritten(old, parts, place), place))
    return _PAIR[0]


def test_templates_are_renumbered(tmp_path):
    """A post-processor that puts a token in front of every text."""
    from tokenizers import processors

    old = AutoTokenizer.from_pretrained(pipeline.folder("llama_tied"))
    end = old.eos_token_id
    old.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{old.eos_token} $A", pair=None, special_tokens=[(old.eos_token, end)]
    )
    parts = json.loads(old.backend_tokenizer.to_str())
    counts = trim.counts_of(old, ["the cat sat"], lambda done: None)
    place = {token: i for i, token in enumerate(trim.chosen(parts, counts, 1.0, ()).kept)}
    new = trim.rewritten(old, parts, place)
    assert new("the cat sat")["input_ids"] == [place[i] for i in old("the cat sat")["input_ids"]]
    assert new("the cat sat")["input_ids"][0] == place[end] == new.eos_token_id


def test_on_the_command_line(corpus, tmp_path):
    words = ("trim", pipeline.folder("llama_tied"), "--text", corpus, "--coverage", 0.7, "--out", tmp_path / "out")
    code, said, err = cli(*words)
    assert code == 0 and "tokens of the text are kept as they are" in said, err
    code, _, err = cli(*words)
    assert code == 2 and "already exists; give another --out, or --overwrite" in err
    assert cli(*words, "--overwrite")[0] == 0
    code, said, err = cli(
        "eval", tmp_path / "out", "--baseline", pipeline.folder("llama_tied"), "--text", corpus, "--windows", 1, "--seq-len", 32,
        "--json",
    )  # fmt: skip
    assert code == 0, err
    assert all(row["texts"][0]["bits_per_byte"] > 0 for row in json.loads(said)["models"])


@pytest.mark.parametrize(
    ("texts", "coverage", "sentence"),
    [
        (True, 0.0, "coverage: 0 is no share of a text"),
        (True, 1.5, "coverage: 1.5 is no share of a text"),
        (False, 0.9, "text: nothing to count tokens in"),
    ],
)
def test_wrong_questions(texts, coverage, sentence, corpus, tmp_path):
    with pytest.raises(UserError, match=sentence):
        trim.trim(Source.open(str(pipeline.folder("llama"))), [str(corpus)] if texts else [], coverage, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_sparse_weights_and_wrong_dtypes_are_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="its mask would be lost"):
        trim.trim(Source.open(str(pipeline.saved("sparse")[0])), [str(corpus)], 0.3, tmp_path / "out")
    with pytest.raises(UserError, match="unknown dtype 'int8'"):
        trim.trim(Source.open(str(pipeline.folder("llama"))), [str(corpus)], 0.3, tmp_path / "out", dtype="int8")


def test_text_without_tokens(tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="there is no token in it"):
        trim.trim(Source.open(str(pipeline.folder("llama"))), [str(tmp_path / "empty.jsonl")], 0.9, tmp_path / "out")


def test_text_of_blanks_alone(tmp_path):
    """Blanks have tokens, but no line to prove anything with."""
    (tmp_path / "blank.jsonl").write_text('{"text": "  \\n "}\n')
    with pytest.raises(UserError, match="there is no token in it"):
        trim.trim(Source.open(str(pipeline.folder("llama_tied"))), [str(tmp_path / "blank.jsonl")], 0.9, tmp_path / "out")


def test_a_tokenizer_that_reads_otherwise_leaves_nothing(tmp_path, monkeypatch):
    honest = trim.rewritten

    def lies(tokenizer, parts, place):
        data = json.loads(json.dumps(parts))
        data["model"]["merges"] = []
        return honest(tokenizer, data, place)

    (tmp_path / "the.txt").write_text("the the the")
    monkeypatch.setattr(trim, "rewritten", lies)
    with pytest.raises(VerificationError, match="is read as other tokens than before"):
        trim.trim(Source.open(str(pipeline.folder("llama"))), [str(tmp_path / "the.txt")], 1.0, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["the.txt"]


def test_other_kinds_of_tokenizers_are_refused(tmp_path, corpus):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), eos_token="b"
    )
    folder = checkpoints.save_folder(tmp_path / "m", pipeline.model("llama", dtype=torch.float32), words)
    with pytest.raises(UserError, match=r"of type WordLevel; only byte-pair encoding"):
        trim.trim(Source.open(str(folder)), [str(corpus)], 0.9, tmp_path / "out")
