"""`python -m benchmarks big`: one full-parameter PPO iteration in which all models are large.

Policy, critic, reward model and reference of 8 billion parameters each, random weights made on the
device, AdamW with 8-bit moments, no moving average, short responses. What a phase does not need is
parked on the host. A first iteration compiles and page-locks, the second is reported: seconds and
peak memory of each phase.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.engine_workloads import MODELS, SMALL, random_model
from benchmarks.results import Row, head, save
from benchmarks.timing import Timing
from fastrl.config import EngineConfig, PPOConfig, SamplingConfig
from fastrl.memory.arena import gpu_peak_bytes
from fastrl.memory.measure import kernel_bytes
from fastrl.metrics import PhaseTimer
from fastrl.models import DecoderConfig, ScalarModel
from fastrl.models.decoder import empty_decoder
from fastrl.models.heads import ScalarHead
from fastrl.rewards import RewardModelScorer
from fastrl.trainers.ppo import PPOTrainer
from fastrl.types import Prompt

PHASES = ("rollout", "scoring", "policy_update", "critic_update")
ROOMY_BYTES = 100 * 10**9
"""A device of so much keeps the policy, so that captured graphs and 16 GB of the host stay."""


@dataclass(frozen=True)
class Load:
    """Sizes of the iteration."""

    model: str
    config: DecoderConfig
    batch: int
    prompt: int
    new: int
    max_tokens: int

    @property
    def sizes(self) -> dict[str, int]:
        """For the rows."""
        return {"B": self.batch, "P": self.prompt, "T": self.new}


def load_of(small: bool) -> Load:
    """The 8B shape, or one for trying the flow."""
    if small:
        return Load("small", SMALL, batch=4, prompt=5, new=8, max_tokens=32)
    name = "llama-3.1-8b"
    return Load(name, MODELS[name], batch=16, prompt=128, new=64, max_tokens=2048)


@dataclass
class Figures:
    """Of one phase."""

    seconds: float = 0.0
    peak_bytes: int | None = None
    resident_bytes: int = 0
    """The most that the models and optimisers took that the trainer lists."""


class MeasuredTrainer(PPOTrainer):
    """Notes seconds and peak memory of each phase, moving included."""

    figures: dict[str, Figures]

    @contextmanager
    def _phase(self, timer: PhaseTimer, name: str, *parts: str) -> Iterator[None]:
        device = self.policy.lm_head.weight.device
        begin_peak(device)
        begin = time.perf_counter()
        with super()._phase(timer, name, *parts):
            figures = self.figures.setdefault(name, Figures())
            listed = {s._cdata: s.nbytes() for part in self.residents.parts.values()
                      for s in (tensor.untyped_storage() for tensor in part())}
            figures.resident_bytes = max(figures.resident_bytes, sum(listed.values()))
            yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        figures.seconds += time.perf_counter() - begin
        peak = end_peak(device)
        if peak is not None:
            figures.peak_bytes = max(peak, figures.peak_bytes or 0)


def begin_peak(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def end_peak(device: torch.device) -> int | None:
    """Of allocator and arenas on a GPU, of the whole process on a CPU; None where nobody says."""
    if device.type == "cuda":
        return gpu_peak_bytes(device)
    return kernel_bytes(Path("/proc/self/status"), "VmHWM") or None


def random_scalar(config: DecoderConfig, dtype: torch.dtype, device: str, seed: int) -> ScalarModel:
    """A reward model or a critic with random weights that were drawn where they are."""
    trunk = empty_decoder(config, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            else:
                parameter.normal_(0, config.initializer_range, generator=generator)
    weight = torch.zeros(config.hidden_size, dtype=dtype, device=device)
    weight.normal_(0, config.hidden_size**-0.5, generator=generator)
    return ScalarModel(trunk, ScalarHead(nn.Parameter(weight)), config.spec)


def trainer_of(load: Load, device: str) -> MeasuredTrainer:
    """Four models on the device, the trainer that parks them, and prompts."""
    dtype = torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    prompts = [Prompt(tuple(torch.randint(load.config.vocab_size, (load.prompt,),
                                          generator=generator).tolist()), "")
               for _ in range(load.batch)]
    config = PPOConfig(
        num_iterations=2, rollout_batch_size=load.batch, minibatch_size=load.batch,
        sampling=SamplingConfig(max_new_tokens=load.new, stop_token_ids=()),
        engine=EngineConfig(max_batch_size=load.batch), max_prompt_tokens=load.prompt,
        max_tokens_per_microbatch=load.max_tokens, optimizer_moments="8bit", ema_decay=None,
        eval_steps=None, keep_best=False, missing_eos_penalty=None, activation_checkpointing=True,
        warmup_steps=0, parking="on", dtype="bfloat16", device=device)
    trainer = MeasuredTrainer(
        config, random_model(load.config, dtype, device), random_model(load.config, dtype, device),
        random_scalar(load.config, dtype, device, seed=1),
        RewardModelScorer(random_scalar(load.config, dtype, device, seed=2)), prompts)
    if device == "cuda" and torch.cuda.mem_get_info()[1] > ROOMY_BYTES:
        trainer.residents.keep("policy")
    return trainer


def run_big(device: str, small: bool, path: Path) -> list[Row]:
    """Measure; `path` has a row for the iteration and one for each of its phases."""
    load = load_of(small)
    document = head("big", device, None, None)
    row = Row(workload=f"ppo {load.model}", case="iteration", sizes=load.sizes, dtype="bfloat16",
              provider="fastrl", status="skipped", reason="not begun")
    try:
        rows = measure(load, device, row)
    except Exception as error:  # a row says what was raised
        first = str(error).splitlines()[0] if str(error) else ""
        rows = [row.without_figure("error", f"{type(error).__name__}: {first}")]
    save(document, rows, path)
    return rows


def measure(load: Load, device: str, row: Row) -> list[Row]:
    """Rows of the second iteration."""
    begin = time.perf_counter()
    trainer = trainer_of(load, device)
    setup_s = time.perf_counter() - begin
    num_parameters = sum(p.numel() for p in trainer.policy.parameters())
    trainer.figures = {}
    trainer.step()
    first, trainer.figures = trainer.figures, {}
    metrics = trainer.step()
    figures = trainer.figures
    peaks = [f.peak_bytes for f in figures.values() if f.peak_bytes is not None]
    rows = [_timed(row, "iteration", metrics["time/step_s"], max(peaks, default=None), {
        "parameters": num_parameters, "setup_s": round(setup_s, 3),
        "parks": sorted(trainer.residents.parks)})]
    for name in PHASES:
        rows.append(_timed(row, name, figures[name].seconds, figures[name].peak_bytes, {
            "first_s": round(first[name].seconds, 3),
            "resident_bytes": figures[name].resident_bytes}))
    return rows


def _timed(row: Row, case: str, seconds: float, peak: int | None, extra: dict[str, object]) -> Row:
    timed = row.timed(Timing("clock", [seconds]), peak, None, None)
    return replace(timed, case=case, extra=extra)
