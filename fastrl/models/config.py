"""The shape of a native decoder."""

from dataclasses import dataclass
from typing import Literal

from fastrl.errors import ModelError
from fastrl.models.spec import ModelSpec

FamilyName = Literal["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"]

MAX_SIZE, MAX_SIZES = 2**26, {"num_layers": 2**13, "max_positions": 2**31, "num_heads": 2**16}
"""Largest sizes: what a config.json that lies could ask for before its weights are looked at."""
ACTIVATION_NAMES = ("silu", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryScaling:
    """How rotary frequencies are stretched for longer contexts."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    """llama3: wavelengths above `original_max_positions / low_freq_factor` are divided in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below `original_max_positions / high_freq_factor` stay as they are."""
    original_max_positions: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Shape of a native decoder. `fastrl.models.decoder_config` makes one by family."""

    family: FamilyName
    """Names and layouts of the checkpoint; the switches below must be ones the family has."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    activation: str = "silu"
    gated_mlp: bool = True
    """The activation multiplies a second projection."""
    rotary_dim: int = 0
    """Rotary channels of each head, the first ones; 0: learned position embeddings."""
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    windows: tuple[int | None, ...] | None = None
    """Keys a query may see, itself included, layer by layer; None: all, in every layer."""
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over the channels of each query and key head."""
    parallel_residual: bool = False
    """Attention and MLP read the same residual stream."""
    tie_embeddings: bool = False
    """The unembedding is the embedding."""
    initializer_range: float = 0.02
    """Standard deviation of new weights."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        def expect(condition: bool, field: str, expected: str) -> None:
            if not condition:
                raise ModelError(f"{field}: expected {expected}, got {getattr(self, field)!r}; "
                                 f"correct {field} in the model's config")

        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
                      "num_kv_heads", "head_dim", "max_positions"):
            expect(1 <= getattr(self, field) <= MAX_SIZES.get(field, MAX_SIZE), field,
                   f"a whole number from 1 to {MAX_SIZES.get(field, MAX_SIZE):,}")
        expect(self.num_heads % self.num_kv_heads == 0, "num_kv_heads",
               f"a divisor of the {self.num_heads} query heads")
        expect(self.activation in ACTIVATION_NAMES, "activation", f"one of {ACTIVATION_NAMES}")
        expect(self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_dim, "rotary_dim",
               f"an even number of at most head_dim ({self.head_dim})")
        expect(self.windows is None or len(self.windows) == self.num_layers, "windows",
               f"None or {self.num_layers} entries, one per layer")

    @property
    def spec(self) -> ModelSpec:
        """The sizes that the rest of fastrl reads."""
        return ModelSpec(
            architecture=self.family, num_layers=self.num_layers, num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, hidden_size=self.hidden_size,
            vocab_size=self.vocab_size, max_positions=self.max_positions,
            eos_token_ids=self.eos_token_ids,
        )
