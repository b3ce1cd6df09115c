"""Prompts: where the engine begins to write."""

from fastrl.data.encoder import TextEncoder
from fastrl.data.fields import encode_row_prompt, prompt_text, row_prompt
from fastrl.data.report import DataReport, Paths, Tally
from fastrl.types import Prompt


def load_prompts(paths: Paths, encoder: TextEncoder, max_tokens: int
                 ) -> tuple[list[Prompt], DataReport]:
    """Read and check every prompt of one or several files.

    A row is `{prompt}` (a text or messages) or `{messages}` that do not end with the assistant;
    any other field is kept for reward functions.

    Args:
        paths: A file or several.
        encoder: The model's text encoder.
        max_tokens: Longer prompts are dropped and counted.
    Returns:
        prompts, report.
    Raises:
        DataError: at the first broken row, or when no row is left.
    """
    tally = Tally(paths)
    prompts = []
    for row in tally.rows():
        prompt = row_prompt(row)
        source = row.source()
        ids = encode_row_prompt(row, encoder, prompt)
        if len(ids) > max_tokens:
            tally.num_too_long += 1
            continue
        tally.kept[source] += 1
        prompts.append(Prompt(tuple(ids), prompt_text(prompt), source, row.value))
    return prompts, tally.report()
