"""The configuration in force: flags over environment over systemd's credentials over a TOML file.

    [sensor]                      FLOWSAGE_SENSOR__IDLE_TIMEOUT=30s
    interfaces = ["eth0"]         flowsage run --interface eth0
    idle_timeout = "30s"

Which keys there are, `settings.py` says.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError
from pydantic_settings import EnvSettingsSource, SettingsError

from flowsage.collector.errors import ConfigurationError
from flowsage.pipelines.settings import ENVIRONMENT, Section, Settings

RESERVED = {"FLOWSAGE_CONFIG", "FLOWSAGE_SHARED"}
"""Variables with our prefix that are not configuration keys: the file itself, and where tests find captures."""


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as e:
        raise ConfigurationError(f"cannot read the configuration file {path}: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigurationError(f"{path} is not valid TOML: {e}") from e


def _read_environment() -> dict[str, Any]:
    for key in os.environ:
        section = key.removeprefix(ENVIRONMENT).partition("__")[0].lower()
        if key.startswith(ENVIRONMENT) and key not in RESERVED and section not in Settings.model_fields:
            raise ConfigurationError(
                f"the environment variable {key} names no configuration key; the form is {ENVIRONMENT}SECTION__KEY, "
                "and `flowsage run --show-config` lists them"
            )
    try:
        return EnvSettingsSource(Settings)()
    except SettingsError as e:
        raise ConfigurationError(f"the environment cannot be read as configuration: {e}") from e


def _read_credentials() -> dict[str, Any]:
    """What systemd hands over (`LoadCredential=kafka.ssl_password`): a file a secret, called as the key.

    Of a key that is a file (`kafka.ssl_keyfile`) the value is where that lies.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    found: dict[str, Any] = {}
    for section, values in Settings.model_fields.items() if folder else ():
        for name, field in getattr(values.annotation, "model_fields", {}).items():
            path = Path(folder or "", f"{section}.{name}")
            secret = field.annotation is SecretStr
            if not (secret or name.endswith("file")) or not path.exists():
                continue
            try:
                text = path.read_text().rstrip("\n")
            except (OSError, UnicodeDecodeError) as e:
                raise ConfigurationError(f"cannot read the credential {path}: {e}") from e
            found.setdefault(section, {})[name] = text if secret else str(path)
    return found


def _merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Later layers win, key by key."""
    out: dict[str, Any] = {}
    for layer in layers:
        for section, values in layer.items():
            if isinstance(values, dict) and isinstance(out.get(section), dict):
                out[section] = out[section] | values
            else:
                out[section] = values
    return out


def load(
    path: Path | None = None,
    flags: dict[str, dict[str, Any]] | None = None,
    *,
    defaults: dict[str, dict[str, Any]] | None = None,
) -> Settings:
    """Settings from `flags` over the environment over credentials over the file at `path` (or $FLOWSAGE_CONFIG) over
    `defaults`.

    `defaults` is what a command prefers where nobody says otherwise (the lab's time scale). Raises ConfigurationError
    that names the key, the value and what would be right.
    """
    path = path or (Path(os.environ["FLOWSAGE_CONFIG"]) if os.environ.get("FLOWSAGE_CONFIG") else None)
    layers = [defaults or {}, _read_file(path) if path else {}, _read_credentials()]
    layers += [_read_environment(), flags or {}]
    try:
        return Settings(**_merge(*layers))
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(p) for p in first["loc"])
        where = f" (in {path}, the environment or the flags)" if path else ""
        if first["type"] == "extra_forbidden":
            near = _near(key)
            raise ConfigurationError(f"unknown configuration key {key!r}{where}{near}") from e
        message = first["msg"].removeprefix("Value error, ")
        if _secret(key):
            raise ConfigurationError(f"configuration key {key!r}{where}: {message}") from None
        raise ConfigurationError(f"configuration key {key!r}{where}: {message}, not {first['input']!r}") from e


def _secret(key: str) -> bool:
    """Whether `key` ("kafka.ssl_password") holds what must not be told."""
    section, _, name = key.partition(".")
    found = Settings.model_fields.get(section)
    fields = getattr(found.annotation, "model_fields", {}) if found else {}
    return name in fields and fields[name].annotation is SecretStr


def _near(key: str) -> str:
    sections = {name: section for name, section in Settings().__dict__.items() if isinstance(section, Section)}
    known = [f"{name}.{field}" for name, section in sections.items() for field in type(section).model_fields]
    best = difflib.get_close_matches(key, [*known, *sections], 1, 0.7)
    return f"; did you mean {best[0]!r}?" if best else "; `flowsage run --show-config` lists the known ones"
