"""How a picture becomes what an encoder sees, as a row of fields."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True)
class Resize:
    """From a picture of any size to one or more views of it; computed in `data.resizing`.

    Attributes:
      mode: of one view of the encoder's size:
          "squash" resizes both sides to it (SigLIP);
          "crop" resizes the shorter side, and cuts the middle out (CLIP, DINOv2);
          "pad" puts the picture into the middle of a square of the encoder's mean colour, and
            resizes that (LLaVA-1.5);
          "letterbox" is Prismatic's way to do so: of an odd border one row or column is lost;
        of one view that keeps the aspect ratio, its sides multiples of the patch:
          "patches" makes as many patches as `max_patches` allows, counting begun ones (NaFlex);
          "whole_patches" counts only whole ones (Pix2Struct);
          "bounds" brings the longer side below `longest`, and the shorter above `shortest` even
            where that bends the picture (Idefics2);
        of several views:
          "quarters" is "bounds" of each quarter, then of the whole (Idefics2 with splitting);
          "pinpoints" squashes the whole, then fits it into that of `pinpoints` which wastes the
            least, black around it, and cuts that into tiles (LLaVA-NeXT's AnyRes);
          "grid" enlarges or reduces the longer side to `longest`, then both sides to multiples of
            the encoder's, and cuts that into tiles; the whole comes last (Idefics3);
          "whole_and_grid" does so in one step, and the whole comes first (nanoVLM).
      side: of the views, in pixels, before what no patch of the encoder sees is cut off, on the
        right and below (SigLIP's 384 with patches of 14); 0 = the encoder's size.
      filter: of resampling, "nearest", "bilinear", "bicubic" or "lanczos" as Pillow has them.
      shortest: of "crop" and "bounds", pixels; 0 = the encoder's shorter side.
      longest: of "bounds" and those with tiles, pixels; 0 = the encoder's longer side.
      enlarge: whether "whole_and_grid" enlarges pictures to `longest`.
      pinpoints: heights and widths.
    """

    mode: str = "squash"
    side: int = 0
    filter: str = "bicubic"
    shortest: int = 0
    longest: int = 0
    enlarge: bool = True
    pinpoints: tuple[tuple[int, int], ...] = ()

    ONE: ClassVar = ("squash", "crop", "pad", "letterbox")
    NATIVE: ClassVar = ("patches", "whole_patches", "bounds", "quarters")
    TILES: ClassVar = ("pinpoints", "grid", "whole_and_grid")
    CHOICES: ClassVar = {
        "mode": (*ONE, *NATIVE, *TILES),
        "filter": ("nearest", "bilinear", "bicubic", "lanczos"),
    }

    @property
    def fixed(self) -> bool:
        """Whether every picture becomes one view of the encoder's size."""
        return self.mode in self.ONE

    def size(self, encoder: Any) -> tuple[int, int]:
        """Height and width of a view before anything is cut off."""
        return (self.side, self.side) if self.side else encoder.size

    def fewest(self, encoder: Any) -> int:
        """How many views a picture becomes at least."""
        if self.mode == "quarters":
            return 5
        height, width = self.size(encoder)
        if self.mode == "pinpoints":
            return 1 + min(down // height * (across // width) for down, across in self.pinpoints)
        if self.mode == "grid" or (self.mode == "whole_and_grid" and self.enlarge):
            tiles = max(1, self.longest // height)
            return tiles + (tiles > 1)
        return 1

    def problems(self, encoder: Any) -> Iterator[tuple[str, str]]:
        """Fields that contradict others or the encoder, each with what was expected."""
        height, width = self.size(encoder)
        patch = getattr(encoder, "patch", 1)
        if self.mode in self.NATIVE and not getattr(encoder, "max_patches", 0):
            yield "mode", "another one where max_patches is not set"
        if self.mode not in ("squash", "pinpoints", *self.NATIVE) and height != width:
            yield "mode", "another one for an encoder whose images are no squares"
        if self.side and (
            self.mode in self.NATIVE
            or any(not 0 <= self.side - side < patch for side in encoder.size)
        ):
            yield "side", f"0, or less than a patch above the encoder's {encoder.size} pixels"
        if self.mode == "crop" and 0 < self.shortest < height:
            yield "shortest", f"at least the encoder's {height} pixels"
        if self.mode in ("bounds", "quarters"):
            yield from self._bounds(encoder)
        if self.mode in ("grid", "whole_and_grid") and self.longest % height:
            yield "longest", f"a multiple of the views' {height} pixels"
        if (self.mode == "pinpoints") != bool(self.pinpoints):
            yield "pinpoints", "heights and widths for this mode, and none for others"
        if any(down % height or across % width for down, across in self.pinpoints):
            yield "pinpoints", f"multiples of the views' {height} x {width} pixels"

    def _bounds(self, encoder: Any) -> Iterator[tuple[str, str]]:
        patch, room = encoder.patch, encoder.max_patches
        longest = self.longest or max(encoder.size)
        shortest = self.shortest or min(encoder.size)
        if not patch <= shortest <= longest:
            yield "shortest", f"from a patch of {patch} pixels to `longest`, {longest}"
        if (longest // patch) ** 2 > room:
            yield "longest", f"one whose square has at most the encoder's {room} patches"


SQUASH = Resize()
