"""Trained tasks in the formats of other programs. A format is a module with a function `write`.

Each export holds, next to the weights, the names of the classes, the preprocessing, and where the weights come from.
Imports nothing heavy.
"""

FORMATS = {
    "timm": "timm_weights",
    "onnx": "onnx_graph",
    "torch_export": "torch_program",
    "huggingface": "huggingface",
}
"""Format → its module in this package."""
