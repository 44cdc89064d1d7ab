"""Which faults of an input pipeline `stats_match` names, which it misses, and how often it cries wolf.

    python benchmarks/fault_matrix.py [--data FOLDER] [--images 128] [--quick] [--fixes] [--json FILE]

Each fault is made in the pipelines of backbones from six families of constants, on several kinds of images (`pictures.py`),
through three loaders: fastai's, PyTorch's, and PyTorch's with augmentation that interpolates floats. Some faults are put into the
model (it normalizes by itself) or into the transforms that a loader states. The right pipelines are tried with 8 images in one
batch, 64 and 192, on two dozen kinds of images, and with what training does to a batch (half precision, mixup, padding).

named         the worst finding has the kind of the fault; where colours are all there is to see, a note has it
either        another fault is named that could have made the same values: a screenshot that was cut to [0,1] after Normalize
wrongly named the worst finding has another kind
cannot tell   the report says so, and the values do show that something is wrong
missed        the report says ok
guessed       the fault is named, and a right pipeline could have made the same values: some right pipeline gets this alarm
right fits    the report cannot tell, and rightly so: a right pipeline could have made these values
not shown     the data cannot hold this fault: grey images have no channel order
false alarm   a mismatch on a right pipeline

Whether a right pipeline could have made the values is decided here in float64, without the package: there is no lattice of 8-bit
levels, and the expected constants undone they lie in [0,1] and fill more than a sliver of it. If black or white is reached in every
channel, nothing but a right pipeline may be assumed; if neither is, the images must have black and white in every channel for the
fault to show.

--data: a folder of photographs, for example a sample of ImageNet; without it tiles of five photographs that scikit-learn and
scikit-image bring are used.
Solar cells need `pip install elpv-dataset` (licence: not for commercial use) and are left out without it.

--quick: a tenth of all cases, always the same.

--fixes: the code of every mismatch (`Finding.code`) is executed as it stands, and the question asked again.
"""
import argparse, json, platform, random, sys, warnings, zlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Callable

warnings.filterwarnings('ignore', category=FutureWarning)
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2 as T

from fastai.vision.all import (CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoaders, ImageBlock, IndexSplitter, IntToFloatTensor, Learner,
                               Normalize, TensorImage, Transform, aug_transforms)
from fastai_normx.all import expected_stats, stats_match
from fastai_normx.expected import ExpectedStatsWarning
from machine import cpu_name
from pictures import Pictures, picture_sets

families = {'ImageNet': 'resnet18', '0.5/0.5': 'tf_efficientnet_lite0', 'CLIP': 'vit_base_patch32_clip_224.openai',
            '0/1': 'fastvit_mci0.apple_mclip', 'DPN': 'dpn68', 'satellite': 'vit_large_patch16_dinov3.sat493m'}
plain = (0, 0, 0), (1, 1, 1)
imagenet = (.485, .456, .406), (.229, .224, .225)
halves = (.5, .5, .5), (.5, .5, .5)
hows = 'fastai', 'PyTorch', 'PyTorch, float augmentation'


# --- a pipeline, whatever runs it ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Pipe:
    "What happens to pixels in [0,1] on their way to the model"
    constants: tuple = ()  # `(mean, std)` of each normalization in turn
    before: Callable = None  # On pixels in [0,1], one image or a batch, before them
    after: Callable = None  # On a batch, after them
    pixels: Callable = None  # On uint8 pixels, before everything
    valid: object = None  # The `Pipe` of the validation set, if it is another
    no_lattice: bool = False  # Does `before` or `after` leave values that lie on no lattice?


def columns(c): return [torch.as_tensor(o, dtype=torch.float32).view(-1, 1, 1) for o in c]

def normalize(x, constants):
    "Normalize `x` with each of `constants` in turn"
    for mean, std in map(columns, constants): x = (x-mean)/std
    return x

def in_turn(*fs):
    "A function that applies those of `fs` that are not None"
    fs = [f for f in fs if f]
    def run(x):
        for f in fs: x = f(x)
        return x
    return run if fs else None


class Images(Dataset):
    "Images in [0,1] and a class; `run` on each of them"
    def __init__(self, x, run=None): self.x, self.run = x, run
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.run(self.x[i]) if self.run else self.x[i], i % 2


class Stated(Dataset):
    "8-bit images with a torchvision `transform`, which the loader states"
    def __init__(self, px, *tfms): self.px, self.transform = px, T.Compose([T.ToImage(), T.ToDtype(torch.float32, scale=True), *tfms])
    def __len__(self): return len(self.px)
    def __getitem__(self, i): return self.transform(self.px[i].permute(1, 2, 0).numpy()).as_subclass(Tensor), i % 2


def torch_loader(ds, bs, after=None):
    def collate(items):
        x, y = zip(*items)
        x = torch.stack(x)
        return after(x) if after else x, torch.tensor(y)
    return DataLoader(ds, bs, shuffle=True, collate_fn=collate)


augmented = {}  # pixels -> what augmentation made of them: the judge sees the same values as the judged

def augment(px):
    "`px` in [0,1], each image cropped, turned and jittered once: floats on no lattice"
    if (key := zlib.crc32(px.numpy().tobytes())) not in augmented:
        rng = torch.get_rng_state()
        torch.manual_seed(key)
        tfm = T.Compose([T.RandomResizedCrop(px.shape[-1], (.5, 1), antialias=True), T.RandomHorizontalFlip(),
                         T.RandomRotation(5, T.InterpolationMode.BILINEAR), T.ColorJitter(.2, .2)])
        augmented[key] = torch.stack([tfm(o/255) for o in px])
        torch.set_rng_state(rng)
    return augmented[key]


def step(place, f):
    "A fastai transform of batches that runs `f`"
    class Step(Transform):
        order = place
        def encodes(self, x: TensorImage): return f(x)
    return Step()


class Second(Normalize): pass  # fastai keeps one transform of each type
class Third(Second): pass

def normalizers(constants): return [cls.from_stats(*c, cuda=False) for cls, c in zip((Normalize, Second, Third), constants)]


def fastai_block(px, bs, **kw):
    "`DataLoaders` of `px`: the first half for training"
    ims = px.permute(0, 2, 3, 1).numpy()
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: ims[i], get_y=lambda i: i % 2, splitter=IndexSplitter(range(len(px)//2, len(px))), **kw)
    return block.dataloaders(list(range(len(px))), bs=min(bs, len(px)//2), num_workers=0, device='cpu')


def fastai_loader(px, pipe, as_float, bs):
    before = in_turn(as_float, pipe.before)
    batch_tfms = [*aug_transforms(), *normalizers(pipe.constants)]
    if before: batch_tfms.append(step(98, before))  # after augmentation, before `Normalize`
    if pipe.after: batch_tfms.append(step(110, pipe.after))
    dls = fastai_block(px, bs, batch_tfms=batch_tfms)
    if pipe.valid:
        fs = dls.valid.after_batch.fs
        dls.valid.after_batch.fs = fs.filter(lambda t: not isinstance(t, Normalize)) + normalizers(pipe.valid.constants)
    return dls


def load(pictures, how, pipe, bs):
    "What a user would hand to `stats_match`"
    px = pipe.pixels(pictures.pixels) if pipe.pixels else pictures.pixels
    if how == 'fastai': return fastai_loader(px, pipe, pictures.as_float, bs)
    if pipe.valid: return DataLoaders(*[load(pictures, how, p, bs) for p in (replace(pipe, valid=None), pipe.valid)])
    x = augment(px) if 'augment' in how else px/255
    return torch_loader(Images(x, in_turn(pictures.as_float, pipe.before, partial(normalize, constants=pipe.constants))), bs, pipe.after)


# --- is there anything to see? -------------------------------------------------------------------------------------------

sliver = .05, .12  # many images whose values, undone, span less are a fault; between the two nobody is wrong

def right_fits(x, expected):
    """Could a right pipeline have made the values `x`, `[N,C,...]`, if they lie on no lattice? 'yes'; 'grey': if the images have
    neither black nor white; 'perhaps': between a sliver and pale images; 'no'"""
    mean, std = (np.array(o, dtype=np.float64) for o in expected)
    x = x.double().numpy()
    if x.shape[1] != len(mean) or not np.isfinite(x).all(): return 'no'
    pixels = x.swapaxes(0, 1).reshape(len(mean), -1)*std[:, None]+mean[:, None]
    lo, hi = pixels.min(1), pixels.max(1)
    span = (hi-lo).max()
    if lo.min() < -.02 or hi.max() > 1.02 or len(x) >= 32 and span < sliver[0]: return 'no'
    if len(x) >= 32 and span < sliver[1]: return 'perhaps'
    return 'yes' if (abs(lo) < .006).all() or (abs(hi-1) < .006).all() else 'grey'


def right_levels(x, expected):
    "Could a right pipeline have made the values `x` of 8-bit images? Undone, all but zeros, which pad, are levels from 0 to 255"
    mean, std = (torch.tensor(o, dtype=torch.float64).view(-1, *[1]*(x.ndim-2)) for o in expected)
    levels = ((x.double()*std+mean)*255)[x != 0]
    return bool((levels-levels.round()).abs().max() < .02 and levels.min() > -.5 and levels.max() < 255.5)


def black_and_white(x):
    "Are both in each channel of the pixels `x` in [0,1]?"
    lo, hi = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    return bool((lo < .006).all() and (hi > .994).all())


def plainly_cut(x):
    "Do so many values lie at exactly 0 and at exactly 1 that they must have been cut, and enough between that it is no drawing?"
    black, white = (x == 0).float().mean(), (x == 1).float().mean()
    return min(black, white) > .1 and black+white < .95


def sees(data):
    "The images of each set in `data`"
    if isinstance(data, Learner): data = data.dls
    return [torch.cat([b[0].as_subclass(Tensor) for b in dl]) for dl in (data.loaders if isinstance(data, DataLoaders) else [data])]


# --- what can be wrong ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Fault:
    "A way to be wrong"
    kind: str  # As in `Finding`; empty: nothing is wrong
    name: str
    pipe: Pipe = Pipe()
    note: bool = False  # All that there is to see are colours: a note, and the outcome is ok
    always_seen: bool = False  # It shows in values that a right pipeline might have made
    cut: bool = False  # Values were cut to [0,1]: they may look like images that nobody normalized


def scale(k): return lambda x: x*k
def scaled(c, k): return tuple(tuple(v*k for v in o) for o in c)
def reverse(c): return tuple(o[::-1] for o in c)

def hole(x):
    x = x.clone()
    x[..., 0, 0] = float('nan')
    return x

def no_blue(x):
    x = x.clone()
    x[..., 2, :, :] = 0
    return x

def first_channel(x): return x[..., :1, :, :]
def four_channels(x): return torch.cat([x, x[..., :1, :, :]], -3)
def black(px): return px*0
def bgr(px): return px.flip(1)

def deep(bits, divisor):
    "Levels of so many bits, divided by `divisor`"
    extra = 2**(bits-8)
    def f(x):
        low = torch.rand(x.shape[-3:], generator=torch.Generator().manual_seed(0))*extra
        return ((x*255).round()*extra+low.floor())/divisor
    return f

def jitter(x):
    "Brightness changed after `Normalize`: what lies outside [0,1] is cut off"
    return torch.stack([T.functional.adjust_brightness(o, .8+.1*(i % 5)) for i, o in enumerate(x)])


def faults(E):
    "What can be wrong in a pipeline for the constants `E`"
    other = halves if np.allclose(E[0], imagenet[0], atol=.01) else imagenet
    right, wrong = Pipe((E,)), Pipe((other,))
    if E != plain:
        yield Fault('not_normalized', 'no Normalize')
        yield Fault('normalized_twice', 'twice', Pipe((E, E)))
        yield Fault('normalized_twice', "then with another family's constants", Pipe((E, other)))
        yield Fault('wrong_range', 'colour jitter after Normalize', replace(right, after=jitter, no_lattice=True), always_seen=True, cut=True)
        yield Fault('split_mismatch', 'validation not normalized', replace(right, valid=Pipe()))
    yield Fault('wrong_stats', "another family's constants", wrong)
    yield Fault('split_mismatch', "validation with another family's constants", replace(right, valid=wrong))
    yield Fault('wrong_range', 'pixels in 0-255', Pipe(before=scale(255)))
    yield Fault('wrong_range', 'normalized, on pixels in 0-255', replace(right, before=scale(255)))
    yield Fault('wrong_range', 'divided by 255 twice', Pipe(before=scale(1/255)))
    yield Fault('wrong_range', 'divided by 255 twice, then normalized', replace(right, before=scale(1/255)))
    yield Fault('wrong_range', '127.5 and 128 on pixels in [0,1]', Pipe((((127.5,)*3, (128.,)*3),)))
    for bits, divisor in ((12, 255), (12, 65535), (16, 255)):
        yield Fault('wrong_range', f'{bits} bits divided by {divisor}, then normalized', replace(right, before=deep(bits, divisor)))
    yield Fault('channel_order', 'images in BGR', replace(right, pixels=bgr), note=True)
    if E != reverse(E): yield Fault('channel_order', 'constants in BGR', Pipe((reverse(E),)))
    yield Fault('channel_count', 'one channel', Pipe(before=first_channel))
    yield Fault('channel_count', 'four channels', Pipe(before=four_channels))
    yield Fault('non_finite', 'a NaN', replace(right, before=hole))
    yield Fault('constant_channel', 'no blue', replace(right, before=no_blue), note=True)
    yield Fault('constant_channel', 'all black', replace(right, pixels=black), always_seen=True)


def stated_pipelines(E):
    "`(Fault, transforms after ToDtype)`: the loader states what it does, or a step that nobody can read comes between"
    times255 = T.Lambda(lambda x: x*255)
    yield Fault('', 'right: stated, in 0-255 by a Lambda'), [times255, T.Normalize(*scaled(E, 255))]
    yield Fault('', 'right: stated'), [T.Normalize(*E)]
    yield Fault('wrong_range', 'stated, in 0-255 by a Lambda'), [times255, T.Normalize(*E)]
    if E != plain: yield Fault('wrong_range', 'stated, constants for 0-255 on pixels in [0,1]'), [T.Normalize(*scaled(E, 255))]


def fastai_pipelines(E):
    "`(Fault, item_tfms, batch_tfms)` written as fastai users write them"
    other = halves if np.allclose(E[0], imagenet[0], atol=.01) else imagenet
    right = normalizers([E])
    yield Fault('', 'right: fastai, no augmentation'), [], right
    own = step(98, partial(normalize, constants=[E]))
    yield Fault('', "right: fastai, the user's own transform normalizes"), [], [*aug_transforms(), own]
    if E != plain: yield Fault('not_normalized', 'fastai, no Normalize'), [], []
    yield Fault('wrong_stats', "fastai, another family's constants"), [], normalizers([other])
    if E != plain: yield Fault('normalized_twice', 'fastai, twice'), [], normalizers([E, E])
    for divisor in (1, 255*255, 65535):
        for name, aug in (('', []), (' and augmentation', aug_transforms())):
            yield Fault('wrong_range', f'fastai, div={divisor}{name}'), [], [*aug, IntToFloatTensor(div=divisor), *right]
    yield Fault('channel_count', 'fastai, Normalize in item_tfms'), right, []


# --- models that normalize -----------------------------------------------------------------------------------------------

def body():
    layers = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    return nn.Sequential(*layers)


class OwnNormalize(nn.Module):
    "A layer of a user's own, with names of its own"
    def __init__(self, E):
        super().__init__()
        for k, v in zip(('shift', 'spread'), columns(E)): self.register_buffer(k, v)
    def forward(self, x): return (x-self.shift)/self.spread


class Buffers(nn.Module):
    "A model with the constants in buffers, as detectors have them"
    def __init__(self, E):
        super().__init__()
        for k, v in zip(('pixel_mean', 'pixel_std'), columns(E)): self.register_buffer(k, v)
        self.backbone = body()
    def forward(self, x): return self.backbone((x-self.pixel_mean)/self.pixel_std)


class Arithmetic(nn.Module):
    "A model that normalizes in the first line of `forward`"
    def __init__(self, E, divisor=1):
        super().__init__()
        self.E, self.divisor, self.backbone = columns(E), divisor, body()
    def forward(self, x): return self.backbone((x/self.divisor-self.E[0])/self.E[1])


def models(E):
    "`(name, model, Pipe that is right before it)`"
    yield 'own layer', nn.Sequential(OwnNormalize(E), body()), Pipe()
    yield 'Resize and Normalize', nn.Sequential(nn.Sequential(T.Resize(48), T.Normalize(*E)), body()), Pipe()
    yield 'buffers', Buffers(E), Pipe()
    yield 'arithmetic', Arithmetic(E), Pipe()
    yield 'arithmetic on 0-255', Arithmetic(E, 255), Pipe(before=scale(255))


# --- what training does to right batches -----------------------------------------------------------------------------------

def half(x): return x.half()

def mixup(x):
    share = torch.linspace(.1, .5, len(x), dtype=x.dtype).view(-1, 1, 1, 1)
    return x*(1-share)+x.flip(0)*share

def cutmix(x):
    x, other = x.clone(), x.flip(0)
    side = x.shape[-1]//2
    x[..., :side, :side] = other[..., :side, :side]
    return x

def zero_padding(x): return nn.functional.pad(x, [8]*4)

batches = {'half precision': half, 'mixup': mixup, 'cutmix': cutmix, 'zeros around after Normalize': zero_padding}


# --- the cases -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    fault: Fault
    family: str
    images: str
    how: str
    make: Callable  # Gives the data
    model: nn.Module = None
    before_model: tuple = None  # The constants that are right before the model; None: those of the family
    no_lattice: bool = False
    shown: bool = True
    full_range: bool = True  # Do the images have black and white in every channel?

    @property
    def seed(self): return zlib.crc32('|'.join((self.fault.kind, self.fault.name, self.family, self.images, self.how)).encode())


fault_sets = 'natural', 'industrial', 'digits', 'faces', 'screenshots', 'scans', 'night', 'pale', 'negative'
model_sets = 'natural', 'digits', 'scans'


def cases(sets, n):
    "All that is asked"
    for family, source in families.items():
        E = tuple(map(tuple, expected_stats(source)))
        for name, pictures in sets.items():
            case = partial(Case, family=family, images=name)
            if name in fault_sets: yield from fault_cases(case, E, pictures[:n])
            if name in model_sets: yield from model_cases(case, E, pictures[:n//2])
            yield from right_cases(case, E, pictures)


def fault_cases(case, E, pictures):
    full_range = black_and_white(pictures.pixels/255)
    for how in hows:
        for fault in faults(E):
            shown = pictures.order_shows or fault.name != 'images in BGR'
            no_lattice = 'augment' in how or fault.pipe.no_lattice
            make = partial(load, pictures, how, fault.pipe, 32)
            yield case(fault, how=how, make=make, no_lattice=no_lattice, shown=shown, full_range=full_range)
    for fault, tfms in stated_pipelines(E): yield case(fault, how='PyTorch', make=partial(stated_loader, pictures.pixels[:64], tfms))
    for fault, item_tfms, batch_tfms in fastai_pipelines(E):
        yield case(fault, how='fastai', make=partial(fastai_block, pictures.pixels, 32, item_tfms=item_tfms, batch_tfms=batch_tfms))
    wrong = partial(fastai_block, pictures.pixels, 32, batch_tfms=normalizers([halves if E[0] == imagenet[0] else imagenet]))
    yield case(Fault('wrong_stats', "a learner, another family's constants"), how='fastai', make=lambda: in_learner(wrong(), body()))


def stated_loader(px, tfms): return DataLoader(Stated(px, *tfms), 32, shuffle=True)
def in_learner(dls, model): return Learner(dls, model, loss_func=CrossEntropyLossFlat())


def model_cases(case, E, pictures):
    if E == plain: return
    full_range = black_and_white(pictures.pixels/255)
    for how in hows:
        no_lattice = 'augment' in how
        for name, model, right in models(E):
            twice = replace(right, before=None, constants=(E,)) if '255' not in name else replace(right, constants=(scaled(E, 255),))
            before_model = scaled(plain, 255) if '255' in name else plain
            ask_about = partial(case, how=how, model=model, before_model=before_model, no_lattice=no_lattice, full_range=full_range)
            yield ask_about(Fault('', f'right: normalized in the model, {name}'), make=partial(load, pictures, how, right, 32))
            yield ask_about(Fault('in_model', name), make=partial(load, pictures, how, twice, 32))
    for name, model, right in models(E):
        for fault, pipe in ((Fault('', f'right: learner, {name}'), right), (Fault('in_model', f'learner, {name}'), Pipe((E,)))):
            if fault.kind and '255' in name: continue
            dls = partial(load, pictures, 'fastai', pipe, 32)
            yield case(fault, how='fastai', model=model, before_model=plain, make=lambda dls=dls, model=model: in_learner(dls(), model))


def right_cases(case, E, pictures):
    right = Pipe((E,))
    for how in hows:
        for n, bs in ((8, 8), (64, 64), (192, 64)):
            if n == 192 and pictures.as_float is None and not pictures.order_shows: continue
            some = pictures[:2*n if how == 'fastai' else n]
            yield case(Fault('', f'right: {n} images'), how=how, make=partial(load, some, how, right, bs))
        for name, f in batches.items() if pictures.order_shows else ():
            yield case(Fault('', f'right: {name}'), how=how, make=partial(load, pictures[:64], how, replace(right, after=f), 32))


# --- asking ----------------------------------------------------------------------------------------------------------------

def ask(data, source, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ExpectedStatsWarning)
        return stats_match(data, source, warn=False, **kw)


hideable = 'not_normalized', 'normalized_twice', 'wrong_stats', 'wrong_range', 'channel_order', 'split_mismatch', 'in_model'

def verdict(case, data, r):
    "What the report `r` is worth"
    fault = case.fault
    if not fault.kind: return {'ok': 'right', 'cannot tell': 'cannot tell', 'mismatch': 'false alarm'}[r.outcome]
    if not case.shown: return 'wrongly named' if r.outcome == 'mismatch' else 'not shown'
    if fault.note and r.outcome == 'mismatch': return 'wrongly named'
    if fault.note: return 'named' if any(f.kind == fault.kind for f in r.findings) else 'missed'
    named = r.outcome == 'mismatch' and r.kind == fault.kind
    expected = case.before_model or tuple(expected_stats(families[case.family]))
    if r.outcome == 'mismatch' and not named:
        either = fault.cut and r.kind == 'not_normalized' and (expected == halves or not all(map(plainly_cut, sees(data))))
        either |= fault.kind == 'in_model' and r.kind == 'wrong_range' and max(case.before_model[1]) > 100  # the model takes 0-255
        return 'either' if either else 'wrongly named'
    if fault.kind in hideable and not case.no_lattice and r.outcome != 'mismatch':
        if all(right_levels(x, expected) for x in sees(data)): return 'right fits'
    if fault.kind in hideable and case.no_lattice:
        fits = {right_fits(x, expected) for x in sees(data)}
        hidden = not fits & ({'no', 'grey'} if case.full_range and not fault.cut else {'no'})
        if hidden and r.outcome == 'cannot tell': return 'right fits'
        sure_to_fit = fits == {'yes'} and fault.kind != 'split_mismatch'  # another range in the other set is evidence, too
        if sure_to_fit and named and not fault.always_seen: return 'guessed'
    return 'named' if named else 'missed' if r.outcome == 'ok' else 'cannot tell'


def star_imports():
    space = {}
    exec('from fastai.vision.all import *\nfrom fastai_normx.all import *', space)
    return space

def mend(data, r, again, space):
    "What became of a mismatch when the code of its worst finding was executed: None without code"
    code = getattr(r.findings[0], 'code', '')
    if not code: return None
    names = dict(space)
    if isinstance(data, Learner): names['learn'] = data
    elif isinstance(data, DataLoaders): names['dls'] = data
    try:
        exec(code, names)
        after = again()
    except Exception as e: return 'raised', code, f'{type(e).__name__}: {e}'
    return ('mended' if after.outcome == 'ok' else 'not mended'), code, f'{after.outcome}: {after.kind}'


def matrix(sets, n, quick=False, fixes=False):
    "Rows `(kind, name, family, images, loader, verdict, what was said)`, and rows of what became of the fixes"
    rows, mended, space = [], [], star_imports() if fixes else {}
    for case in cases(sets, n):
        if quick and case.seed % 10: continue
        for f in (torch.manual_seed, np.random.seed, random.seed): f(case.seed)
        who = case.fault.kind, case.fault.name, case.family, case.images, case.how
        try:
            data = case.make()
            again = partial(ask, data, families[case.family], **({} if case.model is None or isinstance(data, Learner) else dict(model=case.model)))
            r = again()
            row = *who, verdict(case, data, r), f'{r.outcome}: {r.kind}'
        except Exception as e: row, r = (*who, 'raised', f'{type(e).__name__}: {e}'), None
        rows.append(row)
        tell(row, row[5] in ('named', 'either', 'right', 'not shown', 'right fits') or not case.fault.kind and row[5] == 'cannot tell')
        if not fixes or r is None or r.outcome != 'mismatch': continue
        if fix := mend(data, r, again, space):
            mended.append((*who, *fix))
            tell(mended[-1], fix[0] == 'mended')
    return rows, mended


def tell(row, good): print('.' if good else f'\n{row}\n', end='', file=sys.stderr, flush=True)


# --- the tables ------------------------------------------------------------------------------------------------------------

def table(rows, by, cols):
    "Print counts of verdicts, and return them"
    res = {k: Counter(r[5] for r in rows if by(r) == k) for k in dict.fromkeys(by(r) for r in rows)}
    print('\n| ' + ' | '.join(['', *cols]) + ' |\n|---|' + '---:|'*len(cols))
    for k, c in res.items(): print(f'| {k} | ' + ' | '.join(str(c[o] or '') for o in cols) + ' |')
    return res


def tables(rows, mended):
    "Print all tables, and return what they hold"
    bad, right = [r for r in rows if r[0]], [r for r in rows if not r[0]]
    cols = 'named', 'either', 'wrongly named', 'missed', 'cannot tell', 'guessed', 'right fits', 'not shown', 'raised'
    by = dict(fault=lambda r: f'{r[0]}: {r[1]}', loader=lambda r: r[4], images=lambda r: r[3], family=lambda r: r[2])
    res = {k: table(bad, f, cols) for k, f in by.items()}
    cols = 'right', 'cannot tell', 'false alarm', 'raised'
    by_right = {'right': lambda r: r[1], 'right images': by['images'], 'right loader': by['loader']}
    res |= {k: table(right, f, cols) for k, f in by_right.items()}
    res['total'] = dict(faults=Counter(r[5] for r in bad), right=Counter(r[5] for r in right))
    if mended: res['fixes'] = table(mended, by['fault'], ('mended', 'not mended', 'raised'))
    if mended: res['total']['fixes'] = Counter(r[5] for r in mended)
    print(f'\n{json.dumps(res["total"])}')
    return res


def environment():
    return dict(cpu=cpu_name(), threads=torch.get_num_threads(), python=platform.python_version(), **{k: version(k) for k in ('fastai_normx', 'fastai', 'torch', 'timm')})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, help='folder of photographs')
    p.add_argument('--images', type=int, default=128, help='images for each fault')
    p.add_argument('--quick', action='store_true', help='a tenth of all cases')
    p.add_argument('--fixes', action='store_true', help='execute the code of every mismatch and ask again')
    p.add_argument('--json', type=Path, help='write the results to this file')
    a = p.parse_args()
    if a.data and not a.data.exists(): p.error(f'--data {str(a.data)!r} does not exist: pass a folder of photographs')
    env = environment()
    res = tables(*matrix(picture_sets(a.data), a.images, a.quick, a.fixes))
    print(json.dumps(env))
    if a.json: a.json.write_text(json.dumps(dict(environment=env, **res), indent=1)+'\n')


if __name__ == '__main__': main()
