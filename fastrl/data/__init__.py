"""Data files to token ids: readers, the text encoder, and loaders for every stage."""

from fastrl.data.comparisons import load_comparisons
from fastrl.data.demonstrations import load_demonstrations
from fastrl.data.encoder import TextEncoder, load_encoder
from fastrl.data.prompts import load_prompts
from fastrl.data.report import DataReport
from fastrl.data.rows import Row, read_rows
from fastrl.data.selection import sample_by_source, split_by_prompt
from fastrl.data.tokenizer import train_bpe_tokenizer, word_tokenizer
from fastrl.data.windows import load_text_windows

__all__ = [
    "DataReport",
    "Row",
    "TextEncoder",
    "load_comparisons",
    "load_demonstrations",
    "load_encoder",
    "load_prompts",
    "load_text_windows",
    "read_rows",
    "sample_by_source",
    "split_by_prompt",
    "train_bpe_tokenizer",
    "word_tokenizer",
]
