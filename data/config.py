"""The `data` section of an experiment: where its text comes from and how it is tokenised.

DataConfig(source="files", files=("books/**/*.txt",), vocab_size=8192)
"""

import dataclasses
from typing import Literal

from core.config import Section, UserError, setting

SMALLEST = 262  # pieces: 4 marks, 256 bytes, and 2 for something to learn


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """Settings of `python -m data.prepare`; training reads only what that wrote."""

    source: Literal["stdlib", "files", "tfds", "recall"] = setting(
        "stdlib",
        "stdlib (of this Python, needs no network), files, tfds (a prepared dataset), or recall "
        "(made here: keys and values to be remembered)",
    )
    files: tuple[str, ...] = setting(
        (),
        "globs for source=files: .txt .md .py .jsonl .parquet, or these .gz; ** is recursive",
        commas="paths",
    )
    text_field: str = setting("text", "the field that holds the text in jsonl, parquet and tfds")
    tfds_name: str = setting("", "dataset name for source=tfds, as in tfds.builder(name)")
    tfds_dir: str = setting(
        "", "its data_dir, or the folder that holds dataset_info.json (then no name is needed)"
    )
    tfds_split: str = setting("train", "the split to read, as in train[:10%]")
    recall_tokens: int = setting(1024, "tokens of the longest text of source=recall", low=64)
    recall_shortest: int = setting(64, "tokens of its shortest text, or a few less", low=64)
    recall_seed: int = setting(0, "of the texts of source=recall", low=0)
    limit_documents: int = setting(0, "read only the first so many documents (0 = all)", low=0)
    validation_fraction: float = setting(
        0.05, "share of the documents kept for validation, chosen by hash of the text", above=0
    )
    tokenizer: str = setting(
        "", "directory of a tokenizer to use (a bundle's tokenizer/, Hugging Face); none: train one"
    )
    vocab_size: int = setting(
        4096,
        "pieces of the tokenizer, at least 262: its 4 marks, 256 bytes and what it learns",
        low=1,
    )
    tokenizer_bytes: int = setting(
        16_000_000, "bytes of text, taken evenly, that train the tokenizer", low=1
    )
    shard_tokens: int = setting(
        100_000_000, "tokens in a shard file; a longer document has a shard to itself", low=1
    )

    def check(self) -> None:
        if self.validation_fraction >= 1:
            raise UserError(
                f"validation_fraction={self.validation_fraction} leaves nothing to train on: "
                "it must be < 1"
            )
        if not self.tokenizer and self.vocab_size < SMALLEST:
            raise UserError(
                f"vocab_size={self.vocab_size} is out of range: it must be >= {SMALLEST} for a "
                "tokenizer to train, which has 4 marks and 256 bytes among its pieces"
            )
        if self.source == "files" and not self.files:
            raise UserError("files=() is empty, but source='files' needs at least one glob")
        if self.source == "tfds" and not (self.tfds_name or self.tfds_dir):
            raise UserError("tfds_name='' is empty, but source='tfds' needs tfds_name or tfds_dir")
        if self.recall_shortest > self.recall_tokens:
            raise UserError(
                f"recall_shortest={self.recall_shortest} with recall_tokens={self.recall_tokens}: "
                "the shortest text can be no longer than the longest"
            )
        if self.source == "recall" and not self.limit_documents:
            raise UserError("limit_documents=0, but source='recall' never ends: say how many")
