"""Every op of the CUDA extension on a GPU, against the float64 reference.

A new op is an entry of OPS: how to make inputs for a shape, masked positions holding NaN, and what
to compare; an op on lists of tensors has tests of its own. Needs the extension on the path;
`benchmarks/gpu.sh` builds it.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl import ops
from fastrl.errors import BackendUnavailableError
from fastrl.ops.adamw import adamw_step_reference
from fastrl.ops.gae import compute_gae_reference, moments_reference
from fastrl.ops.grad_norm import clip_coefficient, grad_norm_reference
from fastrl.ops.kl import kl_estimate_reference
from fastrl.ops.logprob import gather_logprobs_reference
from fastrl.ops.rewards import shape_rewards_reference
from fastrl.state_formats import split_master

pytestmark = [pytest.mark.gpu, pytest.mark.cuda]
BACKEND, DEVICE = "cuda", "cuda"
FLOORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2**-7}
"""Share of the largest value: sums in another order, results rounded to the inputs' type."""
Inputs = dict[str, Tensor]


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    """New tensors are on the GPU; skips where there is none, or no extension."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if importlib.util.find_spec("fastrl_kernels._C") is None:
        pytest.skip("needs the extension fastrl_kernels._C (benchmarks/gpu.sh builds it)")
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device("cpu")


def holes(B: int, T: int) -> Tensor:
    """A mask [B, T] with holes, and a row that is all masked where there are several."""
    mask = torch.rand(B, T) > 0.3
    mask[B // 2] = B == 1
    return mask


def token_inputs(names: tuple[str, ...], mask_name: str) -> Callable[[int, int], Inputs]:
    """Inputs [B, T] with a mask, NaN where it is False."""
    def make(B: int, T: int) -> Inputs:
        mask = holes(B, T)
        values = -2 * torch.rand(len(names), B, T)
        return {**dict(zip(names, values.masked_fill(~mask, torch.nan), strict=True)),
                mask_name: mask}

    return make


def logit_inputs(M: int, V: int) -> Inputs:
    """Logits with forbidden columns, but for the tokens asked for, and a certain row."""
    logits, token_ids = 3 * torch.randn(M, V), torch.randint(V, (M,))
    kept = logits.gather(1, token_ids[:, None])
    logits[:, ::3] = -torch.inf
    logits[-1] = 1e4 * torch.randn(V)
    return {"logits": logits.scatter(1, token_ids[:, None], kept), "token_ids": token_ids}


def with_scores(B: int, T: int) -> Inputs:
    make = token_inputs(("logprobs", "ref_logprobs"), "response_mask")
    return {"scores": torch.randn(B), **make(B, T)}


def with_every_estimate(op: Callable[..., Any]) -> Callable[..., Any]:
    """shape_rewards, whose estimates become results of their own."""
    def run(**inputs: Any) -> tuple[Tensor, ...]:
        rewards, estimates = op(**inputs, return_estimates=True)
        return rewards, *estimates

    return run


@dataclass(frozen=True, kw_only=True)
class GpuOp:
    """What is tested of one op."""

    op: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[..., Inputs]
    """make(*shape): inputs, NaN where nothing may be read."""
    shapes: tuple[tuple[int, int], ...]
    """Rows and row lengths: one, odd, below, at and above a block, several blocks."""
    options: tuple[dict[str, Any], ...] = ({},)
    differentiable: str = ""
    """The input whose gradient is compared."""


ROWS = ((1, 1), (3, 5), (4, 33), (2, 1024), (2, 1025), (3, 2125))
OPS = {
    "gae": GpuOp(
        op=ops.compute_gae, reference=compute_gae_reference, shapes=ROWS,
        make=token_inputs(("rewards", "values"), "response_mask"),
        options=({}, {"gamma": 0.9, "lam": 0.8}, {"lam": 0.0}, {"lam": 1.0})),
    "kl": GpuOp(
        op=ops.kl_estimate, reference=kl_estimate_reference, shapes=ROWS,
        make=token_inputs(("logprobs", "ref_logprobs"), "mask"), differentiable="logprobs"),
    "rewards": GpuOp(
        op=ops.shape_rewards, reference=shape_rewards_reference, shapes=ROWS, make=with_scores,
        options=tuple({"kl_coef": 0.1, "estimator": k} for k in ("k1", "k2", "k3"))),
    "rewards and estimates": GpuOp(
        op=with_every_estimate(ops.shape_rewards), shapes=ROWS, make=with_scores,
        reference=with_every_estimate(shape_rewards_reference), options=({"kl_coef": 0.1},)),
    "logprob": GpuOp(
        op=ops.gather_logprobs, reference=gather_logprobs_reference, make=logit_inputs,
        shapes=((1, 1), (5, 11), (3, 129), (2, 4096), (2, 4097), (2, 50257), (1, 151936)),
        options=({}, {"temperature": 0.6}), differentiable="logits"),
}
CASES = [pytest.param(OPS[name], shape, options, id=f"{name} {shape} {options}")
         for name in OPS for shape in OPS[name].shapes for options in OPS[name].options]
EACH = pytest.mark.parametrize("case", list(OPS.values()), ids=list(OPS))


def results(case: GpuOp, function: Callable[..., Any], inputs: Inputs, options: dict[str, Any]
            ) -> list[Tensor]:
    """Results, and the gradient of a weighted sum of them where there is one."""
    inputs = dict(inputs)
    if case.differentiable:
        inputs[case.differentiable] = inputs[case.differentiable].detach().requires_grad_()
    returned = function(**inputs, **options)
    outputs = [returned] if isinstance(returned, Tensor) else list(returned)
    if not case.differentiable:
        return outputs
    weighted = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) * x for x in outputs]
    gradient = torch.autograd.grad(sum(x.sum() for x in weighted), inputs[case.differentiable])
    return [*(x.detach() for x in outputs), *gradient]


def ours(case: GpuOp, inputs: Inputs, options: dict[str, Any]) -> list[Tensor]:
    return results(case, case.op, inputs, {**options, "backend": BACKEND})


def assert_as_good_as_torch(case: GpuOp, inputs: Inputs, options: dict[str, Any], floor: float
                            ) -> None:
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    truth = results(case, case.reference, wide, options)
    plain = results(case, case.reference, inputs, options)
    for number, (exact, torchs, result) in enumerate(
            zip(truth, plain, ours(case, inputs, options), strict=True)):
        assert result.dtype == torchs.dtype and result.shape == exact.shape, number
        finite = exact.isfinite() & torchs.isfinite()
        assert torch.equal(result.isnan(), torchs.isnan()), f"result {number}: NaN"
        assert torch.equal(result.isfinite(), torchs.isfinite()), f"result {number}: infinite"
        error, torch_error = ((x.double() - exact)[finite].abs().max() for x in (result, torchs))
        assert error <= 2 * torch_error + floor * (exact[finite].abs().max() + 1), number


@pytest.mark.parametrize("case, shape, options", CASES)
def test_as_good_as_torch(case: GpuOp, shape: tuple[int, int], options: dict[str, Any]) -> None:
    assert_as_good_as_torch(case, case.make(*shape), options, FLOORS[torch.float32])


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs(case: GpuOp, dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) if x.is_floating_point() else x
              for name, x in case.make(*case.shapes[2]).items()}
    assert_as_good_as_torch(case, inputs, case.options[0], FLOORS[dtype])


@EACH
def test_not_contiguous_is_the_same_bit_for_bit(case: GpuOp) -> None:
    inputs = case.make(*case.shapes[2])
    spread = {name: torch.stack([x, torch.ones_like(x)], dim=-1)[..., 0]
              for name, x in inputs.items()}
    pairs = zip(ours(case, inputs, case.options[0]), ours(case, spread, case.options[0]),
                strict=True)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


@EACH
def test_a_row_does_not_depend_on_the_others(case: GpuOp) -> None:
    """Forward results; the weights of the gradient differ between a batch and a row."""
    inputs = case.make(*case.shapes[-2])
    forward = {**case.options[0], "backend": BACKEND}
    together = case.op(**inputs, **forward)
    for row in range(case.shapes[-2][0]):
        alone = case.op(**{name: x[row : row + 1] for name, x in inputs.items()}, **forward)
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one[0].nan_to_num(7.0), all_rows[row].nan_to_num(7.0))


@EACH
def test_twice_the_same_bits(case: GpuOp) -> None:
    inputs = case.make(*case.shapes[-1])
    pairs = zip(*(ours(case, inputs, case.options[0]) for _ in range(2)), strict=True)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


@EACH
def test_a_compiled_graph_holds_it(case: GpuOp) -> None:
    torch.compiler.reset()
    inputs = case.make(*case.shapes[2])
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    options = {**case.options[0], "backend": BACKEND}
    pairs = zip(results(case, compiled, inputs, options), results(case, case.op, inputs, options),
                strict=True)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


@EACH
def test_it_can_be_captured_in_a_graph(case: GpuOp) -> None:
    """No host synchronisation, everything on the present stream."""
    inputs = case.make(*case.shapes[2])
    options = {**case.options[0], "backend": BACKEND}
    expected = case.op(**inputs, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.op(**inputs, **options)
    graph.replay()
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
               for a, b in zip(captured, expected, strict=True))


def test_packed_gae() -> None:
    lengths = torch.tensor([3, 0, 1029, 1])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rewards, values = torch.randn(2, int(lengths.sum()))
    mask = torch.rand(len(values)) > 0.3
    packed = {"rewards": rewards, "values": values, "response_mask": mask,
              "cu_seqlens": cu_seqlens}
    assert_as_good_as_torch(OPS["gae"], packed, {"lam": 0.9}, FLOORS[torch.float32])


@pytest.mark.parametrize("is_packed", [False, True])
def test_moments_of_gae(is_packed: bool) -> None:
    """Advantages about 1e4 in rows of more than a tile, one of them empty: nothing cancels."""
    rewards, values = torch.randn(2, 3, 2125)
    rewards[:, -1] += 1e4
    mask = torch.rand(3, 2125) > 0.3
    mask[:, -1] = torch.tensor([True, False, True])
    mask[1] = False
    cu_seqlens = torch.tensor([0, 2125, 4250, 6375]) if is_packed else None
    inputs = [x.flatten() if is_packed else x for x in (rewards, values, mask)]
    advantages, _, moments = ops.compute_gae(*inputs, lam=1.0, cu_seqlens=cu_seqlens,
                                             return_moments=True, backend=BACKEND)
    truth = moments_reference(advantages.double(), inputs[2], cu_seqlens)
    torch.testing.assert_close(moments.double(), truth, rtol=1e-4, atol=0)


# A scalar, nothing, odd, and several programs that do not fill.
LIST_SHAPES = [(), (0,), (7, 5), (256,), (3, 1000), (2, 8200)]


@pytest.mark.parametrize("dtype", FLOORS)
def test_grad_norm(dtype: torch.dtype) -> None:
    gradients = [torch.randn(shape).to(dtype) for shape in LIST_SHAPES]
    truth = float(grad_norm_reference([g.double() for g in gradients]))
    plain = float(grad_norm_reference(gradients))
    norm = ops.grad_norm(gradients, backend=BACKEND)
    assert norm.shape == () and abs(float(norm) - truth) <= 2 * abs(plain - truth) + 1e-7 * truth
    assert torch.equal(norm, ops.grad_norm(gradients, backend=BACKEND))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_8bit", [False, True])
def test_adamw_has_the_bits_of_the_reference_on_a_cpu(dtype: torch.dtype, is_8bit: bool) -> None:
    weights = [torch.randn(shape) for shape in LIST_SHAPES]
    state = {"first": [torch.randn_like(w) for w in weights],
             "second": [torch.rand_like(w) for w in weights], "remainders": []}
    scales = []
    if is_8bit:
        state["first"] = [torch.randint(-127, 128, w.shape).to(torch.int8) for w in weights]
        state["second"] = [torch.randint(256, w.shape).to(torch.uint8) for w in weights]
        scales = [tuple(torch.rand(2, -(-w.numel() // 256))) for w in weights]
    if dtype == torch.bfloat16:
        pairs = [split_master(w) for w in weights]
        weights, state["remainders"] = [p[0] for p in pairs], [p[1] for p in pairs]
    state["parameters"] = weights
    on_cpu = {name: [x.cpu().clone() for x in tensors] for name, tensors in state.items()}
    scales_on_cpu = [(a.cpu().clone(), b.cpu().clone()) for a, b in scales]
    for number in (1, 2, 1000):
        gradients = [torch.randn(shape).to(dtype) for shape in LIST_SHAPES]
        settings = {"learning_rate": 1e-2, "betas": (0.9, 0.95), "epsilon": 1e-8,
                    "weight_decay": 0.1}
        ops.adamw_step(gradients=gradients, **state, moment_scales=scales, **settings,
                       step=torch.tensor(number), backend=BACKEND)
        adamw_step_reference(gradients=[g.cpu() for g in gradients], **on_cpu, **settings,
                             moment_scales=scales_on_cpu, step=torch.tensor(number, device="cpu"))
    for name, tensors in state.items():
        for ours, reference in zip(tensors, on_cpu[name], strict=True):
            assert torch.equal(ours.cpu(), reference), name
    for ours, reference in zip(scales, scales_on_cpu, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, reference, strict=True))


def test_adamw_can_be_captured_with_norm_and_step_count() -> None:
    captured = [[torch.randn(shape) for shape in LIST_SHAPES] for _ in range(3)]
    eager = [[x.clone() for x in column] for column in captured]
    captured.append([torch.zeros(shape) for shape in LIST_SHAPES])
    eager.append([torch.zeros(shape) for shape in LIST_SHAPES])
    captured_step, eager_step = torch.tensor(0), torch.tensor(0)

    def one(columns: list[list[Tensor]], step: Tensor) -> None:
        step.add_(1)
        norm = ops.grad_norm(columns[1], backend=BACKEND)
        ops.adamw_step(*columns, step=step, learning_rate=1e-2, betas=(0.9, 0.95), epsilon=1e-8,
                       scale=clip_coefficient(norm, 1.0), backend=BACKEND)

    one(captured, captured_step)  # builds the tables
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one(captured, captured_step)
    for _ in range(2):
        graph.replay()
    for _ in range(3):
        one(eager, eager_step)
    assert captured_step == 3
    for ours, theirs in zip(captured, eager, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_float64_tensor_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="float64"):
        ops.compute_gae(*torch.randn(2, 2, 3, dtype=torch.float64), backend=BACKEND)
