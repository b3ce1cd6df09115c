"""Every Triton kernel compiles for three generations of GPU without one, and spills nothing.

One specialisation per kernel and type of tensor; with FASTRL_AOT=every (`make aot`) all of them.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "kernels/fastrl_kernels/triton"
KERNELS = sorted(p.stem for p in FOLDER.glob("*.py") if "def aot_cases" in p.read_text())
ARCHITECTURES = (80, 90, 100)
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
ALLOWED_SPILLS: dict[tuple[str, int], int] = {
    # layer_norm from D = 4097 on, float32 and a float16 case: ptxas keeps two words on the stack,
    # below the limit of registers, for more resident warps. Only `make aot` compiles these widths.
    ("_norm_fwd_kernel", 80): 8, ("_norm_fwd_kernel", 90): 8, ("_norm_bwd_kernel", 80): 16,
    # packed_attention: the gradient kernels hold two operands and their products in 255 registers.
    # dquery spills in float32 at 256 channels alone. fwd, where there are splits, holds sums twice:
    # on sm_80, whose products take the queries from registers too, from 80 channels on.
    ("_packed_attention_fwd_kernel", 80): 208, ("_packed_attention_fwd_kernel", 90): 8,
    ("_packed_attention_fwd_kernel", 100): 8,
    **{("_packed_attention_dquery_kernel", arch): 240 for arch in ARCHITECTURES},
    ("_packed_attention_dkey_kernel", 80): 8, ("_packed_attention_dkey_kernel", 100): 24,
    # prefix_attention: as packed_attention, dquery in float32 at 256 channels too, where twice the
    # warps spill five times as much; dk and dv below the limit of registers, in float32 and, at 16
    # channels, in half precision.
    ("_prefix_attention_fwd_kernel", 80): 112, ("_prefix_attention_fwd_kernel", 100): 16,
    **{("_prefix_attention_dquery_kernel", arch): 184 for arch in ARCHITECTURES},
    ("_prefix_attention_dkey_kernel", 80): 40, ("_prefix_attention_dkey_kernel", 90): 16,
    ("_prefix_attention_dkey_kernel", 100): 24,
    # paged_attention: the same, and the addresses of keys, with pages of one token one for each
    # (half precision, 128 channels: up to 136); most in float32 at 256 channels where the sums of
    # the launch over the prefix come in. Of prefixes: which rows of the tile exist, until stored.
    **{("_paged_attention_fwd_kernel", arch): 248 for arch in ARCHITECTURES},
    ("_paged_attention_prefix_kernel", 80): 40, ("_paged_attention_prefix_kernel", 90): 8,
    ("_paged_attention_prefix_kernel", 100): 64,
}
"""(kernel, architecture) -> bytes of stack a thread may use, each with the reason beside it."""
READS_ADDRESSES = {"_adamw_kernel", "_squares_kernel"}
"""Kernels that find tensors through a table: constants say the dtypes, not the arguments."""

FLOAT32_ONLY = {"_merge_slices_kernel", "_ppo_loss_reduce_kernel"}
"""Kernels that read nothing but what another kernel wrote in float32."""


def compile_all(name: str, every: bool) -> list[dict[str, object]]:
    """Registers and stack of the cases of one kernel file, from the finished machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rows: list[dict[str, object]] = []
    for kernel, types, constants in importlib.import_module(
        f"fastrl_kernels.triton.{name}"
    ).aot_cases(every):
        options = {k: v for k, v in constants.items() if k in LAUNCH_OPTIONS}
        fixed = {k: v for k, v in constants.items() if k not in options}
        signature = {a: "constexpr" if a in fixed else types[a].removesuffix(":16")
                     for a in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names)
                   if types.get(a, "").endswith(":16")}
        for arch in ARCHITECTURES:
            source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            rows.append({"kernel": compiled.metadata.name, "arch": arch, "constants": fixed,
                         "pointers": sorted({v for v in signature.values() if v[0] == "*"}),
                         "products": products(compiled.asm["ttgir"], compiled.asm["ptx"]),
                         **resources(compiled.asm["cubin"])})
    return rows


def products(ttgir: str, ptx: str) -> list[str]:
    """Instructions of the matrix units, and how their results are spread over warps and memory."""
    layouts = re.findall(r"#ttg\.nvidia_mma<.*?>|#ttng\.tensor_memory_encoding<.*?>", ttgir)
    return sorted({*layouts, *re.findall(r"(?:wgmma|mma\.sync|tcgen05\.mma)[.\w:]*", ptx)})


def resources(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump` says: REG and STACK per thread. STACK is where spills live."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True,
                              text=True, check=True).stdout
    words = dict(word.split(":")[:2] for word in text.split() if word.count(":") == 1)
    return {"registers": int(words["REG"]), "stack_bytes": int(words["STACK"]),
            "local_bytes": int(words["LOCAL"])}


def launched(name: str) -> set[str]:
    """The kernels that a file launches, by its text."""
    return set(re.findall(r"(\w+_kernel)\[", (FOLDER / f"{name}.py").read_text()))


def test_every_file_that_launches_a_kernel_is_compiled() -> None:
    assert KERNELS == sorted(p.stem for p in FOLDER.glob("*.py") if launched(p.stem))


@pytest.mark.triton
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_and_spills_nothing(name: str, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT / "kernels")}
    done = subprocess.run([sys.executable, __file__, name], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    compiled = {(row["kernel"], row["arch"]) for row in rows}
    assert compiled == {(k, arch) for k in launched(name) for arch in ARCHITECTURES}
    for kernel in {row["kernel"] for row in rows} - FLOAT32_ONLY - READS_ADDRESSES:
        pointers = {p for row in rows if row["kernel"] == kernel for p in row["pointers"]}
        assert {"*fp32", "*fp16", "*bf16"} <= pointers, f"{kernel}: not every dtype"
    for row in rows:
        print(name, row)
        allowed = ALLOWED_SPILLS.get((row["kernel"], row["arch"]), 0)
        assert row["stack_bytes"] + row["local_bytes"] <= allowed, f"spills: {row}"
        assert 0 < row["registers"] <= 255, row
    if name == "paged_attention":  # a row may not notice with whom it shares a tile
        of = {(r["kernel"], r["arch"], *r["pointers"]): r["products"] for r in rows
              if r["constants"].get("IS_DECODE", True)}
        for (kernel, *where), found in of.items():
            if kernel == "_paged_attention_prefix_kernel":
                assert found == of["_paged_attention_fwd_kernel", *where], where
                assert found or "*fp16" not in where and "*bf16" not in where, "matrix units"


if __name__ == "__main__":
    every = os.environ.get("FASTRL_AOT") == "every"
    sys.stdout.write(json.dumps(compile_all(sys.argv[1], every)) + "\n")
