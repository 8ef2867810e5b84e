"""Settings of a process: one frozen dataclass, filled from flags and environment variables, read once at start.

A field `device_memory_bytes: int` annotated with `setting(...)` becomes the flag `--device-memory` and the variable
`PENSTOCK_DEVICE_MEMORY`. A flag wins over its variable. Unknown flags, unknown `PENSTOCK_` variables and values that do
not parse stop the start with a ConfigError that names the setting, the value and what is allowed.
"""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar  # Any: a setting's value has the type its field says

from common.errors import ConfigError
from common.units import MemoryShare, parse_bytes, parse_memory

T = TypeVar("T")
PREFIX = "PENSTOCK_"


@dataclass(frozen=True, slots=True)
class Setting:
    """How one field is named, read and explained."""

    flag: str
    parse: Callable[[str], Any]
    allowed: str
    help: str
    required: bool
    default_text: str

    @property
    def variable(self) -> str:
        """The environment variable of this setting."""
        return PREFIX + self.flag.upper().replace("-", "_")


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    flag: str | None = None,
    parse: Callable[[str], Any] | None = None,
    allowed: str | None = None,
    choices: Sequence[str] = (),
    show: str | None = None,
) -> Any:
    """A dataclass field that is a setting. Without a default it must be given.

    `parse` raises ValueError on a bad value; `allowed` says in words what it takes; `show` is how the default reads.
    """
    meta = {"help": help, "flag": flag, "parse": parse, "allowed": allowed, "choices": tuple(choices), "show": show}
    return dataclasses.field(default=default, metadata=meta, kw_only=True)


def bytes_setting(default: int | None, *, help: str, flag: str) -> Any:
    """A size in bytes, written like 512MiB; `flag` drops the `_bytes` of the field's name."""
    show = "unset" if default is None else f"{default // 2**20}MiB"
    return setting(default, help=help, flag=flag, parse=parse_bytes, allowed="a size such as 512MiB or 2GiB", show=show)


def memory_setting(default: MemoryShare | int, *, help: str, flag: str) -> Any:
    """Memory in bytes, written like 512MiB, or a share of what there is, written like 80%."""
    show = str(default) if isinstance(default, MemoryShare) else f"{default // 2**20}MiB"
    allowed = "a size such as 512MiB or 2GiB, or a share such as 80%"
    return setting(default, help=help, flag=flag, parse=parse_memory, allowed=allowed, show=show)


def describe(kind: type) -> dict[str, Setting]:
    """Field name -> its Setting, in the order of the class."""
    hints = typing.get_type_hints(kind)
    found: dict[str, Setting] = {}
    for field in dataclasses.fields(kind):
        meta = field.metadata
        parse, allowed = _reader(hints[field.name], meta)
        required = field.default is dataclasses.MISSING
        found[field.name] = Setting(
            flag=meta["flag"] or field.name.replace("_", "-"),
            parse=parse,
            allowed=allowed,
            help=meta["help"],
            required=required,
            default_text="required" if required else meta["show"] or _shown(field.default),
        )
    return found


def _shown(value: object) -> str:
    if value is None or value == "":
        return "unset"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _reader(type_: Any, meta: Mapping[str, Any]) -> tuple[Callable[[str], Any], str]:
    if meta["parse"] is not None:
        return meta["parse"], meta["allowed"] or "another value"
    if meta["choices"]:
        choices = meta["choices"]

        def choose(text: str) -> str:
            if text not in choices:
                raise ValueError(text)
            return text

        return choose, " or ".join(choices)
    options = [option for option in typing.get_args(type_) if option is not type(None)] or [type_]
    plain = options[0]
    if plain is bool:
        return _parse_bool, "true or false"
    if plain is int:
        return int, "a whole number"
    if plain is float:
        return float, "a number"
    return str, "text"


def _parse_bool(text: str) -> bool:
    try:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def load(kind: type[T], arguments: Sequence[str], environ: Mapping[str, str], known: Sequence[type] = ()) -> T:
    """Build `kind` from flags and PENSTOCK_ variables.

    `known` lists the other settings classes whose variables may stand in the same environment.
    Raises ConfigError.
    """
    settings = describe(kind)
    texts = _from_environment(settings, environ, known)
    texts |= _from_flags(settings, arguments)
    values: dict[str, Any] = {}
    for name, (source, text) in texts.items():
        try:
            values[name] = settings[name].parse(text)
        except (ValueError, ConfigError) as error:
            reason = f" ({error})" if str(error) not in ("", text) else ""
            raise ConfigError(f"{source}={text!r}: must be {settings[name].allowed}{reason}") from error
    for name, one in settings.items():
        if one.required and name not in values:
            raise ConfigError(f"--{one.flag} (or {one.variable}) is required: {one.help}")
    try:
        return kind(**values)
    except ValueError as error:  # from __post_init__: settings that contradict each other
        raise ConfigError(str(error)) from error


def _from_environment(
    settings: Mapping[str, Setting], environ: Mapping[str, str], known: Sequence[type]
) -> dict[str, tuple[str, str]]:
    mine = {one.variable: name for name, one in settings.items()}
    others = {one.variable for other in known for one in describe(other).values()}
    found: dict[str, tuple[str, str]] = {}
    for variable, text in environ.items():
        if variable in mine:
            if text != "":  # compose passes unset variables as empty
                found[mine[variable]] = (variable, text)
        elif variable.startswith(PREFIX) and variable not in others:
            raise ConfigError(f"{variable} is not a setting; {_suggest(variable, [*mine, *others])}")
    return found


def _from_flags(settings: Mapping[str, Setting], arguments: Sequence[str]) -> dict[str, tuple[str, str]]:
    mine = {f"--{one.flag}": name for name, one in settings.items()}
    found: dict[str, tuple[str, str]] = {}
    rest = list(arguments)
    while rest:
        flag, equals, text = rest.pop(0).partition("=")
        if flag not in mine:
            raise ConfigError(f"{flag} is not a setting; {_suggest(flag, list(mine))}")
        if not equals:
            if settings[mine[flag]].parse is _parse_bool and (not rest or rest[0].startswith("--")):
                text = "true"
            elif not rest:
                raise ConfigError(f"{flag} needs a value: {settings[mine[flag]].allowed}")
            else:
                text = rest.pop(0)
        found[mine[flag]] = (flag, text)
    return found


def _suggest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"allowed are {', '.join(sorted(names))}"


def usage(kind: type, program: str, summary: str) -> str:
    """Help text: every flag with its variable, default and meaning."""
    lines = [f"usage: {program} [--flag value ...]", "", summary, "", "settings (flag, environment variable, default):"]
    for one in describe(kind).values():
        lines.append(f"  --{one.flag}  {one.variable}  [{one.default_text}]")
        lines.append(f"      {one.help} Takes {one.allowed}.")
    return "\n".join(lines)
