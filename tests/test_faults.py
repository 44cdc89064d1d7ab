"""What is said of wrong and of right pipelines: tables written by hand, against pixels handled in float64 numpy; for each threshold a case
on either side; and the code that a finding gives, executed as it stands.
"""
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader as TorchLoader, TensorDataset
from torchvision.transforms import v2 as T

from fastai.vision.all import (CategoryBlock, CrossEntropyLossFlat, DataBlock, DataLoaders, ImageBlock, IndexSplitter, IntToFloatTensor,
                               Learner, Normalize, TensorImage, Transform, aug_transforms)
from fastai_normx.all import expected_stats, stats_match

# The constants of six families, as the papers and model cards state them
FAMILIES = {
    'ImageNet': ('resnet18', (.485, .456, .406), (.229, .224, .225)),
    '0.5/0.5': ('tf_efficientnet_lite0', (.5, .5, .5), (.5, .5, .5)),
    'CLIP': ('vit_base_patch32_clip_224.openai', (.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)),
    '0/1': ('fastvit_mci0.apple_mclip', (0., 0., 0.), (1., 1., 1.)),
    'DPN': ('dpn68', (124/255, 117/255, 104/255), (1/(.0167*255),)*3),
    'satellite': ('vit_large_patch16_dinov3.sat493m', (.43, .411, .296), (.213, .156, .143))}
ALL = tuple(FAMILIES)
NORMALIZED = tuple(k for k in ALL if k != '0/1')  # families for which pixels in [0,1] are wrong
REVERSIBLE = 'ImageNet', 'CLIP', 'DPN', 'satellite'  # families whose constants are others in reverse order
IMAGENET, HALVES = FAMILIES['ImageNet'][1:], FAMILIES['0.5/0.5'][1:]


def benchmark(name):
    "A module of the folder benchmarks, which is no package"
    folder = Path(__file__).resolve().parent.parent/'benchmarks'
    spec = importlib.util.spec_from_file_location(name, folder/f'{name}.py')
    mod = importlib.util.module_from_spec(spec)
    sys.modules[name] = mod  # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)  # as when a script is run: it imports its neighbours
        spec.loader.exec_module(mod)
    return mod


pics = benchmark('pictures')
SETS = pics.picture_sets(n=32, size=48)
PHOTOS = pics.photographs(None, 128, 32).numpy().astype(np.float64)  # 0 to 255, [N,3,H,W]; of these photographs red is brighter than blue


def columns(c): return [np.array(o, dtype=np.float64).reshape(-1, 1, 1) for o in c]

def norm(x, mean, std):
    "Normalize in float64"
    m, s = columns((mean, std))
    return (x-m)/s

def tensor(x): return torch.from_numpy(np.asarray(x)).float()
def loader(x, bs=32): return TorchLoader(TensorDataset(tensor(x), torch.arange(len(x)) % 2), bs)
def judge(x, expected, **kw): return stats_match(loader(x), expected, warn=False, **kw)

def no_lattice(px):
    "Pixels as they are after resizing in floats: on no 8-bit level"
    small = nn.functional.interpolate(torch.from_numpy(px), scale_factor=.73, mode='bilinear', antialias=True)
    return small.numpy()

def deep(px, bits):
    "The same scene in so many bits: 8 of them are those of `px`, the others noise"
    extra = 2**(bits-8)
    return px*extra+np.random.default_rng(0).integers(0, extra, px.shape)


def with_nan(x):
    x[0, 0, 0, 0] = np.nan
    return x


# --- a table written by hand -------------------------------------------------------------------------------------------

@dataclass
class Fault:
    name: str
    families: tuple  # What it is a fault for
    make: Callable  # Pixels 0 to 255, expected mean, expected std -> values at the model
    kind: str
    severity: str
    phrase: str  # Regular expression that the message holds


FAULTS = [
    Fault('no Normalize', NORMALIZED, lambda px, m, s: px/255, 'not_normalized', 'error', 'not normalized'),
    Fault('no Normalize, floats', REVERSIBLE,
          lambda px, m, s: no_lattice(px)/255, 'not_normalized', 'error', 'not normalized'),
    Fault('twice', NORMALIZED, lambda px, m, s: norm(norm(px/255, m, s), m, s), 'normalized_twice', 'error', 'twice'),
    Fault('twice, floats', NORMALIZED,
          lambda px, m, s: norm(norm(no_lattice(px)/255, m, s), m, s), 'normalized_twice', 'error', 'twice'),
    Fault('twice, dark', NORMALIZED,
          lambda px, m, s: norm(norm(np.floor(px*.3)/255, m, s), m, s), 'normalized_twice', 'error', 'twice'),
    Fault('twice, pale', ('ImageNet', 'CLIP', 'DPN', 'satellite'),  # under 0.5/0.5 it is also pale images without even levels
          lambda px, m, s: norm(norm(np.floor(px*.3+150)/255, m, s), m, s), 'normalized_twice', 'error', 'twice'),
    Fault("ImageNet's constants", ('0.5/0.5', 'CLIP', '0/1', 'satellite'),
          lambda px, m, s: norm(px/255, *IMAGENET), 'wrong_stats', 'error', "with ImageNet's constants"),
    Fault('0.5 and 0.5', ('ImageNet', 'CLIP', '0/1', 'DPN', 'satellite'),
          lambda px, m, s: norm(px/255, *HALVES), 'wrong_stats', 'error', r'with the constants 0\.5/0\.5'),
    Fault("ImageNet's, then the expected ones", ('0.5/0.5', 'CLIP', 'satellite'),
          lambda px, m, s: norm(norm(px/255, *IMAGENET), m, s), 'normalized_twice', 'error', 'ImageNet'),
    Fault('constants of their own', ALL,
          lambda px, m, s: norm(px/255, (.3, .31, .32), (.12, .13, .14)), 'wrong_stats', 'error', r'0\.12'),
    Fault('pixels in 0-255', ALL, lambda px, m, s: px, 'wrong_range', 'error', '0-255'),
    Fault('normalized in 0-255', NORMALIZED, lambda px, m, s: norm(px, m, s), 'wrong_range', 'error', '0-255'),
    Fault('divided by 255 twice', ALL, lambda px, m, s: px/255/255, 'wrong_range', 'error', '255 twice'),
    Fault('divided by 255 twice, normalized', NORMALIZED,
          lambda px, m, s: norm(px/255/255, m, s), 'wrong_range', 'error', '255 twice'),
    Fault('divided by 255 twice, normalized, floats', NORMALIZED,
          lambda px, m, s: norm(no_lattice(px)/255/255, m, s), 'wrong_range', 'error', ''),
    Fault('127.5 and 128 for pixels in [0,1]', ALL, lambda px, m, s: (px/255-127.5)/128, 'wrong_range', 'error', ''),
    Fault('127.5 and 128, floats', ALL, lambda px, m, s: (no_lattice(px)/255-127.5)/128, 'wrong_range', 'error', ''),
    Fault('12 bits over 255', ALL, lambda px, m, s: deep(px, 12)/255, 'wrong_range', 'error', '12 bits'),
    Fault('12 bits over 255, normalized', NORMALIZED,
          lambda px, m, s: norm(deep(px, 12)/255, m, s), 'wrong_range', 'error', '12 bits'),
    Fault('12 bits over 65535', ALL, lambda px, m, s: deep(px, 12)/65535, 'wrong_range', 'error', '12 bits'),
    Fault('12 bits over 65535, normalized', NORMALIZED,
          lambda px, m, s: norm(deep(px, 12)/65535, m, s), 'wrong_range', 'error', '12 bits'),
    Fault('16 bits over 255, normalized', ALL,
          lambda px, m, s: norm(deep(px, 16)/255, m, s), 'wrong_range', 'error', '16 bits'),
    Fault('cut to [0,1] after Normalize', REVERSIBLE,
          lambda px, m, s: norm(px/255, m, s).clip(0, 1), 'wrong_range', 'error', '(?i)clip|cut'),
    Fault('cut to [0,1] after Normalize, floats', REVERSIBLE,
          lambda px, m, s: norm(no_lattice(px)/255, m, s).clip(0, 1), 'wrong_range', 'error', '(?i)clip|cut'),
    Fault('constants in reverse order', REVERSIBLE,
          lambda px, m, s: norm(px/255, m[::-1], s[::-1]), 'channel_order', 'error', 'reverse order|BGR'),
    Fault('BGR', ALL, lambda px, m, s: norm(px[:, ::-1].copy()/255, m, s), 'channel_order', 'note', 'BGR'),
    Fault('one channel', ALL, lambda px, m, s: norm(px/255, m, s)[:, :1], 'channel_count', 'error', '1 channel'),
    Fault('four channels', ALL,
          lambda px, m, s: norm(px/255, m, s)[:, [0, 1, 2, 0]], 'channel_count', 'error', '4 channel'),
    Fault('channels last', ALL,
          lambda px, m, s: norm(px/255, m, s).transpose(0, 2, 3, 1), 'channel_count', 'error', '32 channel'),
    Fault('a NaN', ALL, lambda px, m, s: with_nan(norm(px/255, m, s)), 'non_finite', 'error', 'NaN'),
    Fault('all black', ALL, lambda px, m, s: norm(px*0, m, s), 'constant_channel', 'error', '(?i)channel'),
    Fault('no blue', ALL,
          lambda px, m, s: norm(px*np.array([1., 1, 0]).reshape(3, 1, 1)/255, m, s), 'constant_channel', 'note', 'hannel'),
    Fault('other images', ('ImageNet', '0.5/0.5', 'CLIP', 'DPN'),
          lambda px, m, s: norm(np.floor(px*.3)/255, m, s), 'domain_shift', 'note', 'differ'),
]
BY_NAME = {f.name: f for f in FAULTS}


@pytest.mark.parametrize('family,fault', [(k, f.name) for f in FAULTS for k in f.families])
def test_fault_is_named(family, fault):
    fault, (source, mean, std) = BY_NAME[fault], FAMILIES[family]
    r = judge(fault.make(PHOTOS[:64], mean, std), source)
    assert r.outcome == ('ok' if fault.severity == 'note' else 'mismatch'), str(r)
    found = r.findings[0] if fault.severity != 'note' else next((f for f in r.findings if f.kind == fault.kind), None)
    assert found, str(r)
    assert (found.kind, found.severity) == (fault.kind, fault.severity), str(r)
    assert re.search(fault.phrase, found.message), found.message


KINDS = {'not_normalized', 'normalized_twice', 'wrong_stats', 'wrong_range', 'channel_order', 'channel_count', 'non_finite',
         'constant_channel', 'split_mismatch', 'in_model', 'domain_shift'}

def test_every_kind_has_a_row():
    "Two kinds need more than pixels: they have tests of their own below"
    assert {f.kind for f in FAULTS} | {'split_mismatch', 'in_model'} == KINDS


def test_harm_is_what_was_measured():
    "Loss of top-1 of EfficientNet-Lite0 (0.5/0.5), 1,000 images of ImageNet, as a share of .888; the estimate is within a factor of two"
    E = FAMILIES['0.5/0.5']
    top1 = {'no Normalize': .821, "ImageNet's constants": .776, 'twice': .638, 'pixels in 0-255': .051,
            'divided by 255 twice, normalized': .001}
    for name, accuracy in top1.items():
        lost, harm = 1-accuracy/.888, judge(BY_NAME[name].make(PHOTOS[:64], *E[1:]), E[0]).findings[0].harm
        assert lost/2 < harm < min(1, lost*2), (name, lost, harm)


# --- sets that differ ----------------------------------------------------------------------------------------------------

def two_sets(train, valid): return DataLoaders(loader(train), loader(valid))

@pytest.mark.parametrize('family', NORMALIZED)
def test_validation_is_not_normalized(family):
    source, *E = FAMILIES[family]
    r = stats_match(two_sets(norm(PHOTOS[:64]/255, *E), PHOTOS[64:]/255), source, warn=False)
    assert (r.kind, r.findings[0].severity) == ('split_mismatch', 'error')


@pytest.mark.parametrize('family', NORMALIZED)
@pytest.mark.parametrize('off,kind', [(1.01, None), (1.03, 'split_mismatch')])
def test_sets_differ_by_per_cents(family, off, kind):
    source, mean, std = FAMILIES[family]
    r = stats_match(two_sets(norm(PHOTOS[:64]/255, mean, std), norm(PHOTOS[64:]/255, mean, np.array(std)*off)), source, warn=False)
    assert (r.kind if r.outcome == 'mismatch' else None) == kind, str(r)


@pytest.mark.parametrize('family', NORMALIZED)
@pytest.mark.parametrize('fault', ['twice', 'normalized in 0-255', 'divided by 255 twice, normalized'])
def test_the_same_fault_in_both_sets_is_one(family, fault):
    source, *E = FAMILIES[family]
    fault = BY_NAME[fault]
    r = stats_match(two_sets(fault.make(no_lattice(PHOTOS[:64]), *E), fault.make(PHOTOS[64:], *E)), source, warn=False)
    assert r.kind == fault.kind and not any(f.kind == 'split_mismatch' for f in r.findings), str(r)


# --- models that normalize -----------------------------------------------------------------------------------------------

def body(): return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


class Own(nn.Module):
    "A layer with names that say nothing"
    def __init__(self, m, s):
        super().__init__()
        self.register_buffer('a', tensor(columns((m, s))[0]))
        self.register_buffer('b', tensor(columns((m, s))[1]))
    def forward(self, x): return (x-self.a)/self.b


class InForward(nn.Module):
    "Arithmetic in the first line, on pixels that are divided by `div` there"
    def __init__(self, m, s, div=1.):
        super().__init__()
        self.c, self.div, self.backbone = [tensor(o) for o in columns((m, s))], div, body()
    def forward(self, x): return self.backbone((x/self.div-self.c[0])/self.c[1])


class Buffers(nn.Module):
    "The names that detectors use"
    def __init__(self, m, s):
        super().__init__()
        self.register_buffer('pixel_mean', tensor(columns((m, s))[0]))
        self.register_buffer('pixel_std', tensor(columns((m, s))[1]))
        self.backbone = body()
    def forward(self, x): return self.backbone((x-self.pixel_mean)/self.pixel_std)


MODELS = {
    'own layer': lambda m, s: nn.Sequential(Own(m, s), body()),
    'Resize and Normalize': lambda m, s: nn.Sequential(nn.Sequential(T.Resize(24), T.Normalize(m, s)), body()),
    'arithmetic': InForward,
    'buffers': Buffers}


@pytest.mark.parametrize('family', NORMALIZED)
@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('in_learner', [False, True])
def test_model_that_normalizes(family, name, in_learner):
    source, *E = FAMILIES[family]
    model = MODELS[name](*E)
    def ask(x):
        dl = loader(x)
        if in_learner: return stats_match(Learner(DataLoaders(dl, dl), model, loss_func=CrossEntropyLossFlat()), source, warn=False)
        return stats_match(dl, source, model=model, warn=False)
    right, twice = ask(PHOTOS[:64]/255), ask(norm(PHOTOS[:64]/255, *E))
    assert right.outcome == 'ok' and all(f.severity == 'note' for f in right.findings), str(right)
    assert (twice.outcome, twice.kind, twice.findings[0].severity) == ('mismatch', 'in_model', 'error'), str(twice)


@pytest.mark.parametrize('family', NORMALIZED)
def test_model_that_takes_pixels_in_0_255(family):
    source, *E = FAMILIES[family]
    model = InForward(*E, 255.)
    assert judge(PHOTOS[:64], source, model=model).outcome == 'ok'
    assert judge(PHOTOS[:64]/255, source, model=model).outcome == 'mismatch'


@pytest.mark.parametrize('family', ALL)
def test_model_that_does_not_normalize(family):
    source, *E = FAMILIES[family]
    assert judge(norm(PHOTOS[:64]/255, *E), source, model=body()).outcome == 'ok'
    assert judge(norm(norm(PHOTOS[:64]/255, *HALVES), *HALVES), source, model=body()).kind == 'normalized_twice'


# --- right images raise no alarm -----------------------------------------------------------------------------------------

def pixels_in_0_1(name):
    s = SETS[name]
    x = s.pixels.double()/255
    return (s.as_float(x) if s.as_float else x).numpy()

def mixed(x): return x*.7+x[::-1]*.3
def cut_and_mixed(x): return np.concatenate([x[..., :20], x[::-1][..., 20:]], -1)
def framed(x): return np.pad(x, ((0, 0), (0, 0), (8, 8), (8, 8)))
def halved(x): return torch.from_numpy(x).half().numpy()

BATCHES = {'as they are': lambda x: x, 'mixup': mixed, 'cutmix': cut_and_mixed, 'zeros around after Normalize': framed,
           'half precision': halved}


@pytest.mark.parametrize('family', ALL)
@pytest.mark.parametrize('name', SETS)
def test_right_images(family, name):
    source, *E = FAMILIES[family]
    for n in (4, 32):
        r = judge(norm(pixels_in_0_1(name)[:n], *E), source)
        assert r.outcome != 'mismatch' and all(f.severity == 'note' for f in r.findings), str(r)


@pytest.mark.parametrize('family', ALL)
@pytest.mark.parametrize('batch', BATCHES)
@pytest.mark.parametrize('name', ['natural', 'screenshots', 'scans', 'night'])
def test_right_batches(family, batch, name):
    source, *E = FAMILIES[family]
    x = torch.as_tensor(BATCHES[batch](norm(pixels_in_0_1(name), *E)).copy())
    r = stats_match(x if x.dtype == torch.half else x.float(), source, warn=False)
    assert r.outcome != 'mismatch' and all(f.severity == 'note' for f in r.findings), str(r)


@pytest.mark.parametrize('family', ALL)
@pytest.mark.parametrize('name', ['natural', 'digits', 'faces', 'screenshots', 'line drawings', 'scans', 'night', 'pale', 'dark', 'sky'])
def test_right_images_are_known_to_be_right(family, name):
    "8-bit levels show the constants, whatever the images show"
    source, *E = FAMILIES[family]
    assert judge(norm(pixels_in_0_1(name), *E), source).outcome == 'ok'


@pytest.mark.parametrize('name', ['natural', 'screenshots', 'scans', 'masks', 'night', 'blue bar', 'spectrograms', 'fluorescence',
                                  'negative', 'pale'])
def test_right_images_through_fastai(name):
    for family in ('ImageNet', '0.5/0.5'):
        source, *E = FAMILIES[family]
        dls = fastai_dls(*aug_transforms(), Normalize.from_stats(*E), px=SETS[name].pixels)
        r = dls.stats_match(source, warn=False)
        assert r.outcome == 'ok' and all(f.severity == 'note' for f in r.findings), str(r)


class OwnTransform(Transform):
    "A user's own normalization, which nobody can read"
    order = 98
    def __init__(self, m, s): self.m, self.s = [tensor(o) for o in columns((m, s))]
    def encodes(self, x: TensorImage): return (x-self.m)/self.s


@pytest.mark.parametrize('family', NORMALIZED)
@pytest.mark.parametrize('name', ['natural', 'pale', 'scans', 'night'])
def test_a_transform_of_the_users_own_normalizes(family, name):
    "The pipeline states no `Normalize`, and the values are right"
    source, *E = FAMILIES[family]
    for tfms in ([], aug_transforms()):
        r = fastai_dls(*tfms, OwnTransform(*E), px=SETS[name].pixels).stats_match(source, warn=False)
        assert r.outcome != 'mismatch', str(r)


def stated(*tfms, px=None):
    "A PyTorch loader whose dataset says what its transforms are"
    ims = PHOTOS[:64].astype(np.uint8) if px is None else px.numpy()
    class Data(torch.utils.data.Dataset):
        transform = T.Compose([T.ToImage(), T.ToDtype(torch.float32, scale=True), *tfms])
        def __len__(self): return len(ims)
        def __getitem__(self, i): return self.transform(ims[i].transpose(1, 2, 0)).as_subclass(torch.Tensor), 0
    return TorchLoader(Data(), 16)


@pytest.mark.parametrize('family', ALL)
def test_a_step_that_nobody_can_read_before_normalize(family):
    source, mean, std = FAMILIES[family]
    to_255 = T.Lambda(lambda x: x*255)
    for_255 = T.Normalize([v*255 for v in mean], [v*255 for v in std])
    assert stats_match(stated(to_255, for_255), source, warn=False).outcome == 'ok'
    assert stats_match(stated(T.Normalize(mean, std)), source, warn=False).outcome == 'ok'
    assert stats_match(stated(to_255, T.Normalize(mean, std)), source, warn=False).kind == 'wrong_range'
    if family != '0/1': assert stats_match(stated(for_255), source, warn=False).kind == 'wrong_range'


# --- where two explanations fit, it cannot be known ----------------------------------------------------------------------

@pytest.mark.parametrize('n', [8, 64])
def test_pale_or_not_normalized(n):
    "Floats in [0,1] for 0.5/0.5: right if the images are as pale as scanned paper, wrong if nobody normalized them"
    x = no_lattice(PHOTOS[:n])
    for channel in x.transpose(1, 0, 2, 3): channel[:] = (channel-channel.min())/(channel.max()-channel.min())
    assert judge(x, 'tf_efficientnet_lite0').outcome == 'cannot tell'
    assert judge(norm(x/2+.5, *HALVES), 'tf_efficientnet_lite0').outcome == 'cannot tell'
    on_levels = np.round(x*255)/255
    assert judge(on_levels, 'tf_efficientnet_lite0').kind == 'not_normalized'


# --- a case on either side of each threshold -----------------------------------------------------------------------------

@pytest.mark.parametrize('family', ALL)
@pytest.mark.parametrize('what', ['mean', 'std', 'std, down', 'one mean', 'one std'])
@pytest.mark.parametrize('off,outcome', [(.019, 'ok'), (.03, 'mismatch')])
def test_constants_off_by_per_cents(family, what, off, outcome):
    source, mean, std = FAMILIES[family]
    m, s = np.array(mean), np.array(std)
    if what == 'mean': m = m+off*s
    if what == 'std': s = s*(1+off)
    if what == 'std, down': s = s*(1-off)
    if what == 'one mean': m = m+off*s*np.array([0, 1, 0])
    if what == 'one std': s = s*(1+off*np.array([0, 0, 1]))
    r = judge(norm(PHOTOS[:64]/255, m, s), source)
    assert r.outcome == outcome and (outcome == 'ok' or r.kind == 'wrong_stats'), str(r)


def spanning(x, low, span):
    "`x` so that each channel goes from `low` to `low+span`"
    lo, hi = x.min((0, 2, 3), keepdims=True), x.max((0, 2, 3), keepdims=True)
    return low+span*(x-lo)/(hi-lo)


@pytest.mark.parametrize('family', ALL)
@pytest.mark.parametrize('low', [0., .4, None])
@pytest.mark.parametrize('n,span,fault', [(32, .05, True), (32, .12, False), (31, .05, False), (8, .05, False)])
def test_values_in_a_sliver(family, low, n, span, fault):
    "Where the sliver lies, at black, between or at white, makes no difference"
    source, *E = FAMILIES[family]
    r = judge(norm(spanning(no_lattice(PHOTOS[:n]), 1-span if low is None else low, span), *E), source)
    assert (r.outcome == 'mismatch') == fault and (not fault or r.kind == 'wrong_range'), str(r)


def images_with(mean, std, n=64):
    "8-bit images, each of which has exactly these means and stds of [0,1]"
    from scipy.stats import beta
    rng, res = np.random.default_rng(0), []
    for m, s in zip(mean, std):
        k = m*(1-m)/s**2-1
        levels = beta.ppf((np.arange(4096)+.5)/4096, m*k, (1-m)*k)
        res.append(np.stack([rng.permutation(levels) for _ in range(n)]))
    return np.round(np.stack(res, 1).reshape(n, len(mean), 64, 64)*255)


REF_MEAN, REF_STD = np.array((.485, .456, .406)), np.array((.272, .264, .276))  # of ImageNet's pixels

@pytest.mark.parametrize('family', ['ImageNet', '0.5/0.5', 'DPN'])
@pytest.mark.parametrize('shift,noted', [(.08, False), (-.08, False), (.15, True), (-.15, True)])
def test_images_differ_from_those_of_pretraining(family, shift, noted):
    source, *E = FAMILIES[family]
    r = judge(norm(images_with(REF_MEAN+shift, REF_STD)/255, *E), source)
    assert r.outcome == 'ok' and any(f.kind == 'domain_shift' for f in r.findings) == noted, str(r)


@pytest.mark.parametrize('n,outcome,kind', [(31, 'cannot tell', None), (32, 'mismatch', 'constant_channel')])
@pytest.mark.parametrize('level', [0., 128., 255.])
def test_images_that_show_nothing(n, outcome, kind, level):
    r = judge(norm(np.full((n, 3, 32, 32), level)/255, *IMAGENET), 'resnet18')
    assert r.outcome == outcome and (r.kind == kind or kind is None), str(r)


@pytest.mark.parametrize('n', [2, 8, 31, 32, 64])
def test_one_channel_that_shows_nothing(n):
    r = judge(norm(PHOTOS[:n]*np.array([1., 1, 0]).reshape(3, 1, 1)/255, *IMAGENET), 'resnet18')
    assert r.outcome == 'ok' and ('constant_channel', 'note') in [(f.kind, f.severity) for f in r.findings], str(r)


def in_colour(z, mean=-.05, n=64):
    "8-bit images whose red minus blue is `mean` on average, with the z-score `z` over images"
    from scipy.stats import norm as gauss
    rng = np.random.default_rng(0)
    q = gauss.ppf((np.arange(n)+.5)/n)
    d = mean+q/q.std(ddof=1)*(mean/z*n**.5)
    base = rng.integers(110, 145, (n, 1, 32, 32))/255
    return np.round(np.concatenate([base+d.reshape(-1, 1, 1, 1)/2, base, base-d.reshape(-1, 1, 1, 1)/2], 1)*255)


@pytest.mark.parametrize('z,noted', [(-2.5, False), (-5., True), (5., False)])
def test_blue_images_get_a_note(z, noted):
    r = judge(norm(in_colour(z, -.05 if z < 0 else .05)/255, *IMAGENET), 'resnet18')
    assert r.outcome == 'ok' and any(f.kind == 'channel_order' for f in r.findings) == noted, str(r)


def test_the_same_images_again_are_no_evidence():
    x = in_colour(-2.5, n=8)
    x = np.concatenate([x]*16)
    assert not any(f.kind == 'channel_order' for f in judge(norm(x/255, *IMAGENET), 'resnet18').findings)


def saturated(n=64, share=0.):
    "Photographs in [0,1], a `share` of whose values is exactly 0 or 1"
    x = spanning(no_lattice(PHOTOS[:n]), 0., 1.)
    where = np.random.default_rng(0).random(x.shape)
    return np.where(where < share/2, 0., np.where(where > 1-share/2, 1., x))


@pytest.mark.parametrize('share,clipped', [(0., False), (.5, True)])
def test_many_values_at_exactly_0_and_1(share, clipped):
    r = judge(saturated(share=share), 'resnet18')
    assert r.outcome == 'mismatch' and r.kind == ('wrong_range' if clipped else 'not_normalized'), str(r)


def test_cut_after_half_and_half():
    "`((x-.5)/.5).clip(0, 1)` looks like dark pictures that nobody normalized, or like pale ones that somebody did: never a plain ok"
    cut = BY_NAME['cut to [0,1] after Normalize'].make
    for px in (PHOTOS[:64], no_lattice(PHOTOS[:64])):
        r = judge(cut(px, *HALVES), 'tf_efficientnet_lite0')
        assert r.outcome == 'cannot tell' or r.kind in ('wrong_range', 'not_normalized'), str(r)


def test_black_ink_on_white_paper_is_not_clipped():
    "Exactly 0 and 1, as drawings have them by themselves"
    r = judge(pixels_in_0_1('line drawings'), 'resnet18')
    assert r.kind == 'not_normalized', str(r)


# --- the code of a finding -----------------------------------------------------------------------------------------------

def fastai_dls(*batch_tfms, item_tfms=None, px=None, bs=16):
    "`DataLoaders` made as fastai's users make them"
    ims = (torch.from_numpy(PHOTOS[:96]).to(torch.uint8) if px is None else px).permute(0, 2, 3, 1).numpy()
    n = len(ims)
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: ims[i], get_y=lambda i: i % 2, splitter=IndexSplitter(range(n//2, n)),
                      item_tfms=item_tfms, batch_tfms=list(batch_tfms))
    return block.dataloaders(list(range(n)), bs=bs, num_workers=0)


def execute(code, **names):
    "As a user does who copies it into a notebook"
    space = {}
    exec('from fastai.vision.all import *\nfrom fastai_normx.all import *', space)
    exec(code, space | names)


def without_normalize(dls):
    fs = dls.valid.after_batch.fs
    dls.valid.after_batch.fs = fs.filter(lambda t: not isinstance(t, Normalize))
    return dls


class Again(Normalize): "fastai keeps one transform of each type"
def right(): return Normalize.from_stats(*IMAGENET)
def wrong(): return Normalize.from_stats(*HALVES)

PIPELINES = {
    'wrong Normalize': (lambda: fastai_dls(wrong()), 'wrong_stats'),
    'wrong Normalize and augmentation': (lambda: fastai_dls(*aug_transforms(), wrong()), 'wrong_stats'),
    'no Normalize': (lambda: fastai_dls(), 'not_normalized'),
    'no Normalize and augmentation': (lambda: fastai_dls(*aug_transforms()), 'not_normalized'),
    'div=1': (lambda: fastai_dls(IntToFloatTensor(div=1), right()), 'wrong_range'),
    'div=1 and augmentation': (lambda: fastai_dls(IntToFloatTensor(div=1), *aug_transforms(), right()), 'wrong_range'),
    'div=1, no Normalize': (lambda: fastai_dls(IntToFloatTensor(div=1)), 'wrong_range'),
    'div=1, no Normalize and augmentation': (lambda: fastai_dls(IntToFloatTensor(div=1), *aug_transforms()), 'wrong_range'),
    'div=255*255': (lambda: fastai_dls(IntToFloatTensor(div=255*255), right()), 'wrong_range'),
    'div=255*255 and augmentation': (lambda: fastai_dls(IntToFloatTensor(div=255*255), *aug_transforms(), right()), 'wrong_range'),
    'div=65535': (lambda: fastai_dls(IntToFloatTensor(div=65535), right()), 'wrong_range'),
    'div=1 and wrong Normalize': (lambda: fastai_dls(IntToFloatTensor(div=1), wrong()), 'wrong_range'),
    'twice': (lambda: fastai_dls(right(), Again.from_stats(*IMAGENET)), 'normalized_twice'),
    'validation not normalized': (lambda: without_normalize(fastai_dls(right())), 'split_mismatch'),
    'validation not normalized and augmentation': (lambda: without_normalize(fastai_dls(*aug_transforms(), right())), 'split_mismatch'),
    'Normalize in item_tfms': (lambda: fastai_dls(item_tfms=[right()]), 'channel_count')}


@pytest.mark.parametrize('name', PIPELINES)
def test_the_code_mends_the_loaders(name):
    make, kind = PIPELINES[name]
    dls = make()
    r = stats_match(dls, 'resnet18', warn=False)
    assert (r.outcome, r.kind) == ('mismatch', kind), str(r)
    assert r.findings[0].code, str(r)
    execute(r.findings[0].code, dls=dls)
    after = stats_match(dls, 'resnet18', warn=False)
    assert after.outcome == 'ok', f'{r.findings[0].code}\n{after}'


@pytest.mark.parametrize('name', ['wrong Normalize', 'no Normalize', 'div=1', 'div=1 and augmentation', 'twice'])
def test_the_code_mends_the_loaders_of_a_learner(name):
    make, kind = PIPELINES[name]
    learn = Learner(make(), body(), loss_func=CrossEntropyLossFlat())
    r = stats_match(learn, 'resnet18', warn=False)
    assert r.kind == kind, str(r)
    execute(r.findings[0].code, learn=learn)
    after = stats_match(learn, 'resnet18', warn=False)
    assert after.outcome == 'ok', f'{r.findings[0].code}\n{after}'


@pytest.mark.parametrize('expected', ['resnet18', IMAGENET, expected_stats('resnet18')], ids=['name', 'pair', 'NormStats'])
def test_the_code_names_the_backbone_as_the_caller_did(expected):
    dls = fastai_dls(wrong())
    r = stats_match(dls, expected, warn=False)
    execute(r.findings[0].code, dls=dls)
    assert stats_match(dls, expected, warn=False).outcome == 'ok'


@pytest.mark.parametrize('family', ALL)
@pytest.mark.parametrize('fault', [(), HALVES], ids=['no Normalize', 'wrong Normalize'])
def test_the_code_for_each_family(family, fault):
    source, *E = FAMILIES[family]
    if tuple(E) == fault or family == '0/1' and not fault: pytest.skip('this is right')
    dls = fastai_dls(*aug_transforms(), *([Normalize.from_stats(*fault)] if fault else []))
    r = stats_match(dls, source, warn=False)
    assert r.outcome == 'mismatch'
    execute(r.findings[0].code, dls=dls)
    assert stats_match(dls, source, warn=False).outcome == 'ok', r.findings[0].code


def test_nothing_to_execute_where_code_could_not_mend_it():
    "The dataset of a PyTorch loader is in nobody's hands but the user's"
    for data in (PHOTOS[:64]/255, norm(norm(PHOTOS[:64]/255, *IMAGENET), *IMAGENET)):
        finding = judge(data, 'resnet18').findings[0]
        assert finding.fix and not finding.code


# --- the benchmark that counts all this ------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def matrix(): return benchmark('fault_matrix')


@pytest.mark.parametrize('low,high,n,fits', [
    (0., 1., 8, 'yes'), (0., .5, 8, 'yes'), (.5, 1., 8, 'yes'), (.2, .8, 8, 'grey'), (-.05, 1., 8, 'no'), (0., 1.05, 8, 'no'),
    (-.01, 1.01, 8, 'grey'), (-.005, 1.03, 8, 'no'), (0., .04, 8, 'yes'), (0., .04, 32, 'no'), (0., .1, 32, 'perhaps'), (0., .2, 32, 'yes')])
def test_what_a_right_pipeline_could_have_made(matrix, low, high, n, fits):
    x = norm(spanning(no_lattice(PHOTOS[:n]), low, high-low), *IMAGENET)
    assert matrix.right_fits(torch.from_numpy(x), IMAGENET) == fits


def test_the_benchmark_asks_about_enough(matrix):
    every = list(matrix.cases(SETS, 32))
    assert len({c.seed for c in every}) == len(every), 'each case has a seed of its own'
    assert {c.fault.kind for c in every} == KINDS-{'domain_shift'} | {''}
    assert sum(not c.fault.kind for c in every) >= 1000
    assert {c.family for c in every} == set(FAMILIES) and {c.how for c in every} == set(matrix.hows)


def test_the_benchmark_runs(matrix, monkeypatch, capsys):
    few = [c for c in matrix.cases(SETS, 32) if c.seed % 150 == 0]
    monkeypatch.setattr(matrix, 'cases', lambda sets, n: few)
    rows, mended = matrix.matrix(SETS, 32, fixes=True)
    assert len(rows) == len(few) > 20 and not [r for r in rows if r[5] == 'raised']
    res = matrix.tables(rows, mended)
    assert sum(sum(c.values()) for c in res['total'].values()) == len(rows)+len(mended)
