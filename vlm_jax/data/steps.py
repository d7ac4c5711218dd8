"""Views of a picture, each made by steps that are known before the picture is decoded."""

from typing import NamedTuple

from PIL import Image

Size = tuple[int, int]  # height and width
BLACK = (0, 0, 0)


class Scale(NamedTuple):
    """Resampling to a size.

    Attributes:
      height, width: of what comes out.
      filter: one of Pillow's, by name.
      part: left, top, right and bottom of what is resampled, in pixels of the picture, which lends
        the filter its surroundings; () = all of it.
    """

    height: int
    width: int
    filter: str
    part: tuple[float, ...] = ()

    def apply(self, image: Image.Image) -> Image.Image:
        size = self.width, self.height
        if image.size == size and not self.part:
            return image
        return image.resize(size, _FILTERS[self.filter], self.part or None)


class Window(NamedTuple):
    """A part of the picture, or more than all of it: what is outside has the colour `fill`."""

    top: int
    left: int
    height: int
    width: int
    fill: tuple[int, int, int] = BLACK

    def apply(self, image: Image.Image) -> Image.Image:
        bottom, right = self.top + self.height, self.left + self.width
        within = min(self.top, self.left) >= 0 and bottom <= image.height and right <= image.width
        if within:
            return image.crop((self.left, self.top, right, bottom))
        around = _blank(image.mode, (self.height, self.width), self.fill)
        around.paste(image, (-self.left, -self.top))
        return around


class Framed(NamedTuple):
    """Resampling of the picture within a larger frame, which is never made: it may be huge.

    Attributes:
      height, width: of what comes out.
      filter: as for `Scale`.
      frame: height and width of the frame.
      corner: where in the frame the picture's upper left corner is.
      fill: colour of the frame.
    """

    height: int
    width: int
    filter: str
    frame: Size
    corner: tuple[int, int]
    fill: tuple[int, int, int]

    def apply(self, image: Image.Image) -> Image.Image:
        """Columns first, as Pillow resamples a square; so many rows at a time."""
        (height, width), (top, left) = self.frame, self.corner
        if height * width > _HUGE and image.height > image.width:
            down = Scale(self.height, image.width, self.filter).apply(image)
            framed = Window(0, -left, self.height, width, self.fill).apply(down)
            return Scale(self.height, self.width, self.filter).apply(framed)
        across = _blank(image.mode, (height, self.width), self.fill)
        rows = max(1, _STRIP // width)
        for start in range(0, image.height, rows):
            strip = Window(start, -left, min(rows, image.height - start), width, self.fill)
            scaled = Scale(strip.height, self.width, self.filter).apply(strip.apply(image))
            across.paste(scaled, (0, top + start))
        return Scale(self.height, self.width, self.filter).apply(across)


def _blank(mode: str, size: Size, fill: tuple[int, int, int]) -> Image.Image:
    opaque = (255,) * (Image.getmodebands(mode) - len(fill))
    return Image.new(mode, size[::-1], fill + opaque)


# Pixels of a strip. And of what is made in full although only a part of it has anything to show:
# beyond, other orders of rows and columns are taken, which in noise is off by some of 255 levels.
_STRIP, LARGE, _HUGE = 2**20, 2**24, 2**26


class Flip(NamedTuple):
    """A picture of this size, left and right exchanged."""

    height: int
    width: int

    def apply(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


Steps = tuple[Scale | Window | Framed | Flip, ...]
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Plan(NamedTuple):
    """The views of a picture.

    Attributes:
      views: how each is made from the picture, in the order in which the encoder gets them.
      tiles: rows and columns of the views that are tiles, row by row; (0, 0) = there are none.
      whole: which view is none of the tiles.
      size: height and width of the picture that is resized.
    """

    views: tuple[Steps, ...]
    tiles: Size = (0, 0)
    whole: int = 0
    size: Size = (0, 0)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Height and width of each view."""
        return tuple((steps[-1].height, steps[-1].width) for steps in self.views)


def apply(image: Image.Image, plan: Plan) -> list[Image.Image]:
    """The views of a picture of the size that the plan was made for; common steps are done once."""
    made: dict[Steps, Image.Image] = {(): image}
    for steps in plan.views:
        for n in range(1, len(steps) + 1):
            if steps[:n] not in made:
                made[steps[:n]] = steps[n - 1].apply(made[steps[: n - 1]])
    return [made[steps] for steps in plan.views]
