"""The tree of frozen dataclasses that a config is; `vlm_jax.config` fills it and checks it."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.presets.connectors import Connector
from vlm_jax.presets.convnets import ConvNet
from vlm_jax.presets.decoders import Decoder
from vlm_jax.presets.encoders import Encoder
from vlm_jax.presets.fusion import CrossAttention
from vlm_jax.presets.mapping import Mapping as MappingNetwork
from vlm_jax.presets.matching import Matching
from vlm_jax.presets.qformer import QFormer
from vlm_jax.presets.sam import Sam
from vlm_jax.presets.sva import Samplers, Sva
from vlm_jax.presets.text import TextTower


@dataclasses.dataclass(frozen=True)
class Model:
    """The system: images -> encoder(s) -> connector -> decoder -> text.

    A tower alone, as weights are published, is a model whose other parts are None.

    Attributes:
      encoder: the encoder, or the first of several.
      connector: from the features of all encoders to visual tokens.
      decoder: the language model.
      extra_encoders: further encoders that look at the same images.
      fusion: gated cross-attention between the decoder's layers; None = visual tokens stand in the
        sequence and nothing else (autoregressive).
      samplers: blocks by which visual tokens go on looking at images between the decoder's layers.
      text: what embeds texts beside the encoder's images (CLIP, SigLIP); or what compares the
        queries of a Q-Former with texts that it reads (BLIP-2's first stage).
    """

    encoder: Encoder | ConvNet | Sam | None = None
    connector: Connector | QFormer | Sva | MappingNetwork | None = None
    decoder: Decoder | None = None
    extra_encoders: tuple[Encoder | ConvNet | Sam, ...] = ()
    fusion: CrossAttention | None = None
    samplers: Samplers | None = None
    text: TextTower | Matching | None = None

    @property
    def encoders(self) -> tuple[Encoder | ConvNet | Sam, ...]:
        """All encoders."""
        return (() if self.encoder is None else (self.encoder,)) + self.extra_encoders

    @property
    def instructed(self) -> bool:
        """Whether the connector reads what is asked about an image (InstructBLIP)."""
        reads = isinstance(self.connector, QFormer) and self.connector.vocab > 0
        return reads and not self.matched

    @property
    def matched(self) -> bool:
        """Whether a Q-Former's queries are compared with texts, and no decoder follows it."""
        return isinstance(self.text, Matching)

    @property
    def pair(self) -> bool:
        """Whether images and texts are embedded to be compared, and nothing is generated."""
        return self.text is not None and self.decoder is None

    @property
    def tokens(self) -> int:
        """Ids that what reads texts has embeddings for."""
        if self.decoder is not None:
            return self.decoder.tokens
        return self.connector.vocab if self.matched else self.text.vocab

    @property
    def visual_tokens(self) -> int:
        """Visual tokens per image, Q; none where no decoder reads them."""
        there = self.connector is not None and not self.pair
        return self.connector.visual_tokens(self.encoders) if there else 0

    @property
    def visual_width(self) -> int:
        """Width of visual tokens, the decoder's unless cross-attention takes another; or 0."""
        if self.decoder is None:
            return 0
        return (0 if self.fusion is None else self.fusion.width) or self.decoder.width

    @property
    def visual_in_sequence(self) -> bool:
        """Whether visual tokens stand in the sequence."""
        return self.fusion is None or self.fusion.both

    @property
    def image_positions(self) -> int:
        """Positions of the sequence that an image takes: its visual tokens, or a placeholder."""
        return self.visual_tokens if self.visual_in_sequence else 1


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random changes to training pictures; the defaults change nothing but the background.

    Attributes:
      background: how transparent pixels are filled in training, "white" or "random"; evaluation
        always composites on white.
      scale: smallest and largest zoom.
      aspect: largest relative change of width over height.
      rotate, shear: largest angles, degrees.
      translate: largest shift, as a share of the side.
      perspective: largest relative change of size from one side of the picture to the other.
      brightness, contrast, saturation, hue: largest relative changes (hue: share of the circle).
      gain: the same for each colour channel on its own.
      grey: chance of a grey picture.
      blur: largest radius of a box blur, in pixels as the encoder sees them; half stay sharp.
      shade: strength of a random linear light gradient.
      noise: largest standard deviation of pixel noise, white being 1.
      erase: chance that a random rectangle is painted over.
      crop: smallest and largest share of the picture's area that is shown, at an aspect ratio
        between 3:4 and 4:3 (Inception's random crop); (1, 1) = all of it.
      flip: chance that left and right are exchanged.
      upscale: a picture whose longer side is below the second is enlarged to a longer side drawn
        between the first, or its own, and the second (Idefics2: 378 to 980); (0, 0) = never.
    """

    background: str = "white"
    scale: tuple[float, float] = (1.0, 1.0)
    aspect: float = 0.0
    rotate: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    perspective: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gain: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    shade: float = 0.0
    noise: float = 0.0
    erase: float = 0.0
    crop: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    upscale: tuple[int, int] = (0, 0)

    @functools.cached_property  # asked for every picture
    def repaints(self) -> bool:
        """Whether it changes more than what of a picture is shown, and how large."""
        return self != Augment(crop=self.crop, flip=self.flip, upscale=self.upscale)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus of the user's own files; its name is a source of the mixture.

    Attributes:
      format: how it is written, a row of `data.formats.FORMATS`.
      paths: its file by split, e.g. {"train": "train.jsonl", "validation": "validation.jsonl"}.
      images: folder that paths of images start from; "" = the file's own.
    """

    format: str
    paths: Mapping[str, str]
    images: str = ""


@dataclasses.dataclass(frozen=True)
class MixtureStage:
    """Another mixture, from some document of the stream on.

    Attributes:
      start: the first document of it, counted over all sources and hosts.
      mixture: as `Data.mixture`.
    """

    start: int
    mixture: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Data:
    """What the model is fed.

    Attributes:
      mixture: weight per source, e.g. {"emoji:caption": 3.0, "emoji:choice": 1.0}.
      size_power: weights are multiplied by this power of the source's size: 0 takes them as they
        are, 0.5 mixes by the square root of sizes, 1 in proportion to them.
      caps: most examples that a source has, by its name: random ones, the same in every epoch.
      schedule: mixtures that follow the first one.
      loss_weights: factor of the loss weights of a source's tokens, by its name; 1 without.
      corpora: corpora of files by the name that the mixture calls them.
      tokenizer: "embedded", which has the template's special tokens too, or the path of a Hugging
        Face tokenizer.json.
      template: name of a chat template, a row of `data.templates.TEMPLATES`.
      attention: "causal", or "prefix" (prompt tokens, images among them, see each other).
      images: False trains the same config without images (the text-only baseline).
      rows: rows of the global batch, B.
      tokens: text positions of a row, T.
      images_per_row: image slots of a row, N.
      patches_per_row: patches of a row, which its images share as `model.encoder` sees them, for an
        encoder with `max_patches`; 0 = each slot has room of its own.
      overlong: what becomes of a sample longer than `tokens`: "reject", or "truncate" to its first
        ones, none of a picture that would not stand there whole.
      text_tokens: tokens of an image's second text, S. It is the image's own text, cut there, which
        auxiliary losses read; or what is asked about it, never cut, where the connector reads that.
      instruction_tokenizer: of what the connector reads, as `tokenizer`; "" = the same.
      views: pictures of one thing that come one after the other in training, so that a batch holds
        what the contrastive loss draws together; 1 shuffles pictures without regard to that.
      pool: documents that the packer of a lane chooses from; more of them, less padding.
      lanes: parts of the stream that are packed each on its own, into rows of its own, so that any
        number of hosts that divides it gives the same global batches; divides `rows`.
      threads: threads that read, decode and augment.
      workers: processes that do so instead; 0 = threads.
      bad_samples: share of bad samples, over a window of 10,000, that ends the run with code 65.
      augment: random changes to training pictures.
    """

    mixture: Mapping[str, float]
    size_power: float = 0.0
    caps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    schedule: tuple[MixtureStage, ...] = ()
    loss_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    corpora: Mapping[str, Corpus] = dataclasses.field(default_factory=dict)
    tokenizer: str = "embedded"
    template: str = "tiny"
    attention: str = "causal"
    images: bool = True
    rows: int = 16
    tokens: int = 256
    images_per_row: int = 8
    patches_per_row: int = 0
    overlong: str = "reject"
    text_tokens: int = 16
    instruction_tokenizer: str = ""
    views: int = 1
    pool: int = 64
    lanes: int = 1
    threads: int = 2
    workers: int = 0
    bad_samples: float = 0.01
    augment: Augment = Augment()


@dataclasses.dataclass(frozen=True)
class Train:
    """How the model is trained.

    Attributes:
      steps: optimizer steps; what the guard skips does not count.
      optimizer: "adamw", "adafactor" (big_vision's form), "lion", or "muon" for matrices with AdamW
        for the rest.
      lr: peak learning rate; `scaled_lr` carries one over to another batch size.
      adam_lr: under "muon", the peak learning rate of what AdamW trains.
      schedule: what follows the warm-up: "cosine" or "linear" to `end_lr` at the last step,
        "constant", "wsd" (constant, then a decay), or "rsqrt" (lr / sqrt(1 + t / timescale), t
        steps after the warm-up, then a decay if it has any).
      warmup_steps: linear warm-up from 0.
      decay_steps: last steps of "wsd" and "rsqrt", in which the rate falls to `end_lr` of what it
        would be.
      decay_shape: how it falls: "linear", "cosine" or "sqrt" (1 - sqrt of the share done).
      timescale: of "rsqrt", steps.
      end_lr: where "cosine", "linear" and decays end, as a share of `lr`.
      weight_decay: decoupled, times the learning rate.
      b1, b2: of AdamW and Lion (whose authors take 0.9 and 0.99); b1 alone of Adafactor.
      eps: of AdamW.
      accumulate: micro-batches that the global batch is split into, one after the other in the
        memory of one; the gradient is that of the whole batch.
      clip: largest global norm of the gradient; 0 = no clipping.
      label_smoothing: share of the target spread over the vocabulary.
      z_loss: weight of the squared log of the softmax's normaliser (PaLM: 1e-4).
      neftune: alpha of the uniform noise on embeddings of tokens while the model trains, at most
        alpha / sqrt(document's length * width) (NEFTune); 0 = none.
      bag_of_words: weight of the auxiliary loss by which an image's mean visual token names the
        words of that image's text.
      contrastive: weight of the auxiliary loss that draws together the mean visual tokens of
        images with the same text.
      temperature: of the contrastive loss.
      pairs: what a model of pairs minimises, "sigmoid" (SigLIP) or "softmax" (CLIP).
      pairs_weight: weight of that loss beside a decoder's, where the model has a text tower too
        (CoCa: 1 to the decoder's 2).
      masked: share of the documents whose learned tokens a masked decoder tells all at once,
        without those before them (CapPa: 0.75); held-out losses are those of one after the other.
      ema: decay of the averaged weights that evaluation and export use; 0 = the last weights.
      feature_cache: GiB of the host's memory for features of frozen encoders, which are then made
        once for a picture that comes again; 0 = they are made in every step.
      log_every: steps between lines on the terminal and points in TensorBoard.
    """

    steps: int = 1000
    optimizer: str = "adamw"
    lr: float = 1e-3
    adam_lr: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 100
    decay_steps: int = 0
    decay_shape: str = "linear"
    timescale: int = 10_000
    end_lr: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    accumulate: int = 1
    clip: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    neftune: float = 0.0
    bag_of_words: float = 0.0
    contrastive: float = 0.0
    temperature: float = 0.1
    pairs: str = "sigmoid"
    pairs_weight: float = 0.0
    masked: float = 0.0
    ema: float = 0.0
    feature_cache: float = 0.0
    log_every: int = 10


@dataclasses.dataclass(frozen=True)
class Guard:
    """Steps that are skipped: they cost their batch and leave no trace in the state.

    Spikes are learned from by default: no published recipe skips them, and with few rows a batch
    far above the mean is common in runs that are well.

    Attributes:
      nonfinite: skip where the loss or the norm of its gradient is no finite number.
      sigmas: skip where one of them lies more than so many standard deviations above the mean of
        the last good steps; 0 = never. OLMo takes 6.
      window: how many good steps are remembered; spikes are looked for once half of it is filled.
      floor: smallest standard deviation, as a share of the mean.
      patience: skips in a row after which the run goes back to its last checkpoint and on with
        later data.
      rollbacks: how often it may go back to the same checkpoint before it ends.
    """

    nonfinite: bool = True
    sigmas: float = 0.0
    window: int = 128
    floor: float = 0.02
    patience: int = 5
    rollbacks: int = 3


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of the adaptation table: the first whose pattern matches a parameter's path holds.

    Attributes:
      pattern: regular expression, matched against the whole path.
      mode: "full" trains, "frozen" does not. "lora" (Hu et al. 2022) and "dora" (Liu et al. 2024)
        train adapters beside kernels that are frozen; they hold for kernels of linear layers
        alone, and leave whatever else their pattern matches to later rules. So does "bottleneck",
        an adapter that follows the layer (Houlsby et al. 2019). "prefix" trains keys and values
        before those of the tokens (Li and Liang 2021); it holds for the kernels of keys of
        attentions among tokens of one tower.
      lr: factor on the learning rate.
      weight_decay: factor on the weight decay.
      rank: of an adapter's two matrices; width of a bottleneck; keys and values of a prefix.
      alpha: the product of LoRA and DoRA is scaled by alpha / rank.
      dropout: share of the numbers dropped that go into that product.
      rslora: scales by alpha / sqrt(rank) instead (Kalajdzievski 2023).
      base: how kernels that stay as they are are held: "float", or in few bits as "nf4" (with
        LoRA beside them QLoRA, Dettmers et al. 2023) or "int8"; then "frozen" too holds for kernels
        of linear layers alone.
      hidden: width of the network that prefixes are made by; 0 = they are learned themselves.
    """

    pattern: str
    mode: str = "full"
    lr: float = 1.0
    weight_decay: float = 1.0
    rank: int = 0
    alpha: float = 0.0
    dropout: float = 0.0
    rslora: bool = False
    base: str = "float"
    hidden: int = 0

    @property
    def quantises(self) -> bool:
        """Whether kernels are held in few bits."""
        return self.base != "float"

    @property
    def adapts(self) -> bool:
        """Whether kernels stay as they are and adapters train beside them."""
        return self.mode in ADAPTERS

    @property
    def scale(self) -> float:
        """Factor of an adapter's product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


ADAPTERS = ("lora", "dora", "bottleneck", "prefix")
BASES = ("float", "nf4", "int8")
# Fields that are 0 in rules of other modes.
FIELDS = {
    "lora": ("rank", "alpha", "dropout", "rslora"),
    "dora": ("rank", "alpha", "dropout", "rslora"),
    "bottleneck": ("rank",),
    "prefix": ("rank", "hidden"),
}
MODES = ("full", "frozen", *ADAPTERS)


# Norm scales and biases are not decayed; everything trains. A batch norm's statistics have no
# gradient, and would only decay.
FULL = (
    Rule(r".*/(bias|scale|mean|variance)", weight_decay=0.0),
    Rule(r".*"),
)


@dataclasses.dataclass(frozen=True)
class Init:
    """Where a part of a new run's parameters comes from.

    Attributes:
      folder: what `python -m vlm_jax.convert import` wrote; or the folder of a run, of which the
        newest checkpoint is read, of one in stages that of the last which has ended; or an adapter
        in PEFT's format, for the part that an entry above it names; or a BERT of transformers, for
        a Q-Former as "connector" and the head by which it generates as "text", where the rest is
        drawn. An encoder's learned positions are resized where its grid is another one.
      part: which parameters: "encoder", "connector", "decoder", "extra_encoders/0"; "" = all.
      source: what the part is called in that folder, if otherwise.
    """

    folder: str
    part: str = ""
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When the run is saved.

    Attributes:
      every: steps between checkpoints; 0 = only at the end.
      keep: how many of the last ones are kept.
      milestones: steps that are saved besides and kept for good, to branch from.
    """

    every: int = 200
    keep: int = 2
    milestones: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tracking:
    """Views of metrics.jsonl.

    Attributes:
      tensorboard: event files in the run's folder.
      wandb: the Weights & Biases project to send to; "" = none. Needs the extra `tracking`.
    """

    tensorboard: bool = True
    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class Eval:
    """What is measured inside the run.

    Attributes:
      every: steps between held-out losses; 0 = only at the end.
      splits: splits that are scored at the end; "validation" alone is used for choices.
      kinds: kinds of examples that are scored.
      examples: held-out examples per split and kind for the losses during the run.
      final_examples: the same for the scores at the end; 0 = all.
      rows: rows of an evaluation batch.
      max_new_tokens: length limit of greedy answers.
      text_only_steps: steps for the model of the same config without images; 0 = no such baseline.
      text_only_every: steps between its validation losses; its best step is the baseline.
    """

    every: int = 200
    splits: tuple[str, ...] = ("validation", "unseen_style", "unseen_concept")
    kinds: tuple[str, ...] = ("caption",)
    examples: int = 128
    final_examples: int = 0
    rows: int = 32
    max_new_tokens: int = 16
    text_only_steps: int = 0
    text_only_every: int = 50


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Devices per mesh axis; -1 once = all that are left.

    Attributes:
      data: copies of the model, each on its share of the rows.
      fsdp: parameters and rows are both spread over this axis.
      tensor: heads, feed-forward width and vocabulary are spread over this axis.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Stage:
    """One of the runs that a run in stages walks: the config with some of its fields changed.

    Attributes:
      name: part of its folder's name; lower-case letters, digits, "_" and "-".
      changes: values by the dotted path of their field, e.g. {"train.steps": 500,
        "model.encoder.image_size": 336}. Each stands in place of all that the config has there; a
        number is a place in a list ("model.extra_encoders.0.image_size").
    """

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run; with `stages` one after the other, each of its own changes (`stages.py`)."""

    name: str
    model: Model
    data: Data
    seed: int = 0
    train: Train = Train()
    guard: Guard = Guard()
    init: tuple[Init, ...] = ()
    adaptation: tuple[Rule, ...] = FULL
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    eval: Eval = Eval()
    parallel: Parallel = Parallel()
    stages: tuple[Stage, ...] = ()
