"""What a training run is made of: the settings behind a YAML file, with their defaults.

`config` reads them from files and the command line; `presets` has the published values.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class StartSettings:
    """What training begins with: a checkpoint, or a vision tower and a language model.

    Attributes:
        checkpoint: directory of a CoMemo checkpoint.
        vision, language: directories of the two parts instead; mixin layers and projector are new.
        tokenizer: directory; None for that of `checkpoint` or `language`.
        projector: safetensors file of a trained projector, keys `mlp1.{0,1,3}.*` or `{0,1,3}.*`.
        model: values of `CoMemoConfig` to set, such as `tile_order` or `mixin_config`.
    """

    checkpoint: str | None = None
    vision: str | None = None
    language: str | None = None
    tokenizer: str | None = None
    projector: str | None = None
    model: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataSettings:
    """What is read, and how it is packed.

    Attributes:
        train: a meta file (JSON) or one JSONL file.
        eval: a held-out meta or JSONL file, or None.
        root: folder of the images of a JSONL file; None for the folder of the file.
        max_tokens, max_tiles: the most of a pack.
        buffer: packs that are filled at the same time.
        max_sample_tokens, too_long: the most of a sample, and what happens to a longer one: "cut"
            at the end, never through an image, or "refuse", which makes it a bad sample.
        bad_data: "skip" counts bad samples and goes on, "stop" raises at the first.
        mixing: how datasets are weighted: "length", "sqrt" (of the length) or name -> weight.
        restart: whether a dataset that is used up begins again within an epoch.
        loss_weight: weight of a label: "token" 1, "sample" 1/n, "square" 1/sqrt(n), n labels of
            the sample.
        max_dynamic_patch, min_dynamic_patch, use_thumbnail: tiling; None for the model's config.
        min_frames, max_frames: of a video.
        workers: processes that read and decode; 0 reads in the training process.
        published_pixels: whether the EXIF orientation is ignored, as in the published code.
        published_text: whether control tokens written in the text of the data take effect, as in
            the published code; otherwise text stays text.
    """

    train: str = ""
    eval: str | None = None
    root: str | None = None
    max_tokens: int = 16384
    max_tiles: int = 48
    buffer: int = 20
    max_sample_tokens: int = 8192
    too_long: str = "cut"
    bad_data: str = "skip"
    mixing: Any = "length"
    restart: bool = False
    loss_weight: str = "square"
    max_dynamic_patch: int | None = None
    min_dynamic_patch: int | None = None
    use_thumbnail: bool | None = None
    min_frames: int = 4
    max_frames: int = 24
    workers: int = 4
    published_pixels: bool = False
    published_text: bool = False


@dataclass
class LoraSettings:
    """Low-rank adapters of one part.

    Attributes:
        vision, language, mixin: ranks; 0 for no adapter there.
        alpha: scale divided by the rank; None for twice the rank.
        dropout: of the adapters' inputs.
    """

    vision: int = 0
    language: int = 0
    mixin: int = 0
    alpha: float | None = None
    dropout: float = 0.0


@dataclass
class StageSettings:
    """One stage of training.

    Attributes:
        train: parts whose weights are trained: "vision", "projector", "mixin", "language".
        freeze_gates: whether the gates of trained mixin layers keep their values.
        unfreeze_vit_layers: also train the vision layers from this index on (negative: the last
            ones); 0 for none.
        unfreeze_lm_head: also train the output layer.
        lora: adapters; their parts are frozen but for them.
        steps: optimizer steps; None if `epochs` is given.
        epochs: how often all data is read.
        packs_per_step: packs of one optimizer step over all ranks.
        learning_rate, schedule: the peak, and "constant" (after the warm-up) or "cosine".
        warmup: share of the steps if below 1, else their number.
        weight_decay, betas, eps, max_grad_norm: of AdamW and the clipping of gradients.
        drop_path: highest rate of stochastic depth in the vision tower.
        neftune_alpha: noise on the embeddings, scaled by the length of a whole pack; or None.
        gradient_checkpointing: compute layers again in the backward pass.
        precision: "bfloat16" (autocast), "float32", or "auto" for what the device is fast in.
        save_every, keep: steps between checkpoints, and how many are kept.
        eval_every: steps between evaluations; 0 for one at the end.
        log_every: steps between log lines.
        spike: a loss above this many times the median of recent steps is reported; 0 for never.
    """

    train: tuple[str, ...] = ("projector", "mixin")
    freeze_gates: bool = False
    unfreeze_vit_layers: int = 0
    unfreeze_lm_head: bool = False
    lora: LoraSettings = field(default_factory=LoraSettings)
    steps: int | None = None
    epochs: float | None = None
    packs_per_step: int = 8
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup: float = 0.03
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    drop_path: float = 0.0
    neftune_alpha: float | None = None
    gradient_checkpointing: bool = True
    precision: str = "auto"
    save_every: int = 500
    keep: int = 2
    eval_every: int = 0
    log_every: int = 1
    spike: float = 3.0


@dataclass
class AnswerSettings:
    """Answers to a few questions while training goes on.

    Attributes:
        every: steps between answers; 0 for none.
        ask: list of {"question": text, "image": path or list or absent}; empty for the first lines
            of the evaluation file, or of the training data.
        max_new_tokens: of an answer.
    """

    every: int = 0
    ask: list[dict[str, Any]] = field(default_factory=list)
    max_new_tokens: int = 64


@dataclass
class ParallelSettings:
    """How several ranks share the model; any of it may change when a run is resumed.

    Attributes:
        plan: "ddp": each rank has the whole model. "fsdp": weights, gradients and the optimizer's
            state are divided among the ranks (FSDP2).
        tensor: ranks next to each other that divide the heads and columns of each decoder layer
            and mixin layer; needs "fsdp".
        replicas: groups of ranks that have the model once each (HSDP), such as one for each node;
            needs "fsdp".
        offload: keep what "fsdp" divides in the memory of the CPU.
        checkpoints: "full": one rank gathers and writes weights in the published layout.
            "sharded": each rank writes its part, by torch.distributed.checkpoint; needs "fsdp".
        context: ranks that divide the tokens of a pack; only 1 is supported.
    """

    plan: str = "ddp"
    tensor: int = 1
    replicas: int = 1
    offload: bool = False
    checkpoints: str = "full"
    context: int = 1


@dataclass
class TrainSettings:
    """A whole run.

    Attributes:
        output: directory of the run: settings, checkpoints, logs, the trained model.
        preset: "script", "paper" or None: what the defaults of the stages follow.
        run: names of the stages to run, in this order.
        stages: name -> settings of a stage.
        seed: of weights, order of data, augmentation, dropout.
        shard_optimizer: whether each rank keeps only its part of the optimizer's state (ZeRO-1);
            the plan "fsdp" does so in any case.
        tensorboard: whether scalars are written to `output`/tensorboard.
        device: "auto", "cpu" or "cuda".
    """

    output: str = ""
    preset: str | None = None
    start: StartSettings = field(default_factory=StartSettings)
    data: DataSettings = field(default_factory=DataSettings)
    run: tuple[str, ...] = ()
    stages: dict[str, StageSettings] = field(default_factory=dict)
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    seed: int = 42
    shard_optimizer: bool = False
    tensorboard: bool = True
    device: str = "auto"
