"""What captured steps depend on, and the engine running them, with a capture that a CPU can do."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine, generation, graphs
from fastrl.engine import engine as engine_file
from fastrl.engine.cache import KVCache
from fastrl.engine.graphs import StepGraphs, fixed_parts, ladder, refusal, rung
from fastrl.errors import ConfigError
from fastrl.memory import parking
from fastrl.memory.residents import Residents, tensors_of
from fastrl.models import CausalLM, DecoderConfig, new_decoder
from fastrl.types import Rollout

CONFIG = DecoderConfig(
    family="llama", vocab_size=53, hidden_size=20, intermediate_size=37, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=5, rotary_dim=4, max_positions=128, initializer_range=0.3)
PROMPTS = [[3, 9, 4], [7], list(range(20, 43)), [5, 5, 5, 5], [8] * 16, [50, 2, 11, 44, 1]]
SAMPLING = SamplingConfig(max_new_tokens=30, stop_token_ids=(0, 1, 2))
MANY_ROWS = 96
"""More than a batch of the tests is padded to."""
pytestmark = pytest.mark.usefixtures("pages_checked_after_every_step")


def test_ladder() -> None:
    assert ladder(1) == (1,)
    assert ladder(6) == (1, 2, 4, 6)
    assert ladder(64) == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert ladder(300) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 300)
    assert [rung(n, 40) for n in (1, 2, 3, 5, 16, 17, 33, 40)] == [1, 2, 4, 8, 16, 24, 40, 40]


def test_weights_that_change_in_place_change_no_graph() -> None:
    model = new_decoder(CONFIG, 0)
    cache = KVCache(model.spec, 4, 4, torch.float32, torch.device("cpu"))
    before = fixed_parts(model, cache, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    model.load_state_dict(new_decoder(CONFIG, 1).state_dict())
    cache.kv_pages.zero_()
    assert fixed_parts(model, cache, 8) == before


def _new_weight(model: CausalLM) -> None:
    weight = model.backbone.layers[1].mlp.down.weight
    weight.data = weight.data.clone()


CHANGES: dict[str, Callable[[CausalLM], object]] = {
    "another address": _new_weight,
    "another dtype": lambda model: model.to(torch.bfloat16),
    "one parameter in another dtype": lambda model: model.backbone.final_norm.double(),
    "a buffer elsewhere": lambda model: setattr(
        model.backbone.rotary, "frequencies", model.backbone.rotary.frequencies.clone()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_graph_was_captured_with_is_noticed(change: str) -> None:
    model = new_decoder(CONFIG, 0)
    cache = KVCache(model.spec, 4, 4, torch.float32, torch.device("cpu"))
    before = fixed_parts(model, cache, 8)
    CHANGES[change](model)
    assert fixed_parts(model, cache, 8) != before


def test_pages_batch_size_and_backends_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_decoder(CONFIG, 0)
    cache, other = (KVCache(model.spec, 4, 4, torch.float32, torch.device("cpu")) for _ in range(2))
    before = fixed_parts(model, cache, 8)
    assert fixed_parts(model, other, 8) != before
    assert fixed_parts(model, cache, 9) != before
    monkeypatch.setattr(graphs, "choose", lambda *arguments: "another")
    assert fixed_parts(model, cache, 8) != before


def test_a_cpu_runs_eagerly_and_refuses_where_graphs_are_asked_for() -> None:
    model = new_decoder(CONFIG, 0)
    for choice in ("auto", "off"):
        engine = Engine(model, EngineConfig(cuda_graphs=choice))  # type: ignore[arg-type]
        engine.generate([[1]], SamplingConfig(max_new_tokens=2))
        assert engine._graphs is None
    with pytest.raises(ConfigError, match="cuda_graphs: expected a model whose decode step can be "
                                          "captured, but the model is on cpu; set cuda_graphs"):
        Engine(model, EngineConfig(cuda_graphs="on")).generate([[1]])


def test_plain_ops_and_value_checks_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    model: Any = SimpleNamespace(lm_head=SimpleNamespace(weight=weight))
    backends = {"write_kv": "torch", "paged_attention": "triton", "sample_tokens": "cuda"}
    monkeypatch.setattr(graphs, "_backends", lambda model: backends)
    assert refusal(model) is None
    backends["paged_attention"] = "torch"
    assert refusal(model) == (
        "paged_attention would run as plain torch, which reads numbers on the host")
    monkeypatch.setenv("FASTRL_CHECK", "1")
    assert refusal(model) == "FASTRL_CHECK=1 looks at values in every op"


class Recorder:
    """Captures like a GPU: the run is made twice to warm up, and later again for each step."""

    def __init__(self) -> None:
        self.num_captures = 0
        self.num_replays = 0
        self.made: list[StepGraphs] = []

    def __call__(
        self, warm_up: Callable[[], None], run: Callable[[], None]
    ) -> Callable[[], None]:
        self.num_captures += 1
        warm_up()
        warm_up()

        def replay() -> None:
            self.num_replays += 1
            run()

        return replay

    def graphs_for(
        self, model: CausalLM, config: EngineConfig, pages: KVCache, previous: StepGraphs | None
    ) -> StepGraphs:
        """As the engine asks for them on a GPU."""
        parts = fixed_parts(model, pages, config.max_batch_size)
        if previous is not None and previous.parts == parts:
            return previous
        self.made.append(StepGraphs(parts, MANY_ROWS, capture=self))
        return self.made[-1]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(engine_file, "graphs_for", recorder.graphs_for)
    return recorder


def _assert_same_bits(a: Rollout, b: Rollout) -> None:
    assert a.finish_reasons == b.finish_reasons
    for name in ("token_ids", "response_ids", "response_mask", "rollout_logprobs", "entropy"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


KINDS = [SAMPLING, SamplingConfig(max_new_tokens=9, greedy=True, stop_token_ids=(3, 4, 5, 6)),
         SamplingConfig(max_new_tokens=12, top_k=9, repetition_penalty=1.3, min_new_tokens=2)]


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("sizes", [{}, {"num_pages": 17}, {"max_batch_size": 5}], ids=str)
def test_replayed_steps_give_the_same_bits(
    sizes: dict[str, int], behind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_decoder(CONFIG, 0)
    plain = Engine(model, EngineConfig(page_size=4))
    expected = [plain.generate(PROMPTS, kinds, seed=3, num_samples_per_prompt=3)
                for kinds in (SAMPLING, KINDS * 2)]
    recorder = Recorder()
    monkeypatch.setattr(engine_file, "graphs_for", recorder.graphs_for)
    monkeypatch.setitem(generation.ROUNDS_BEHIND, "cpu", behind)
    engine = Engine(model, EngineConfig(page_size=4, sync_every=3, **sizes))
    for _ in range(2):
        for kinds, rollout in zip((SAMPLING, KINDS * 2), expected, strict=True):
            again = engine.generate(PROMPTS, kinds, seed=3, num_samples_per_prompt=3)
            _assert_same_bits(rollout, again)
    assert recorder.num_replays > 100


def test_a_second_call_captures_nothing_and_sees_new_weights(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_decoder(CONFIG, 0)
    engine = Engine(model, EngineConfig(page_size=4, sync_every=4))
    first = engine.generate(PROMPTS, SAMPLING)
    num_captures = recorder.num_captures
    assert num_captures == len(recorder.made[0].capture_s) >= 1
    model.load_state_dict(new_decoder(CONFIG, 1).state_dict())
    engine.weights_changed()
    second = engine.generate(PROMPTS, SAMPLING)
    assert len(recorder.made) == 1 and recorder.num_captures == num_captures
    assert not torch.equal(first.response_ids[:, :5], second.response_ids[:, :5])
    with monkeypatch.context() as patch:
        patch.setattr(engine_file, "graphs_for", graphs.graphs_for)
        eager = Engine(model, EngineConfig(page_size=4)).generate(PROMPTS, SAMPLING)
    _assert_same_bits(second, eager)
    model.to(torch.float64)
    engine.generate(PROMPTS, SAMPLING)
    assert len(recorder.made) == 2 and recorder.num_captures > num_captures


@pytest.mark.parametrize("keeps_addresses", [True, False])
def test_parked_weights_that_come_back_to_their_addresses_cost_no_capture(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, keeps_addresses: bool
) -> None:
    """As in PPO: rollout, the cache's memory away, the policy parked, rollout."""
    monkeypatch.setattr(parking, "can_keep_addresses", lambda device: keeps_addresses)
    model = new_decoder(CONFIG, 0)
    residents = Residents({"policy": lambda: tensors_of(model)}, {"policy"}, torch.device("cpu"),
                          folder=tmp_path)
    engine = Engine(model, EngineConfig(page_size=4, sync_every=4))
    rollouts, captures, in_the_way = list[Rollout](), list[int](), list[torch.Tensor]()
    for _ in range(3):
        with residents.phase("critic_update"):
            assert residents.parked == {"policy"}
            # What takes the place of weights that have given theirs up.
            in_the_way += [torch.zeros(parameter.shape) for parameter in model.parameters()]
        with residents.phase("rollout"):
            rollouts.append(engine.generate(PROMPTS, SAMPLING, seed=5))
        engine.release_memory()
        captures.append(recorder.num_captures)
    assert captures[0] > 0 and recorder.num_replays > 0
    for rollout in rollouts[1:]:
        _assert_same_bits(rollouts[0], rollout)
    if keeps_addresses:
        assert len(recorder.made) == 1 and captures == captures[:1] * 3
    else:
        assert len(recorder.made) == 3 and captures == [captures[0], 2 * captures[0],
                                                        3 * captures[0]]


def test_new_weights_in_the_middle_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is replayed comes from another graph than what is drawn."""
    rollouts = []
    for graphs_of in (graphs.graphs_for, Recorder().graphs_for):
        monkeypatch.setattr(engine_file, "graphs_for", graphs_of)
        model = new_decoder(CONFIG, 0)
        engine = Engine(model, EngineConfig(page_size=4, sync_every=3))
        changes: list[int] = []

        def change(
            num_tokens: int, num_finished: int, total: int, model: CausalLM = model,
            engine: Engine = engine, changes: list[int] = changes,
        ) -> None:
            if num_tokens > 40 and not changes:
                changes.append(num_tokens)
                model.load_state_dict(new_decoder(CONFIG, 1).state_dict())
                engine.weights_changed()

        rollouts.append(engine.generate(PROMPTS, SAMPLING, on_progress=change))
        assert len(changes) == 1
    _assert_same_bits(*rollouts)


def test_a_smaller_batch_keeps_its_addresses(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "_batch_rows", lambda self, num_rows: rung(num_rows, MANY_ROWS))
    engine = Engine(new_decoder(CONFIG, 0), EngineConfig(page_size=4, sync_every=2))
    places = set()
    shapes = set()

    def look(num_tokens: int, num_finished: int, total: int) -> None:
        batch = engine._active[0]._batch
        places.add(tuple(tensor.data_ptr() for tensor in batch.tensors().values()))
        shapes.add(len(batch.index))

    engine.generate(PROMPTS, [SamplingConfig(max_new_tokens=4 + 4 * i, stop_token_ids=())
                              for i in range(6)], num_samples_per_prompt=8, on_progress=look)
    assert shapes == {48, 32, 24, 16, 8, 1} and len(places) == 1


def test_one_call_at_a_time_has_the_graphs(recorder: Recorder) -> None:
    engine = Engine(new_decoder(CONFIG, 0), EngineConfig(page_size=4))
    alone = [token.token_id for token in engine.stream([3], SAMPLING)]
    stream = engine.stream([3], SAMPLING)
    together = [next(stream).token_id]
    uses = []
    engine.generate(PROMPTS, SAMPLING, on_progress=lambda *_: uses.append(
        [active.graphs is not None for active in engine._active]))
    together += [token.token_id for token in stream]
    assert together == alone and all(use == [True, False] for use in uses)


def _fails(warm_up: Callable[[], None], run: Callable[[], None]) -> Callable[[], None]:
    warm_up()
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_a_step_that_cannot_be_captured_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = new_decoder(CONFIG, 0)
    expected = Engine(model, EngineConfig(page_size=4)).generate(PROMPTS, SAMPLING)
    graphs._warn_once.cache_clear()

    def graphs_for(
        model: CausalLM, config: EngineConfig, pages: KVCache, previous: StepGraphs | None
    ) -> StepGraphs:
        return StepGraphs((), MANY_ROWS, is_required=config.cuda_graphs == "on", capture=_fails)

    monkeypatch.setattr(engine_file, "graphs_for", graphs_for)
    with caplog.at_level(logging.WARNING, logger="fastrl"):
        _assert_same_bits(expected, Engine(model, EngineConfig(page_size=4)).generate(
            PROMPTS, SAMPLING))
    assert [record.message for record in caplog.records] == [
        "cuda_graphs: decode steps run eagerly: a step cannot be captured: operation not "
        "permitted when stream is capturing"]
    engine = Engine(model, EngineConfig(page_size=4, cuda_graphs="on"))
    with pytest.raises(ConfigError, match="cannot be captured: operation not permitted when"):
        engine.generate(PROMPTS, SAMPLING)
    assert not engine._active
