"""Command-line options for the fields of an op's request, made from its dataclass: any op, a plugin's too."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from hal.errors import HalError, UnknownOpError

if TYPE_CHECKING:
    from hal_ops import Op, Request

__all__ = ["OpGroup", "request_from", "request_options"]

_PREFIX = "field_"
_WORDS = {"none": None, "true": True, "false": False}
_KINDS = {"int": (click.INT, "N"), "float": (click.FLOAT, "NUMBER"), "str": (click.STRING, "NAME")}
_METAVARS = {"Window": "KEYS|LEFT,RIGHT", "int | str": "N|NAME", "tuple[str, ...] | None": "NAME,..."}
_NAMED = re.compile(r"(?:(?<=^)|(?<=[.;\s]))((?:`*\w+`*, )*`*\w+`*): ")


class OpGroup(click.Group):
    """A command that takes an op first, and then that op's request: ``hal explain OP [options]``.

    ``run(ctx, op, request, **own)`` is called with the values of the command's ``own`` options; ``alone(**own)`` with
    those of ``alone_options`` where no op is named, if the command has a meaning then.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., None],
        own: Sequence[Callable[[Any], Any]],
        help: str,  # noqa: A002
        alone: Callable[..., Any] | None = None,
        alone_options: Sequence[Callable[[Any], Any]] = (),
    ) -> None:
        super().__init__(
            name,
            help=help,
            subcommand_metavar="OP [OPTIONS]" if alone is None else "[OP [OPTIONS]]",
            no_args_is_help=alone is None,
            invoke_without_command=alone is not None,
            callback=_unless_op(alone),
            params=[p for decorate in alone_options for p in click.command(decorate(lambda: None)).params],
        )
        self.run = run
        self.own = own

    def list_commands(self, ctx: click.Context) -> list[str]:
        from hal import _plugins

        try:
            return sorted(_plugins.registry().ops)
        except HalError as error:
            raise click.ClickException(str(error)) from error

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        from hal import _plugins

        try:
            op = _plugins.registry().op(cmd_name)
        except UnknownOpError as error:
            raise click.UsageError(str(error), ctx) from error
        return self._command(op)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Let the op stand behind options too: ``hal explain --json attention``. An option's value is no op."""
        if len(args) > 1 and args[0].startswith("-"):
            valued = {flag for p in self.params if not (isinstance(p, click.Option) and p.is_flag) for flag in p.opts}
            ops = self.list_commands(ctx)
            at = next((i for i, text in enumerate(args) if text in ops and args[i - 1] not in valued), 0)
            args = [args[at], *args[:at], *args[at + 1 :]]
        return super().parse_args(ctx, args)

    def _command(self, op: Op) -> click.Command:
        @click.pass_context
        def callback(ctx: click.Context, /, **params: Any) -> None:
            own = {k: v for k, v in params.items() if not k.startswith(_PREFIX)}
            self.run(ctx, op, request_from(op, _given(ctx, params)), **own)

        for decorate in reversed(self.own):
            callback = decorate(callback)
        text = f"{self.help}\n\nOp {op.name}: {op.summary}."
        made = click.command(op.name, help=text, short_help=op.summary)(callback)
        taken = {flag for p in made.params for flag in p.opts}
        made.params = [*request_options(op, taken), *made.params]
        return made


def _unless_op(alone: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """What a group calls: ``alone``, and nothing where an op is named, whose command comes then."""
    if alone is None:
        return None

    @click.pass_context
    def call(ctx: click.Context, /, **params: Any) -> Any:
        return None if ctx.invoked_subcommand else alone(**params)

    return call


def request_options(op: Op, taken: set[str]) -> list[click.Option]:
    """An option a field of the op's request; a name that is ``taken`` becomes ``--request-<name>``."""
    helps = _field_helps(op.request)
    return [_option(f, helps.get(f.name, ""), taken) for f in dataclasses.fields(op.request) if f.init]


def request_from(op: Op, fields: Mapping[str, Any]) -> Request:
    """The request that the given options describe.

    Raises:
        click.UsageError: a value that no kernel could honour.
    """
    try:
        return op.request(**fields)
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error


def _given(ctx: click.Context, params: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that the command line sets; ``none`` is a value too."""
    source = click.core.ParameterSource.COMMANDLINE
    fields = [k for k in params if k.startswith(_PREFIX) and ctx.get_parameter_source(k) is source]
    return {k.removeprefix(_PREFIX): params[k] for k in fields}


def _literal(annotation: str) -> Callable[[str], Any]:
    """A parser of what is no plain int, float or str: ``16``, ``auto``, ``none``, ``127,0``, ``prefill,decode``."""
    always_tuple = annotation.startswith("tuple[") and "..." in annotation
    numbers = any(word in annotation for word in ("int", "float", "Any", "Window"))

    def parse(text: str) -> Any:
        parts = tuple(_atom(part.strip(), numbers) for part in text.split(",") if part.strip())
        if not parts:
            raise click.BadParameter("give a value")
        return parts[0] if len(parts) == 1 and not (always_tuple and parts[0] is not None) else parts

    return parse


def _atom(text: str, numbers: bool) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float) if numbers else ():
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _option(field: dataclasses.Field[Any], text: str, taken: set[str]) -> click.Option:
    flag = "--" + field.name.replace("_", "-")
    flag = f"--request-{flag[2:]}" if flag in taken else flag
    annotation = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    annotation = annotation.strip("\"'")
    names = [_PREFIX + field.name, f"{flag}/--no-{flag[2:]}" if annotation == "bool" else flag]
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    if annotation == "bool":
        return click.Option(names, default=None, required=required, help=_help(text, field))
    kind, metavar = _KINDS.get(annotation) or (_literal(annotation), _METAVARS.get(annotation, "VALUE"))
    return click.Option(names, type=kind, required=required, metavar=metavar, help=_help(text, field))


def _help(text: str, field: dataclasses.Field[Any]) -> str:
    default = field.default
    if default in (dataclasses.MISSING, None) or default is False:
        return text
    shown = "none" if default == (None, None) else "yes" if default is True else str(default)
    return f"{text}  [default: {shown}]".strip()


def _field_helps(request: type[Request]) -> dict[str, str]:
    """Field to what the ``Fields:`` section of the request's docstring says, as ``a, b: text.``, about it."""
    section = (request.__doc__ or "").partition("Fields:")[2].partition("Raises:")[0]
    section = re.sub(r"\s+", " ", section).strip()
    known = {f.name for f in dataclasses.fields(request)}
    found = [(m, [n.strip("`") for n in m[1].split(", ")]) for m in _NAMED.finditer(section)]
    found = [(m, names) for m, names in found if set(names) <= known]
    ends = [m.start() for m, _ in found][1:] + [len(section)] * bool(found)
    return {n: _sentence(section[m.end() : end]) for (m, names), end in zip(found, ends, strict=True) for n in names}


def _sentence(text: str) -> str:
    return re.sub(r":\w+:`([^`]+)`", r"\1", text).replace("``", "").strip(" ;.")
