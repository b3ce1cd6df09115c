"""The files of the small world: text, demonstrations, prompts and a tokenizer."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrl import world
from fastrl.data.tokenizer import word_tokenizer
from fastrl.trainers.common import derive_seed

NUM_DOCUMENTS = 6000
NUM_HELDOUT_DOCUMENTS = 600
NUM_EVAL_PROMPTS = 320
NUM_HELDOUT_PROMPTS = 120
NUM_ANSWERS = 2
"""Demonstrations per training prompt."""


def write_world(folder: Path, seed: int) -> None:
    """Write text, demonstrations, prompts and tokenizer; the same seed writes the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(derive_seed(seed, "world"))
    for name, count in (("corpus", NUM_DOCUMENTS), ("heldout", NUM_HELDOUT_DOCUMENTS)):
        _write_rows(folder / f"{name}.jsonl", [{"text": t} for t in world.corpus(count, rng)])
    questions = world.all_questions(rng)
    held = NUM_EVAL_PROMPTS + NUM_HELDOUT_PROMPTS
    parts = {
        "prompts_eval": questions[:NUM_EVAL_PROMPTS],
        "prompts_heldout": questions[NUM_EVAL_PROMPTS:held],
        "prompts_train": questions[held:],
    }
    for name, part in parts.items():
        _write_rows(folder / f"{name}.jsonl", [{"prompt": q.prompt} for q in part])
    _write_rows(folder / "demonstrations.jsonl", [
        {"prompt": q.prompt, "completion": world.answer(q, rng)}
        for _ in range(NUM_ANSWERS) for q in parts["prompts_train"]
    ])
    word_tokenizer(world.vocabulary(), folder / "tokenizer")


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
