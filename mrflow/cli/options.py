"""How a model is loaded, in the words of the command line: once, for every verb that loads one."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from mrflow.cli.parsing import load_model

if TYPE_CHECKING:
    from mrflow.backbone import Backbone


@dataclass(frozen=True)
class ModelOptions:
    """Each field is an option; a verb that takes `options: ModelOptions` and is `with_model_options` has them all."""

    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "auto"
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16 (default: the files' own).")
    ] = None
    offload: Annotated[
        str, typer.Option("--offload", help="none, phase or block: weights leave the device when idle.")
    ] = "none"
    storage: Annotated[str | None, typer.Option("--storage", help="fp8: keep the blocks' matrices in 8 bits.")] = None
    vae: Annotated[str | None, typer.Option("--vae", help="The autoencoder, where it is not beside the model.")] = None
    text: Annotated[
        str | None, typer.Option("--text", help="Text encoders and tokenizers, where not beside the model.")
    ] = None
    compile: Annotated[bool, typer.Option("--compile", help="Compile each block with torch.compile.")] = False
    lora: Annotated[
        list[str] | None, typer.Option("--lora", help="A LoRA to merge into the weights: FILE or FILE:STRENGTH.")
    ] = None

    def load(self, model: str) -> "Backbone":
        """The model, as `mrflow.load` finds it.

        Raises:
            PlanError: an option cannot be. WeightsError: there is no such model.
        """
        return load_model(
            model, self.device, self.dtype, self.offload, self.storage, self.vae, self.text, self.compile, self.lora
        )


def with_model_options(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the fields of `ModelOptions` as options, in place of its parameter `options`."""
    hints = get_type_hints(ModelOptions, include_extras=True)
    names = [field.name for field in fields(ModelOptions)]
    usual = {field.name: field.default for field in fields(ModelOptions)}
    own = [p for p in inspect.signature(verb).parameters.values() if p.name != "options"]
    kind = inspect.Parameter.KEYWORD_ONLY
    more = [inspect.Parameter(name, kind, default=usual[name], annotation=hints[name]) for name in names]

    @wraps(verb)
    def call(**given: Any) -> None:  # noqa: ANN401
        words = {name: given.pop(name) for name in names}
        verb(options=ModelOptions(**words), **given)

    call.__signature__ = inspect.Signature([*(p.replace(kind=kind) for p in own), *more])  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in (*own, *more)}
    return call
