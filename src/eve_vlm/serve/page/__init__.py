"""The page of `eve demo`, on Gradio."""
