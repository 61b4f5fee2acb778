"""Settings: every ``HAL_*`` variable there is, typed, with its default and one line of help.

A setting is looked up, highest first, in: the context manager ``hal.override``, the environment, the config file, the
default. (Call arguments and the lock file stand where ``docs/environment.md`` says.) Unknown names and values raise
with the nearest match. HAL never writes the environment.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from hal.errors import SettingError, did_you_mean
from hal_ops import record

__all__ = ["REMOVED", "SETTINGS", "Setting", "Settings", "Value", "current", "override"]


@record(frozen=True)
class Setting:
    """One variable. ``parse`` turns its trimmed text into a value, or raises ValueError saying what is allowed."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    help: str
    values: str

    @property
    def key(self) -> str:
        """The setting's name in the config file and in ``hal.override``."""
        return self.name.removeprefix("HAL_").lower()


@record(frozen=True)
class Value:
    """A setting's value and where it came from."""

    value: Any
    source: str


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9_.\-]+", text.lower()):
        raise ValueError("give one name, in letters, digits, '_', '-' and '.'")
    return text.lower()


def _names(text: str) -> tuple[str, ...]:
    return tuple(_name(part.strip()) for part in text.split(",") if part.strip())


def _flag(text: str) -> bool:
    spelled = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in spelled:
        raise ValueError("give 1 or 0 (also true/false, yes/no, on/off)")
    return spelled[text.lower()]


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError(f"give one of {', '.join(allowed)}.{did_you_mean(text, allowed)}")
        return text.lower()

    return parse


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hal"


SETTINGS = tuple(
    Setting(*row)
    for row in (
        (
            "HAL_ATTENTION",
            _name,
            None,
            "kernel or library to force for every attention phase",
            "a name of `hal kernels`",
        ),
        ("HAL_ATTENTION_DECODE", _name, None, "the same, for the decode phase only", "a name of `hal kernels`"),
        ("HAL_ATTENTION_EXTEND", _name, None, "the same, for the extend phase only", "a name of `hal kernels`"),
        ("HAL_ATTENTION_PREFILL", _name, None, "the same, for the prefill phase only", "a name of `hal kernels`"),
        ("HAL_CACHE_DIR", _path, None, "folder of the ledger and of measurements", "a path; default: ~/.cache/hal"),
        ("HAL_CONFIG", _path, None, "config file, TOML", "a path; default: ~/.config/hal/config.toml"),
        ("HAL_DEBUG_CHECKS", _flag, False, "check block tables and lengths on the device at each call", "1 or 0"),
        ("HAL_DEVICES", str, None, "simulated devices in place of probed ones", "e.g. nvidia:sm_90,cuda=12.8*8"),
        ("HAL_DISABLE", _names, (), "kernels or libraries never to choose", "names, comma-separated"),
        ("HAL_ERRATA", _path, None, "a further file of known-bad combinations, JSON", "a path"),
        ("HAL_LOCK", _path, None, "lock file whose decisions must be repeated", "a path"),
        ("HAL_LOG", _choice("debug", "info", "warning", "error"), "warning", "what is logged to stderr", "a level"),
        ("HAL_PLATFORM", _name, None, "platform of the default device", "a name of `hal devices`"),
        ("HAL_PLUGINS", _names, (), "plugins to load; -name denies one", "names, comma-separated; default: all"),
        ("HAL_STRICT", _flag, False, "refuse the slow reference kernels instead of warning", "1 or 0"),
        ("HAL_TUNE", _choice("use", "off"), "use", "whether measurements of `hal tune` order kernels", "use or off"),
        (
            "HAL_VERIFY",
            _choice("off", "require"),
            "off",
            "require: only kernels verified on this device",
            "off or require",
        ),
    )
)

REMOVED: dict[str, str] = {}
"""Variables of earlier versions, with what to use instead."""

_OP = r"HAL_OP_[A-Z0-9_]+\Z"
_BY_KEY = {s.key: s for s in SETTINGS}
_BY_NAME = {s.name: s for s in SETTINGS}
_context: contextvars.ContextVar[Mapping[str, Value]] = contextvars.ContextVar("hal_override", default={})  # noqa: B039


class Settings:
    """A snapshot of every setting, with sources. Get it from :func:`current`."""

    def __init__(self, values: Mapping[str, Value], log: str | None) -> None:
        self._values = values
        self.log = log
        """What the environment or the config file says of logging, if either does."""

    def value(self, key: str) -> Value:
        """The value and its source; ``key`` is a setting's key, or ``op_<name>``."""
        found = self._values.get(key)
        if found is not None:
            return found
        return Value(_BY_KEY[key].default if key in _BY_KEY else None, "default")

    def __getitem__(self, key: str) -> Any:
        return self.value(key).value

    def cache_dir(self) -> Path:
        """Folder of the ledger and of measurements."""
        return self["cache_dir"] or _default_cache_dir()

    def op_keys(self) -> tuple[str, ...]:
        """The ``op_<name>`` keys that are set."""
        return tuple(key for key in self._values if key.startswith("op_"))


def fingerprint() -> tuple[Any, ...]:
    """Whatever decides :func:`current`, as a hashable key that is cheap to make."""
    variables = tuple((name, os.environ[name]) for name in os.environ if name.startswith("HAL_"))
    return (variables, tuple(_context.get().items()), _config_stamp(os.environ.get("HAL_CONFIG")))


def current() -> Settings:
    """The settings as they stand: context manager over environment over config file over defaults.

    Raises:
        SettingError: an unknown variable, config key or value.
    """
    found = _settings(fingerprint())
    if found.log != _Followed.level:
        from hal._log import follow

        _Followed.level = found.log
        follow(found.log)
    return found


class _Followed:
    """The level at which HAL logs outside of blocks, as it was last seen."""

    level: str | None = None


@lru_cache(maxsize=64)
def _settings(key: tuple[Any, ...]) -> Settings:
    variables, context, (path, _) = key
    values = dict(_from_config(path)) if path is not None else {}
    for name, text in variables:
        values.update(_from_variable(name, text))
    log = values["log"].value if "log" in values else None
    values.update(dict(context))
    return Settings(values, log)


def _from_variable(name: str, text: str) -> dict[str, Value]:
    if name in REMOVED:
        raise SettingError(f"{name} was removed: {REMOVED[name]}", setting=name)
    setting = _BY_NAME.get(name) or _op_setting(name)
    if setting is None:
        raise SettingError(
            f"unknown variable {name}.{_meant(name)} `hal env` lists every variable; unset the others", setting=name
        )
    if not text.strip():
        return {}
    return {setting.key: Value(_parsed(setting, text, f"{name}={text!r}"), f"variable {name}")}


def _meant(name: str) -> str:
    """What a name that is no variable's may have been meant as."""
    if name.startswith("HAL_OP"):
        return " Write HAL_OP_<NAME> with the name of an op."
    bare = re.sub("_(KERNEL|BACKEND)S?", "", name)
    near = did_you_mean(bare, _BY_NAME, prefix="HAL_")
    if near or bare == name:
        return near
    return " HAL_ATTENTION forces a kernel for attention, HAL_OP_<NAME> for another op."


def _op_setting(name: str) -> Setting | None:
    if not re.match(_OP, name):
        return None
    return Setting(name, _name, None, "kernel or library to force for this op", "a name of `hal kernels`")


def _parsed(setting: Setting, text: str, shown: str) -> Any:
    try:
        return setting.parse(text.strip())
    except ValueError as error:
        raise SettingError(f"{shown}: {error}", setting=setting.name) from None


def _config_stamp(named: str | None) -> tuple[Path | None, int]:
    if named and named.strip():
        path = os.path.expanduser(named.strip())
    else:
        base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        path = os.path.join(base, "hal", "config.toml")
    try:
        return Path(path), os.stat(path).st_mtime_ns
    except OSError:
        if named and named.strip():
            raise SettingError(f"HAL_CONFIG={named!r}: no such file", setting="HAL_CONFIG") from None
        return None, 0


def _from_config(path: Path) -> Iterator[tuple[str, Value]]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SettingError(f"config file {path} cannot be read: {error}", setting="HAL_CONFIG") from error
    for key, value in table.items():
        yield key, Value(_checked(key, value, f"config file {path}: {key}"), f"config file {path}")


def _checked(key: str, value: Any, shown: str) -> Any:
    setting = _BY_KEY.get(key) or _op_setting(f"HAL_{key.upper()}")
    if setting is None or key == "config":
        raise SettingError(f"{shown}: unknown setting.{did_you_mean(key, _BY_KEY)} Known: {', '.join(sorted(_BY_KEY))}")
    if isinstance(value, bool):
        value = "1" if value else "0"
    elif isinstance(value, (list, tuple)):
        value = ",".join(str(v) for v in value)
    elif value is None:
        return setting.default
    return _parsed(setting, str(value), f"{shown}={value!r}")


@contextlib.contextmanager
def override(**settings: Any) -> Iterator[None]:
    """Set settings for a ``with`` block, in this thread or task: ``with hal.override(attention="fa3"): ...``.

    Keys are the variables' names without ``HAL_``, lower case (``attention_decode``, ``op_rms_norm``, ``disable``,
    ``strict``, ...). What a choice forces is checked like any other choice. On leaving, however that happens, the
    outer values hold again; handles made inside keep their kernels. ``log`` is the level of what this thread or task
    logs in the block.

    Raises:
        SettingError: an unknown key or value.
    """
    values = {k: Value(_checked(k, v, f"hal.override({k})"), f"hal.override({k}={v!r})") for k, v in settings.items()}
    token = _context.set({**_context.get(), **values})
    try:
        with _logging(values.get("log")):
            yield
    finally:
        _context.reset(token)


def _logging(level: Value | None) -> contextlib.AbstractContextManager[None]:
    if level is None:
        return contextlib.nullcontext()
    from hal._log import logging_at

    return logging_at(level.value)
