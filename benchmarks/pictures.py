"""Kinds of images that people really train on, as 8-bit RGB tensors: photographs, and what is no photograph, made in code.

Everything is deterministic: the same call gives the same images on every machine.
"""
import sys
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2 as T


@dataclass(frozen=True)
class Pictures:
    "Images of one kind, and what a right pipeline does to them before `Normalize`"
    pixels: Tensor  # uint8 `[n,3,H,W]`
    as_float: Callable = None  # On pixels in [0,1], one image or a batch: it leaves floats on no lattice of 8-bit levels
    order_shows: bool = False  # Photographs in colour: red and blue exchanged show

    def __getitem__(self, i): return Pictures(self.pixels[i], self.as_float, self.order_shows)
    def __len__(self): return len(self.pixels)


def photographs(folder, n, size=64):
    "uint8 `[n,3,size,size]`: of a folder the shorter side resized to `size`, centre cropped; without one tiles of five photographs"
    rng = np.random.default_rng(0)
    if folder is None:
        from skimage import data
        from sklearn.datasets import load_sample_images
        photos = [*load_sample_images().images, data.astronaut(), data.coffee(), data.chelsea()]
        return torch.stack([_tile(photos[i % 5], rng, size) for i in range(n)])
    files = sorted(f for f in folder.rglob('*') if f.suffix.lower() in ('.jpg', '.jpeg', '.png'))
    chosen = [files[i] for i in rng.permutation(len(files))[:n]]
    tfm = T.Compose([T.Resize(size), T.CenterCrop(size), T.PILToTensor()])
    return torch.stack([tfm(Image.open(f).convert('RGB')) for f in chosen])


def _tile(image, rng, size):
    h, w = image.shape[:2]
    y, x = rng.integers(0, h-size), rng.integers(0, w-size)
    return _channels_first(image[y:y+size, x:x+size])


def tiles(image, n, size=64):
    "`n` tiles of one uint8 image `[H,W,3]`"
    rng = np.random.default_rng(0)
    return torch.stack([_tile(image, rng, size) for _ in range(n)])


def _channels_first(image): return torch.tensor(image).permute(2, 0, 1)
def _canvases(n, size, color): return np.full((n, size, size, 3), color, dtype=np.float64)
def _to_pixels(ims): return torch.tensor(ims.clip(0, 255).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()

def grey(a):
    "uint8 `[n,H,W]` in three channels"
    return torch.tensor(np.asarray(a)).to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()


# --- what is on a screen or on paper -----------------------------------------------------------------------------------

def _write_lines(im, rng, ink, top, left):
    "Draw rows of small marks, as text looks from afar"
    size = len(im)
    for y in range(top, size-3, 5):
        x = left
        while x < size-left-4 and rng.random() > .05:
            width = rng.integers(1, 4)
            im[y:y+3, x:x+width] = ink
            x += width+rng.integers(1, 3)


def screenshots(n, size=64, bar=(222, 225, 230)):
    "White windows with a title bar of the colour `bar`, dark text and a button"
    rng, ims = np.random.default_rng(1), _canvases(n, size, (255, 255, 255))
    for im in ims:
        im[:rng.integers(8, 14)] = bar
        _write_lines(im, rng, (32, 33, 36), 17, 4)
        y, x = rng.integers(size*5//8, size-8), rng.integers(4, size-24)
        im[y:y+6, x:x+18] = (60, 64, 67)
    return _to_pixels(ims)


def line_drawings(n, size=64):
    "Black lines with soft edges on white"
    from skimage.draw import line_aa
    rng, ims = np.random.default_rng(2), _canvases(n, size, 255.)
    for im in ims:
        points = rng.integers(0, size, (rng.integers(4, 12), 2))
        for (y, x), (y2, x2) in zip(points, points[1:]):
            rows, cols, share = line_aa(y, x, y2, x2)
            im[rows, cols] = np.minimum(im[rows, cols], 255*(1-share[:, None]))
    return _to_pixels(ims)


def scans(n, size=64):
    "Dark grey text on yellowish paper, with the noise of a scanner: neither black nor white"
    rng, ims = np.random.default_rng(3), _canvases(n, size, 0.)
    for im in ims:
        im[:] = np.array([236, 231, 220])-rng.uniform(0, 18)
        _write_lines(im, rng, (62, 58, 60), rng.integers(2, 8), rng.integers(3, 8))
        im += rng.normal(0, 2.5, im.shape[:2])[..., None]
    return _to_pixels(ims)


def masks(n, size=64):
    "Black and white, nothing between"
    rng, res = np.random.default_rng(4), []
    y, x = np.mgrid[:size, :size]
    for _ in range(n):
        discs = [(rng.integers(0, size, 2), rng.integers(4, size//3)) for _ in range(rng.integers(1, 4))]
        res.append(255*np.any([(y-cy)**2+(x-cx)**2 < r*r for (cy, cx), r in discs], axis=0))
    return grey(res)


# --- what cameras and instruments see ----------------------------------------------------------------------------------

def night(n, size=64):
    "Nearly black, with the noise of a sensor and a few lamps"
    rng, ims = np.random.default_rng(5), _canvases(n, size, 0.)
    y, x = np.mgrid[:size, :size]
    for im in ims:
        im += rng.exponential(rng.uniform(3, 10), im.shape[:2])[..., None]*np.array([1., .9, .8])
        for _ in range(rng.integers(1, 5)):
            (cy, cx), r = rng.integers(0, size, 2), rng.uniform(1, 4)
            im += 300*np.exp(-((y-cy)**2+(x-cx)**2)/(2*r*r))[..., None]*np.array([1., .85, .55])
    return _to_pixels(ims)


def sky(n, size=64):
    "Blue, paler towards the horizon, with clouds"
    rng, ims = np.random.default_rng(6), _canvases(n, size, 0.)
    y, x = np.mgrid[:size, :size]/size
    for im in ims:
        zenith, horizon = np.array([60, 115, 195])+rng.normal(0, 8, 3), np.array([165, 200, 235])+rng.normal(0, 6, 3)
        im[:] = zenith+(horizon-zenith)*y[..., None]
        for _ in range(rng.integers(0, 4)):
            cy, cx, w = rng.random(), rng.random(), rng.uniform(.05, .2)
            cloud = np.exp(-((y-cy)**2*4+(x-cx)**2)/w**2)[..., None]
            im += (245-im)*cloud*.9
        im += rng.normal(0, 1.5, im.shape)
    return _to_pixels(ims)


def fluorescence(n, size=64):
    "Two dyes: red and green spots, and a blue channel that is zero by design"
    rng, ims = np.random.default_rng(7), _canvases(n, size, 0.)
    y, x = np.mgrid[:size, :size]
    for im in ims:
        for channel in (0, 1):
            im[..., channel] += rng.exponential(3., (size, size))
            for _ in range(rng.integers(4, 10)):
                (cy, cx), r = rng.integers(0, size, 2), rng.uniform(2, 5)
                im[..., channel] += rng.uniform(80, 260)*np.exp(-((y-cy)**2+(x-cx)**2)/(2*r*r))
    return _to_pixels(ims)


def spectrograms(n, size=64):
    "Chirps in matplotlib's jet colours: most of it is blue"
    from matplotlib import colormaps
    rng, res = np.random.default_rng(8), []
    t, f = np.meshgrid(np.arange(size), np.arange(size))
    for _ in range(n):
        power = rng.exponential(.06, (size, size))
        for _ in range(rng.integers(1, 4)):
            start, slope = rng.uniform(0, size), rng.uniform(-.6, .6)
            power += rng.uniform(.5, 1.)*np.exp(-(f-start-slope*t)**2/6)
        res.append(colormaps['jet'](power.clip(0, 1))[..., :3]*255)
    return _to_pixels(np.array(res))


def digits(n, size=None):
    "Handwritten digits of 8 x 8 pixels, four times as large, grey in three channels"
    from sklearn.datasets import load_digits
    return grey(load_digits().images[:n].repeat(4, 1).repeat(4, 2)*15.9375)


def faces(n, size=None):
    "Grey faces of 25 x 25 pixels"
    from skimage.data import lfw_subset
    return grey((lfw_subset()*255).round()[:n])


def solar_cells(n):
    "Electroluminescence images of solar cells, 75 x 75; None without the package"
    try: from elpv_dataset.utils import load_dataset
    except ImportError: print('Without solar cells: pip install elpv-dataset', file=sys.stderr)
    else: return grey(load_dataset()[0][::6, ::4, ::4][:n])


# --- what is done to images before they are normalized -------------------------------------------------------------------

def dark(px): return (px*.3).to(torch.uint8)
def pale(px): return (px*.3+150).to(torch.uint8)
def negative(px): return 255-px

def stretched(x):
    "Each image from black to white"
    lo, hi = x.amin((-3, -2, -1), keepdim=True), x.amax((-3, -2, -1), keepdim=True)
    return (x-lo)/(hi-lo).clamp(min=1e-3)


def equalized(x):
    "Each channel of each image with a flat histogram: the share of its pixels that are not brighter"
    flat = x.flatten(-2)
    order = flat.sort(-1).values.contiguous()
    return (torch.searchsorted(order, flat.contiguous(), right=True)/flat.shape[-1]).view_as(x).to(x.dtype)


def resized(x):
    "Three quarters of the size, in floats"
    batch = x if x.ndim == 4 else x[None]
    small = nn_resize(batch, [batch.shape[-2]*3//4, batch.shape[-1]*3//4]).clamp(0, 1)
    return small if x.ndim == 4 else small[0]


def nn_resize(batch, size): return torch.nn.functional.interpolate(batch, size, mode='bilinear', antialias=True)

def padded(x, width=8): return torch.nn.functional.pad(x, [width]*4)
def reflected(x, width=8): return torch.nn.functional.pad(x, [width]*4, mode='reflect')


def picture_sets(folder=None, n=256, size=64):
    "Name -> `Pictures`: about two dozen kinds of right images"
    from skimage import data
    photos = photographs(folder, n, size)
    res = {'natural': Pictures(photos, order_shows=True)}
    if (cells := solar_cells(n)) is not None: res['industrial'] = Pictures(cells)
    made = digits, faces, screenshots, line_drawings, scans, masks, night, sky, fluorescence, spectrograms
    res |= {f.__name__.replace('_', ' '): Pictures(f(n, size)) for f in made}
    res['blue bar'] = Pictures(screenshots(n, size, (26, 115, 232)))
    res['stained tissue'] = Pictures(tiles(data.immunohistochemistry(), n, size))
    res['rocket'] = Pictures(tiles(data.rocket(), n, size))
    res |= {f.__name__: Pictures(f(photos)) for f in (dark, pale, negative)}
    floats = stretched, equalized, resized, padded, reflected
    return res | {f.__name__: Pictures(photos, as_float=f) for f in floats}
