"""Text that comes token by token, after a prompt that ends anywhere: it adds up to the whole."""

import json

import pytest
import tokenizer_cases as cases
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from core.config import UserError
from core.tokenizer import tokenizer_files
from data.tokenizer import load, trained

SCRIPTS = "ab Th1\n\u1b13\ua990\u4f60\U0001f680\U00020000\u0939\u0940\u00e9\ufeff"
FALLS_BACK = {"llama2_json", "metaspace", "exported"}  # bytes of a broken run are U+FFFD each


def _exported(folder):
    """Our own as a tokenizer.json, with a token more: its escape spans tokens."""
    trained.train(cases.TEXTS, 340, folder / "ours")
    tokenizer_files.export_tokenizer(folder / "ours", folder)
    path = str(folder / "tokenizer.json")
    model = tokenizers.Tokenizer.from_file(path)
    model.add_special_tokens(["<|turn|>"])
    model.save(path)
    return folder


def _trained(folder):
    trained.train(cases.TEXTS, 340, folder)
    return folder


def _decoding(decoder):
    def make(folder):
        cases.llama_json(folder)
        path = folder / "tokenizer.json"
        model = tokenizers.Tokenizer.from_file(str(path))
        rules = json.loads(model.to_str())
        if decoder is not None:
            model.decoder = decoder
            rules["decoder"] = json.loads(model.to_str())["decoder"]
        else:
            rules["decoder"] = None
        cases.write(path, rules)
        return folder

    return make


MADE = cases.MAKERS | {
    "trained": _trained,
    "exported": _exported,
    "metaspace": _decoding(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    ),
    "none": _decoding(None),
    "word pieces": _decoding(decoders.WordPiece(prefix="t")),
    "word ends": _decoding(decoders.BPEDecoder(suffix="e")),
    "strip": _decoding(
        decoders.Sequence(
            [decoders.Fuse(), decoders.Replace("aba", "-a"), decoders.Strip("\u2581", 2, 0)]
        )
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(the tokenizer, its library if that reads a tokenizer.json) of each kind."""
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, make in MADE.items():
        found, path = load.load(make(folder / name)), folder / name / "tokenizer.json"
        library = tokenizers.Tokenizer.from_file(str(path)) if path.is_file() else None
        made[name] = found, library
    return made


def streamed(model, prompt, new):
    """The pieces of the text that `new` adds."""
    stream = model.stream(prompt)
    return [*map(stream.push, new), stream.flush()]


def properties(test):
    """Runs `test` on few examples, the same ones always."""
    quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
    return quick(test)


@pytest.mark.parametrize("name", [*cases.MAKERS, "trained", "exported"])
@properties
@given(text=st.lists(st.sampled_from(SCRIPTS), max_size=24).map("".join), cut=st.integers(0, 99))
def test_a_text_cut_at_any_token(models, name, text, cut):
    model, _ = models[name]
    marks = [i for i in (model.bos, model.eos[0]) if i is not None]
    ids = [*marks, *model.encode(text).tolist(), *marks]
    cut %= len(ids) + 1
    # No text here has U+FFFD: it stands for a character that is not complete.
    parts = [model.decode(ids[:n]).rstrip("\ufffd") for n in range(cut + 1)]
    head = max((part for part in parts if text.startswith(part)), key=len)
    pieces = streamed(model, ids[:cut], ids[cut:])
    assert head + "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", MADE)
@properties
@given(ids=st.lists(st.integers(0, 999), max_size=12), cut=st.integers(0, 12))
def test_any_tokens_add_up_to_the_whole(models, name, ids, cut):
    """Half of them bytes, so most of it is no UTF-8."""
    model, library = models[name]
    ids = [i // 2 % (262 if i % 2 else model.vocab_size) for i in ids]
    whole = model.decode(ids)
    assert library is None or whole == library.decode(ids)
    assert "".join(streamed(model, [], ids)) == whole
    new = "".join(streamed(model, ids[:cut], ids[cut:]))
    assert whole.endswith(new)
    if name not in FALLS_BACK:
        # The prompt keeps its complete characters, and half of one that stays broken.
        stream = model.stream()
        complete = "".join(map(stream.push, ids[:cut]))
        assert whole in (complete + new, model.decode(ids[:cut]) + new)


@pytest.mark.parametrize("name", [*cases.MAKERS, "trained"])
def test_prompts_that_were_wrong(models, name):
    model, _ = models[name]
    for prompt, new in [
        ("ab " + "\u1b13" * 7, "\u1b13\u1b13 ok"),  # more byte tokens than a window had
        ("a\ufffd", "b"),
        ("\ufffd" * 9, "\ufffd!"),
        ("", " a"),
        ("hello", "  ok"),
    ]:
        ids = model.encode(prompt + new).tolist()
        cut = max(n for n in range(len(ids) + 1) if model.decode(ids[:n]) == prompt)
        assert "".join(streamed(model, ids[:cut], ids[cut:])) == new


def test_an_escape_that_the_prompt_leaves_unfinished(models):
    for name in ("trained", "exported"):
        model, _ = models[name]
        ids = model.encode("a\u2581b").tolist()
        cut = next(n for n in range(len(ids)) if model.decode(ids[:n]) == "a\x10")
        assert "".join(streamed(model, ids[:cut], ids[cut:])) == "\u2581b"
        assert "".join(streamed(model, ids[:cut], model.encode("b"))) == "b"


@pytest.mark.parametrize("name", [*cases.MAKERS, "trained"])
def test_half_a_character_that_stays_broken_is_the_prompts(models, name):
    model, _ = models[name]
    half, after = model.encode("a\U0001f680").tolist()[:-1], model.encode("a b").tolist()
    after = after[max(n for n in range(len(after)) if model.decode(after[:n]) == "a") :]
    assert model.decode(half).count("\ufffd") == (3 if name in FALLS_BACK else 1)
    assert "".join(streamed(model, half, [])) == ""
    assert "".join(streamed(model, half, after)) == " b"
    assert "".join(streamed(model, half[:-1], [half[-1], *after])) == (
        "\ufffd b" if name in FALLS_BACK else " b"
    )


@pytest.mark.parametrize("name", [*cases.MAKERS, "trained"])
def test_endless_bytes_come_at_once(models, name):
    """Nothing grows: what is held back is less than a character."""
    model, _ = models[name]
    half = model.encode("\U0001f680").tolist()[-3:-1]
    stream = model.stream(half * 50)
    pieces = [stream.push(i) for i in half * 500]
    assert all(
        "\ufffd" in first + second for first, second in zip(pieces, pieces[1:], strict=False)
    )
    assert len("".join(pieces)) + 2 >= len(model.decode(half * 500))


@pytest.mark.parametrize(
    ("decoder", "step"),
    [
        (decoders.CTC(), '"type": "CTC"'),
        (decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]), "ByteFallback.*whole text"),
        (
            decoders.Sequence([decoders.Fuse(), decoders.WordPiece()]),
            "WordPiece.*on the whole text",
        ),
    ],
)
def test_decoders_that_cannot_be_followed_are_named(tmp_path, decoder, step):
    folder = _decoding(decoder)(tmp_path)
    with pytest.raises(UserError, match=f"its decoder has the step.*{step}.*not supported"):
        load.load(folder)
