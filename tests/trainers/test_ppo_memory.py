"""What should be parked is not resident: the system's word on every phase of an iteration."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastrl.config import EngineConfig, PPOConfig, SamplingConfig
from fastrl.memory.residents import PARKABLE
from fastrl.memory.shapes import shape_of_model
from fastrl.memory.stages import Device, plan_ppo
from fastrl.models.causal_lm import scalar_from_causal
from fastrl.models.decoder import DecoderConfig, new_decoder
from fastrl.rewards import RewardModelScorer
from fastrl.trainers.ppo import PPOTrainer
from fastrl.types import Prompt

SIZES = {"policy": 1, "reference": 1, "critic": 1, "reward_model": 1, "policy_optimizer": 2,
         "critic_optimizer": 2, "ema": 1}
"""float32: weights, and twice as much of moments."""


def resident_bytes() -> int:
    """Memory of this process, without pages of files that it has mapped."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


# Alone: what other tests of the process gave back to the heap would be taken again unseen.
@pytest.mark.exhaustive
def test_each_phase_takes_the_memory_of_what_it_needs() -> None:
    config = DecoderConfig(
        family="llama", vocab_size=2048, hidden_size=512, num_layers=4, num_heads=8,
        num_kv_heads=8, head_dim=64, rotary_dim=64, intermediate_size=1024, max_positions=64,
        eos_token_ids=(1,), tie_embeddings=True)
    before_all = resident_bytes()
    policy = new_decoder(config, seed=0)
    unit = sum(parameter.nbytes for parameter in policy.parameters())
    assert unit > 40e6
    reward_model = scalar_from_causal(policy, seed=1)
    trainer = PPOTrainer(
        PPOConfig(num_iterations=2, rollout_batch_size=2, minibatch_size=2, eval_steps=None,
                  sampling=SamplingConfig(max_new_tokens=4), missing_eos_penalty=None,
                  engine=EngineConfig(page_size=4, max_batch_size=2), parking="on"),
        policy, copy.deepcopy(policy), copy.deepcopy(reward_model).requires_grad_(True),
        RewardModelScorer(reward_model), [Prompt((2, 3), ""), Prompt((4, 5), "")])
    phase, measured = trainer.residents.phase, list[tuple[str, float, int]]()

    @contextmanager
    def note(name: str, *parts: str) -> Iterator[None]:
        with phase(name, *parts):
            expected = sum(SIZES[part] for part in PARKABLE - trainer.residents.parked
                           if part != "swapped")  # of evaluations only
            measured.append((f"{name} {parts}", (resident_bytes() - before_all) / unit, expected))
            yield

    trainer.residents.phase = note  # type: ignore[method-assign]
    trainer.step()
    trainer.step()
    # Rollout and each model of scoring: one; policy with its optimiser and average: four.
    assert [expected for _, _, expected in measured] == 2 * [1, 1, 1, 1, 1, 4, 3, 1]
    # The plan says the same, for the models and states that may be parked.
    plan = plan_ppo(trainer.config, shape_of_model("policy", policy), Device("cpu", 2**40,
                                                                            torch.float32))
    for name in ("rollout", "scoring", "policy_update", "critic_update"):
        taken = max(t for step, t, _ in measured if step.startswith(name))
        planned = sum(num_bytes for resident, num_bytes in plan.phases[name].items()
                      if resident in PARKABLE)
        assert abs(taken - planned / unit) < 0.3, (name, taken, planned / unit)
    worst = max(measured, key=lambda row: abs(row[1] - row[2]))
    assert all(abs(taken - expected) < 0.3 for _, taken, expected in measured), worst
