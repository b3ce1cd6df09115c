"""`fastrl generate`: completions of a model as rows ready to be ranked.

A row is `{"prompt" or "messages", "completions": [{"text", "token_ids", "logprobs",
"finish_reason"}]}`. With a `rank` in every completion (0 is best) it is a row of a ranking file.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from fastrl.config import EngineConfig, SamplingConfig, check
from fastrl.errors import ConfigError, DataError, NumericsError

if TYPE_CHECKING:
    from fastrl.console import Console
    from fastrl.data import TextEncoder
    from fastrl.models import CausalLM
    from fastrl.types import Prompt, Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRun(SamplingConfig):
    """The settings of `fastrl generate`."""

    model_name_or_path: str = field(metadata={"aliases": ("model",)})
    """Folder of the model."""
    prompts: tuple[str, ...] = ()
    """Prompt files: rows with `prompt` or `messages`."""
    prompt: str | None = None
    """One prompt, in place of files."""
    output: str | None = None
    """File of the rows (JSON lines), which must not exist; null: standard output."""
    num_samples_per_prompt: int = 1
    """Completions of each prompt."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted."""
    prompt_format: Literal["auto", "text", "chat"] = "auto"
    """What a prompt given as one text is: a user message (chat), or text to continue (text); auto:
    chat where the tokenizer has a chat template."""
    seed: int = 0
    """The same seed, prompts and model give the same completions."""
    engine: EngineConfig = EngineConfig()
    """Sizes of the rollout engine."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU when there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Type of the weights; auto is float32 on a CPU and bfloat16 on a GPU."""

    def __post_init__(self) -> None:
        SamplingConfig.__post_init__(self)
        check((self.prompt is None) != (not self.prompts), "prompts",
              "either prompt files or one --prompt", self.prompts)
        for name in ("num_samples_per_prompt", "max_prompt_tokens"):
            check(getattr(self, name) > 0, name, "a number above 0", getattr(self, name))
        check(self.seed >= 0, "seed", "a whole number of at least 0", self.seed)


def sampling_for(config: SamplingConfig, model: "CausalLM", encoder: "TextEncoder"
                 ) -> SamplingConfig:
    """Return the sampling settings of a config that inherits them, stop tokens filled in.

    A response also ends with the token that ends a turn of the chat template, which a model's
    `config.json` often does not name.
    """
    names = [setting.name for setting in dataclasses.fields(SamplingConfig)]
    settings = {name: getattr(config, name) for name in names}
    if config.stop_token_ids is None:
        stops = dict.fromkeys((*model.spec.eos_token_ids, *encoder.eos_token_ids))
        # A tokenizer may have more tokens than its model.
        settings["stop_token_ids"] = tuple(
            token for token in stops if token < model.spec.vocab_size)
    return SamplingConfig(**settings)


def generate(config: GenerateRun, console: "Console") -> int:
    """Write the completions that a config asks for.

    Args:
        config: Model, prompts, sampling and where to write.
        console: Shows progress.
    Returns:
        The number of rows written.
    Raises:
        ConfigError: the output file exists, or its folder does not.
        DataError: a prompt file is broken, or no prompt is left.
        ModelError: the model cannot be loaded.
        NumericsError: its log-probs are not finite.
    """
    from fastrl.data import load_encoder
    from fastrl.engine import Engine
    from fastrl.stages.inputs import load_policy

    output = None if config.output is None else _checked_output(Path(config.output))
    encoder = load_encoder(config.model_name_or_path, prompt_format=config.prompt_format)
    prompts = _load_prompts(config, encoder, console)
    model = load_policy(config.model_name_or_path, config, encoder)
    engine = Engine(model, config.engine, encoder=encoder)
    sampling = sampling_for(config, model, encoder)
    group, chunk = config.num_samples_per_prompt, _prompts_per_call(config)
    with (_open_output(output) as file,
          console.progress("generate", len(prompts) * group) as progress):
        for begin in range(0, len(prompts), chunk):
            part, done = prompts[begin:begin + chunk], begin * group
            rollout = engine.generate(
                [prompt.token_ids for prompt in part], sampling, seed=config.seed,
                num_samples_per_prompt=group, first_request_id=done)
            _check_finite(rollout, config.model_name_or_path)
            file.writelines(row + "\n" for row in _rows(part, rollout, encoder))
            progress.update(done + rollout.batch_size, _numbers(rollout))
    return len(prompts)


def _checked_output(path: Path) -> Path:
    """A file that can be written without losing another one."""
    if path.exists():
        raise ConfigError(f"output: expected a new file, got {path}, which exists; choose another "
                          "name or delete it")
    if not path.parent.is_dir():
        raise ConfigError(f"output: expected a folder at {path.parent}, found none; create it")
    return path


def _prompts_per_call(config: GenerateRun) -> int:
    """Prompts generated for before rows are written; their number never changes the tokens."""
    return max(1, 2 * config.engine.max_batch_size // config.num_samples_per_prompt)


def _load_prompts(config: GenerateRun, encoder: "TextEncoder", console: "Console"
                  ) -> list["Prompt"]:
    from fastrl.stages.inputs import load_prompt_files
    from fastrl.types import Prompt

    if config.prompt is None:
        return load_prompt_files(config.prompts, encoder, config.max_prompt_tokens, console)
    ids = encoder.encode_prompt(config.prompt)
    if not 0 < len(ids) <= config.max_prompt_tokens:
        raise DataError(f"--prompt: expected 1 to {config.max_prompt_tokens} tokens, got "
                        f"{len(ids)}; change it or --max_prompt_tokens")
    return [Prompt(token_ids=tuple(ids), text=config.prompt, row={"prompt": config.prompt})]


def _check_finite(rollout: "Rollout", path: str) -> None:
    """Raise NumericsError where a model gives no probabilities to draw from."""
    if not bool(rollout.rollout_logprobs.isfinite().all()):
        raise NumericsError(f"{path}: expected finite log-probs, got NaN or infinity; its weights "
                            "are broken, or too large for this dtype")


def _rows(prompts: list["Prompt"], rollout: "Rollout", encoder: "TextEncoder") -> Iterator[str]:
    """One JSON line per prompt, with all of its completions."""
    from fastrl.metrics import to_json
    from fastrl.rewards import decode_continuation

    group = rollout.num_samples_per_prompt
    for index, prompt in enumerate(prompts):
        row: dict[str, Any] = _prompt_columns(prompt.row)
        row["completions"] = [
            {"text": decode_continuation(rollout, i, encoder, prompt),
             "token_ids": rollout.response(i),
             "logprobs": rollout.rollout_logprobs[i, :int(rollout.response_lens[i])].tolist(),
             "finish_reason": rollout.finish_reasons[i]}
            for i in range(index * group, (index + 1) * group)
        ]
        yield to_json(row)


def _prompt_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a ranking row keeps of a prompt row; answers that came with it are left out."""
    return {name: row[name] for name in ("prompt", "messages", "source", "id") if name in row}


def _numbers(rollout: "Rollout") -> dict[str, float]:
    """What the progress shows."""
    return {"entropy/mean": float(rollout.entropy[rollout.response_mask].mean()),
            "response/length_mean": float(rollout.response_lens.double().mean())}


@contextmanager
def _open_output(path: Path | None) -> Iterator[TextIO]:
    """The file to write to; it gets its name when everything is in it."""
    if path is None:
        yield sys.stdout
        return
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        yield file
    part.replace(path)
