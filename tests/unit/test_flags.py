"""Flags, configuration files and what goes wrong with them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from engine.config.command_line import describe, read_settings
from engine.config.engine_config import EngineConfig
from engine.config.env import Environment, read_environment
from engine.config.flags import FLAGS, MAX_FLAGS, Kind, markdown_table
from engine.config.server_config import ServerConfig
from engine.errors import ConfigError

EMPTY = Environment()
ROOT = Path(__file__).parents[2]


def read(*argv: str, environment: Environment = EMPTY) -> dict[str, object]:
    return {name: setting.value for name, setting in read_settings(argv, environment).chosen.items()}


def test_flags_and_fields_are_the_same_things() -> None:
    without_flag = {
        "tokenizer_path",
        "cpu_isa",
        "debug_checks",
        "embedding_model_name",
        "disable_overlap_schedule",
    }
    fields = {f.name for target in (EngineConfig, ServerConfig) for f in dataclasses.fields(target)}
    assert {flag.field for flag in FLAGS if flag.target} == fields - without_flag
    assert len(FLAGS) < MAX_FLAGS == 64
    assert len({flag.name for flag in FLAGS}) == len(FLAGS)


def test_values_are_typed() -> None:
    line = (
        "--model-path=/m --port 0 --page-size 32 --target-itl-ms 12.5 --disable-radix-cache --api-key a "
        "--api-key b --served-model-name x --default-max-tokens-chat 64"
    )
    chosen = read(*line.split())
    assert chosen == {
        "model_path": "/m",
        "port": 0,
        "page_size": 32,
        "target_itl_ms": 12.5,
        "disable_radix_cache": True,
        "api_key": ("a", "b"),
        "served_model_name": ("x",),
        "default_max_tokens_chat": 64,
    }
    assert read("--default-max-tokens-chat", "context") == {"default_max_tokens_chat": None}
    assert read("--model", "m") == {"model_path": "m"}
    assert read("serve", "--port", "1") == read("--port", "1") == {"port": 1}
    assert read() == {}


def test_every_flag_can_be_given_in_a_file(tmp_path: Path) -> None:
    sample = {
        Kind.TEXT: "auto",
        Kind.TEXTS: ["a", "b"],
        Kind.INTEGER: 7,
        Kind.NUMBER: 7,
        Kind.SWITCH: True,
        Kind.INTEGER_OR_CONTEXT: "context",
    }
    flags = [flag for flag in FLAGS if flag.target]
    content = {flag.key: flag.choices[0] if flag.choices else sample[flag.kind] for flag in flags}
    path = tmp_path / "server.json"
    path.write_text(json.dumps(content))
    chosen = read_settings(["--config", str(path)], EMPTY).chosen
    assert set(chosen) == {flag.field for flag in flags}
    assert {setting.source for setting in chosen.values()} == {str(path)}


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text('page-size = 32\nport = 1\napi_key = "k"\nenable-cache-report = true\n')
    settings = read_settings(["--port", "2", "--config", str(path), "--no-enable-cache-report"], EMPTY)
    assert {name: setting.value for name, setting in settings.chosen.items()} == {
        "page_size": 32,
        "port": 2,
        "api_key": ("k",),
        "enable_cache_report": False,
    }
    assert settings.chosen["port"].source == "command line"
    assert settings.chosen["page_size"].source == str(path)


def test_the_same_file_in_three_languages(tmp_path: Path) -> None:
    contents = {
        "toml": 'page-size = 32\napi-key = ["k", "l"]\ntarget-itl-ms = 1.5\ndtype = "auto"\n',
        "yaml": "page-size: 32\napi-key: [k, l]\ntarget_itl_ms: 1.5\ndtype: auto\n",
        "json": '{"page-size": 32, "api-key": ["k", "l"], "target-itl-ms": 1.5, "dtype": "auto"}',
    }
    read_values = []
    for suffix, content in contents.items():
        path = tmp_path / f"server.{suffix}"
        path.write_text(content)
        read_values.append(read("--config", str(path)))
    assert read_values[0] == read_values[1] == read_values[2]
    assert read_values[0]["api_key"] == ("k", "l")
    (tmp_path / "empty.yml").write_text("# nothing\n")
    assert read("--config", str(tmp_path / "empty.yml")) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("port: [1", "expected ',' or ']'"),
        ("a: b: c", "mapping values are not allowed here"),
        ("1: 2", "unknown key '1'"),
        ("- port", "must hold an object of flags"),
        ("port: 2001-01-01", "port expects a whole number"),
        ("port: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
    ],
)
def test_mistakes_in_yaml(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_settings(["--config", str(path)], EMPTY)
    assert str(path) in caught.value.message and message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--modle-path", "x"], "unknown flag --modle-path; did you mean --model-path?"),
        (["--pagesize=3"], "unknown flag --pagesize; did you mean --page-size?"),
        (["--zzz"], "unknown flag --zzz; --help lists them all"),
        (["--mode", "x"], "unknown flag --mode; did you mean --model?"),
        (["start"], "unexpected argument 'start'; --help lists the flags"),
        (["serve", "serve"], "unexpected argument 'serve'; --help lists the flags"),
        (["--port"], "--port: expected one argument"),
        (["--port", "x"], "--port expects a whole number, got 'x'"),
        (["--port", "1.5"], "--port expects a whole number, got '1.5'"),
        (["--target-itl-ms", "fast"], "--target-itl-ms expects a number, got 'fast'"),
        (["--dtype", "int3"], "--dtype must be one of auto, bfloat16, float16, float32, got 'int3'"),
        (
            ["--default-max-tokens-chat", "all"],
            "--default-max-tokens-chat expects a whole number or 'context', got 'all'",
        ),
        (["--config", "/no/such.toml"], "cannot read --config /no/such.toml: No such file or directory"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(argv, EMPTY)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("page-sise = 1", "unknown key 'page-sise'; did you mean page-size?"),
        ("config = 'x'", "unknown key 'config'; --help lists them all"),
        ("port = '1x'", "port expects a whole number, got '1x'"),
        ("port = true", "port expects a whole number, got True"),
        ("port = 1.5", "port expects a whole number, got 1.5"),
        ("dtype = 5", "dtype expects text, got 5"),
        ("disable-radix-cache = 'yes'", "disable-radix-cache expects true or false, got 'yes'"),
        ("api-key = [1]", "api-key expects text or a list of texts, got [1]"),
        ("port 1", "Expected '='"),
        ("[section]\nport = 1", "unknown key 'section'"),
        ("page-size = 16\npage_size = 32", "page-size is given twice"),
        ("port = " + "[" * 100_000, "nested too deeply"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "server.toml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_settings(["--config", str(path)], EMPTY)
    assert str(path) in caught.value.message
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"port": 65536}, "--port must be in [0, 65535], got 65536"),
        ({"port": -1}, "--port must be in"),
        ({"default_max_tokens_chat": 0}, "--default-max-tokens-chat must be at least 1"),
        ({"log_level": "loud"}, "--log-level must be one of"),
        ({"api_key": ("",)}, "--api-key must not be empty"),
        ({"served_model_name": ("",)}, "--served-model-name must not be empty"),
    ],
)
def test_values_out_of_range_of_the_server(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ServerConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_path": ""}, "--model-path must not be empty"),
        ({"max_queued_requests": -1}, "--max-queued-requests must be in [0, 2147483647], got -1"),
        ({"max_total_tokens": 10**30}, "--max-total-tokens must be in [1, 2147483647], got 1000"),
        ({"context_length": 0}, "--context-length must be in"),
        ({"context_length": 1}, "--context-length must be in [2, "),
        ({"page_size": 10**30}, "--page-size must be a multiple of 16"),
        ({"max_running_requests": 10**10}, "--max-running-requests must be in"),
        ({"chunked_prefill_size": 10**10}, "--chunked-prefill-size must be in"),
        ({"num_threads": 10**10}, "--num-threads must be in"),
        ({"target_itl_ms": float("nan")}, "--target-itl-ms must be positive, got nan"),
        ({"target_itl_ms": float("inf")}, "--target-itl-ms must be positive, got inf"),
    ],
)
def test_values_out_of_range_of_the_engine(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        EngineConfig(**{"model_path": "/nowhere"} | fields)


def test_the_environment_adds_a_key_and_names_the_instruction_set() -> None:
    environment = read_environment({"ENGINE_API_KEY": "secret", "ENGINE_CPU_ISA": "avx2"})
    settings = read_settings(["--api-key", "a"], environment)
    assert settings.get("api_key") == ("a", "secret")
    assert settings.get("cpu_isa") == "avx2"
    assert "secret" not in repr(environment)
    assert read_environment({"ENGINE_API_KEY": ""}) == EMPTY


def test_a_description_names_each_value_and_its_source_but_no_key() -> None:
    settings = read_settings(["--api-key", "secret", "--port", "5"], EMPTY)
    text = describe(settings, {"page_size": (16, "because")})
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert set(lines) == {flag.key for flag in FLAGS if flag.target}
    assert "secret" not in text
    assert re.search(r"^port\s+5\s+# command line$", lines["port"])
    assert re.search(r"^page-size\s+16\s+# because$", lines["page-size"])
    assert lines["dtype"].endswith("# default")


def test_help_names_every_flag_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read_settings(["--help"], EMPTY)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in FLAGS:
        assert len(re.findall(rf"^  {flag.name}(?![\w-])", text, flags=re.MULTILINE)) == 1, flag.name


def test_every_flag_that_is_spoken_of_exists() -> None:
    """In the README and pages for users, as inline code, and in our messages and docstrings."""
    pages = [path for path in (ROOT / "docs").glob("*.md") if path.name != "experiments.md"]
    texts = [path.read_text() for path in (ROOT / "README.md", *pages)]
    spoken = {name for text in texts for name in re.findall(r"`(--[a-z][a-z-]*)", text)}
    for path in (ROOT / "python" / "engine").rglob("*.py"):
        if "demo" not in path.parts:
            spoken |= set(re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*(?![\w-])", path.read_text()))
    assert len(spoken) > 40
    assert spoken - {flag.name for flag in FLAGS} - {flag.alias for flag in FLAGS} == {"--help"}


def test_the_readme_shows_the_table() -> None:
    rows = markdown_table().splitlines()
    assert len(rows) == len(FLAGS) + 2
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert markdown_table() in (ROOT / "README.md").read_text()
