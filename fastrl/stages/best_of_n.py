"""Best-of-n: a baseline in numbers, and demonstrations for rejection-sampling SFT."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.best_of_n import best_of_n_table, kept_samples
from fastrl.console import Console
from fastrl.data import TextEncoder, load_encoder
from fastrl.engine import Engine
from fastrl.metrics import RunFolder
from fastrl.reward_settings import BestOfNRun, join_parts
from fastrl.rewards import Scorer, decode_continuation
from fastrl.runs import PPORun
from fastrl.stages.inputs import OpenFolder, load_policy, load_prompt_files
from fastrl.stages.rewards import check_rewards, load_scorer
from fastrl.trainers.common import derive_seed
from fastrl.trainers.ppo import PPOTrainer
from fastrl.types import Prompt, Rollout

RESULT, DEMONSTRATIONS = "best_of_n.json", "demonstrations.jsonl"

_SAMPLES_PER_ROUND = 4096


def best_of_n(run: BestOfNRun, open_folder: OpenFolder, console: Console) -> None:
    """Write the kept completions to `demonstrations.jsonl` and the figures to `best_of_n.json`."""
    check_rewards(run)
    encoder = load_encoder(run.model_name_or_path)
    prompts = load_prompt_files(run.prompts, encoder, run.max_prompt_tokens,
                                console)[:run.num_prompts]
    parts = join_parts(run.reward_model, run.reward_function, run.rewards)
    scorers: list[Scorer | None] = [load_scorer(
        named, run, encoder, prompts, max_tokens=run.max_tokens_per_microbatch,
        max_new_tokens=run.sampling.max_new_tokens) if named else None
        for named in (parts, run.gold_rewards)]
    engine = Engine(load_policy(run.model_name_or_path, run, encoder).eval(), run.engine,
                    encoder=encoder)
    n, seed = run.num_samples_per_prompt, derive_seed(run.seed, "best_of_n")
    size = max(1, _SAMPLES_PER_ROUND // n)
    columns: list[tuple[Tensor, Tensor | None]] = []
    num_kept = num_without = num_tokens = 0
    with open_folder() as folder, console.progress("samples", len(prompts)) as progress:
        for begin in range(0, len(prompts), size):
            part = prompts[begin:begin + size]
            rollout = engine.generate([p.token_ids for p in part], run.sampling, seed=seed,
                                      num_samples_per_prompt=n, first_request_id=begin * n)
            scores, gold = (None if scorer is None else scorer(rollout).reshape(-1, n).cpu()
                            for scorer in scorers)
            assert scores is not None  # check_rewards has seen a reward
            columns.append((scores, gold))
            num_tokens += int(rollout.response_lens.sum())
            kept = _demonstrations(run, part, rollout, scores, encoder)
            for rows in kept:
                num_without += not rows
                for row in rows:
                    folder.append(DEMONSTRATIONS, row)
                    num_kept += 1
            progress.update(min(begin + size, len(prompts)), {})
        table = _table(columns)
        result = {"num_prompts": len(prompts), "num_samples_per_prompt": n, "table": table,
                  "num_kept": num_kept, "num_prompts_without": num_without,
                  "generated_tokens": num_tokens}
        folder.write_json(RESULT, result)
        folder.finish({**table[-1], **{k: v for k, v in result.items() if k != "table"}})
    _show(table, console)
    console.print(f"best of {n}: {num_kept} completions kept for {len(prompts)} prompts, none for "
                  f"{num_without}")
    if not num_kept:
        console.warning(f"{DEMONSTRATIONS} was not written: no completion was good enough; lower "
                        "threshold, or set keep_unfinished")


def _demonstrations(run: BestOfNRun, prompts: Sequence[Prompt], rollout: Rollout, scores: Tensor,
                    encoder: TextEncoder) -> list[list[Mapping[str, Any]]]:
    """The rows that are kept of each prompt; blank completions teach nothing and are left out."""
    n = rollout.num_samples_per_prompt
    stopped = torch.tensor([r == "stop" for r in rollout.finish_reasons]).reshape(-1, n)
    allowed = torch.ones_like(stopped) if run.keep_unfinished else stopped
    texts: dict[tuple[int, int], str] = {}
    for p, s in allowed.nonzero().tolist():
        texts[p, s] = decode_continuation(rollout, p * n + s, encoder, prompts[p])
        allowed[p, s] = bool(texts[p, s].strip())
    kept = kept_samples(scores, run.num_kept_per_prompt, run.threshold, allowed)
    return [[{**prompt.row, "completion": texts[p, s], "score": float(scores[p, s])}
             for s in kept[p]] for p, prompt in enumerate(prompts)]


def _table(columns: Sequence[tuple[Tensor, Tensor | None]]) -> list[dict[str, Any]]:
    """The figures over all prompts."""
    gold = [values for _, values in columns if values is not None]
    return best_of_n_table(torch.cat([scores for scores, _ in columns]),
                           torch.cat(gold) if gold else None)


def _show(table: Sequence[Mapping[str, Any]], console: Console) -> None:
    columns = ("n", "score_mean", "gold_mean", "kl_bound", "kl")
    names = [name for name in columns if name in table[0]]
    console.table("best of n", [name.replace("_", " ") for name in names],
                  [[row[name] for name in names] for row in table])


def write_baseline(run: PPORun, trainer: PPOTrainer, folder: RunFolder) -> None:
    """Write what best-of-n of the policy gains on the held-out prompts, before it is trained."""
    prompts = trainer.evaluation.prompts
    if run.best_of_n is None or not prompts:
        return
    phase = trainer.residents.phase
    with phase("evaluation", "policy", "kv_cache"):
        rollout = trainer.engine.generate(
            [p.token_ids for p in prompts], run.sampling, seed=derive_seed(run.seed, "best_of_n"),
            num_samples_per_prompt=run.best_of_n)
        trainer.engine.release_memory()
    with phase("evaluation", "reward_model"):
        scores = trainer.scorer(rollout).reshape(len(prompts), -1)
        watch = trainer.evaluation.watch
        gold = None if watch is None or watch.gold is None \
            else watch.gold(rollout).reshape(len(prompts), -1)
    folder.write_json(RESULT, {"num_prompts": len(prompts), "table": best_of_n_table(scores, gold),
                               "num_samples_per_prompt": run.best_of_n})
