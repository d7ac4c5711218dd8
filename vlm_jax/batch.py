"""The Batch: static shapes, the only thing a model ever sees. Plain data, no jax.

Axes: B rows, T text positions, N images of a row, P patches of a row, S tokens of an image's text.
Being NamedTuples, both types are pytrees of whatever array type the caller holds.
"""

from typing import Any, NamedTuple

Array = (
    Any  # a numpy array on the host, a jax.Array on the device, a ShapeDtypeStruct when planning
)


class Images(NamedTuple):
    """What the encoder sees: whole pixels or flattened patches, as the encoder's preset says.

    Attributes:
      grids: int32 [B, N, 2], rows and columns of patches of each image, 0 = no image in this slot.
      pixels: [B, N, H, W, 3]; None for an encoder that takes patches. uint8, which the encoder
        normalises, or float32, which is normalised: all batches of a stream alike.
      patches: [B, P, patch * patch * 3], likewise; None for an encoder that takes pixels.
      patch_positions: int32 [B, P, 2], row and column of each patch in its image.
      patch_images: int32 [B, P], which image of the row a patch belongs to, -1 = padding.
      starts: int32 [B, N], in packed rows of patches the first patch of each image, whose others
        follow in reading order; None where all slots own equal shares of the row, in order.
      features: [B, N, P, E], what a frozen encoder made of each image, in place of pixels or
        patches (`training.features`); None where it is to look itself.
      feature_mask: bool [B, N, P], which of them are there; None = all.
    """

    grids: Array
    pixels: Array | None = None
    patches: Array | None = None
    patch_positions: Array | None = None
    patch_images: Array | None = None
    starts: Array | None = None
    features: Array | None = None
    feature_mask: Array | None = None


class Batch(NamedTuple):
    """One global batch of packed rows.

    Attributes:
      tokens: int32 [B, T], a placeholder id stands where a visual token will.
      segments: int32 [B, T], packed document id counted from 1, 0 = padding.
      positions: int32 [B, T], restart at every document.
      loss_weights: float32 [B, T], weight of predicting this token from those before it; 0 on
        prompts, visual tokens and padding.
      blocks: int32 [B, T], 0 = causal; tokens of one document sharing a block see each other.
      visual_index: int32 [B, T], which visual token of the row stands here, -1 = none.
      image_index: int32 [B, T], which image of the row this token looks at (the last one at or
        before it in its document), -1 = none.
      image_texts: int32 [B, N, S], optional second text per image, 0 = padding.
      images: what the encoder sees, or the first of several.
      extra_images: what each of `model.extra_encoders` sees.
    """

    tokens: Array
    segments: Array
    positions: Array
    loss_weights: Array
    blocks: Array
    visual_index: Array
    image_index: Array
    image_texts: Array
    images: Images
    extra_images: tuple[Images, ...] = ()
