"""Tokenizers like those of the families, made on the spot, and texts that are hard for them."""

import json
import random

import sentencepiece
import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "def f(x):\n\treturn x  # twice\n" * 3,
    "The quick brown fox jumps over the lazy dog, 1234 times.\r\n",
    "Selamat pagi, dunia! Cakrawala membentang luas di depan mata kita.\n\n    if a:\n",
    "h\u00e9llo w\u00f6rld \u4f60\u597d \u0939\u093f\u0928\u094d\u0926\u0940 \U0001f600\n",
]
HARD = [
    "",
    " ",
    "   \t ",
    "\n",
    "\r\n\r\n",
    "\0",
    "a\0b",
    "\ufeffwith a mark",
    " leading",
    "   three",
    "two  spaces  ",
    "\u2028\u2029\x0b\x0c\x85",
    "\ufffd",
    "\ufffd \ufffda",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600",
    "\u9f98\u9f98\U0001f600\U0001f680",  # characters that no text below has: bytes
    "e\u0301 \ufb01 \uff12",
    "<0x41>",
]
MARKED = "<s>a </s><pad> <unk> <|begin|>b<|end|> <|turn|> <start_of_turn>c<unused0>[INST]"


def random_texts(count, alphabet="ab Th1 \t\n\r\0\x1001\u00e9\u4f60\U0001f600\ufeff\ufffd<s>"):
    draw = random.Random(0)
    for _ in range(count):
        yield "".join(draw.choices(alphabet, k=draw.randrange(30)))


def write(path, content):
    path.write_text(json.dumps(content))


def byte_level(folder, before="<|begin|>", **files):
    """Like Llama 3 (marks added, `before` put before a text), or GPT-2 (`before=None`).

    Ids 300-303 are <|begin|>, <|end|>, <|turn|> and <tool>, which is added but not special.
    """
    model = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.pre_tokenizer, model.decoder = split, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(alphabet), show_progress=False
    )
    model.train_from_iterator(TEXTS * 3, trainer)
    assert model.get_vocab_size() == 300
    model.add_special_tokens(["<|begin|>", "<|end|>", "<|turn|>"])
    model.add_tokens(["<tool>"])
    model.post_processor = processors.ByteLevel(trim_offsets=False)
    if before:
        template = processors.TemplateProcessing(
            single=f"{before} $A", special_tokens=[(before, model.token_to_id(before))]
        )
        model.post_processor = processors.Sequence([model.post_processor, template])
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    for name, content in {"generation_config": {"eos_token_id": [301, 302]}, **files}.items():
        write(folder / f"{name}.json", content)
    return folder


def llama_json(folder, **files):
    """Like the tokenizer.json of Llama 2: byte tokens, a leading space, no pre-tokenizer.

    Ids 0-2 are <unk>, <s>, </s>, and the merges make <s> of its letters.
    """
    letters = sorted({c for text in TEXTS for c in text.replace(" ", "\u2581")} | set("<s>/"))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters]
    merges = [("\u2581", "\u2581"), ("t", "h"), ("\u2581", "th"), ("e", "r"), ("<", "s")]
    pieces += dict.fromkeys(a + b for a, b in merges)
    merges += [("<s", ">")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    model = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    model.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    for name, content in {"tokenizer_config": {"eos_token": "</s>"}, **files}.items():
        write(folder / f"{name}.json", content)
    return folder


def sentencepiece_model(folder, **options):
    """Like Llama 2's tokenizer.model: byte tokens, a leading space, marks <unk>, <s>, </s>."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = dict(
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_prefix=str(folder / "tokenizer"),
        **settings | options,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder


def gemma_model(folder):
    """Like Gemma's tokenizer.model: no leading space, symbols of which some are marks."""
    symbols = [
        "<start_of_turn>",
        "<end_of_turn>",
        "<unused0>",
        "[INST]",
        "\n\n",
        "<table>",
        "</h1>",
    ]
    ids = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3)
    return sentencepiece_model(folder, add_dummy_prefix=False, user_defined_symbols=symbols, **ids)


def library(folder):
    """The SentencePiece library on the same file."""
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def edit_model(folder, change):
    """Applies `change` to the ModelProto of the folder."""
    path, model = folder / "tokenizer.model", ModelProto()
    model.ParseFromString(path.read_bytes())
    change(model)
    path.write_bytes(model.SerializeToString())


MAKERS = dict(
    llama3=byte_level, llama2_json=llama_json, llama2=sentencepiece_model, gemma=gemma_model
)
