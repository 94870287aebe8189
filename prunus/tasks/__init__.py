"""Zero-shot tasks through lm-eval: its prompts and scores, our way through the model."""
