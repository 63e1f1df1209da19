"""Every tensor of a prompt: `trace`, the explain page, and parity with other implementations."""

from llama.explain.edits import knock_out, replace, scale
from llama.explain.trace import Step, Trace, logit_lens
from llama.explain.tracing import trace

__all__ = ["Step", "Trace", "knock_out", "logit_lens", "replace", "scale", "trace"]
