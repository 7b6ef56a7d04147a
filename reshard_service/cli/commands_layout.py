"""``reshard layout check``: is a layout valid for a model or a checkpoint?"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from reshard_service.cli.options import Json
from reshard_service.cli.output import print_json, say
from reshard_service.errors import LayoutInvalid, UsageError

layout_app = typer.Typer(help="Questions about layouts.", no_args_is_help=True, rich_markup_mode=None)


@layout_app.callback()
def _layout() -> None:
    """Questions about layouts."""


@layout_app.command("check")
def check_command(
    layout: Annotated[str, typer.Argument(metavar="LAYOUT", help="fsdp=4,tp=2,… or a layout document's path")],
    model: Annotated[
        str, typer.Option(metavar="CONFIG", help="a model's config.json (or its folder), or a checkpoint")
    ] = "",
    json: Json = False,
) -> int:
    """Is this layout valid for this model or checkpoint? Names, dims and the nearest sizes that would be."""
    from reshard_service.layouts.check import check_config, check_layout
    from reshard_service.layouts.shorthand import parse_layout

    if not model:
        raise UsageError("--model is needed: a config.json, a model folder or a checkpoint")
    config = _config(model)
    catalogue = _catalogue(model)
    if config is None and catalogue is None:
        raise UsageError(f"--model {model!r} is neither a config.json nor a checkpoint")
    try:
        parsed = parse_layout(layout, rules_known=True)
    except LayoutInvalid as error:
        return _contradicts_itself(error, json)
    problems = [] if config is None else list(check_config(parsed, config))
    if catalogue is not None and (parsed.document.rules or config is None):
        problems += check_layout(parsed, [(tensor.identity.fqn, tensor.shape) for tensor in catalogue])
    bad = [problem for problem in problems if problem.severity == "error"]
    checked = "the checkpoint's tensors" if config is None else "the dims in config.json"
    if catalogue is not None and config is not None:
        checked += " and the checkpoint's tensors"
    if json:
        print_json(
            {
                "valid": not bad,
                "world": parsed.world,
                "checked": checked,
                "problems": [_document(problem) for problem in problems],
            }
        )
        return 1 if bad else 0
    say(f"{'INVALID' if bad else 'valid'}: {parsed.world} ranks; checked only {checked}")
    for problem in problems:
        say(f"  {problem.severity}: {problem.name}: {problem.reason}" + (f" ({problem.fix})" if problem.fix else ""))
    return 1 if bad else 0


def _contradicts_itself(error: LayoutInvalid, json: bool) -> int:
    """A layout that is valid for no model at all."""
    if json:
        problem = {"code": error.code, "severity": "error", "name": "layout", "reason": error.message}
        problem |= {"fix": error.hint} if error.hint else {}
        print_json({"valid": False, "world": None, "checked": "the layout itself", "problems": [problem]})
    else:
        say(f"INVALID: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    return 1


def _document(problem: Any) -> dict[str, Any]:
    fields = ("code", "severity", "name", "reason", "at", "fix")
    return {field: getattr(problem, field) for field in fields if getattr(problem, field) is not None}


def _config(model: str) -> dict[str, Any] | None:
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file() or path.suffix != ".json" or path.name.endswith(".index.json"):
        return None
    try:
        config = jsonlib.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{str(path)!r} is not a model's config: it holds no mapping")
    return config


def _catalogue(model: str) -> Any:
    """The model's tensors of a checkpoint at ``model``; None if there is none."""
    from reshard_service.catalogue import Section
    from reshard_service.conversion import open_source
    from reshard_service.documents.job import SourceDocument
    from reshard_service.documents.reading import validated
    from reshard_service.errors import InputRefused

    if Path(model).is_file() and model.endswith(".json"):
        return None
    try:
        catalogue = open_source(validated(SourceDocument, {"uri": model}, "--model"))
    except InputRefused:
        if Path(model).is_dir() and (Path(model) / "config.json").is_file():
            return None
        raise
    return [tensor for tensor in catalogue.tensors if tensor.identity.section is Section.MODEL]
