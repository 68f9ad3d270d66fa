"""What is where on the page of `eve demo`: its columns and components, all empty.

How they look is in `page.css`, and what happens with them in `page.py`.  Easy to get wrong: Gradio
would load fonts from elsewhere and offer to share pictures; neither may be, because the page works
without a network and keeps what it is shown to itself.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from .engine import EveEngine
from .page_parts import LIMITS, MEAN, Example, Visit

NO_PICTURE = "<p>Add a picture to see the tokens that it becomes.</p>"
NO_ANSWER = "<p>After an answer, choose one of its words.</p>"
EMPTY_CHAT = "**Ask about a picture.**\n\nAdd one below with the clip, or begin with an example."
METHODS = (("attention", "attention"), ("gradient x attention", "gradient"))


class PageLayout:
    """The components.

    Args:
        engine: the model, whose sizes the choices have.
        name: of the model.
        examples: what a newcomer can begin with.
        folder: for the examples' pictures.
    """

    def __init__(self, engine: EveEngine, *, name: str, examples: Sequence[Example], folder: Path):
        import gradio as gr

        self.engine = engine
        self.examples = [(str(folder / f"example-{n}.png"), one) for n, one in enumerate(examples)]
        for file, example in self.examples:
            example.picture.save(file)
        self.blocks = gr.Blocks(
            title=f"{name} · EVE",
            analytics_enabled=False,
            fill_width=True,
            delete_cache=(3600, 24 * 3600),  # seconds: pictures of visitors who left
        )
        with self.blocks:
            self.visit = gr.State(Visit())
            gr.HTML(_header(name), elem_id="eve-header", padding=False)
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    self._add_chat()
                    self._add_settings()
                with gr.Column(scale=4, min_width=320):
                    self._add_tokens()
                with gr.Column(scale=4, min_width=320):
                    self._add_looked()

    def _add_chat(self) -> None:
        import gradio as gr

        _title("Chat")
        self.chat = gr.Chatbot(
            label="Chat",
            show_label=False,
            height=400,
            buttons=[],
            placeholder=EMPTY_CHAT,
            render_markdown=False,  # a picture in a model's Markdown would be fetched
            examples=[
                {"icon": file, "display_text": one.question, "text": one.question}
                for file, one in self.examples
            ],
            elem_id="eve-chat",
        )
        self.box = gr.MultimodalTextbox(
            show_label=False,
            placeholder="Ask about a picture ...",
            file_count="multiple",
            file_types=["image"],
            sources=["upload"],
            max_plain_text_length=LIMITS.max_text,  # longer words would be pasted as a file
            autofocus=True,
            elem_id="eve-box",
        )
        self.clear_button = gr.Button("Clear", size="sm", elem_id="eve-clear")

    def _add_settings(self) -> None:
        import gradio as gr

        most = min(LIMITS.max_tokens, self.engine.max_length)
        with gr.Accordion("Settings", open=False, elem_id="eve-settings"):
            self.temperature = gr.Slider(
                0,
                2,
                0,
                step=0.05,
                label="Temperature",
                info="0 takes the likeliest token; above, tokens are drawn.",
            )
            self.seed = gr.Number(
                None, precision=0, label="Seed", info="The same one draws the same answer."
            )
            self.longest = gr.Slider(
                1, most, min(256, most // 4), step=1, label="Longest answer, in tokens"
            )
            self.budget = gr.Number(
                None,
                precision=0,
                label="Most tokens for each picture",
                info="Left empty, the model's own.",
                elem_id="eve-budget",
            )

    def _add_tokens(self) -> None:
        import gradio as gr

        _title("What the model reads")
        self.which = gr.Radio([], label="Picture", visible=False, elem_id="eve-which")
        self.grid = gr.Image(
            label="The picture as tokens",
            show_label=False,
            format="png",
            interactive=False,
            buttons=["fullscreen", "download"],
            height=300,
            elem_id="eve-grid",
        )
        self.sum = gr.HTML(NO_PICTURE, elem_id="eve-sum", elem_classes="eve-note", padding=False)
        self.figures = gr.HTML("", elem_id="eve-figures", padding=False)

    def _add_looked(self) -> None:
        import gradio as gr

        config = self.engine.model.config.text_config
        _title("Where it looked")
        self.words = gr.Radio(
            [], show_label=False, container=False, visible=False, elem_id="eve-words"
        )
        self.heat = gr.Image(
            label="Where it looked",
            show_label=False,
            format="png",
            interactive=False,
            buttons=["fullscreen", "download"],
            height=300,
            elem_id="eve-heat",
        )
        self.scale = gr.HTML(NO_ANSWER, elem_id="eve-scale", elem_classes="eve-note", padding=False)
        with gr.Accordion("Which attention", open=False, elem_id="eve-which-attention"):
            self.method = gr.Radio(
                METHODS,
                value="attention",
                label="What is drawn",
                info="The weights themselves, or how far they made the word likelier.",
            )
            self.layer = gr.Dropdown(_numbered("layer", config.num_hidden_layers), label="Layer")
            self.head = gr.Dropdown(_numbered("head", config.num_attention_heads), label="Head")


def _header(name: str) -> str:
    return (
        f"<h1>{escape(name)}</h1><p>This model has no image encoder: it reads a picture as a grid "
        "of tokens, like words. Ask about a picture, then choose a word of the answer to see where "
        "the model looked.</p>"
    )


def _title(text: str) -> None:
    import gradio as gr

    gr.HTML(f"<h2>{text}</h2>", elem_classes="eve-title", padding=False)


def _numbered(name: str, count: int) -> list[tuple[str, int]]:
    """Choices of a layer or head."""
    return [(f"mean of all {count} {name}s", MEAN), *((f"{name} {n}", n) for n in range(count))]


__all__ = ["NO_ANSWER", "NO_PICTURE", "PageLayout"]
