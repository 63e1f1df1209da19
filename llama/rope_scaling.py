"""How RoPE is scaled for a longer context; `model.py` applies it."""

from dataclasses import dataclass, fields

from llama.errors import ConfigError, require_number


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE is scaled, so that the context can be longer than in pre-training.

    Args:
        factor: divides frequencies.
        low_freq_factor, high_freq_factor: of kind "llama3". A frequency is divided by the factor if
            it makes fewer than low_freq_factor turns in the original context. It does not change if
            it makes more than high_freq_factor turns. Those between are interpolated.
        original_context_length: longest context of pre-training, in tokens.
        kind: "llama3" divides the low frequencies by the factor, as in Llama 3.1 and later.
            "linear" divides all frequencies by the factor, as in some fine-tunes of Llama 2 (Chen
            et al. 2023, arxiv.org/abs/2306.15595); it uses no other field. "dynamic" raises theta
            if max_seq_len exceeds the original context; see `ModelArgs.scaled_theta`.

    Raises ConfigError for another kind, a number that is not above 0, or a high_freq_factor that is
    not above low_freq_factor.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192
    kind: str = "llama3"

    def __post_init__(self) -> None:
        if self.kind not in ("llama3", "linear", "dynamic"):
            raise ConfigError(
                f"RoPE scaling is of kind {self.kind!r}: it must be llama3, linear or dynamic"
            )
        for field in fields(self):
            if field.name != "kind":
                require_number(field.name, getattr(self, field.name))
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"RoPE high_freq_factor is {self.high_freq_factor}: it must be above "
                f"low_freq_factor, {self.low_freq_factor}"
            )
