"""A page to try an exported model: `python -m serkd_jax.page --model=DIR`, then open its address.

Record or upload speech to see its emotions, overall and over time. The page can be reached only
from this machine, unless --host says otherwise, and keeps no recording for more than an hour.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serkd_jax.data.tables import markdown_cell
from serkd_jax.deploy.model import Model, Window, load_model
from serkd_jax.errors import UserError
from serkd_jax.predict import add_model_options

# Every 300 s, Gradio deletes what was uploaded more than 3300 s ago.
CLEANING = (300, 3300)


def build_page(model: Model) -> Any:
    """Makes the page, a `gradio.Blocks`, which shows a recording's and its windows' emotions."""
    import gradio as gr
    import pandas as pd

    def classify(recording: str | None) -> tuple[dict[str, float], Any]:
        if recording is None:
            raise gr.Error("Record or upload some speech first.")
        try:
            prediction = model(recording, hop_seconds=model.window_seconds / 4)
        except UserError as error:
            # Of the server's temporary folder, which means nothing to who reads it.
            told = str(error).replace(recording, Path(recording).name)
            raise gr.Error(told) from error
        for notice in prediction.notices:
            gr.Info(f"{Path(recording).name}: {notice}")
        course = [
            {"seconds": time, "emotion": label, "probability": value}
            for window in prediction.windows
            for time in _times(window, len(prediction.windows))
            for label, value in window.probabilities.items()
        ]
        return prediction.probabilities, pd.DataFrame(course)

    with gr.Blocks(title="Speech emotion", analytics_enabled=False, delete_cache=CLEANING) as page:
        gr.Markdown(
            "# Speech emotion\nWhat a voice sounds like to a small model, not what a person feels. "
            f"It knows {', '.join(map(markdown_cell, model.labels))}, and hears "
            f"{model.window_seconds:.1f} s at once."
        )
        recording = gr.Audio(sources=["microphone", "upload"], type="filepath", label="Speech")
        button = gr.Button("Classify", variant="primary")
        with gr.Row():
            whole = gr.Label(label="The whole recording")
            course = gr.LinePlot(
                x="seconds",
                y="probability",
                color="emotion",
                y_lim=[0, 1],
                x_title="seconds (middle of the window)",
                label="Over time",
            )
        button.click(classify, recording, [whole, course], api_name="classify")
    return page


def _times(window: Window, count: int) -> list[float]:
    """Returns where a window is drawn: at its middle, or as a level line if it is the only one."""
    return [window.start, window.end] if count == 1 else [(window.start + window.end) / 2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves the page until it is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m serkd_jax.page", description=__doc__)
    add_model_options(parser, max_seconds=600)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for the whole network")
    parser.add_argument("--port", type=int, default=7860)
    flags = parser.parse_args(arguments)
    try:
        model = load_model(
            flags.model, flags.format, revision=flags.revision, max_seconds=flags.max_seconds
        )
        build_page(model).launch(
            server_name=flags.host, server_port=flags.port, max_file_size="100mb"
        )
    except ImportError as error:
        print(f'error: no {error.name}: pip install "serkd-jax[page]"', file=sys.stderr)
        return 1
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
