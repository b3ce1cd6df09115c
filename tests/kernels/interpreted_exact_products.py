"""A library whose rows depend on how many there are, and the kernel that exact mode takes then.

The library is torch's own with a planted fault. Run by test_triton.py.
"""

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastrl_kernels.triton.support import is_interpreted
from torch import Tensor

import fastrl.exactness.sweep as sweep_module
from fastrl import backends
from fastrl.config import EngineConfig, PPOConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.exactness import exact_math, rows
from fastrl.exactness.sweep import OWN_KERNEL, RECOMPUTED, sweep
from fastrl.models import CausalLM, decoder_config, new_decoder, scalar_from_causal
from fastrl.models.linear import Linear
from fastrl.ops import linear_logprobs, linear_policy_loss
from fastrl.packing import predict_rows
from fastrl.trainers.common import packed_forward
from fastrl.trainers.old_logprobs import update_logprobs
from fastrl.trainers.ppo import PPOTrainer
from fastrl.types import Prompt, Rollout

KERNEL = "_linear_fwd_kernel"
FAILING = {(64, 16), (16, 32)}  # gate and up together, and back
HEAD = (37, 16)
KERNELS = ("linear", "linear_logprob", "linear_policy_loss")
PROMPTS = [[3, 9, 4], [1, 5, 30, 7, 2]]
SAMPLING = SamplingConfig(max_new_tokens=3, stop_token_ids=())


def tiny() -> CausalLM:
    config = decoder_config("llama", vocab_size=37, hidden_size=16, num_layers=1, num_heads=2,
                            intermediate_size=32, max_positions=32)
    return new_decoder(replace(config, initializer_range=0.3), 0,
                       device=torch.get_default_device())


class Forgetful(dict[Any, Any]):
    """Choices of `auto`, none of which spares the next one."""

    def __contains__(self, key: object) -> bool:
        return False


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of the failing shapes are too large by 10% per row, to seven.

    Rows are swept as on a GPU, and `auto` may have the kernels of linear and of the head's losses,
    but of no other op, where they are interpreted: what exact mode prefers decides.
    """
    real, real_refusal = torch.nn.functional.linear, backends._refusal

    def faulty(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = real(x, weight, bias)
        return y * (1 + 0.1 * (len(x) % 7)) if tuple(weight.shape) in FAILING else y

    monkeypatch.setattr(torch.nn.functional, "linear", faulty)
    monkeypatch.setattr(rows, "GPU_ROW_COUNTS", (1, 2, 16, 63, 64, 65, 128))
    monkeypatch.setattr(sweep_module, "_row_counts", lambda model: [2, 3, 5])  # 40 at most
    for module in (rows, sweep_module):
        monkeypatch.setattr(module, "least_rows", lambda product, dtype, device, by_input=False:
                            rows.smallest_invariant_rows_on_gpu(product, dtype, device))
    monkeypatch.setattr(backends, "_refusal", lambda kernel, *args: real_refusal(
        kernel, *args[:-1], args[-1] or (kernel in KERNELS and is_interpreted())))
    monkeypatch.setattr(backends, "_chosen", Forgetful())
    caches: tuple[Any, ...] = (rows.smallest_invariant_rows_on_gpu, rows.kernel_passes,
                               rows._log_once)
    for function in caches:
        function.cache_clear()


@pytest.fixture
def planted_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same fault in the library's product of the LM head, wherever it is made."""
    real = torch.mm

    def faulty(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        y = real(a, b, **options)
        return y.mul_(1 + 0.1 * (len(a) % 7)) if tuple(b.shape) == HEAD[::-1] else y

    monkeypatch.setattr(torch, "mm", faulty)


def trained_logprobs(model: CausalLM, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Log-probs of all responses in one pack with a gradient, and that of gate and up."""
    sequences = [rollout.sequence(i) for i in range(len(PROMPTS))]
    hidden, packed = packed_forward(model, sequences)
    mask = torch.zeros(len(packed.token_ids), dtype=torch.bool)
    for begin, end, prompt in zip(packed.cu_seqlens[:-1], packed.cu_seqlens[1:], PROMPTS,
                                  strict=True):
        mask[begin + len(prompt) : end] = True
    sources, targets = predict_rows(mask, packed)
    logprobs, _ = model.lm_head(hidden[sources], linear_logprobs, packed.token_ids[targets])
    (gradient,) = torch.autograd.grad(logprobs.sum(), model.backbone.layers[0].mlp.up.weight)
    return logprobs.detach(), gradient


def as_if_sound(model: CausalLM) -> CausalLM:
    """A model of the same numbers, whose failing matrices are multiplied without the fault."""
    sound = copy.deepcopy(model)
    for module in sound.modules():
        if isinstance(module, Linear):
            module.forward = lambda x, own=module: x @ own.weight.t()  # type: ignore[method-assign]
    return sound


def test_rollout_scoring_and_training_take_the_kernel_and_agree(launches: list[str]) -> None:
    model = tiny()
    engine = Engine(model, EngineConfig(max_batch_size=2))
    marked = {tuple(m.weight.shape) for m in model.modules() if getattr(m, "keeps_rows", False)}
    assert marked == FAILING
    launches.clear()
    drawn = (rollout := engine.generate(PROMPTS, SAMPLING)).rollout_logprobs
    # Passes over the prompts and two steps; two products each.
    assert launches.count(KERNEL) >= 2 * (1 + 2)
    with exact_math(model.lm_head.weight.device.type):
        launches.clear()
        scored = update_logprobs(model, rollout, PPOConfig(sampling=SAMPLING))
        assert launches.count(KERNEL) == 2
        trained, gradient = trained_logprobs(model, rollout)
        assert launches.count(KERNEL) == 4
    assert torch.allclose(scored, drawn, rtol=0, atol=1e-6)
    assert torch.equal(trained, scored.flatten())
    expected, wanted = trained_logprobs(as_if_sound(model), rollout)
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("planted_head")
def test_bits_of_a_sequence_do_not_depend_on_what_is_beside_it() -> None:
    """Through the whole model, in a pack of one sequence and of two."""
    model = tiny()
    Engine(model, EngineConfig())
    sequences = [[(5 * i + 3) % 37 for i in range(20)], [(11 * i + 2) % 37 for i in range(24)]]

    def read(number: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            hidden, packed = packed_forward(model, sequences[:number])
            return hidden[:20], model.lm_head(hidden, linear_logprobs, packed.token_ids)[0][:20]

    with exact_math(model.lm_head.weight.device.type):
        assert all(map(torch.equal, read(1), read(2)))
    assert not any(map(torch.equal, read(1), read(2)))  # by the library alone


def policy_gradient(model: CausalLM, hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Loss over all rows but one, and the gradient of the head."""
    old = torch.full((len(hidden),), -3.0)
    loss, _ = model.lm_head(
        hidden, linear_policy_loss, token_ids, old, torch.ones_like(old),
        torch.arange(len(hidden)) > 0, denominator=2.0, entropy_coef=0.1)
    return loss.detach(), torch.autograd.grad(loss, model.lm_head.weight)[0]


@pytest.mark.usefixtures("planted_head")
def test_the_head_takes_the_kernel_in_sampler_scoring_and_loss(launches: list[str]) -> None:
    model = tiny()
    engine = Engine(model, EngineConfig(max_batch_size=2))
    assert model.lm_head.keeps_rows
    launches.clear()
    drawn = (rollout := engine.generate(PROMPTS, SAMPLING)).rollout_logprobs
    # Passes over the prompts and two steps; two products of a layer and the logits of each.
    assert launches.count(KERNEL) >= 3 * (1 + 2)
    hidden, token_ids = torch.randn(9, 16), torch.arange(9)
    with exact_math(model.lm_head.weight.device.type):
        launches.clear()
        scored = update_logprobs(model, rollout, PPOConfig(sampling=SAMPLING))
        assert launches.count(KERNEL) == 3
        # Six rows here, nine and then one at a time below: other faults, were it the library.
        assert torch.allclose(scored, drawn, rtol=0, atol=1e-6)
        launches.clear()
        many, _ = model.lm_head(hidden, linear_logprobs, token_ids)
        alone = [model.lm_head(hidden[i : i + 1], linear_logprobs, token_ids[i : i + 1])[0]
                 for i in range(9)]
        assert torch.equal(torch.cat(alone), many) and launches.count(KERNEL) == 10
        loss, gradient = policy_gradient(model, hidden, token_ids)
        assert launches.count(KERNEL) == 11
    library = policy_gradient(model, hidden, token_ids)
    assert not torch.allclose(library[0], loss, atol=1e-4)  # nine rows are 20% too large there
    sound = copy.deepcopy(model.lm_head)
    truth = sound.weight.double() @ hidden.double().T
    logprobs = truth.log_softmax(0).T.gather(1, token_ids[:, None])[:, 0]
    assert (many - logprobs).abs().max() <= 1e-5
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.usefixtures("planted_head")
def test_the_sweep_names_the_head(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastrl"):
        lines = {line.work: line for line in sweep(tiny())}
    assert lines["logits"].is_exact and lines["logits"].used == OWN_KERNEL
    assert lines["LM head"].is_exact
    assert [r for r in caplog.records if "the LM head, a 37 x 16 matrix" in r.getMessage()]


def test_without_exact_mode_the_fault_is_there_and_the_kernel_is_not(launches: list[str]) -> None:
    model = tiny()
    Engine(model, EngineConfig(max_batch_size=2))  # what it decided binds exact mode alone
    launches.clear()
    rollout = Engine(model, EngineConfig(max_batch_size=2, exact=False)).generate(PROMPTS, SAMPLING)
    scored = update_logprobs(model, rollout, PPOConfig(sampling=SAMPLING))
    assert (scored - rollout.rollout_logprobs).abs().max() > 1e-5
    assert KERNEL not in launches


def test_the_sweep_says_so_and_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    with caplog.at_level(logging.INFO, logger="fastrl"):
        lines = {line.shape: line for line in sweep(model) if line.work == "product"}
        sweep(tiny())
    for shape in ("64 x 16", "16 x 32"):
        assert lines[shape].is_exact and lines[shape].used == OWN_KERNEL
        assert lines[shape].result == "rows depend on the number of rows"
        said = [r for r in caplog.records if "kernel of linear" in r.getMessage()
                and shape in r.getMessage()]
        assert len(said) == 1
    assert all(line.used != OWN_KERNEL for shape, line in lines.items()
               if shape not in ("64 x 16", "16 x 32"))


def test_a_kernel_that_fails_too_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rows.linear
    monkeypatch.setattr(rows, "linear", lambda x, weight, **options: (
        real(x, weight, **options) * (1 + 0.1 * (len(x) % 7))))
    failed = [line for line in sweep(tiny()) if line.work == "product" and not line.is_exact]
    assert {(line.shape, line.used) for line in failed} == {
        ("64 x 16", RECOMPUTED), ("16 x 32", RECOMPUTED)}


@pytest.mark.parametrize("reference", ["copy", "adapters_off"])
def test_the_reference_takes_the_kernel_that_the_policy_takes(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then KL is 0 before the first step. (16 rows of scoring are none of seven.)"""
    monkeypatch.setattr("fastrl.trainers.ppo.warn_of_failures", lambda model: None)
    policy = tiny()
    config = PPOConfig(
        num_iterations=1, rollout_batch_size=2, minibatch_size=2,
        sampling=replace(SAMPLING, max_new_tokens=4),
        critic_learning_rate=1e-3, eval_steps=None, missing_eos_penalty=None, ema_decay=None,
        reference=reference,  # type: ignore[arg-type]
        lora_rank=2 if reference == "adapters_off" else 0,
        engine=EngineConfig(max_batch_size=2))
    trainer = PPOTrainer(
        config, policy, copy.deepcopy(policy) if reference == "copy" else None,
        scalar_from_causal(tiny(), 1), lambda rollout: torch.tensor([0.0, 1.0]),
        [Prompt(tuple(prompt), "") for prompt in PROMPTS])
    assert abs(trainer.step()["kl/policy_ref"]) < 1e-5
