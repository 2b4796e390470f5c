"""python -m bench predict: decode attention as the planner predicts it, beside the measured time.

The planner measures this CPU for each format (`kvcore plan --device cpu`), and the bench then times
contexts of 8,192 tokens and more. Prints rows of a table in README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import kvcore
from bench.arguments import positive
from bench.cases import decode
from bench.formats import k_and_v, parse
from bench.machine import Pinning
from bench.roof import Roof
from bench.suite import Settings, run_case
from kvcore.planner import Model, decode_attention, get_model
from kvcore.planner.machine import measure_cpu

FORMATS = "fp32,bf16,rot8,chan4/rot4"
CONTEXTS = (8192, 16384, 32768)
#: Models of one layer, with 32 query heads on 8 and on 32 KV heads of 128.
MODELS = {
    "32/8": replace(get_model("llama-3-8b"), num_layers=1),
    "32/32": replace(get_model("llama-2-7b"), num_layers=1),
}
HEADER = (
    "| heads | format | context | predicted ms | measured ms | predicted over measured |\n"
    "| --- | --- | --- | --- | --- | --- |"
)


def rows(
    heads: str, model: Model, kv_format: str, contexts: Sequence[int], roof: Roof, seconds: float
) -> list[str]:
    """One row a context: the machine is measured once for all."""
    k_format, v_format = (side.name for side in k_and_v(kv_format))
    spec = model.cache_spec(k_format, v_format)
    with Pinning(roof.num_threads) as pinning:
        pinning.place_new_threads()
        device = measure_cpu(model, spec)
    found = []
    for context in contexts:
        case = decode(f"decode-{context}", [context], num_kv_heads=model.num_kv_heads)
        settings = Settings.full(roof.num_threads, seconds)
        result = run_case(case, kv_format, {}, roof, settings)
        measured = next(row.ms for row in result.rows if row.peer.startswith("kvcore"))
        cost = decode_attention(model, spec, context)
        predicted = 1e3 * cost.seconds(device) / device.attention_share
        found.append(
            f"| {heads} | {kv_format} | {context:,} | {predicted:.2f} | {measured:.2f} | "
            f"{predicted / measured:.2f} |"
        )
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench predict", description=__doc__)
    parser.add_argument("--formats", type=parse, default=parse(FORMATS))
    parser.add_argument("--threads", type=positive, help="default: what kvcore would use")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each context (0.5)")
    parser.add_argument("--quick", action="store_true", help="the shortest context only")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        kvcore.set_num_threads(arguments.threads)
    roof = Roof(kvcore.get_num_threads())
    print(HEADER)
    contexts = CONTEXTS[:1] if arguments.quick else CONTEXTS
    for heads, model in MODELS.items():
        for kv_format in arguments.formats:
            for row in rows(heads, model, kv_format, contexts, roof, arguments.seconds):
                print(row, flush=True)
    return 0
