"""`python -m moelora models`: which experts classes run on the operators, as docs/models.md has it."""

from __future__ import annotations

from typing import Any

import transformers

from moelora.attention import KNOWN, MOST_KEYS, PLAIN
from moelora.experts import OUTSIDE
from moelora.survey import matrix


def main(explicit: dict[str, Any]) -> None:
    """Prints the document; there are no options."""
    print(markdown(), end="")


def markdown() -> str:
    """The support matrix for the installed transformers, and what is outside it."""
    rows = matrix()
    served = sum(row.path == "operators" for row in rows)
    followers = [f"| {r.model} | `{r.name}` | {r.weights} | {r.activation} | {r.path} |" for r in rows]
    outside = [f"| `{name}` | {reason} |" for name, reason in OUTSIDE.items()]
    return _DOCUMENT.format(
        version=transformers.__version__,
        classes=len(rows),
        served=served,
        followers="\n".join(followers),
        outside="\n".join(outside),
        sinks=", ".join(f"`{kind}`" for kind in KNOWN),
        plain=", ".join(f"`{kind}`" for kind in PLAIN),
        most=MOST_KEYS,
    )


_DOCUMENT = """# Models

<!-- Generated: python -m moelora models > docs/models.md -->

Experts classes of transformers {version} that follow its experts interface: {classes}.
On the operators: {served}.

`tests/test_model_sweep.py` compares each of them with transformers' own eager forward and PEFT: output, dX,
gradients of routing weights and adapters, in fp32 and bf16. The activation is recognised by what it computes;
a gate that is none of the fused ones is called as it is. A class that is not listed here, your own for one,
is treated in the same way.

| model | experts class | weights | activation | computed by |
|---|---|---|---|---|
{followers}

## Attention

gpt-oss and some others add a sink to each row of attention scores, and transformers computes them step by
step. On CPUs, commands of `python -m moelora` run these on torch's fused attention: {sinks}.
Where torch's kernel multiplies bf16 as float32, on processors with AVX-512-BF16 and no AMX, they run
attention of others by products, with at most {most} keys for each column of a query: {plain}.
Elsewhere, `import moelora.attention; model.set_attn_implementation(moelora.attention.NAME)` does either, for
attention without biases for positions, soft caps or chosen keys, which it refuses.

## Outside the interface

`moelora.enable` says so where a model has nothing else.

| experts class | why |
|---|---|
{outside}
| other quantised experts | stay on transformers' own functions; FP8Experts and bitsandbytes' run packed |
"""
