"""What turns a model's name into a decoder: references, downloads, checkpoints, layers.

No scheduling and no sampling here; a model knows neither requests nor graphs.
"""
