"""The command that starts a model: `eve init` turns a language model into an encoder-free one.

The options are the sizes of the new patch embedding layer; the decoder stays as it is.  The work is
in `eve_vlm.initialize`, imported inside so that `eve --help` does not wait for it.
"""

from pathlib import Path
from typing import Annotated

import typer


def init(
    llm: Annotated[str, typer.Option(help="A decoder's Hub id, folder or GGUF file.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    patch_size: Annotated[int, typer.Option(min=1, help="Side of a patch in pixels.")] = 14,
    merge_size: Annotated[
        int, typer.Option(min=1, help="Patches per side that become one token.")
    ] = 2,
    width: Annotated[int, typer.Option(min=1, help="Width of the patch embedding layer.")] = 1024,
    heads: Annotated[int, typer.Option(min=1, help="Heads of its attentions.")] = 8,
    projector_depth: Annotated[
        int, typer.Option(min=1, help="Linear layers of the projector.")
    ] = 2,
    longest_edge: Annotated[
        int | None, typer.Option(help="Longer side of every picture in pixels; 672 if left out.")
    ] = None,
    min_image_tokens: Annotated[
        int | None, typer.Option(help="A picture takes at least so many tokens; it is enlarged.")
    ] = None,
    max_image_tokens: Annotated[
        int | None, typer.Option(help="A picture takes at most so many tokens; it is made smaller.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the decoder's if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new weights.")] = 0,
    chat_template: Annotated[
        str | None,
        typer.Option(help="vicuna, chatml or a Jinja file, instead of the decoder's own."),
    ] = None,
) -> None:
    """Make an encoder-free vision-language model from a language model.

    eve init --llm Qwen/Qwen3-0.6B --out my-model
    """
    from eve_vlm.configuration_eve import EveVisionConfig
    from eve_vlm.decoders.initialize import initialize

    made = initialize(
        llm,
        out,
        vision=EveVisionConfig(
            patch_size=patch_size,
            merge_size=merge_size,
            hidden_size=width,
            num_attention_heads=heads,
        ),
        projector_depth=projector_depth,
        longest_edge=longest_edge,
        min_image_tokens=min_image_tokens,
        max_image_tokens=max_image_tokens,
        dtype=dtype,
        seed=seed,
        chat_template=chat_template,
    )
    parts = ", ".join(f"{name} {count:,}" for name, count in made.parameters.items() if count)
    side, cells, tokens = made.square
    typer.echo(f"{made.folder}: a new model on a {made.kind} decoder, which is as it was.")
    typer.echo(f"parameters   {sum(made.parameters.values()):,}: {parts}")
    typer.echo(
        f"placeholder  {made.placeholder.token} (id {made.placeholder.id}), {made.placeholder.why}"
    )
    typer.echo(
        f"pictures     a large square one becomes {side} x {side} pixels, {cells} x {cells} cells, "
        f"{tokens} tokens"
    )
    for note in made.notes:
        typer.echo(f"note         {note}")
    typer.echo(f"The patch embedding layer knows nothing yet. Next:\n  {made.next_step}")


__all__ = ["init"]
