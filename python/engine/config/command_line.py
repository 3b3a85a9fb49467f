"""From the command line, a configuration file and the environment to typed configurations."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from engine.config.env import API_KEY, CPU_ISA, Environment
from engine.config.flags import FLAGS, Flag, Kind, convert
from engine.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Setting:
    """One value that somebody chose, and where."""

    value: Any
    source: str


@dataclasses.dataclass(frozen=True)
class Settings:
    """What was chosen, by field name; fields that nobody chose are absent."""

    chosen: dict[str, Setting]
    print_config: bool = False

    def get(self, field: str) -> Any:
        setting = self.chosen.get(field)
        return None if setting is None else setting.value

    def for_class(self, target: type) -> dict[str, Any]:
        """Keyword arguments for `target` from the flags that set its fields."""
        names = {field.name for field in dataclasses.fields(target)}
        return {name: setting.value for name, setting in self.chosen.items() if name in names}


def read_settings(argv: Sequence[str], environment: Environment) -> Settings:
    """Read `argv` (without the program's name). Raises `ConfigError`; --help exits the process.

    A first word `serve`, as other servers want it, changes nothing.
    """
    given = vars(_parser().parse_args(argv[1:] if list(argv[:1]) == ["serve"] else argv))
    chosen: dict[str, Setting] = {}
    if (path := given.get("config")) is not None:
        chosen |= _read_file(path)
    for flag in FLAGS:
        if (raw := given.get(flag.field)) is not None:
            chosen[flag.field] = Setting(convert(flag, raw, flag.name), "command line")
    if environment.api_key is not None:
        keys = chosen.get("api_key", Setting((), ""))
        source = ", ".join(filter(None, (keys.source, API_KEY)))
        chosen["api_key"] = Setting((*keys.value, environment.api_key), source)
    if environment.cpu_isa is not None:
        chosen["cpu_isa"] = Setting(environment.cpu_isa, CPU_ISA)
    print_config = chosen.pop("print_config", Setting(False, "")).value
    chosen.pop("config", None)
    return Settings(chosen, print_config)


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing usage, and suggests the nearest flag for an unknown one."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        namespace, unknown = self.parse_known_args(args)
        if unknown:
            word = unknown[0].split("=")[0]
            if not word.startswith("-"):
                raise ConfigError(f"unexpected argument {word!r}; --help lists the flags")
            raise ConfigError(f"unknown flag {word}" + _suggestion(word, _NAMES))
        return namespace


_NAMES = tuple(name for flag in FLAGS for name in (flag.name, flag.alias) if name)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m engine.server",
        usage="python -m engine.server [serve] [flags]",
        description="Serve a model over an OpenAI-compatible HTTP API.",
        epilog=f"Environment: {API_KEY} adds an API key; {CPU_ISA} names the instruction set of the kernels.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    for flag in FLAGS:
        group = groups.get(flag.group) or groups.setdefault(flag.group, parser.add_argument_group(flag.group))
        group.add_argument(*filter(None, (flag.name, flag.alias)), **_argument(flag))
    return parser


def _argument(flag: Flag) -> dict[str, Any]:
    text = f"{flag.help} Default: {flag.shown_default}.".replace("%", "%%")
    if flag.kind is Kind.SWITCH:
        if flag.target is None:
            return {"action": "store_true", "help": flag.help, "dest": flag.field}
        return {"action": argparse.BooleanOptionalAction, "help": text, "dest": flag.field}
    action = "append" if flag.kind is Kind.TEXTS else "store"
    return {"action": action, "help": text, "dest": flag.field, "metavar": flag.shown_values}


def _read_file(path: str) -> dict[str, Setting]:
    flags = {flag.key: flag for flag in FLAGS if flag.key not in ("config", "print-config")}
    chosen: dict[str, Setting] = {}
    for key, raw in _parse_file(path).items():
        name = str(key)  # YAML has other keys
        flag = flags.get(name.replace("_", "-"))
        if flag is None:
            raise ConfigError(f"{path}: unknown key {name!r}" + _suggestion(name, flags))
        if flag.field in chosen:
            raise ConfigError(f"{path}: {flag.key} is given twice")
        chosen[flag.field] = Setting(convert(flag, raw, f"{path}: {key}"), path)
    return chosen


def _parse_file(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"cannot read --config {path}: {reason}") from None
    try:
        content = _parser_of(path)(text)
    except ValueError as error:
        raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"--config {path}: nested too deeply") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold an object of flags")
    return content


def _parser_of(path: str) -> Callable[[str], Any]:
    if path.endswith(".json"):
        return json.loads
    if path.endswith((".yaml", ".yml")):
        return _read_yaml
    return tomllib.loads


def _read_yaml(text: str) -> Any:
    """Raises: `ValueError`, as the parsers of the other languages do."""
    import yaml  # late: few need it

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(error) from None


def _suggestion(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "; --help lists them all"


def describe(settings: Settings, resolved: dict[str, tuple[Any, str]]) -> str:
    """Every value and where it comes from, one line each.

    `resolved` holds what was worked out for fields that nobody chose: value and reason.
    """
    lines = []
    for flag in FLAGS:
        if flag.target is None:
            continue
        if flag.field in resolved:
            value, reason = resolved[flag.field]
        elif flag.field in settings.chosen:
            setting = settings.chosen[flag.field]
            value, reason = setting.value, setting.source
        else:
            value = flag.default if flag.default not in (None, ()) else flag.unset
            reason = "default"
        lines.append((flag.key, _shown(flag, value), reason))
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    return "\n".join(f"{key:<{widths[0]}}  {value:<{widths[1]}}  # {reason}" for key, value, reason in lines)


def _shown(flag: Flag, value: Any) -> str:
    if flag.field == "api_key" and isinstance(value, tuple):
        return f"({len(value)} hidden)"
    if flag.field == "admin_api_key" and value != flag.unset:
        return "(hidden)"
    if flag.kind is Kind.INTEGER_OR_CONTEXT and value is None:
        return "context"
    if isinstance(value, bool):
        return "on" if value else "off"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
