"""What the JSON files of results hold: of a run, a comparison, a reconstruction, the check of a dataset."""

from __future__ import annotations

from typing import NamedTuple, NotRequired, TypedDict

Metrics = dict[str, float | str]
"""`metrics.json`: numbers by their names, and in words what they depend on: the device, the versions."""


TESTED = "test/images"
"""Of a run that did not test all of its test images, how many it tested."""
LEFT_OUT = "test/images_left_out"
"""Of the same, how many it left out."""


class Counts(TypedDict):
    """`parameters.json`: the numbers of parameters, by kind."""

    coefficients: int
    adapter: int
    buffers: int
    """Running statistics of the task."""
    backbone_trained: int
    adapter_norm: int
    """Of `adapter`, the scales and shifts of the backbone's own normalisation layers."""
    task_specific: int
    """The sum of the first four."""
    head: int
    templates: int
    template_bits: NotRequired[int]
    """The size of `templates`, with their scales; not in runs of earlier versions."""
    frozen: int
    total: int
    task_bits: int
    """The size of `task_specific`."""
    task_file_bytes: int
    layers: dict[str, dict[str, int]]
    """Layer → kind → trained parameters, for each layer that has any."""


class Results(NamedTuple):
    """The results of a finished run."""

    metrics: Metrics
    parameters: Counts


_Measured = TypedDict(
    "_Measured",
    {
        "val/accuracy": float,
        "val/accuracy/spread": float,
        "test/accuracy": float,
        "test/accuracy/spread": float,
        "seconds/spread": float,
    },
)


class Compared(_Measured):
    """A row of `comparison.json`: mean and spread over a method's seeds or draws, and what a task takes."""

    runs: int
    task_specific: int
    task_bits: int
    head: int
    seconds: float


class SequenceRow(TypedDict):
    """A method in `sequence.json`; null where a number is not defined for it.

    Attributes:
        known: Mean over the tasks of the test accuracy after the last one, the task of an image being known.
        forgetting: Mean over the tasks but the last of what that is below their best accuracy before.
        unknown: The same accuracies, the task of an image not being known.
        parameters: Trained parameters of all tasks together, without heads; 0 for features of the frozen backbone.
        heads: Parameters of the heads of all tasks.
    """

    method: str
    known: float
    forgetting: float
    unknown: float | None
    parameters: int
    heads: int


class Sequenced(TypedDict):
    """`sequence.json`.

    Attributes:
        tasks: Names of the tasks, in order.
        accuracy: R: row i has the test accuracies of the tasks 0 to i after task i was trained.
        identical: Whether each task's predictions were the same bit for bit after every later one.
        backward_transfer: Mean of R[T, j] - R[j, j].
        forward_transfer: Mean of R[i, i] minus the accuracy from the pretrained start; null for that start.
        methods: The methods next to each other.
        unknown: Method → its accuracy on images of unknown task, after each task.
        parameters: Trained parameters of each task, without its head.
        bytes: Sizes of the task files.
        seconds: Of training each task.
    """

    tasks: list[str]
    accuracy: list[list[float]]
    identical: bool
    backward_transfer: float
    forward_transfer: float | None
    methods: list[SequenceRow]
    unknown: dict[str, list[float]]
    parameters: list[int]
    bytes: list[int]
    seconds: list[float]


class Reconstruction(TypedDict):
    """`reconstruction.json`: the bank, and how close it comes; of all layers the worst, and each layer."""

    bank: str
    hash: str
    seconds: float
    settings: dict[str, object]
    relative_error: float
    max_error: float
    cosine_similarity: float
    feature_similarity: float
    layers: dict[str, dict[str, float]]


class MergedTask(TypedDict):
    """A row of `merged.json`: a task among others."""

    task: str
    error: float
    """How far its change of the weights is from what it was, relative."""
    averaged: float
    """The same with the mean of all tasks instead."""
    similarity: dict[str, float]
    """Cosine similarity of its change to that of each other task."""
    bytes: int
    """Size of its task file, without the templates that all share."""


class BankSize(TypedDict):
    """A row of `bank_sizes.json`: a bank, and what it costs."""

    num_templates: int
    solver: str
    dtype: str
    share: float
    """Size of the bank as a share of the weights that it replaces, in float32."""
    output_error: float
    """Of the layers' outputs on validation images, relative; the mean over the layers."""
    layer_similarity: float
    """Cosine similarity of the same outputs."""
    feature_similarity: float
    """Cosine similarity of the features of the validation images."""
    head_accuracy: float
    """Of the best solved head, on the validation images."""


class Sizes(TypedDict, total=False):
    """Heights or widths of images, in pixels; empty without images."""

    min: int
    median: float
    max: int


class Copies(TypedDict):
    """Images that a dataset has more than once, byte for byte."""

    seen_before: dict[str, int]
    """Split → its images that an earlier split has, too: validation images of training, test images of either."""
    other_classes: int
    """Images that are in more than one class."""
    groups: list[list[str]]
    """Files or numbers of the images that are the same; the first hundred groups."""


class Inspection(TypedDict):
    """`check.json`: what a dataset holds, before anything is chosen from it."""

    verified: bool
    official_classes: int
    classes: int
    official_images: dict[str, int]
    height: Sizes
    width: Sizes
    bad: dict[str, str]
    """Path → what is wrong with the image."""
    unread: dict[str, int]
    """Number of files with each extension that is not read, and of skipped folders (`@eaDir/`)."""
    copies: Copies
