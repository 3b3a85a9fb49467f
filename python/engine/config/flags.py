"""The table of flags: the one source of the help text, the README's table, the keys of a
configuration file and the fields of `EngineConfig` and `ServerConfig`.

A flag sets the field of its name (`--page-size` sets `page_size`), from the command line, else
from the file given with --config, else from the environment, else the field's own default holds.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from engine.config.engine_config import (
    DEVICES,
    DTYPES,
    KV_CACHE_DTYPES,
    LOAD_FORMATS,
    LOGPROBS_MODES,
    POOLINGS,
    QUANTIZATIONS,
    SCHEDULE_POLICIES,
    SPECULATIONS,
    EngineConfig,
)
from engine.config.server_config import (
    ERROR_FORMATS,
    REASONING_PARSERS,
    TOOL_CALL_PARSERS,
    ServerConfig,
)
from engine.errors import ConfigError
from engine.log import LEVELS

MAX_FLAGS = 64


class Kind(enum.Enum):
    """How a flag's value is read."""

    TEXT = "TEXT"
    TEXTS = "TEXT (repeatable)"
    INTEGER = "N"
    NUMBER = "X"
    SWITCH = ""
    INTEGER_OR_CONTEXT = "N|context"


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag. `target` is the configuration class whose field it sets; None: handled on its own."""

    name: str
    kind: Kind
    group: str
    help: str
    target: type | None = None
    choices: tuple[str, ...] = ()
    unset: str = "decided at start"
    """What None means, for people."""

    alias: str | None = None

    @property
    def key(self) -> str:
        """Name in a configuration file, and on the command line without the dashes."""
        return self.name.removeprefix("--")

    @property
    def field(self) -> str:
        return self.key.replace("-", "_")

    @property
    def default(self) -> Any:
        if self.target is None or self.field == "model_path":
            return None
        return next(f.default for f in dataclasses.fields(self.target) if f.name == self.field)

    @property
    def shown_default(self) -> str:
        """The default, for people."""
        if self.kind is Kind.SWITCH:
            return "off"
        if self.default in (None, ()):
            return self.unset
        return str(self.default)

    @property
    def shown_values(self) -> str:
        return "|".join(self.choices) or self.kind.value.split(" ")[0]


MODEL, HTTP, CAPACITY, SPEED = "Model", "HTTP", "Capacity", "Scheduling and speed"
ADAPTERS, OTHER = "Adapters", "Other"

FLAGS: tuple[Flag, ...] = (
    Flag(
        "--model-path", Kind.TEXT, MODEL,
        "Directory of a checkpoint, a GGUF file, or an id on the Hugging Face hub.",
        EngineConfig, unset="the bundled model", alias="--model",
    ),
    Flag(
        "--served-model-name", Kind.TEXTS, MODEL,
        "Name of the model in requests and answers; give it again for aliases.",
        ServerConfig, unset="the model path",
    ),
    Flag(
        "--device", Kind.TEXT, MODEL, "What computes: the CPU, or an NVIDIA GPU (docs/gpu.md).",
        EngineConfig, DEVICES,
    ),
    Flag("--dtype", Kind.TEXT, MODEL, "Type of weights and of the KV cache.", EngineConfig, DTYPES),
    Flag(
        "--kv-cache-dtype", Kind.TEXT, MODEL,
        "Type of the KV cache: that of --dtype, or int8 (on the CPU) or fp8 (on a GPU) with a scale for each "
        "token and head.",
        EngineConfig, KV_CACHE_DTYPES,
    ),
    Flag(
        "--quantization", Kind.TEXT, MODEL,
        "int8 or int4: bits of the weights, which are quantized while they are loaded; on the CPU "
        "activations become 8 bits. bf16_dot: both are bfloat16 in products, which is faster where the CPU "
        "has AVX512-BF16. With all three attention over a bfloat16 cache multiplies in bfloat16. fp8: "
        "weights are float8 e4m3, on a GPU of capability 8.9.",
        EngineConfig, QUANTIZATIONS,
    ),
    Flag(
        "--packed-cache", Kind.TEXT, MODEL,
        "Directory that keeps the packed weights: the next start reads them instead of the checkpoint. When "
        "it packs anew, those are removed that no start has read for 30 days, or that only older versions "
        "read.",
        EngineConfig, unset="none",
    ),
    Flag(
        "--map-packed-cache", Kind.SWITCH, MODEL,
        "Leave packed weights in their files, paged in when used: for machines short of memory. What is "
        "paged in is not checked; without this flag a file that has changed is told, and made again.",
        EngineConfig,
    ),
    Flag(
        "--load-format", Kind.TEXT, MODEL, "Where weights come from; dummy draws them at random.",
        EngineConfig, LOAD_FORMATS,
    ),
    Flag(
        "--trust-remote-code", Kind.SWITCH, MODEL,
        "Run Python code that a checkpoint brings along, where transformers has no model of its type.",
        EngineConfig,
    ),
    Flag(
        "--context-length", Kind.INTEGER, MODEL, "Most tokens of prompt and answer together.",
        EngineConfig, unset="the model's",
    ),
    Flag(
        "--sampling-defaults", Kind.TEXT, MODEL,
        "Sampling parameters of a request that leaves them out: those of the model's "
        "generation_config.json, those of the OpenAI API, or a JSON object with some that come before the "
        "model's.",
        ServerConfig,
    ),
    Flag(
        "--logprobs-mode", Kind.TEXT, MODEL,
        "What logprobs are of: the model's own distribution, or the one after penalties, bias, temperature "
        "and filters; log-probabilities, or the logits themselves.",
        EngineConfig, LOGPROBS_MODES,
    ),
    Flag(
        "--chat-template", Kind.TEXT, MODEL,
        "Jinja file that writes conversations as prompts, in place of the model's own template.",
        ServerConfig, unset="the model's",
    ),
    Flag(
        "--tool-call-parser", Kind.TEXT, MODEL,
        "How the model writes tool calls; auto: as its chat template shows them.",
        ServerConfig, TOOL_CALL_PARSERS,
    ),
    Flag(
        "--reasoning-parser", Kind.TEXT, MODEL,
        "How the model marks its thoughts; auto: as its chat template shows.",
        ServerConfig, REASONING_PARSERS,
    ),
    Flag(
        "--embedding-model", Kind.TEXT, MODEL,
        "A second checkpoint, for embeddings: a directory, or an id on the Hugging Face hub; NAME=PATH to "
        "serve it under a name.",
        EngineConfig, unset="none",
    ),
    Flag(
        "--pooling", Kind.TEXT, MODEL,
        "How one vector is made of a text: for checkpoints that do not say, or otherwise than they say.",
        EngineConfig, POOLINGS, unset="the checkpoint's; mean for the bundled model",
    ),
    Flag(
        "--matryoshka-dimensions", Kind.TEXT, MODEL,
        "Sizes to which embeddings may be cut (64,128), or any.", EngineConfig, unset="the checkpoint's",
    ),
    Flag(
        "--allow-auto-truncate", Kind.SWITCH, MODEL,
        "Cut texts that are too long to embed, instead of refusing them.", EngineConfig,
    ),
    Flag("--host", Kind.TEXT, HTTP, "Address to listen on.", ServerConfig),
    Flag("--port", Kind.INTEGER, HTTP, "Port to listen on; 0 takes any free one.", ServerConfig),
    Flag(
        "--api-key", Kind.TEXTS, HTTP,
        "Key that requests must carry; give it again for more. ENGINE_API_KEY in the environment adds one.",
        ServerConfig, unset="no key needed",
    ),
    Flag(
        "--api-key-file", Kind.TEXT, HTTP,
        "TOML file of keys with names, weights and limits, as README shows.", ServerConfig, unset="none",
    ),
    Flag(
        "--admin-api-key", Kind.TEXT, HTTP, "The only key for routes that manage the server.",
        ServerConfig, unset="any key",
    ),
    Flag(
        "--allowed-origins", Kind.TEXTS, HTTP,
        "Origin of web pages that may read answers (https://example.com), or * for all; "
        "give it again for more.",
        ServerConfig, unset="none",
    ),
    Flag(
        "--default-max-tokens-chat", Kind.INTEGER_OR_CONTEXT, HTTP,
        "Most tokens of a chat answer when the request does not say; context: as many as fit.",
        ServerConfig,
    ),
    Flag(
        "--allow-any-model-name", Kind.SWITCH, HTTP,
        "Answer requests for models that this server does not have, instead of 404. Where there are "
        "adapters, a name with a colon must end in one of them.", ServerConfig,
    ),
    Flag(
        "--strict-params", Kind.SWITCH, HTTP,
        "Refuse unknown fields of a request with 400; else x-ignored-params names them.", ServerConfig,
    ),
    Flag(
        "--error-format", Kind.TEXT, HTTP,
        "Body of errors: flat (code is the status), openai (inside of error, code is a word), or both.",
        ServerConfig, ERROR_FORMATS,
    ),
    Flag(
        "--sse-keep-alive-s", Kind.NUMBER, HTTP,
        "Seconds after which a silent stream gets a comment, so that no proxy cuts it off; 0: none.",
        ServerConfig,
    ),
    Flag(
        "--stream-interval", Kind.INTEGER, HTTP,
        "Tokens in an event of a stream; the first token never waits for more.", ServerConfig,
    ),
    Flag(
        "--enable-cache-report", Kind.SWITCH, HTTP,
        "Report cached prompt tokens in the usage of every answer.", ServerConfig,
    ),
    Flag(
        "--max-total-tokens", Kind.INTEGER, CAPACITY, "Tokens that the KV cache holds.",
        EngineConfig, unset="from free memory",
    ),
    Flag(
        "--max-running-requests", Kind.INTEGER, CAPACITY, "Most requests computed at once.",
        EngineConfig, unset="64 on the CPU, 256 on a GPU",
    ),
    Flag(
        "--max-queued-requests", Kind.INTEGER, CAPACITY,
        "Most requests waiting; one more is answered 503. 0: none waits.", EngineConfig, unset="1024",
    ),
    Flag(
        "--max-queued-tokens", Kind.INTEGER, CAPACITY,
        "Most prompt tokens waiting; a request beyond is answered 503.", EngineConfig, unset="no limit",
    ),
    Flag(
        "--queue-timeout", Kind.NUMBER, CAPACITY,
        "Seconds a request may wait to be run before it is answered 503; 0: any.", ServerConfig,
    ),
    Flag(
        "--request-timeout", Kind.NUMBER, CAPACITY,
        "Seconds a request may take in all before it is ended with an error; 0: any.", ServerConfig,
    ),
    Flag(
        "--drain-timeout", Kind.NUMBER, CAPACITY,
        "Seconds that running requests have to end when the server is told to stop.", ServerConfig,
    ),
    Flag(
        "--limit", Kind.TEXTS, CAPACITY,
        "name=value of a bound on clients, as README lists them; give it again for more.",
        ServerConfig, unset="none",
    ),
    Flag(
        "--page-size", Kind.INTEGER, CAPACITY, "Tokens in a block of the KV cache.",
        EngineConfig, unset="16",
    ),
    Flag(
        "--mem-fraction-static", Kind.NUMBER, CAPACITY,
        "Share of the GPU's memory for weights, KV cache and the rows of a step; libraries, graphs and "
        "adapters live in the rest.",
        EngineConfig, unset="0.88 on a GPU",
    ),
    Flag(
        "--disable-radix-cache", Kind.SWITCH, CAPACITY, "Do not reuse the prefixes of earlier requests.",
        EngineConfig,
    ),
    Flag(
        "--schedule-policy", Kind.TEXT, SPEED,
        "Who is admitted first: fcfs, first come; lpm, longest cached prefix.",
        EngineConfig, SCHEDULE_POLICIES,
    ),
    Flag(
        "--chunked-prefill-size", Kind.INTEGER, SPEED, "Most prompt tokens computed in one step.",
        EngineConfig, unset="512 on the CPU, 8192 on a GPU",
    ),
    Flag(
        "--target-itl-ms", Kind.NUMBER, SPEED,
        "Milliseconds between tokens that prefill should not exceed.", EngineConfig, unset="500",
    ),
    Flag(
        "--speculative", Kind.TEXT, SPEED,
        "Compute guesses of the next tokens together with what is known; the answers are the same. ngram: "
        "what followed the last tokens where they stood before in the prompt or the answer.",
        EngineConfig, SPECULATIONS,
    ),
    Flag(
        "--deterministic", Kind.SWITCH, SPEED,
        "Give a request the same answer in every batch on a GPU too, by slower products and attention; on "
        "the CPU that always holds.",
        EngineConfig,
    ),
    Flag(
        "--disable-cuda-graph", Kind.SWITCH, SPEED,
        "Launch the steps of a GPU op by op, instead of replaying steps of decoding as a whole.",
        EngineConfig,
    ),
    Flag(
        "--num-threads", Kind.INTEGER, SPEED, "Threads of the CPU kernels.",
        EngineConfig, unset="the cores this process may use",
    ),
    Flag(
        "--watchdog-timeout", Kind.NUMBER, OTHER,
        "Seconds without progress after which a stuck engine is replaced; 0: never.", EngineConfig,
    ),
    Flag(
        "--grammar-timeout", Kind.NUMBER, OTHER,
        "Seconds that a schema, regex or grammar of a request may take to compile.", EngineConfig,
    ),
    Flag(
        "--free-json-whitespace", Kind.SWITCH, OTHER,
        "Let the model put whitespace between the elements of JSON that follows a schema.", EngineConfig,
    ),
    Flag(
        "--disable-jump-forward", Kind.SWITCH, SPEED,
        "Compute text that a constraint forces token by token; the answers are the same.", EngineConfig,
    ),
    Flag(
        "--lora-paths", Kind.TEXTS, ADAPTERS,
        'Adapter to serve: PATH, NAME=PATH, or {"lora_name": NAME, "lora_path": PATH, "pinned": true}; '
        "give it again for more. The bundled model's own are served beside them.",
        ServerConfig, unset="none",
    ),
    Flag(
        "--lora-dir", Kind.TEXTS, ADAPTERS,
        "Directory under which requests may name adapters by their path; give it again for more.",
        ServerConfig, unset="none",
    ),
    Flag(
        "--max-loras-per-batch", Kind.INTEGER, ADAPTERS, "Most different adapters in use at once.",
        EngineConfig,
    ),
    Flag(
        "--max-loaded-loras", Kind.INTEGER, ADAPTERS,
        "Most adapters in memory; the one that was not used for longest makes room.",
        EngineConfig,
    ),
    Flag("--max-lora-rank", Kind.INTEGER, ADAPTERS, "Largest rank of an adapter.", EngineConfig),
    Flag("--log-level", Kind.TEXT, OTHER, "How much is logged.", ServerConfig, LEVELS),
    Flag(
        "--config", Kind.TEXT, OTHER,
        "TOML, YAML or JSON file with these flags as keys; the command line wins.", unset="none",
    ),
    Flag("--print-config", Kind.SWITCH, OTHER, "Print every value and where it comes from, then exit."),
)  # fmt: skip


def convert(flag: Flag, raw: Any, origin: str) -> Any:
    """Value of `flag` from a command-line string or from a typed value of a file.

    `origin` names the place for the error message. Raises `ConfigError`.
    """
    is_typed = not isinstance(raw, str)
    if flag.kind is Kind.TEXTS:
        items = raw if isinstance(raw, list) else [raw]
        if all(isinstance(item, str) for item in items):
            return tuple(items)
    elif flag.kind is Kind.SWITCH:
        if isinstance(raw, bool):
            return raw
    elif isinstance(raw, bool) or (is_typed and flag.kind is Kind.TEXT):
        pass
    elif flag.kind is Kind.TEXT:
        if flag.choices and raw not in flag.choices:
            raise ConfigError(f"{origin} must be one of {', '.join(flag.choices)}, got {raw!r}")
        return raw
    elif flag.kind is Kind.INTEGER_OR_CONTEXT and raw == "context":
        return None
    else:
        try:
            if flag.kind is Kind.NUMBER:
                return float(raw)
            if not isinstance(raw, float):
                return int(raw)
        except (TypeError, ValueError):
            pass
    raise ConfigError(f"{origin} expects {_EXPECTED[flag.kind]}, got {raw!r}")


_EXPECTED = {
    Kind.TEXT: "text",
    Kind.TEXTS: "text or a list of texts",
    Kind.INTEGER: "a whole number",
    Kind.NUMBER: "a number",
    Kind.SWITCH: "true or false",
    Kind.INTEGER_OR_CONTEXT: "a whole number or 'context'",
}


def markdown_table() -> str:
    """The flags as the table that README shows."""
    rows = ["| Flag | Value | Default | What it does |", "|---|---|---|---|"]
    for flag in FLAGS:
        values = flag.shown_values.replace("|", "\\|")
        repeat = " (repeatable)" if flag.kind is Kind.TEXTS else ""
        rows.append(f"| `{flag.name}` | {values}{repeat} | {flag.shown_default} | {flag.help} |")
    return "\n".join(rows) + "\n"
