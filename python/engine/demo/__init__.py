"""The bundled model: a toy that answers real questions, the corpus it learned from, and its trainer.

`MODEL_DIR` is what the server loads when no model is named. Nothing else here is imported by the
engine: corpus, tokenizer and training script are only for those who repeat or change the recipe.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
