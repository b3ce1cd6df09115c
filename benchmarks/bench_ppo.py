"""One PPO iteration beside that of other trainers, on the same models and prompts.

    make peers
    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.bench_ppo

Every provider is a process of its own, `benchmarks/peers/<provider>_ppo.py`, in turns; a peer's
runs in the environment that `make peers` makes. Before anything is timed a peer's first rollout is
scored by fastrl: KL, rewards and advantages before whitening have to agree to 1e-4, or there is no
figure. The first iteration of a process warms up. Clock and processor time are both kept: on a
machine that others use only the second says something.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ceilings import assumed_ceilings, measured_ceilings
from benchmarks.peers.common import read_workload
from benchmarks.results import ROOT, Row, file_name, head, save, table
from benchmarks.timing import Timing
from fastrl.advantages import gae
from fastrl.models import load_causal_lm, load_scalar_model
from fastrl.models.scoring import response_logprobs, response_values, sequence_scores
from fastrl.ops import shape_rewards
from fastrl.types import Rollout

PEERS = ROOT / "benchmarks" / "peers"
TOLERANCE = 1e-4
"""Largest difference of KL, rewards and advantages."""
MAX_TOKENS = 8192


def make_models(workload: dict[str, Any], folder: Path) -> None:
    """`policy` and `reward`, transformers checkpoints with random weights."""
    import transformers

    model = workload["model"]
    config = {
        "vocab_size": model["vocab_size"], "hidden_size": model["hidden_size"],
        "intermediate_size": model["intermediate_size"], "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"], "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "max_position_embeddings": model["max_positions"],
        "tie_word_embeddings": True, "dtype": workload.get("dtype", "float32"),
        "num_key_value_heads": model.get("num_kv_heads", model["num_heads"]),
        "head_dim": model.get("head_dim", model["hidden_size"] // model["num_heads"])}
    torch.manual_seed(workload["seed"])
    dtype = getattr(torch, config["dtype"])
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(dtype).save_pretrained(
        folder / "policy")
    transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
        **config, num_labels=1)).to(dtype).save_pretrained(folder / "reward")


def interpreter(provider: str) -> Path | None:
    """The Python that runs a provider; None where there is no environment that has it.

    That of `make peers` comes first; a machine without network may have the peer beside torch.
    """
    path = ROOT / "peers" / provider / "bin" / "python"
    if provider != "fastrl" and path.exists():
        return path
    return Path(sys.executable) if importlib.util.find_spec(provider) is not None else None


def run(provider: str, workload: Path, models: Path, threads: int,
        rollout: Path | None = None, task: str = "ppo", device: str = "cpu",
        deadline: float = float("inf")) -> dict[str, Any]:
    """What a provider's process measured.

    Raises:
        RuntimeError: when it failed; with the end of what it printed.
        subprocess.TimeoutExpired: at the deadline, by time.monotonic().
    """
    python = interpreter(provider)
    assert python is not None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [str(python), str(PEERS / f"{provider}_{task}.py"), "--workload", str(workload),
                   "--models", str(models), "--out", str(out), "--threads", str(threads),
                   "--device", device]
        if rollout is not None:
            command += ["--rollout", str(rollout)]
        path = os.pathsep.join(  # last what gpu.sh has built
            [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        own = {"PYTHONPATH": path} if provider == "fastrl" else {}
        left = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        result = subprocess.run(command, capture_output=True, text=True, timeout=left,
                                env={**os.environ, "PYTHONPATH": "", **own})
        if result.returncode or not out.exists():
            raise RuntimeError(f"{provider}: {result.stderr[-2000:]}")
        measured: dict[str, Any] = json.loads(out.read_text("utf-8"))
        return measured


def differences(saved: Path, models: Path, workload: dict[str, Any]) -> dict[str, float]:
    """Largest differences between a peer's numbers of a rollout and fastrl's of the same tokens.

    A response that holds the padding token is left out: the peer takes it for the end.
    """
    theirs = {name: torch.from_numpy(array) for name, array in np.load(saved).items()}
    whole = (theirs["query_responses"][:, workload["prompt_tokens"]:] != 0).all(dim=1)
    theirs = {name: tensor[whole] for name, tensor in theirs.items()}
    rollout = as_rollout(theirs["query_responses"], theirs["logprobs"], workload)
    ref_logprobs, _ = response_logprobs(load_causal_lm(models / "policy"), rollout,
                                        workload["temperature"], MAX_TOKENS)
    reward_model = load_scalar_model(models / "reward")
    values = response_values(reward_model, rollout, MAX_TOKENS)
    scores = sequence_scores(reward_model, theirs["query_responses"].tolist(), MAX_TOKENS)
    rewards, (kl, _, _) = shape_rewards(
        scores, rollout.rollout_logprobs, ref_logprobs, rollout.response_mask,
        kl_coef=workload["kl_coef"], estimator="k1", return_estimates=True)
    advantages, _ = gae(rewards, values, rollout.response_mask, gamma=workload["gamma"],
                        lam=workload["lam"], whiten_advantages=False)
    ours = {"kl": kl, "rewards": rewards, "advantages": advantages, "values": values,
            "scores": scores}
    return {name: float((tensor - theirs[name].reshape(tensor.shape)).abs().max())
            for name, tensor in ours.items()}


def as_rollout(token_ids: torch.Tensor, logprobs: torch.Tensor, workload: dict[str, Any]
               ) -> Rollout:
    """Rows of prompt and response, all of one length, as fastrl's own type."""
    count, length = token_ids.shape
    prompt = workload["prompt_tokens"]
    return Rollout(
        token_ids=token_ids.reshape(-1), cu_seqlens=torch.arange(count + 1) * length,
        prompt_lens=torch.full((count,), prompt), response_ids=token_ids[:, prompt:],
        response_mask=torch.ones(count, length - prompt, dtype=torch.bool),
        rollout_logprobs=logprobs, entropy=torch.zeros_like(logprobs),
        finish_reasons=("length",) * count)


def agreement(provider: str, path: Path, models: Path, threads: int, device: str,
              deadline: float) -> dict[str, float]:
    """Largest differences of a peer's first rollout, on the workload or on that of `checked_by`."""
    workload = read_workload(path)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / f"{provider}.npz"
        if "checked_by" in workload:
            path, models = path.with_name(f"{workload['checked_by']}.yaml"), Path(folder)
            workload = read_workload(path)
            make_models(workload, models)
        run(provider, path, models, threads, saved, device=device, deadline=deadline)
        return differences(saved, models, workload)


def measure(path: Path, providers: Sequence[str], threads: int, rounds: int, device: str = "cpu",
            deadline: float = float("inf")) -> Iterator[list[Row]]:
    """The rows so far, after every process; response tokens per second and ratios are extras.

    Args:
        deadline: time.monotonic() after which no process begins or goes on.
    """
    workload = read_workload(path)
    sizes = {"B": workload["num_prompts"], "P": workload["prompt_tokens"],
             "T": workload["response_tokens"], "V": workload["model"]["vocab_size"],
             "D": workload["model"]["hidden_size"], "L": workload["model"]["num_layers"]}
    blank = Row(workload="ppo", case=path.stem, sizes=sizes, provider="fastrl",
                dtype=workload.get("dtype", "float32"), status="skipped", reason="not begun",
                extra={"num_threads": threads})
    rows = {provider: replace(blank, provider=provider) for provider in ("fastrl", *providers)}
    runs: dict[str, list[dict[str, Any]]] = {"fastrl": []}
    gaps: dict[str, dict[str, float]] = {"fastrl": {}}
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        make_models(workload, models)
        for provider in providers:
            if interpreter(provider) is None:
                rows[provider] = rows[provider].without_figure("unavailable",
                                                               "no environment: make peers")
                continue
            try:
                gaps[provider] = agreement(provider, path, models, threads, device, deadline)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                rows[provider] = failed(rows[provider], error)
                continue
            if max(gaps[provider].values()) > TOLERANCE:
                rows[provider] = rows[provider].without_figure(
                    "wrong", f"not fastrl's numbers: {gaps[provider]}")
            else:
                runs[provider] = []
        for _ in range(rounds):
            for provider, done in list(runs.items()):
                try:
                    done.append(run(provider, path, models, threads, device=device,
                                    deadline=deadline))
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    rows[provider] = failed(rows[provider], error)
                    del runs[provider]
                    if provider == "fastrl":
                        runs.clear()  # beside nothing there is no ratio
                else:
                    extra = figures(done, runs["fastrl"], workload)
                    rows[provider] = replace(
                        blank, provider=provider,
                        extra={**blank.extra, **extra, "differences": gaps[provider]},
                    ).timed(Timing("clock", [s for one in done for s in one["seconds"][1:]]),
                            max(one["peak_bytes_above_imports"] for one in done), None, None)
                yield list(rows.values())
                if not runs:
                    return


def failed(row: Row, error: Exception) -> Row:
    """The row of a process that raised or whose time was used up."""
    if isinstance(error, subprocess.TimeoutExpired):
        return row.without_figure("skipped", "the time is used up")
    return row.without_figure("error", str(error)[-300:])


def figures(done: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]],
            workload: dict[str, Any]) -> dict[str, Any]:
    """The extras of a row; ratios are times over fastrl's, so that above 1 fastrl is faster."""
    def median(runs: Sequence[dict[str, Any]], name: str) -> float:
        return statistics.median(s for one in runs for s in one[name][1:])

    tokens = workload["num_prompts"] * workload["response_tokens"]
    extra = {
        "response_tokens_per_s": round(tokens / median(done, "seconds"), 1),
        "processor_s": median(done, "processor_s"),
        "ratio": round(median(done, "seconds") / median(own, "seconds"), 2),
        "processor_ratio": round(median(done, "processor_s") / median(own, "processor_s"), 2),
        "peak_bytes_of_process": max(one["peak_bytes"] for one in done),
        "peer_versions": done[0]["versions"], "load": os.getloadavg()[0],
    }
    if "phases" in done[0]:
        extra["phases_s"] = done[-1]["phases"][-1]
    return extra


def main() -> int:
    """Measure and write the result file; 1 where numbers differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_ppo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workload", type=Path, help="a file like those of benchmarks/workloads; "
                        "ppo_cpu.yaml or ppo_gpu.yaml there")
    parser.add_argument("--peers", nargs="*", default=["trl"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="processes of each provider")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS",
                        help="no process begins or goes on after so long")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    name = "ppo_gpu.yaml" if options.device == "cuda" else "ppo_cpu.yaml"
    workload = options.workload or ROOT / "benchmarks/workloads" / name
    deadline = time.monotonic() + options.budget
    torch.set_num_threads(options.threads)
    ceilings = measured_ceilings(options.device, small="tiny" in workload.stem)
    assumed = assumed_ceilings(torch.cuda.get_device_name()) if options.device == "cuda" else None
    document, path = head("ppo", options.device, ceilings, assumed), options.out / file_name(
        "ppo", options.device)
    rows: list[Row] = []
    for rows in measure(workload, options.peers, options.threads, options.rounds, options.device,
                        deadline):
        save(document, rows, path)
    for row in rows:
        print(row.provider, row.status, row.reason, row.median_s, row.extra, flush=True)
    print(table(rows))
    return int(any(row.status == "wrong" or row.is_failure for row in rows)
               or rows[0].median_s is None)


if __name__ == "__main__":
    sys.exit(main())
