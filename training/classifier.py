"""The parts of a classifier's training: network, tokenizer or preprocessing, and data, from ee-train's
options.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, TextIO

import torch
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from offramp.models.families import family_of
from offramp.models.network import EarlyExitNetwork, ExitParts, NetworkSpec, count_blocks, parse_exits
from offramp.models.tasks import CLASSIFICATION, EMBEDDING, MULTI_LABEL, REGRESSION, TASKS
from offramp.runtime.bundle.row_samples import DEV, ROWS_SAMPLE, TRAIN, row_hashes, row_sample
from offramp.runtime.errors import BadSetting
from offramp.runtime.inputs.images import ImageInput
from offramp.training.batches import Encoded, encode_rows, parse_augment
from offramp.training.checkpoint import (
    NETWORK,
    TOKENIZER,
    BadCheckpoint,
    Checkpoint,
    TextFacts,
    load_checkpoint,
    read_json,
    write_checkpoint,
)
from offramp.training.collect import QUALITY, collect, exit_table, label_logits, start_exits
from offramp.training.data import NO_LABEL, Columns, balanced_index, has_label, load_data
from offramp.training.loop import Run
from offramp.training.options import BadModel, TrainConfig
from offramp.training.pretrained import first_line
from offramp.training.recipes import FOR_EVERY_TASK
from offramp.training.recipes.base import ClassifierRecipe, Settings
from offramp.training.user_input import crop_of, resize_of
from offramp.training.user_model import UserModel, load_user_model, match_labels, own_task, without_labels

# ImageNet's mean and standard deviation, for models without a preprocessor.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers


class ClassifierTraining:
    """The parts of a training that only classifiers have; see train.Training.

    Raises BadSetting for options that contradict each other or the data.
    """

    save_every = 0.0

    def __init__(self, config: TrainConfig, recipe: ClassifierRecipe[Settings], settings: Settings) -> None:
        self.config, self.recipe, self.settings = config, recipe, settings
        try:
            self.augment = parse_augment(config.augment)
        except ValueError as problem:
            raise BadSetting(f"--augment {problem}") from problem
        columns = Columns(config.text_column, config.text_b_column, config.label_column, config.image_column)
        self.data = load_data(
            config.data, columns, task=chosen_task(config), labels_needed=recipe.NEEDS_LABELS
        )
        self._refuse_other_tasks()
        if not self.data.has_images and (self.augment or config.no_crop):
            raise BadSetting(f"--augment and --no-crop are for images, and {config.data} holds text")
        self.data.split("train")  # BadData if there is none
        self.row_counts = {name: len(rows) for name, rows in self.data.splits.items()}
        self.data_digest = self.data.digest()
        self.facts: dict[str, Any] = {}

    def _refuse_other_tasks(self) -> None:
        """Raise BadSetting for a recipe or an option that the task has not."""
        name, task = self.recipe.__name__.rpartition(".")[2], self.data.task
        if task == CLASSIFICATION:
            return
        if name not in FOR_EVERY_TASK:
            raise BadSetting(
                f"recipe {name} is for {CLASSIFICATION}, the task is {task}; choose one of "
                f"{', '.join(FOR_EVERY_TASK)}"
            )
        if task == EMBEDDING and name != "attach":
            raise BadSetting(f"recipe {name} learns from labels, {task} has none; choose attach")
        if self.config.balance:
            raise BadSetting(f"--balance repeats rows by their one label, and the task is {task}")
        if self.config.pooling is not None and TASKS[task].per_token:
            raise BadSetting(f"--pooling {self.config.pooling}: exits of {task} read each token, not a pool")

    def load(self) -> EarlyExitNetwork:
        """Load the network to train, new on a pretrained backbone or from a checkpoint."""
        config, parts = self.config, self.recipe.parts_of(self.settings)
        if config.init is not None:
            if config.image_size is not None or config.no_crop:
                raise BadSetting("--image-size and --no-crop go with --model: a checkpoint has its own")
            if (config.pooling, config.head, config.ensemble) != (None, None, None):
                raise BadSetting("--pooling, --head and --ensemble go with --model: a checkpoint has its own")
            self.checkpoint = load_initial_checkpoint(config.init, parts.policy, config.seed)
            matched, note = match_labels(self.data, self.checkpoint.network.spec.labels)
            if matched is None:
                raise BadCheckpoint(f"{config.init}: {note}")
            self.data = matched
            if note:
                print(f"{config.init}: {note}", file=sys.stderr)
            file = self.checkpoint.tokenizer
            self.tokenizer_json = None if file is None else file.read_text("utf-8")
        else:
            self.checkpoint, self.tokenizer_json = self._new_checkpoint(parts)
        if self.tokenizer_json is not None:
            self.checkpoint.tokenizer = config.partial / TOKENIZER
        return self.checkpoint.network

    def _new_checkpoint(self, parts: ExitParts) -> tuple[Checkpoint, str | None]:
        """A checkpoint with a new network on the user's model, and the tokenizer's JSON if it reads text."""
        config = self.config
        assert config.model is not None
        task = self.data.task
        pairs = any(rows.text_b is not None for rows in self.data.splits.values())
        user = load_user_model(
            config.model,
            config.seed,
            task,
            pairs=pairs,
            image_size=config.image_size,
            no_crop=config.no_crop,
        )
        user = self._with_matching_labels(user)
        network = new_network(
            user,
            self.data.labels,
            task=task,
            exits=config.exits,
            parts=dataclasses.replace(
                parts,
                pooling="none" if TASKS[task].per_token else config.pooling or parts.pooling,
                head=config.head or parts.head,
                ensemble=parts.ensemble if config.ensemble is None else config.ensemble,
            ),
            seed=config.seed,
            image_size=config.image_size,
        )
        if network.family.vision is not None:
            image = image_input(config.model, network, no_crop=config.no_crop)
            return Checkpoint(network, image, None), None
        tokenizer, text = text_input(user.tokenizer)
        if (ids := tokenizer.get_vocab_size()) > network.vocab_size:
            raise BadModel(
                f"{config.model}: its tokenizer has {ids} ids, its embeddings {network.vocab_size}; take the "
                "tokenizer that the model was trained with, or call resize_token_embeddings and save the "
                "model"
            )
        longest = min(text.longest, network.longest, config.max_length)
        text = TextFacts(config.prefix, text.pad_id, longest)
        return Checkpoint(network, text, None), tokenizer.to_str()

    def _with_matching_labels(self, user: UserModel) -> UserModel:
        """The user's model, without its own head if the labels of the data are others than the head's.

        The labels of the data are renumbered as the head numbers them. What is dropped is said on stderr.
        """
        if user.head is None:
            if not any(rows.labelled for rows in self.data.splits.values()):
                raise BadSetting(
                    f"{self.config.data} has no labels, and {user.name} has no trained head that would give "
                    "them; give rows with a label, or a model saved as *ForSequenceClassification; for "
                    f"embeddings say --task {EMBEDDING}"
                )
            return user
        matched, note = match_labels(self.data, user.labels)
        if matched is not None:
            self.data = matched
            if note:
                print(f"{user.name}: {note}", file=sys.stderr)
            return user
        if self.recipe.NEEDS_LABELS:
            print(f"{user.name}: its own head is dropped, a new one is trained: {note}", file=sys.stderr)
            return dataclasses.replace(user, head=None, labels=())
        print(f"{user.name}: the labels of the data are not used: {note}", file=sys.stderr)
        self.data = without_labels(self.data, user.labels)
        return user

    def write_inputs(self) -> None:
        """Write tokenizer.json into the folder of the run, where all processes read it."""
        if self.checkpoint.tokenizer is not None and self.tokenizer_json is not None:
            self.checkpoint.tokenizer.write_text(self.tokenizer_json, encoding="utf-8")

    def run_recipe(self, run: Run[EarlyExitNetwork]) -> dict[str, Any]:
        """Encode the data and run the recipe's phases; gives its entries of training.json."""
        train = encode_rows(self.checkpoint, self.data.splits["train"], self.augment)
        dev = encode_rows(self.checkpoint, self.data.splits["dev"])
        samples = self._row_samples() if run.is_main_process else []  # the main process writes training.json
        if self.config.balance:
            train = self._balanced(train)
        skip_warm_start = self.config.init is not None
        own_head = run.network.spec.own_head
        if not own_head and self.data.task == REGRESSION:
            start_exits(run, torch.from_numpy(train.label))
        if self.data.task == MULTI_LABEL and self.recipe.NEEDS_LABELS:
            start_exits(run, label_logits(train.label))
        known = has_label(dev.label)
        if (
            own_head
            and not skip_warm_start
            and (known.any() if TASKS[self.data.task].per_token else known.all())
        ):
            self.facts["user_model"] = _user_model_figures(run, dev)
        results = self.recipe.train(run, train, dev, self.settings, skip_warm_start=skip_warm_start)
        return {**results, ROWS_SAMPLE: samples}

    def _row_samples(self) -> list[dict[str, Any]]:
        """Samples by hash of the train and dev rows, after those of the checkpoint that the run starts from.

        With them ee-calibrate recognises these rows; see runtime.bundle.row_samples.
        """
        samples = [
            {
                "split": split,
                "data": Path(self.config.data).name,
                "rows": len(self.data.splits[split]),
                "hashes": row_sample(row_hashes(self.data.splits[split].items)),
            }
            for split in (TRAIN, DEV)
        ]
        before = self.checkpoint.training.get(ROWS_SAMPLE)
        return [*(each for each in before if each not in samples), *samples] if before else samples

    def _balanced(self, train: Encoded) -> Encoded:
        """The training rows with those of rarer labels repeated; raises BadSetting without labels."""
        if (train.label == NO_LABEL).any():
            raise BadSetting(f"--balance needs a label at every training row of {self.config.data}")
        index = balanced_index(train.label)
        self.facts["balanced"] = {"rows": len(index)}
        print(f"--balance: {len(train)} training rows become {len(index)}", file=sys.stderr)
        return train.take(index)

    def write(self, folder: Path, training: dict[str, Any]) -> None:
        """Write the checkpoint into an empty folder."""
        self.checkpoint.training = training
        write_checkpoint(self.checkpoint, folder)


def _user_model_figures(run: Run[EarlyExitNetwork], dev: Encoded) -> dict[str, Any]:
    """The quality on dev of the model as the user gave it, computed before anything is trained."""

    def score() -> torch.Tensor:
        collected = collect(run.network, dev, device=run.accelerator.device, description="user model")
        return torch.tensor(exit_table(collected).measure.each[-1])

    quality = QUALITY[run.network.spec.task]
    return {quality: float(run.compute_once("user_model_score", score)), "rows": len(dev)}


def chosen_task(config: TrainConfig) -> str | None:
    """The task by --task, by the checkpoint of --init, or by the model's trained head; None: by the data.

    Raises BadSetting if --task is another one than that of the checkpoint.
    """
    if config.init is None:
        return config.task or own_task(str(config.model))
    network = Path(config.init) / NETWORK
    if not network.is_file():
        return config.task  # load_checkpoint will say what is missing
    task: str = read_json(network)["network"].get("task", CLASSIFICATION)
    if config.task not in (None, task):
        raise BadSetting(f"--task {config.task}: {config.init} was trained for {task}")
    return task


def new_network(
    user: UserModel,
    labels: tuple[str, ...],
    *,
    task: str = CLASSIFICATION,
    exits: str,
    parts: ExitParts,
    seed: int,
    image_size: int | None = None,
) -> EarlyExitNetwork:
    """A network with new exits and policies, of random weights by `seed`, on a user's model.

    The user's own head, if there is one, is the last exit. image_size: side of the images that the network
    will read; None for the model's. Raises BadSetting.
    """
    _resize(user.backbone, user.name, image_size)
    try:
        blocks = parse_exits(exits, count_blocks(user.backbone.config))
    except ValueError as problem:
        raise BadSetting(f"--exits {exits}: {problem}") from problem
    facts = {"task": task, "unit": user.unit, "own_head": user.head is not None}
    if task == EMBEDDING and user.head is not None:
        facts["embedding_pooling"] = user.head.own_pool.reads
    torch.manual_seed(seed)
    vision = family_of(user.backbone.config.model_type).vision
    if parts.pooling == "cls" and vision is not None and vision.prefix(user.backbone.config) == 0:
        raise BadSetting(f"--pooling cls: {user.name} has no token before its patches; say mean or attention")
    try:
        spec = NetworkSpec(labels, blocks, **dataclasses.asdict(parts) | facts)
        return EarlyExitNetwork(user.backbone, spec, user.head)
    except ValueError as problem:  # parts of exits that this task or this family has not
        raise BadSetting(f"{user.name}: {problem}") from problem


def _resize(backbone: PreTrainedModel, model: str, size: int | None) -> None:
    if size is None:
        return
    vision = family_of(backbone.config.model_type).vision
    if vision is None:
        raise BadSetting(f"--image-size {size}: {model} reads text")
    for side in vision.patch(backbone.config):
        if size % side:
            near = max(1, round(size / side)) * side
            raise BadSetting(f"--image-size {size}: patches are {side} pixels, say a multiple such as {near}")
    vision.resize(backbone, size)


def load_initial_checkpoint(folder: str, policy: str | None, seed: int) -> Checkpoint:
    """Load a trained checkpoint to continue from, with policies of the given kind.

    Policies of another kind are replaced by random ones (by `seed`). Raises BadCheckpoint.
    """
    checkpoint = load_checkpoint(folder)
    spec = checkpoint.network.spec
    if policy != spec.policy:
        old = checkpoint.network.state_dict()
        torch.manual_seed(seed)
        config = checkpoint.network.config
        new_spec = dataclasses.replace(spec, policy=policy, forecast=())
        network = EarlyExitNetwork(AutoModel.from_config(config, trust_remote_code=False), new_spec)
        without_policies = {name: value for name, value in old.items() if not name.startswith("policies")}
        network.load_state_dict(without_policies, strict=False)
        checkpoint.network = network
    elif spec.forecast:
        # Forecasts predict the errors of exactly the weights that they were fitted on.
        checkpoint.network.forecasts = torch.nn.ModuleList()
        checkpoint.network.spec = dataclasses.replace(spec, forecast=())
    return checkpoint


def text_input(tokenizer: Any) -> tuple[Tokenizer, TextFacts]:
    """The tokenizer.json form of a tokenizer, with padding id and longest input, without prefix."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    longest = int(min(tokenizer.model_max_length, 2**31))  # "no limit" is a number too large for a file
    return backend, TextFacts(prefix="", pad_id=int(tokenizer.pad_token_id or 0), longest=longest)


def image_input(
    model: str, network: EarlyExitNetwork, *, no_crop: bool, messages: TextIO | None = None
) -> ImageInput:
    """The preprocessing in a model's preprocessor_config.json, scaled to the size that the network reads.

    Without that file: the whole image, bicubic, with ImageNet's mean and deviation, which a line in
    `messages` (None: stderr) reports. no_crop: resize the whole image even if the preprocessor crops.
    """
    vision = network.family.vision
    assert vision is not None
    channels, height, width = vision.shape(network.config)
    if channels != 3:
        raise BadModel(f"{model}: it reads {channels} channels; only images of 3 are supported")
    default = ImageInput(
        height, width, (height, width), "bicubic", "RGB", 1 / 255, IMAGENET_MEAN, IMAGENET_STD
    )
    try:
        processor: Any = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as problem:
        print(
            f"{model}: no preprocessor, taking the usual: {default} ({first_line(problem)})",
            file=messages or sys.stderr,
        )
        return default
    try:
        return _image_facts(processor, height, width, no_crop=no_crop)
    except (ArithmeticError, LookupError, TypeError, ValueError) as problem:
        what = f"{type(problem).__name__}: {first_line(problem)}"
        raise BadModel(f"{model}: its preprocessor_config.json cannot be used: {what}") from problem


def _image_facts(processor: Any, height: int, width: int, *, no_crop: bool) -> ImageInput:
    """The facts of an image processor for images of this size; raises nearly anything for odd values."""
    resize: tuple[int, ...] = (height, width) if no_crop else ()
    if processor.do_resize and not no_crop:
        resize = _resize_before_crop(processor, height, width)
    normalizes, rescales = processor.do_normalize, processor.do_rescale
    return ImageInput(
        height,
        width,
        resize,
        RESAMPLING[int(processor.resample)],
        "BGR" if getattr(processor, "do_flip_channel_order", False) else "RGB",
        float(processor.rescale_factor) if rescales else 1.0,
        _per_channel(processor.image_mean) if normalizes else (0.0, 0.0, 0.0),
        _per_channel(processor.image_std) if normalizes else (1.0, 1.0, 1.0),
    )


def _resize_before_crop(processor: Any, height: int, width: int) -> tuple[int, ...]:
    """ImageInput.resize for crops of this size that contain the same share of the image as the
    preprocessor's.

    A resize to 256 for crops of 224, for example, becomes one to 128 for crops of 112.
    """
    size, crop = resize_of(processor), crop_of(processor)
    if "shortest_edge" in size:
        cropped = crop.get("height", size["shortest_edge"])
        return (round(size["shortest_edge"] * min(height, width) / cropped),)
    if "height" in crop and "height" in size:
        return (
            round(size["height"] * height / crop["height"]),
            round(size["width"] * width / crop["width"]),
        )
    return height, width


def _per_channel(numbers: Any) -> tuple[float, ...]:
    return tuple(float(n) for n in (numbers if isinstance(numbers, (list, tuple)) else [numbers] * 3))
