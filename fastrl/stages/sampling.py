"""The stages that make data: prompts in disjoint files, and rankings by a programmatic labeler."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fastrl.config import SamplingConfig
from fastrl.console import Console
from fastrl.data import TextEncoder, load_encoder
from fastrl.engine import Engine
from fastrl.errors import DataError
from fastrl.evaluation import eos_rate
from fastrl.labelers import (
    find_labeler,
    fit_noise_scale,
    pair_agreement,
    rank_with_noise,
    score_responses,
)
from fastrl.metrics import RunFolder
from fastrl.models import CausalLM
from fastrl.rewards import decode_continuation
from fastrl.runs import PromptsRun, RankRun
from fastrl.stages.inputs import OpenFolder, load_policy, load_prompt_files
from fastrl.trainers.common import derive_seed
from fastrl.types import Prompt, Rollout

_SAMPLES_PER_ROUND = 1024
_MAX_ROUNDS_WITHOUT_NEWS = 3


def prompts(run: PromptsRun, open_folder: OpenFolder, console: Console) -> None:
    """Write `train.jsonl`, `heldout.jsonl` and `eval.jsonl`, no prompt text in two of them."""
    encoder = load_encoder(run.model_name_or_path)
    sizes = {"eval": run.num_eval, "heldout": run.num_heldout, "train": run.num_train}
    if run.data:
        parts = _from_files(run, encoder, sizes, console)
    else:
        model = load_policy(run.model_name_or_path, run, encoder)
        rows = _own_beginnings(run, model, encoder, sum(sizes.values()), console)
        parts = {name: [next(rows) for _ in range(size)] for name, size in sizes.items()}
    with open_folder() as folder:
        for name, part in parts.items():
            for row in part:
                folder.append(f"{name}.jsonl", row)
        folder.finish({name: len(part) for name, part in parts.items()})
    console.print("prompts: " + ", ".join(f"{len(part)} {name}" for name, part in parts.items()))


def _own_beginnings(run: PromptsRun, model: CausalLM, encoder: TextEncoder, count: int,
                    console: Console) -> Iterator[Mapping[str, Any]]:
    """`count` distinct rows made of the first tokens of the model's own samples."""
    begin = encoder.bos_token_id
    if begin is None:
        raise DataError(f"prompts: expected a tokenizer with a beginning-of-text token to start "
                        f"samples with, {run.model_name_or_path} has none; give prompt files in "
                        "data")
    stops = tuple(sorted({begin, *encoder.eos_token_ids}))
    sampling = SamplingConfig(max_new_tokens=run.max_tokens, stop_token_ids=stops)
    engine, lengths = Engine(model.eval()), random.Random(run.seed)
    seen: set[str] = set()
    num_rounds = num_without_news = 0
    while len(seen) < count:
        rollout = engine.generate([[begin]], sampling, seed=run.seed,
                                  num_samples_per_prompt=_SAMPLES_PER_ROUND,
                                  first_request_id=num_rounds * _SAMPLES_PER_ROUND)
        num_rounds += 1
        num_before = len(seen)
        for index in range(rollout.batch_size):
            token_ids = rollout.response(index)[:lengths.randint(run.min_tokens, run.max_tokens)]
            text = encoder.decode(token_ids)
            is_whole = len(token_ids) >= run.min_tokens and token_ids[-1] not in stops
            if is_whole and text.strip() and text not in seen and len(seen) < count:
                seen.add(text)
                yield {"prompt": text, "source": "own samples"}
        num_without_news = 0 if len(seen) > num_before else num_without_news + 1
        if num_without_news == _MAX_ROUNDS_WITHOUT_NEWS:
            raise DataError(f"prompts: expected {count} distinct prompts, the model's samples gave "
                            f"{len(seen)}; ask for fewer or raise max_tokens")


def _from_files(run: PromptsRun, encoder: TextEncoder, sizes: Mapping[str, int], console: Console
                ) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of files, distinct by text and of allowed length, in seeded order, by source."""
    longest = run.max_tokens + (encoder.bos_token_id is not None)
    found = load_prompt_files(run.data, encoder, longest, console)
    distinct = {prompt.text: prompt for prompt in found if len(prompt.token_ids) >= run.min_tokens}
    order = list(distinct.values())
    random.Random(run.seed).shuffle(order)
    weights = run.source_weights or {"": 1.0}
    pools: dict[str, list[Mapping[str, Any]]] = {source: [] for source in weights}
    for prompt in order:
        source = prompt.source if run.source_weights is not None else ""
        if source in pools:
            pools[source].append(prompt.row)
    empty = [source for source, pool in pools.items() if not pool]
    if empty:
        known = ", ".join(sorted({prompt.source for prompt in order}))
        raise DataError(f"source_weights: expected prompts of source {empty[0]!r} within the "
                        f"limits on tokens, found none; sources: {known}")
    total = sum(weights.values())
    return {name: [row for source, weight in weights.items()
                   for row in _take(pools[source], round(size * weight / total))]
            for name, size in sizes.items()}


def _take(pool: list[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Remove and return the first `count` rows, or as many as there are."""
    taken = pool[:count]
    del pool[:count]
    return taken


def rank(run: RankRun, open_folder: OpenFolder, console: Console) -> None:
    """Write `rankings.jsonl`, `heldout.jsonl` and `labels.json`."""
    gold_score = find_labeler(run.labeler)
    encoder = load_encoder(run.model_name_or_path)
    files = {"rankings": run.prompts}
    if run.heldout_prompts is not None:
        files["heldout"] = run.heldout_prompts
    longest = 1 << 20  # prompts come from an earlier stage, which has limited them
    parts = {name: load_prompt_files((path,), encoder, longest, console)
             for name, path in files.items()}
    model = load_policy(run.model_name_or_path, run, encoder)
    engine = Engine(model.eval(), run.engine, encoder=encoder)
    labels: dict[str, Any] = {"labeler": run.labeler, "noise_scale": run.noise_scale,
                              "num_samples_per_prompt": run.num_samples_per_prompt}
    with open_folder() as folder:
        for name, part in parts.items():
            rollout = _generate(engine, part, run, derive_seed(run.seed, name, "samples"), name,
                                console)
            gold = score_responses(gold_score, rollout, part, encoder, run.sampling.max_new_tokens
                                   ).reshape(len(part), run.num_samples_per_prompt)
            if labels["noise_scale"] is None:
                assert run.target_agreement is not None  # checked by RankRun
                labels["noise_scale"] = fit_noise_scale(gold, run.target_agreement)
            scale = float(labels["noise_scale"])
            ranks = rank_with_noise(gold, scale, derive_seed(run.seed, name, "noise"))
            _write_rankings(folder, f"{name}.jsonl", part, rollout, gold, ranks, encoder)
            labels[name] = _label_facts(rollout, gold, scale)
        folder.write_json("labels.json", labels)
        folder.finish(labels)
    console.print(f"labels: noise scale {scale:.3f}, "
                  + ", ".join(f"{name}: agreement {labels[name]['agreement']:.3f}, "
                              f"Bayes limit {labels[name]['bayes_limit']:.3f}" for name in parts))


def _generate(engine: Engine, prompts: Sequence[Prompt], run: RankRun, seed: int, name: str,
              console: Console) -> Rollout:
    """K responses to every prompt, with a progress bar."""
    with console.progress(name, len(prompts) * run.num_samples_per_prompt) as progress:
        return engine.generate(
            [prompt.token_ids for prompt in prompts], run.sampling, seed=seed,
            num_samples_per_prompt=run.num_samples_per_prompt,
            on_progress=lambda num_tokens, num_finished, total: progress.update(num_finished, {}))


def _write_rankings(folder: RunFolder, name: str, prompts: Sequence[Prompt], rollout: Rollout,
                    gold: torch.Tensor, ranks: torch.Tensor, encoder: TextEncoder) -> None:
    """One row per prompt: its own fields, and K completions with rank and gold score.

    Blank completions cannot be ranked as text and are left out.
    """
    num_samples = rollout.num_samples_per_prompt
    for index, prompt in enumerate(prompts):
        completions: list[dict[str, Any]] = []
        for k in range(num_samples):
            row = index * num_samples + k
            text = decode_continuation(rollout, row, encoder, prompt)
            if text.strip():
                completions.append({
                    "text": text, "rank": int(ranks[index, k]), "gold": float(gold[index, k]),
                    "finish_reason": rollout.finish_reasons[row]})
        if len(completions) > 1:
            folder.append(name, {**prompt.row, "completions": completions})


def _label_facts(rollout: Rollout, gold: torch.Tensor, noise_scale: float) -> dict[str, Any]:
    """What a reader of an accuracy needs to know about the labels."""
    return {
        "num_prompts": len(gold),
        "agreement": pair_agreement(gold, noise_scale, count_ties=False),
        "bayes_limit": pair_agreement(gold, noise_scale, count_ties=True),
        "gold_mean": float(gold.mean()),
        "gold_std": float(gold.std()),
        "response_length": float(rollout.response_lens.double().mean()),
        "eos_rate": eos_rate(rollout),
    }
