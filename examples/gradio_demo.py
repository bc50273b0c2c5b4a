"""A chain behind a page, as a diffusers pipeline: `pip install gradio`, then `python examples/gradio_demo.py`."""

import torch
from PIL.Image import Image

import mrflow as mf

model = mf.load("pocket")
chain = mf.recipes.paper(low=model.info.low, size=model.info.size)
pipeline = mf.to_diffusers(chain, model)


def draw(prompt: str, seed: float) -> Image:
    """One picture of a prompt."""
    return pipeline(prompt, generator=torch.Generator().manual_seed(int(seed))).images[0]


if __name__ == "__main__":
    import gradio as gr

    words = gr.Textbox("a big happy face at the centre", label="Prompt")
    gr.Interface(draw, [words, gr.Number(0, precision=0, label="Seed")], gr.Image(type="pil"), title="mrflow").launch()
