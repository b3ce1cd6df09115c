"""The stage that compares models on held-out prompts, and what it writes.

`evaluation.json`:

    {"num_prompts": 384, "reference": "initial", "judge": "lexicon",
     "models": {"ppo": {"score_mean": ..., "reward_mean": ..., "kl": {"k1", "k1_std_error", "k3"},
                        "loglikelihood": ..., "distinct_word_ratio": ..., "response_length": ...,
                        "eos_rate": ..., "lm_loss": ...}, ...},
     "best_of_n": {"name": "best-of-16", "n": 16, "kl_bound": ...} (with `best_of_n`),
     "win_rates": [{"model": "ppo", "opponent": "initial", "rate", "low", "high", "num_prompts",
                    "num_ties"}, ...],
     "samples": [{"prompt": ..., "responses": {"ppo": ...}, "scores": {"ppo": ...}}, ...]}

The best of n samples of the reference is one of the models; its `kl` is what
`fastrl.best_of_n.measured_best_of_n_kl` measures, as k1 and k3. `score` is what decides who wins
(the labeler, else the rewards); KL is in nats per response against the reference, on the model's
own samples; `loglikelihood` is that of its samples under the reference, per token, to be read
beside the reference's own. `reward_mean` and `lm_loss` are there when the stage has rewards and
text.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastrl.best_of_n import best_of_n_kl, kept_samples, measured_best_of_n_kl
from fastrl.console import Console
from fastrl.data import TextEncoder, load_encoder
from fastrl.evaluation import (
    SequenceKL,
    distinct_word_ratio,
    eos_rate,
    generate_for,
    language_model_loss,
    response_loglikelihood,
    sequence_kl,
    win_rate,
)
from fastrl.labelers import find_labeler, score_responses
from fastrl.models import CausalLM, response_logprobs
from fastrl.reward_settings import join_parts
from fastrl.rewards import Scorer, decode_response
from fastrl.runs import EvaluateRun
from fastrl.stages.inputs import (
    OpenFolder,
    load_policy,
    load_prompt_files,
    load_text_files,
)
from fastrl.stages.rewards import load_scorer
from fastrl.trainers.common import derive_seed
from fastrl.types import Prompt, Rollout, TokenExample


def evaluate(run: EvaluateRun, open_folder: OpenFolder, console: Console) -> None:
    """Sample every model on the same prompts and write `evaluation.json`."""
    encoder = load_encoder(run.models[run.reference])
    prompts = load_prompt_files(run.prompts, encoder, run.max_prompt_tokens,
                                console)[:run.num_prompts]
    windows = load_text_files(run.text, encoder, run.window_tokens)[:run.max_windows]
    scorer = _load_scorer(run, encoder, prompts)
    reference = load_policy(run.models[run.reference], run, encoder)
    with open_folder() as folder, console.progress("evaluate", len(run.models)) as progress:
        rollouts: dict[str, Rollout] = {}
        facts: dict[str, dict[str, Any]] = {}
        for number, (name, path) in enumerate(run.models.items(), start=1):
            model = reference if name == run.reference else load_policy(path, run, encoder)
            rollout = generate_for(model, [p.token_ids for p in prompts], run.sampling,
                                   seed=derive_seed(run.seed, name), engine=run.engine)
            rollouts[name] = rollout
            facts[name] = _facts(run, model, reference, rollout, windows, encoder)
            progress.update(number, {})
        if run.best_of_n is not None and scorer is not None:
            name = f"best-of-{run.best_of_n}"
            rollouts[name], kl = _best_of_n(run, run.best_of_n, reference, scorer, prompts)
            facts[name] = {**_facts(run, reference, reference, rollouts[name], windows, encoder),
                           "kl": dataclasses.asdict(kl)}
        scores = _scores(run, scorer, rollouts, prompts, encoder, facts)
        result = {
            "num_prompts": len(prompts),
            "reference": run.reference,
            "judge": run.labeler or _judge(run),
            "models": facts,
            **({} if run.best_of_n is None else {"best_of_n": {
                "name": f"best-of-{run.best_of_n}", "n": run.best_of_n,
                "kl_bound": best_of_n_kl(run.best_of_n)}}),
            "win_rates": _win_rates(run, scores),
            "samples": _sample_rows(rollouts, scores, prompts[:run.num_table_rows], encoder),
        }
        folder.write_json("evaluation.json", result)
        _show(result, console)
        folder.finish({key: result[key] for key in ("num_prompts", "models", "win_rates")})


def _facts(run: EvaluateRun, model: CausalLM, reference: CausalLM, rollout: Rollout,
           windows: Sequence[TokenExample], encoder: TextEncoder) -> dict[str, Any]:
    """What can be said of one model's samples without a judge."""
    max_tokens = run.max_tokens_per_microbatch
    ref_logprobs, _ = response_logprobs(reference, rollout, run.sampling.temperature, max_tokens)
    facts: dict[str, Any] = {
        "kl": dataclasses.asdict(sequence_kl(rollout.rollout_logprobs, ref_logprobs,
                                             rollout.response_mask)),
        "loglikelihood": response_loglikelihood(reference, rollout, max_tokens),
        "distinct_word_ratio": distinct_word_ratio(
            [decode_response(rollout, i, encoder) for i in range(rollout.batch_size)]),
        "response_length": float(rollout.response_lens.double().mean()),
        "eos_rate": eos_rate(rollout),
    }
    if windows:
        facts["lm_loss"] = language_model_loss(model, windows, max_tokens)
    return facts


def _load_scorer(run: EvaluateRun, encoder: TextEncoder, prompts: Sequence[Prompt]
                 ) -> Scorer | None:
    """What the rewards of the stage say; None without any."""
    parts = join_parts(run.reward_model, run.reward_function, run.rewards)
    return load_scorer(parts, run, encoder, prompts, max_tokens=run.max_tokens_per_microbatch,
                       max_new_tokens=run.sampling.max_new_tokens) if parts else None


def _judge(run: EvaluateRun) -> str:
    """Who decides without a labeler."""
    names = list(join_parts(run.reward_model, run.reward_function, run.rewards))
    return "reward model" if names == ["reward_model"] else " + ".join(names)


def _best_of_n(run: EvaluateRun, n: int, reference: CausalLM, scorer: Scorer,
               prompts: Sequence[Prompt]) -> tuple[Rollout, SequenceKL]:
    """The best of n samples of the reference for each prompt, and how far that is from it."""
    rollout = generate_for(reference, [p.token_ids for p in prompts], run.sampling,
                           seed=derive_seed(run.seed, "best_of_n"), num_samples_per_prompt=n,
                           engine=run.engine)
    scores = scorer(rollout).reshape(-1, n)
    kl = measured_best_of_n_kl(scores, n)
    error = float(kl.std(correction=1)) / len(kl) ** 0.5 if len(kl) > 1 else 0.0
    mean = float(kl.mean())
    best = rollout.select([p * n + rows[0] for p, rows in enumerate(kept_samples(scores, 1))])
    return best, SequenceKL(k1=mean, k1_std_error=error, k3=mean)


def _scores(
    run: EvaluateRun, scorer: Scorer | None, rollouts: Mapping[str, Rollout],
    prompts: Sequence[Prompt], encoder: TextEncoder, facts: dict[str, dict[str, Any]],
) -> dict[str, Tensor]:
    """The judge's scores [B] of every model; means go to `facts`."""
    scores: dict[str, Tensor] = {}
    if scorer is not None:
        scores = {name: scorer(rollout) for name, rollout in rollouts.items()}
        for name, values in scores.items():
            facts[name]["reward_mean"] = float(values.mean())
    if run.labeler is not None:
        gold = find_labeler(run.labeler)
        scores = {name: score_responses(gold, rollout, prompts, encoder,
                                        run.sampling.max_new_tokens)
                  for name, rollout in rollouts.items()}
    for name, values in scores.items():
        facts[name]["score_mean"] = float(values.mean())
    return scores


def _win_rates(run: EvaluateRun, scores: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    pairs = run.pairs or tuple((name, run.reference) for name in run.models
                               if name != run.reference)
    return [{"model": model, "opponent": opponent,
             **dataclasses.asdict(win_rate(scores[model], scores[opponent]))}
            for model, opponent in pairs]


def _sample_rows(rollouts: Mapping[str, Rollout], scores: Mapping[str, Tensor],
                 prompts: Sequence[Prompt], encoder: TextEncoder) -> list[dict[str, Any]]:
    """Prompts with the response of every model, side by side."""
    return [{
        "prompt": prompt.text,
        "responses": {name: decode_response(rollout, index, encoder)
                      for name, rollout in rollouts.items()},
        "scores": {name: float(values[index]) for name, values in scores.items()},
    } for index, prompt in enumerate(prompts)]


def _show(result: Mapping[str, Any], console: Console) -> None:
    """The tables of an evaluation."""
    console.table(f"win rates, {result['judge']}, {result['num_prompts']} held-out prompts",
                  ("model", "over", "rate", "95% from", "to"),
                  [(win["model"], win["opponent"], win["rate"], win["low"], win["high"])
                   for win in result["win_rates"]])
    console.table(f"samples against {result['reference']}",
                  ("model", "score", "KL", "log-lik./token", "distinct words", "tokens", "stopped"),
                  [(name, facts["score_mean"], facts["kl"]["k1"], facts["loglikelihood"],
                    facts["distinct_word_ratio"], facts["response_length"], facts["eos_rate"])
                   for name, facts in result["models"].items()])
    samples = result["samples"]
    console.samples("samples", [sample["prompt"] for sample in samples],
                    {name: [sample["responses"][name] for sample in samples]
                     for name in result["models"]})
