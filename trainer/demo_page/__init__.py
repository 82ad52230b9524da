"""Build the page of ``trainer.demo``: what it does stands apart from gradio, which only ``page`` and ``server`` use."""
