"""Flags of vLLM, SGLang and llama.cpp, and what to use instead: messages for those who are used to them."""

from collections.abc import Mapping

_ONE_DEVICE = "one server uses one device, which --device chooses"
_KV_CACHE_MEMORY = "--kv-cache-memory sets the memory for the KV cache, such as 2GiB; unset, it depends on what is free"
_DETECTED = "it is not needed: tool calls and reasoning are recognised by the chat template"
_ALWAYS_ON = "it is not needed: this is always on"
_DEFAULT_SAMPLING = "--default-sampling sets what requests leave out, such as temperature=0.7,top_p=0.9"
_PROXY = "put a reverse proxy in front of the server"
_NO_DRAFT_MODEL = "--speculative ngram drafts tokens without a second model"
_MODEL_NAME = "give MODEL as org/name, org/name:Q4_K_M, org/name:file.gguf or org/name@revision"
_URL = "--url is the address of the server, such as http://127.0.0.1:8000"

# Flags of a row, separated by spaces -> what to use instead.
_SERVE: Mapping[str, str] = {
    "-c --ctx-size --context-length": "--max-model-len limits prompt and output of a request, in tokens",
    "-np --parallel --max-running-requests": "--max-num-seqs is the number of requests that run at a time",
    "-b --batch-size -ub --ubatch-size --chunked-prefill-size --max-prefill-tokens": "--max-num-batched-tokens is the "
    "number of tokens of an engine step",
    "-a --alias": "--served-model-name is the name of the model in the API",
    "-hf -hfr --hf-repo --hf-file -hff --revision --tokenizer --tokenizer-path --tokenizer-mode --hf-config-path": (
        _MODEL_NAME
    ),
    "-mu --model-url": "give the address as MODEL if it is on Hugging Face; else download the file and give its path",
    "--hf-token -hft": "set HF_TOKEN in the environment",
    "--download-dir": "HF_HOME is the folder of models from Hugging Face, LIGHTWELL_CACHE that of aliases",
    "-t --threads -tb --threads-batch --threads-http": "set OMP_NUM_THREADS in the environment",
    "-ngl --gpu-layers --n-gpu-layers": "--device cuda runs all layers on the GPU, --device cpu none",
    "-mg --main-gpu": "--device cuda:N chooses the GPU",
    "-tp --tp --tp-size -ts --tensor-split -sm --split-mode": "--tensor-parallel-size is the number of processes, each "
    "on a device of its own, that run the model together",
    "-dp --dp-size": "--data-parallel-size is the number of engines, each with the whole model",
    "-pp --pipeline-parallel-size --pp-size": _ONE_DEVICE,
    "--mem-fraction-static": "--gpu-memory-utilization is the share of a GPU's memory that the server may use",
    "--max-total-tokens --num-gpu-blocks-override --kv-cache-memory-bytes": _KV_CACHE_MEMORY,
    "--swap-space --cpu-offload-gb --mlock --no-mmap --numa": "it is not needed: weights and KV cache stay in the "
    "memory of the device",
    "-ctk --cache-type-k -ctv --cache-type-v": "--kv-cache-dtype int8 makes the KV cache smaller",
    "-q": "--quantization chooses the format of the weights in memory",
    "--trust-remote-code": "code from model repositories is never run",
    "--enable-auto-tool-choice --tool-call-parser --reasoning-parser --enable-reasoning --reasoning-format --jinja": (
        _DETECTED
    ),
    "--chat-template-file": "--chat-template is the file of a chat template",
    "--guided-decoding-backend --grammar-backend --structured-outputs-config": "it is not needed: structured output "
    "works without a choice of backend",
    "--enable-chunked-prefill --enable-metrics --metrics -cb --cont-batching --enable-log-requests --log-requests "
    "-fa --flash-attn": _ALWAYS_ON,
    "--load-format": "it is not needed: GGUF and safetensors are told apart by the files",
    "--rope-scaling --rope-scale --rope-theta --rope-freq-base --rope-freq-scale --hf-overrides "
    "--json-model-override-args": "it is read from the model's own configuration",
    "--warmup --no-warmup --skip-server-warmup": "the short warm-up at start always runs",
    "--webui --no-webui": "the page at / is always there",
    "--rerank --reranking": "it is not needed: /v1/rerank works with every model, and --score-tokens chooses how",
    "-to --timeout": "requests have no time limit, but end when their client disconnects; --step-timeout is for hung "
    "engine steps",
    "-p --prompt -f --file": "a question can be piped into `lightwell run` or `lightwell chat`",
    "--num-prompts --num-requests --max-concurrency --concurrency --request-rate --dataset-name": "`lightwell bench` "
    "measures a running server",
    "--embedding --embeddings --is-embedding --task --runner": "it is not needed: /v1/embeddings works with every "
    "model, and --pooling chooses how",
    "--disable-radix-cache --no-cache-prompt": "--no-enable-prefix-caching turns the prefix cache off",
    "--disable-cuda-graph": "--enforce-eager launches GPU kernels one by one",
    "-md --model-draft --draft --draft-max --speculative-config --speculative-model --num-speculative-tokens "
    "--speculative-algorithm": _NO_DRAFT_MODEL,
    "--random-seed -s": "--seed is the seed of requests that send none",
    "--lora --lora-paths --lora-scaled": "--lora-modules NAME=PATH loads an adapter",
    "--enable-lora": "--lora-modules and --allow-runtime-lora-updating enable adapters",
    "--max-cpu-loras": "--max-loras is the maximum number of loaded adapters, on any device",
    "--temp --temperature --top-p --top-k --min-p --repeat-penalty --generation-config --override-generation-config": (
        _DEFAULT_SAMPLING
    ),
    "-n --predict --n-predict": "--default-max-tokens limits requests that set no limit",
    "--mmproj -mm --limit-mm-per-prompt": "images and audio are not supported",
    "--ssl-key-file --ssl-cert-file": "--ssl-certfile and --ssl-keyfile are the files of a certificate and its key",
    "--ssl-ca-certs --ssl-cert-reqs": _PROXY,
    "--otlp-traces-endpoint --enable-trace": "--otlp-endpoint is the receiver of OpenTelemetry traces",
    "--api-prefix": "--root-path is the prefix of all paths",
    "--api-key-file": "set LIGHTWELL_API_KEY in the environment, or api-key in the file of --config",
    "--allowed-methods --allowed-headers --allow-credentials": "--allowed-origins is enough for web pages",
    "--disable-log-requests --disable-log-stats --disable-uvicorn-access-log": "--log-level warning leaves out a line "
    "for each request",
    "-v --verbose --verbosity -lv --log-verbosity --log-verbose --uvicorn-log-level": "--log-level debug logs more",
}

_CLIENT: Mapping[str, str] = {"--base-url --host --port": _URL, "-m": "--model is the name of the model"}

_CONVERSATION: Mapping[str, str] = {
    "--temp": "--temperature sets the sampling temperature",
    "-n --n-predict --predict --max-new-tokens": "--max-tokens limits an answer",
    "--system-prompt -sys -p --prompt": "--system is the system message; a question can be piped in",
}

_CHAT: Mapping[str, str] = {**_CLIENT, **_CONVERSATION}

_BENCH: Mapping[str, str] = {
    **_CLIENT,
    "-n --num-prompts --num-prompt": "--num-requests is the number of requests",
    "--max-concurrency -c": "--concurrency is the number of requests in flight",
    "--request-rate": "--rate is the number of requests per second",
    "--random-input-len --random-input": "--input-len is the length of prompts, in words",
    "--random-output-len --random-output --max-tokens": "--output-len is the length of answers, in tokens",
    "--random-prefix-len": "--shared-prefix-len is the number of words that all prompts begin with",
    "--num-warmups --warmup-requests": "--warmup is the number of requests before the measured ones",
    "--backend --dataset-name --dataset-path --tokenizer": "it is not needed: prompts are random words, for any "
    "OpenAI-compatible server",
    "--save-result --result-filename --output-file --output-json": "--json prints the report as JSON",
    "--ignore-eos": "answers have --output-len tokens unless --no-ignore-eos is given",
}


def _by_flag(rows: Mapping[str, str]) -> Mapping[str, str]:
    return {flag: text for flags, text in rows.items() for flag in flags.split()}


# Command -> flag of another server -> what to use instead.
FOREIGN_FLAGS: Mapping[str, Mapping[str, str]] = {
    "serve": _by_flag(_SERVE),
    "run": {**_by_flag(_SERVE), **_by_flag(_CONVERSATION)},
    "chat": _by_flag(_CHAT),
    "bench": _by_flag(_BENCH),
}

# Command -> what to use instead of the positional arguments that its counterpart in Ollama or vLLM has.
FOREIGN_ARGUMENTS: Mapping[str, str] = {
    "run": "a question can be piped in, or is asked for once the model is loaded",
    "chat": "--model is the name of the model; a question can be piped in",
    "bench": "--model is the name of the model",
}
