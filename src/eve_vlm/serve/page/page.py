"""What happens on the page of `eve demo`: questions, answers, pictures, words.

What is where on the page is in `layout.py`, and what it shows in `parts.py`.  Easy to get
wrong: these functions run for every visitor, so what belongs to one of them is in `Visit` and
nowhere else; and they give back those components only that change.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from html import escape
from typing import Any

from eve_vlm.serve.page.layout import NO_ANSWER, NO_PICTURE, PageLayout
from eve_vlm.serve.page.parts import (
    WHOLE,
    View,
    Visit,
    answer_figures,
    check_pictures,
    draw_heat,
    draw_tokens,
    figures_html,
    grid_html,
    pieces_of,
    prompt_figure,
    shown_turns,
)
from eve_vlm.serve.reply import Answer
from eve_vlm.serve.sampling import Sampling
from eve_vlm.serve.worker import Worker

Update = dict[Any, Any]  # what a function of the page gives back: components and what they get

NOTHING: Any = {"text": "", "files": []}  # in the box; None breaks it in the browser
NOTHING_SEEN = "<p>The answer has no words about a picture.</p>"
CHOOSE = "<p>Choose a word of the answer to see where the model looked when it said it.</p>"


class Page(PageLayout):
    """The page, and what happens when somebody uses it.

    Args:
        worker: answers; several visitors are answered together.
        settings: of `PageLayout`.
    """

    def __init__(self, worker: Worker, **settings: Any):
        super().__init__(worker.engine, **settings)
        self.worker = worker
        with self.blocks:
            self._add_events()

    def _add_events(self) -> None:
        import gradio as gr

        settings = [self.temperature, self.seed, self.longest, self.budget]
        answering: Any = {
            "fn": self.ask,
            "inputs": [self.visit, self.box, *settings],
            "outputs": [
                *(self.chat, self.box, self.figures, self.words, self.heat, self.scale),
                *(self.which, self.grid, self.sum),
            ],
            "show_progress": "hidden",
            # Without it, one visitor would wait for another.
            "concurrency_limit": self.engine.batch_size,
            "concurrency_id": "ask",
            # A question right behind an answer counts; one during an answer is refused in `ask`.
            "trigger_mode": "multiple",
            "api_visibility": "private",
        }
        quick: Any = {
            "show_progress": "hidden",
            "concurrency_limit": None,
            "api_visibility": "private",
        }
        seen = [self.which, self.grid, self.sum]
        self.box.submit(**answering)

        def example(chosen: gr.SelectData) -> Update:
            return self.example(chosen.index)

        chosen = self.chat.example_select(example, None, [self.box], **quick)
        chosen.then(**answering)
        self.box.stop(self.stop, [self.visit], None, queue=False, **quick)
        self.box.change(self.add, [self.visit, self.box, self.budget], [self.box, *seen], **quick)
        gr.on(
            [self.clear_button.click, self.chat.clear],
            self.clear,
            [self.visit],
            [self.visit, *answering["outputs"]],
            **quick,
        )
        gr.on(
            [self.which.input, self.budget.change],
            self.choose_picture,
            [self.visit, self.which, self.budget],
            seen,
            **quick,
        )
        gr.on(
            [one.input for one in (self.words, self.which, self.method, self.layer, self.head)],
            self.choose_word,
            [self.visit, self.words, self.which, self.method, self.layer, self.head],
            [self.heat, self.scale],
            show_progress="minimal",
            show_progress_on=[self.heat],
            concurrency_limit=1,  # the model is one, too
            api_visibility="private",
        )

    # --- what happens ---

    async def ask(
        self,
        visit: Visit,
        asked: dict[str, Any],
        temperature: float,
        seed: int | None,
        longest: int,
        budget: int | None,
    ) -> AsyncGenerator[Update, None]:
        """Answers what is in the box, bit by bit."""
        import gradio as gr

        if visit.asking is not None:
            gr.Warning("The model is still answering; wait for it, or stop it.")
            yield gr.skip()  # nothing at all would empty the page
            return
        said, answer = "", None
        visit.asking = visit.turns  # before anything is waited for: Enter may be pressed twice
        try:
            sampling = Sampling(
                temperature=temperature,
                seed=seed,
                max_new_tokens=longest,
                max_image_tokens=budget,
            )
            messages = await asyncio.to_thread(visit.question, asked["text"], asked["files"])
            visit.asking = messages
            async with aclosing(pieces_of(self.worker, visit, messages, sampling)) as pieces:
                async for new in pieces:
                    if visit.closed:
                        break
                    if not new:  # the prompt is read, and nothing is said yet
                        yield self._begun(visit)
                        continue
                    said += "".join(piece.text for piece in new)
                    answer = new[-1].answer
                    yield {self.chat: shown_turns(messages, said)}
            if visit.closed or answer is None:
                yield self._emptied()  # as `clear` does, because who is shown last is not certain
                return
            stays = visit.answered(self.engine, messages, answer, budget)
            visit.asking = None  # before the page shows that it is done
            yield self._ended(visit, None if stays else asked, answer)
        except (ValueError, RuntimeError) as error:
            gr.Warning(escape(str(error)))
            yield self._ended(visit, asked, None)
        finally:
            visit.asking = None

    def _begun(self, visit: Visit) -> Update:
        """The question is read, and nothing is said yet."""
        import gradio as gr

        assert visit.reply is not None and visit.asking is not None
        prompt = visit.reply.prompt
        return {
            self.chat: shown_turns(visit.asking, ""),
            self.box: gr.MultimodalTextbox(value=NOTHING, submit_btn=False, stop_btn=True),
            self.figures: figures_html([prompt_figure(len(prompt), prompt.image_tokens)]),
            **self._no_words(NO_ANSWER),
        }

    def _ended(self, visit: Visit, asked: dict[str, Any] | None, answer: Answer | None) -> Update:
        """After an answer, or a question that goes back into the box."""
        import gradio as gr

        # Without a value the box keeps what the visitor has begun to write meanwhile.
        back: dict[str, Any] = {} if asked is None else {"value": asked}
        update: Update = {
            self.chat: shown_turns(visit.turns),
            self.box: gr.MultimodalTextbox(submit_btn=True, stop_btn=False, **back),
        }
        if answer is None or visit.looked is None:
            return update
        words = visit.looked.words
        choices = [("whole answer", WHOLE), *((w.text.strip(), n) for n, w in enumerate(words))]
        update |= {self.figures: figures_html(answer_figures(answer))}
        if not words:
            return update | self._no_words(NOTHING_SEEN)
        return update | {
            self.words: gr.Radio(choices=choices, value=None, visible=True),
            self.scale: CHOOSE,
        }

    def _no_words(self, why: str) -> Update:
        import gradio as gr

        words = gr.Radio(choices=[], value=None, visible=False)
        return {self.words: words, self.heat: None, self.scale: why}

    def stop(self, visit: Visit) -> None:
        """Ends the answer at its next token; what was said stays."""
        if visit.reply is not None:
            visit.reply.cancel()

    async def clear(self, visit: Visit) -> Update:
        """Begins anew, when an answer in the making has ended.

        Gradio's own way to cancel an event forgets the first of two of the same kind (6.31).
        """
        visit.closed = True
        self.stop(visit)
        while visit.asking is not None:
            await asyncio.sleep(0.02)
        return {self.visit: Visit(), **self._emptied()}

    def _emptied(self) -> Update:
        import gradio as gr

        return {
            self.chat: [],
            self.box: gr.MultimodalTextbox(value=NOTHING, submit_btn=True, stop_btn=False),
            self.figures: "",
            **self._no_words(NO_ANSWER),
            **self._seen(Visit(), None, None),
        }

    def example(self, number: int) -> Update:
        """Puts an example into the box."""
        file, one = self.examples[number]
        return {self.box: {"text": one.question, "files": [file]}}

    def add(self, visit: Visit, asked: dict[str, Any], budget: int | None) -> Any:
        """Looks at pictures that came into the box or left it."""
        import gradio as gr

        files, before = asked["files"], visit.files
        added = [file for file in files if file not in visit.waiting]
        update: Update = {}
        try:
            check_pictures(files, earlier=len(before) - len(visit.waiting), unread=added)
        except ValueError as error:
            gr.Warning(escape(str(error)))
            files = [file for file in files if file in visit.waiting]
            update = {self.box: {"text": asked["text"], "files": files}}
        visit.waiting = files
        if visit.files != before:
            update |= self._seen(visit, None, budget)
        return update or gr.skip()

    def choose_picture(self, visit: Visit, which: int | None, budget: int | None) -> Update:
        """Shows another picture's tokens."""
        return self._seen(visit, which, budget)

    def _seen(self, visit: Visit, which: int | None, budget: int | None) -> Update:
        """The tokens of one of the pictures; of the last one if none is named."""
        import gradio as gr

        files = visit.files
        if which is None or which >= len(files):
            which = len(files) - 1
        choices = [(str(n + 1), n) for n in range(len(files))]
        radio = gr.Radio(choices=choices, value=max(which, 0), visible=len(files) > 1)
        if not files:
            return {self.which: radio, self.grid: None, self.sum: NO_PICTURE}
        try:
            drawn, grid = draw_tokens(self.engine, files[which], budget)
        except ValueError as error:
            gr.Warning(escape(str(error)))
            return {self.which: radio}
        return {self.which: radio, self.grid: drawn, self.sum: grid_html(grid)}

    def choose_word(
        self,
        visit: Visit,
        word: int | None,
        which: int | None,
        method: str,
        layer: int,
        head: int,
    ) -> Any:
        """Shows where the model looked."""
        import gradio as gr

        if visit.looked is None or word is None:
            return gr.skip()
        view = View(method=method, layer=layer, head=head)
        try:
            drawn, text = draw_heat(self.worker, visit.looked, word, which or 0, view)
        except ValueError as error:
            gr.Warning(escape(str(error)))
            return gr.skip()
        return {self.heat: drawn, self.scale: text}


__all__ = ["Page"]
