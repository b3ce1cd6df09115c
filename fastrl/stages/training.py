"""The stages that train: each loads what it needs, opens its folder, trains and saves."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.console import Console
from fastrl.data import (
    TextEncoder,
    load_demonstrations,
    load_encoder,
    load_prompts,
    sample_by_source,
    split_by_prompt,
    train_bpe_tokenizer,
)
from fastrl.errors import NumericsError, RewardError
from fastrl.evaluation import generate_for
from fastrl.metrics import RunFolder
from fastrl.models import CausalLM, new_decoder, scalar_from_causal
from fastrl.models.families import decoder_config
from fastrl.models.weights import save_causal_lm, save_scalar_model
from fastrl.reward_settings import join_parts
from fastrl.rewards import RewardModelScorer, Scorer, reward_models
from fastrl.runs import DPORun, PPORun, PretrainRun, RewardRun, SelectRun, SFTRun
from fastrl.stages.best_of_n import write_baseline
from fastrl.stages.inputs import (
    OpenFolder,
    load_policy,
    load_prompt_files,
    load_ranking_files,
    load_reward_model,
    load_text_files,
    placement,
    placement_names,
    read_texts,
    show_report,
)
from fastrl.stages.rewards import check_rewards, expected_scores, load_scorer
from fastrl.stages.samples import SAMPLING, AnsweringProgress
from fastrl.trainers.common import Progress
from fastrl.trainers.dpo import DPOTrainer
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.ppo_trunks import initial_critic
from fastrl.trainers.ppo_weights import AVERAGE_MODEL, LAST_MODEL
from fastrl.trainers.reward import RewardTrainer
from fastrl.trainers.sft import SFTTrainer, select_candidate
from fastrl.types import Prompt, TokenExample
from fastrl.watch import RewardWatch

_NUM_SELECTION_PROMPTS = 128


def pretrain(run: PretrainRun, open_folder: OpenFolder, console: Console) -> None:
    """A tokenizer, unless one is given, and a decoder trained on windows of text."""
    texts = []
    if run.tokenizer_name_or_path is None:
        texts = read_texts((*run.data, *run.tokenizer_data))
    else:
        encoder = load_encoder(run.tokenizer_name_or_path)
    with open_folder() as folder:
        if run.tokenizer_name_or_path is None:
            encoder = train_bpe_tokenizer(texts, run.vocab_size, folder.path / "tokenizer")
            console.print(f"tokenizer: {encoder.vocab_size} entries from {len(texts):,} texts")
        windows = load_text_files(run.data, encoder, run.window_tokens)
        held_out = load_text_files(run.eval_data, encoder, run.window_tokens)
        model = _new_model(run, encoder)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        console.print(f"{num_parameters:,} parameters, {len(windows):,} windows of "
                      f"{run.window_tokens} tokens")
        trainer = SFTTrainer(run, model, windows, eval=held_out, run=folder)
        _resume(trainer, folder)
        with _progress(run, console, model, encoder, trainer.num_steps) as progress:
            trainer.train(progress)
        save_causal_lm(model, folder.model_path, tokenizer_from=encoder.path)
        folder.finish({"parameters": num_parameters, "windows": len(windows),
                       "steps": trainer.num_steps})


def _new_model(run: PretrainRun, encoder: TextEncoder) -> CausalLM:
    """A decoder of the shape that a run asks for, with random weights."""
    device, dtype = placement(run)
    config = decoder_config(
        run.family, vocab_size=encoder.max_token_id + 1, hidden_size=run.hidden_size,
        num_layers=run.num_layers, num_heads=run.num_heads, num_kv_heads=run.num_kv_heads,
        intermediate_size=run.intermediate_size, max_positions=run.max_positions,
        bos_token_id=encoder.bos_token_id, eos_token_ids=encoder.eos_token_ids,
        pad_token_id=encoder.pad_token_id)
    return new_decoder(config, run.seed, dtype=dtype, device=device)


def sft(run: SFTRun, open_folder: OpenFolder, console: Console) -> None:
    """A model that imitates demonstrations."""
    encoder = load_encoder(run.model_name_or_path)
    train, held_out = _demonstrations(run, encoder, console)
    windows = load_text_files(run.ptx_data, encoder, run.ptx_window_tokens)
    model = load_policy(run.model_name_or_path, run, encoder)
    judge = None
    if run.select_by == "reward" and run.reward_model is not None:
        scorer = RewardModelScorer(load_reward_model(run.reward_model, run, encoder),
                                   run.max_tokens_per_microbatch)
        prompts = [example.token_ids[:example.loss_mask.index(True)]
                   for example in (held_out or train)[:_NUM_SELECTION_PROMPTS]]
        judge = Judge(scorer, prompts, SamplingConfig(), EngineConfig(), run.seed)
    with open_folder() as folder:
        trainer = SFTTrainer(run, model, train, eval=held_out, ptx=windows, run=folder, score=judge)
        _resume(trainer, folder)
        with _progress(run, console, model, encoder, trainer.num_steps) as progress:
            trainer.train(progress)
        save_causal_lm(model, folder.model_path, tokenizer_from=encoder.path)
        folder.finish({"demonstrations": len(train), "held_out": len(held_out),
                       "steps": trainer.num_steps, "selected_step": trainer.selected_step})


def _resume(trainer: SFTTrainer | RewardTrainer | PPOTrainer | DPOTrainer,
            folder: RunFolder) -> None:
    """Put the state of the checkpoint that a run continues from, if any, into its trainer."""
    if folder.checkpoint is not None:
        trainer.load_state(folder.checkpoint.load())


@contextmanager
def _progress(run: PretrainRun | SFTRun | PPORun | DPORun, console: Console, model: CausalLM,
              encoder: TextEncoder, num_steps: int, sampling: SamplingConfig = SAMPLING
              ) -> Iterator[Progress]:
    """The numbers of a stage and, where it has sample prompts, its answers while it trains."""
    name = Path(run.output_dir).name
    with console.progress(name, num_steps) as progress:
        if run.sample_steps is None or not run.sample_prompts:
            yield progress
            return
        prompts, _ = load_prompts(run.sample_prompts, encoder, model.spec.max_positions or 1 << 20)
        yield AnsweringProgress(progress, console, name, model, encoder, prompts,
                                run.sample_steps, num_steps, sampling)


def _demonstrations(run: SFTRun, encoder: TextEncoder, console: Console
                    ) -> tuple[list[TokenExample], list[TokenExample]]:
    """Demonstrations to learn from and held out."""
    train, report = load_demonstrations(run.data, encoder, run.max_seq_tokens, run.loss_on)
    show_report(report, console)
    if not run.eval_data:
        return split_by_prompt(train, run.eval_fraction, run.seed)
    held_out, report = load_demonstrations(run.eval_data, encoder, run.max_seq_tokens, run.loss_on)
    show_report(report, console)
    return train, held_out


def reward(run: RewardRun, open_folder: OpenFolder, console: Console) -> None:
    """A reward model that orders completions as people ranked them."""
    encoder = load_encoder(run.model_name_or_path)
    rankings = load_ranking_files(run.data, encoder, run.max_seq_tokens, console)
    fraction = run.eval_fraction
    if fraction is None:
        fraction = 0.0 if run.eval_data else 0.05
    train, held_out = split_by_prompt(rankings, fraction, run.seed)
    held_out += load_ranking_files(run.eval_data, encoder, run.max_seq_tokens, console)
    demonstrations: list[TokenExample] = []
    if run.demonstrations:
        demonstrations, report = load_demonstrations(run.demonstrations, encoder,
                                                     run.max_seq_tokens)
        show_report(report, console)
    model = scalar_from_causal(load_policy(run.model_name_or_path, run, encoder), run.seed)
    with open_folder() as folder:
        trainer = RewardTrainer(run, model, train, eval=held_out, demonstrations=demonstrations,
                                run=folder)
        _resume(trainer, folder)
        with console.progress("reward", trainer.num_steps) as progress:
            trainer.train(progress)
        save_scalar_model(model, folder.model_path, tokenizer_from=encoder.path)
        folder.finish({"rankings": len(train), "held_out": len(held_out),
                       "steps": trainer.num_steps})


def select(run: SelectRun, open_folder: OpenFolder, console: Console) -> None:
    """The candidate of an SFT stage whose responses score best."""
    encoder = load_encoder(run.model_name_or_path)
    prompts = load_prompt_files(run.prompts, encoder, run.max_prompt_tokens,
                                console)[:run.num_prompts]
    scorer = load_scorer(join_parts(run.reward_model, run.reward_function, run.rewards), run,
                         encoder, prompts, max_tokens=run.max_tokens_per_microbatch,
                         max_new_tokens=run.sampling.max_new_tokens)
    judge = Judge(scorer, [prompt.token_ids for prompt in prompts], run.sampling, run.engine,
                  run.seed)
    with open_folder() as folder:
        dtype, device = placement_names(run)
        winner = select_candidate(Path(run.model_name_or_path).parent, judge, dtype=dtype,
                                  device=device)
        save_causal_lm(load_policy(str(winner), run, encoder), folder.model_path,
                       tokenizer_from=encoder.path)
        scores = json.loads((winner.parent / "scores.json").read_text("utf-8"))
        folder.finish(scores)
    console.print(f"selected {winner.name}: " + ", ".join(
        f"{name} {score:.3f}" for name, score in scores["scores"].items()))


@dataclass(frozen=True, slots=True)
class Judge:
    """Scores a model by the mean score of its responses; every model gets the same prompts."""

    scorer: Scorer
    prompts: Sequence[Sequence[int]]
    sampling: SamplingConfig
    engine: EngineConfig
    seed: int

    def __call__(self, model: CausalLM) -> float:
        """Mean reward of one response per prompt."""
        rollout = generate_for(model, self.prompts, self.sampling, seed=self.seed,
                               engine=self.engine)
        return float(self.scorer(rollout).mean())


def ppo(run: PPORun, open_folder: OpenFolder, console: Console) -> None:
    """A policy that raises the reward model's score near its reference."""
    check_rewards(run)
    encoder = load_encoder(run.model_name_or_path)
    train, held_out = _prompts(run, encoder, console)
    windows = load_text_files(run.ptx_data, encoder, run.ptx_window_tokens)
    held_out_windows = load_text_files(run.eval_ptx_data, encoder, run.ptx_window_tokens)
    policy = load_policy(run.model_name_or_path, run, encoder)
    reference = None if run.reference != "copy" else load_policy(
        run.reference_model or run.model_name_or_path, run, encoder)
    load = partial(load_scorer, run=run, encoder=encoder, max_tokens=run.max_tokens_per_microbatch,
                   max_new_tokens=run.sampling.max_new_tokens, share_prefix=run.share_prefix)
    scorer = load(join_parts(run.reward_model, run.reward_function, run.rewards),
                  prompts=train + held_out)
    gold = load(run.gold_rewards, prompts=held_out) if run.gold_rewards else None
    critic = None
    if run.has_critic:
        critic = initial_critic(run, policy, next(iter(reward_models(scorer).values()), None))
    with open_folder() as folder:
        trainer = PPOTrainer(
            run, policy, reference, critic, scorer, train,
            eval_prompts=held_out, ptx=windows, eval_ptx=held_out_windows, run=folder,
            encoder=encoder, watch=RewardWatch(run.watch, gold, folder),
            expected_scores=expected_scores(run))
        if folder.checkpoint is None:  # else it is there, of the policy before training
            write_baseline(run, trainer, folder)
        _resume(trainer, folder)
        with _progress(run, console, policy, encoder, trainer.num_steps, run.sampling) as progress:
            reason = _train_or_save(trainer, progress, folder, encoder)
        save_causal_lm(policy, folder.model_path, tokenizer_from=encoder.path)
        for name in (LAST_MODEL, AVERAGE_MODEL):
            if (folder.path / name).exists():
                encoder.save(folder.path / name)
        folder.finish({"ended": reason, "iterations": trainer.iteration})
    console.print(f"{run.output_dir}: {reason}")


def _train_or_save(trainer: PPOTrainer, progress: Progress, folder: RunFolder,
                   encoder: TextEncoder) -> str:
    """Why training ended; where a score or an alarm ends it, the policy so far is saved first."""
    try:
        return trainer.train(progress)
    except (RewardError, NumericsError) as error:
        if trainer.iteration == 0:
            raise
        path = folder.path / LAST_MODEL
        with trainer.residents.phase("evaluation", "policy"):
            save_causal_lm(trainer.policy, path, tokenizer_from=encoder.path)
        raise type(error)(f"{error}. The policy after {trainer.iteration} iterations is in {path}"
                          ) from error


def _prompts(run: PPORun, encoder: TextEncoder, console: Console
             ) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, weighted by source, and held-out prompts."""
    train = load_prompt_files(run.prompts, encoder, run.max_prompt_tokens, console)
    if run.eval_prompts:
        held_out = load_prompt_files(run.eval_prompts, encoder, run.max_prompt_tokens, console)
    else:
        train, held_out = split_by_prompt(train, run.eval_fraction, run.seed)
    if run.source_weights is not None:
        count = run.num_iterations * run.rollout_batch_size // run.num_samples_per_prompt
        train = sample_by_source(train, run.source_weights, count, run.seed)
    return train, held_out


def dpo(run: DPORun, open_folder: OpenFolder, console: Console) -> None:
    """A policy that gives the better of two ranked completions the larger implicit reward."""
    encoder = load_encoder(run.model_name_or_path)
    train = load_ranking_files(run.data, encoder, run.max_seq_tokens, console)
    if run.eval_data:
        held_out = load_ranking_files(run.eval_data, encoder, run.max_seq_tokens, console)
    else:
        train, held_out = split_by_prompt(train, run.eval_fraction, run.seed)
    policy = load_policy(run.model_name_or_path, run, encoder)
    reference = None
    if run.reference_model is not None:
        reference = load_policy(run.reference_model, run, encoder)
    with open_folder() as folder:
        trainer = DPOTrainer(run, policy, train, reference=reference, eval=held_out, run=folder)
        reference = None  # its log-probs are known
        _resume(trainer, folder)
        with _progress(run, console, policy, encoder, trainer.num_steps) as progress:
            trainer.train(progress)
        save_causal_lm(policy, folder.model_path, tokenizer_from=encoder.path)
        folder.finish({"rankings": len(trainer.examples), "held_out": len(trainer.eval),
                       "steps": trainer.num_steps})
